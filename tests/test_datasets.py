"""common/datasets.py: D4RL's rule on hand-made episodes, reward rules, damaged files, downloads, memory."""

import hashlib
import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from common import UserError, datasets
from common.datasets import Dataset, check_sizes, load, read_hdf5, transitions

ROOT = Path(__file__).parents[1]
ROLLED = ROOT.parent / "shared" / "data"
CHEETAH = "halfcheetah-medium-expert-v2"


def raw(terminals, timeouts=None, rewards=None, seed=0, obs_dim=3, action_dim=2):
    """Arrays as read_hdf5 returns them; observation i is (i, ..., i) plus noise, so that neighbours differ."""
    rng = np.random.default_rng(seed)
    n = len(terminals)
    arrays = {
        "observations": (np.arange(n)[:, None] + rng.uniform(0, 0.5, (n, obs_dim))).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, (n, action_dim)).astype(np.float32),
        "rewards": np.asarray(rng.normal(size=n) if rewards is None else rewards, np.float32),
        "terminals": np.asarray(terminals, bool),
    }
    return arrays if timeouts is None else arrays | {"timeouts": np.asarray(timeouts, bool)}


def write(path, arrays, **changes):
    """An HDF5 file of `arrays`; a change of None leaves the key out."""
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changes).items():
            if array is not None:
                file[key] = array
    return str(path)


def flags(n, *rows):
    return [i in rows for i in range(n)]


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "terminal_rows, timeout_rows, kept, done",
    [
        ([], [], [0, 1, 2, 3, 4], []),  # the last row is dropped
        ([2], [], [0, 1, 2, 3, 4], [2]),  # a terminal row stays
        ([], [2], [0, 1, 3, 4], []),  # a timeout row goes
        ([2], [2], [0, 1, 3, 4], []),  # both: goes
        ([5], [], [0, 1, 2, 3, 4], []),  # the last row goes, terminal or not
        ([], [5], [0, 1, 2, 3, 4], []),
        ([0, 4], [1, 2], [0, 3, 4], [0, 4]),
    ],
)
def test_rule_on_six_rows(terminal_rows, timeout_rows, kept, done):
    source = raw(flags(6, *terminal_rows), flags(6, *timeout_rows))
    data = transitions(source, "kitchen")
    assert np.array_equal(data.obs, source["observations"][kept])
    assert np.array_equal(data.next_obs, source["observations"][np.array(kept) + 1])
    assert np.array_equal(data.action, source["actions"][kept])
    assert np.array_equal(data.reward, source["rewards"][kept])
    assert [row for row, d in zip(kept, data.done.tolist()) if d] == done


def slow_rule(source, limit):
    """The rule as a loop over rows, and the returns of the episodes it leaves."""
    rows, returns, total, steps = [], [], None, 0
    for i in range(len(source["rewards"]) - 1):
        steps += 1
        timeout = source["timeouts"][i] if "timeouts" in source else steps == limit
        if not timeout:
            rows.append(i)
            total = (total or 0.0) + float(source["rewards"][i])
        if timeout or source["terminals"][i]:
            steps = 0
            if total is not None:
                returns.append(total)
            total = None
    return rows, returns if total is None else [*returns, total]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_timeouts", [True, False])
def test_rule_against_slow_loop(seed, with_timeouts, monkeypatch):
    monkeypatch.setattr(datasets, "STEP_LIMITS", {"hopper": 7})
    monkeypatch.setattr(datasets, "CHUNK", 13)
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    rate = rng.choice([0.0, 0.05, 0.4])
    source = raw(rng.random(n) < rate, np.append(False, rng.random(n - 1) < 0.2) if with_timeouts else None, seed=seed)
    rows, returns = slow_rule(source, 7)
    data = transitions(source, "hopper-medium-v2")
    scale = 1000 / (max(returns) - min(returns)) if len(returns) > 1 else 1
    assert np.array_equal(data.obs, source["observations"][rows])
    assert np.array_equal(data.next_obs, source["observations"][np.array(rows) + 1])
    assert np.array_equal(data.done, source["terminals"][rows])
    np.testing.assert_allclose(data.reward, source["rewards"][rows] * scale, rtol=1e-5)


@pytest.mark.parametrize(
    "name, limit",
    [
        ("maze2d-umaze-v1", 300),
        ("maze2d-medium-dense-v1", 600),
        ("maze2d-large-v1", 800),
        ("antmaze-umaze-diverse-v2", 700),
        ("antmaze-large-play-v2", 1000),
        ("pen", 100),
        ("pendulum", 1000),
        ("", 1000),
    ],
)
def test_step_limit_without_timeouts(name, limit, capsys):
    source = raw(flags(2500, 50))
    dropped = sorted(set(range(2500)) - set(transitions(source, name).obs[:, 0].long().tolist()))
    assert dropped == [*range(50 + limit, 2499, limit), 2499]  # the terminal in row 50 starts the count anew
    assert f"after {limit} steps" in capsys.readouterr().out


# ---------------------------------------------------------------- rewards, actions


def test_reward_scale_counts_the_rows_left_after_the_cut():
    # episodes {0, 1, 2 terminal}, {3, 4, (5 timeout)}, {(6 timeout)}, {7, (8 last)}: returns 6, 20, none and 2
    rewards = [1, 2, 3, 10, 10, 1000, -500, 2, 1000]
    data = transitions(raw(flags(9, 2), flags(9, 5, 6), rewards), "hopper")
    assert data.reward.tolist() == pytest.approx([r * 1000 / (20 - 2) for r in (1, 2, 3, 10, 10, 2)])


def test_reward_scale_of_equal_returns_is_one():
    data = transitions(raw(flags(5, 1), flags(5), [0.1, 0.2, 0.2, 0.1, 9]), "hopper")
    assert data.reward.tolist() == pytest.approx([0.1, 0.2, 0.2, 0.1])
    assert transitions(raw(flags(3), flags(3), [0, 0, 0])).reward.tolist() == [0, 0]


@pytest.mark.parametrize(
    "eval_env, expected",
    [
        ("antmaze-umaze-v2", [0.0, 2.0]),
        ("antmaze", [0.0, 2.0]),
        *[(name, [1.0, 3.0]) for name in ("pen-human-v1", "door", "kitchen", "maze2d-large-v1")],
        *[(name, [500.0, 1500.0]) for name in ("hopper", "ant", "Hopper-v5", "my_module:My-v0", None)],
    ],
)
def test_reward_rule_of_an_own_file(eval_env, expected, tmp_path):
    path = write(tmp_path / "own.hdf5", raw([True, False, False], flags(3), [1, 3, 7]))
    assert load(path, eval_env=eval_env).reward.tolist() == pytest.approx(expected)


def test_actions_are_clipped_and_far_ones_refused(tmp_path):
    source = raw(flags(3), flags(3)) | {"actions": np.array([[1, -1], [1.009, 0.5], [0, 0]])}
    limit = np.float32(1 - 1e-5)
    expected = np.array([[limit, -limit], [limit, 0.5]], np.float32)
    assert np.array_equal(load(write(tmp_path / "own.hdf5", source)).action, expected)
    with pytest.raises(UserError, match=r"own.hdf5: actions reach 2; rescale"):
        load(write(tmp_path / "own.hdf5", source, actions=np.array([[0, 0], [0, -2], [0, 0]])))


# ---------------------------------------------------------------- the tensor


def test_batch_device_and_views():
    source = raw(flags(50, 9), flags(50, 19))
    data = transitions(source, "pen")
    index = torch.tensor([3, 0, 3, 47])
    batch = data[index]
    for got, whole in zip(batch, (data.obs, data.action, data.reward, data.next_obs, data.done)):
        assert got.dtype == torch.float32 and torch.equal(got, whole[index])
    assert [tuple(x.shape) for x in batch] == [(4, 3), (4, 2), (4,), (4, 3), (4,)]
    assert (len(data), data.obs_dim, data.action_dim, data.rows.shape) == (48, 3, 2, (48, 10))
    data.rows.zero_()
    assert not data.obs.any() and not data.done.any()
    assert transitions(source, "pen", device="meta").obs.device.type == "meta"


def test_sample_follows_torchs_own_seed():
    data = transitions(raw(flags(50), flags(50)), "pen")
    torch.manual_seed(0)
    rows = torch.randint(49, (1000,))
    torch.manual_seed(0)
    for got, expected in zip(data.sample(1000), data[rows]):
        assert torch.equal(got, expected)
    assert rows.unique().numel() == 49


def test_facts_and_description(tmp_path):
    path = write(tmp_path / "own.hdf5", raw(flags(9, 2), flags(9, 5, 6), [1, 2, 3, 10, 10, 1000, -500, 2, 1000]))
    data, content = load(path, eval_env="hopper"), Path(path).read_bytes()
    assert data.facts.pop("reward_rule") == "times 1000 / 18, the returns' spread (locomotion's rule)"
    file = {"source": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert data.facts == file | {"episodes": 3, "returns": [2, pytest.approx(28 / 3), 20]}
    assert load(path, eval_env="pen").facts["reward_rule"] == "as they are (pen's rule)"
    assert load(path, eval_env="antmaze").facts["reward_rule"] == "minus 1 (antmaze's rule)"
    text = "\n".join(load(path, eval_env="pen").describe())
    for part in (path, "6 transitions in 3 episodes", "of 3 numbers, actions of 2", "2 to 20, mean 9.3333", "as they"):
        assert part in text
    facts = load("bandit").facts
    assert (facts["sha256"], facts["episodes"], facts["returns"][0], facts["returns"][2]) == (None, 20_000, 0, 1)


@pytest.mark.parametrize("eval_env", ["hopper", "antmaze", "pen"])
def test_reward_scale_takes_the_place_of_the_rule(eval_env, tmp_path):
    path = write(tmp_path / "own.hdf5", raw([True, False, False], flags(3), [1, 3, 7]))
    assert load(path, eval_env=eval_env, reward_scale=1).reward.tolist() == [1, 3]
    data = load(path, eval_env=eval_env, reward_scale=0.5)
    assert data.reward.tolist() == [0.5, 1.5] and data.facts["reward_rule"] == "times 0.5 (--reward-scale)"


def test_dataset_of_tensors_and_float64():
    x = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    data = Dataset(x, x + 1, x[:, 0], x + 2, torch.tensor([0, 1, 0]))
    assert torch.equal(data.action, (x + 1).float()) and data.done.tolist() == [0, 1, 0]


# ---------------------------------------------------------------- HDF5 files


def test_dtypes_and_columns_do_not_matter(tmp_path):
    source = raw(flags(9, 3), flags(9, 6))
    plain = load(write(tmp_path / "plain.hdf5", source))
    odd = {key: source[key].astype(np.float64) for key in source}
    odd |= {key: odd[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    odd |= {"next_observations": np.full((9, 3), np.nan), "infos/qpos": np.zeros((4, 2)), "metadata/algorithm": "SAC"}
    assert torch.equal(load(write(tmp_path / "odd.hdf5", odd)).rows, plain.rows)
    whole = load(write(tmp_path / "whole.hdf5", source, rewards=np.arange(9), terminals=np.uint8(source["terminals"])))
    assert whole.done.sum() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": None, "terminals": None}, "lacks rewards, terminals; a file needs observations"),
        ({"rewards": None, "rewards/group": np.zeros(9)}, "lacks rewards"),
        ({"actions": np.zeros(9)}, r"actions has shape \(9,\); it must be \(N, size\)"),
        ({"actions": np.zeros((9, 0))}, r"actions has shape \(9, 0\)"),
        ({"observations": np.zeros((9, 3, 1))}, r"observations has shape \(9, 3, 1\)"),
        ({"rewards": np.zeros((9, 2))}, r"rewards has shape \(9, 2\); it must be \(N,\)"),
        ({"rewards": 1.0}, r"rewards has shape \(\)"),
        ({"terminals": np.array([b"no"] * 9)}, r"terminals holds .*; it must hold numbers"),
        ({"rewards": np.zeros(8)}, r"differ in their number of rows \(observations 9, actions 9, rewards 8"),
        ({"observations": np.array([[0.0]] * 4 + [[np.nan]] * 5)}, "observations is NaN or infinite, first in row 4"),
        ({"rewards": np.array([0.0] * 8 + [np.inf])}, "rewards is NaN or infinite, first in row 8"),
        ({"actions": np.array([[0.0, 1e300]] * 9)}, "actions is NaN or infinite, first in row 0"),  # in float32
        ({"terminals": np.array([np.nan] * 9)}, "terminals is NaN"),
        ({"timeouts": np.ones(9, bool)}, "every row is a timeout"),
    ],
)
def test_unusable_data(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "bad.hdf5", raw(flags(9), flags(9)), **changes))
    assert str(tmp_path / "bad.hdf5") in str(caught.value)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows(n, tmp_path):
    with pytest.raises(UserError, match=f"has {n} rows; a transition needs at least 2"):
        load(write(tmp_path / "few.hdf5", raw(flags(n), flags(n))))


def test_damaged_files(tmp_path):
    path = Path(write(tmp_path / "whole.hdf5", raw(flags(900), flags(900))))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"<html>Not found</html>", content[:-100], content[: len(content) // 2], content[:600]]
    for _ in range(200):  # random bytes in the header: whatever h5py raises, the user gets one sentence, or the data
        noisy = bytearray(content)
        noisy[rng.integers(8, 4000)] = rng.integers(256)
        damaged.append(bytes(noisy))
    for k, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            load(str(path))
            assert k >= 5
        except UserError as error:
            assert "whole.hdf5" in str(error)
    with pytest.raises(UserError, match="damaged, cut short or not HDF5"):
        load(str(tmp_path))


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="did you mean halfcheetah-medium-expert-v2"):
        load("halfcheeta-medium-expert-v2")
    with pytest.raises(UserError, match="neither a D4RL task nor an HDF5 file; D4RL's names look like"):
        load("zzz")
    with pytest.raises(UserError, match="none.hdf5 does not exist"):
        load(str(tmp_path / "none.hdf5"))


def test_check_sizes():
    data = transitions(raw(flags(5), flags(5), obs_dim=3, action_dim=1), "pen")
    check_sizes(data, gymnasium.make("Pendulum-v1"))
    check_sizes(data, gymnasium.make_vec("Pendulum-v1", num_envs=2))
    with pytest.raises(
        UserError, match=r"observations have size 3, but those of MountainCarContinuous-v0 are .*\(2,\)"
    ):
        check_sizes(data, gymnasium.make("MountainCarContinuous-v0"))
    with pytest.raises(UserError, match=r"actions have size 1, but those of the environment are Discrete"):
        env = gymnasium.Env()
        env.observation_space, env.action_space = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Discrete(6)
        check_sizes(data, env)


@pytest.mark.parametrize("name, sizes", [("halfcheetah", (17, 6)), ("hopper", (11, 3))])
def test_rolled_files(name, sizes):
    path = ROLLED / f"{name}-medium-expert-rolled.hdf5"
    if not path.exists():
        pytest.skip("the rolled data sets are not part of the repository")
    data, source = load(str(path), eval_env=name), read_hdf5(path)
    rows, returns = slow_rule(source, 1000)
    assert (data.obs_dim, data.action_dim, len(data)) == (*sizes, len(rows))
    scale = 1000 / (max(returns) - min(returns))
    np.testing.assert_allclose(data.reward, source["rewards"][rows] * scale, rtol=1e-5)


# ---------------------------------------------------------------- D4RL's folder and downloads


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    (tmp_path / "d4rl").mkdir()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "d4rl"


@pytest.fixture
def server(tmp_path):
    """http://127.0.0.1:port serving /whole.hdf5 and /cut.hdf5, the same broken off half-way; all else is a 404."""
    content = Path(write(tmp_path / "served.hdf5", raw(flags(400, 100), flags(400, 200)))).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path in ("/whole.hdf5", "/cut.hdf5")
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(content if self.path == "/whole.hdf5" else content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        httpd.url, httpd.sha256 = f"http://127.0.0.1:{httpd.server_port}", hashlib.sha256(content).hexdigest()
        yield httpd
        httpd.shutdown()


def set_task(monkeypatch, url, sha256):
    monkeypatch.setattr(datasets, "_tasks", lambda: {CHEETAH: datasets.Task(url, "474567252", sha256)})


def test_task_table():
    tasks = datasets._tasks()
    assert len(tasks) == 115 and sum(bool(task.sha256) for task in tasks.values()) == 38
    assert all(len(task.sha256) == 64 and int(task.bytes) > 1e6 for task in tasks.values() if task.sha256)
    assert len({task.url.rsplit("/", 1)[1] for task in tasks.values()}) == 115  # so that one folder holds them all
    assert tasks[CHEETAH].url.endswith("/halfcheetah_medium_expert-v2.hdf5") and tasks[CHEETAH].bytes == "474567252"


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", "/somewhere")
    assert datasets.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert datasets.cache_folder() == Path.home() / ".d4rl" / "datasets"


def test_file_in_place_with_another_checksum(folder, capsys):
    path = folder / "halfcheetah_medium_expert-v2.hdf5"
    write(path, raw(flags(30), flags(30, 9, 19)))
    content = path.read_bytes()
    with pytest.raises(UserError) as caught:
        load(CHEETAH)
    for part in (str(path), hashlib.sha256(content).hexdigest(), "015db75dae5bbe8e", "--allow-unverified"):
        assert part in str(caught.value)
    assert path.read_bytes() == content  # the user's file is left alone
    assert len(load(CHEETAH, allow_unverified=True)) == 27
    assert capsys.readouterr().out.count("\n") == 1


def test_actions_of_a_task_are_only_clipped(folder):
    write(folder / "halfcheetah_medium_expert-v2.hdf5", raw(flags(3), flags(3)), actions=np.full((3, 2), 5.0))
    assert load(CHEETAH, allow_unverified=True).action.max() < 1


def test_no_network(folder, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(CHEETAH)
    assert time.monotonic() - start < 5
    task = datasets._tasks()[CHEETAH]
    for part in (task.url, "474.6 MB", task.sha256, str(folder / "halfcheetah_medium_expert-v2.hdf5"), "by hand"):
        assert part in str(caught.value)
    assert not list(folder.iterdir()) and "\n" not in str(caught.value)


@pytest.mark.parametrize("known", [True, False])
def test_download(known, folder, server, monkeypatch, capsys):
    set_task(monkeypatch, f"{server.url}/whole.hdf5", server.sha256 if known else "")
    assert len(load(CHEETAH)) == 398
    assert [path.name for path in folder.iterdir()] == ["whole.hdf5"]
    assert ("no checksum is known" in capsys.readouterr().out) == (not known)
    server.shutdown()
    assert len(load(CHEETAH)) == 398  # from the folder


@pytest.mark.parametrize(
    "file, sha256, message",
    [
        ("whole.hdf5", "0" * 64, "wrong sha256"),
        ("cut.hdf5", "0" * 64, "the download failed"),
        ("cut.hdf5", "", "the download failed"),
        ("gone.hdf5", "0" * 64, r"the download failed \(HTTP 404\)"),
    ],
)
def test_failed_download_leaves_nothing(file, sha256, message, folder, server, monkeypatch):
    set_task(monkeypatch, f"{server.url}/{file}", sha256)
    with pytest.raises(UserError, match=message) as caught:
        load(CHEETAH)
    assert str(folder / file) in str(caught.value) and not list(folder.iterdir())


# ---------------------------------------------------------------- cost

# VmHWM, not getrusage's ru_maxrss: a child process inherits the peak of its parent there
MEASURE = """
import sys, time, torch
from common.datasets import load
def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
load(sys.argv[1])  # a small file first, so that libraries are loaded
before, start = status("VmRSS"), time.perf_counter()
data = load(sys.argv[2])
print(len(data), time.perf_counter() - start, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_time_and_memory(tmp_path):
    n = 200_000
    small = write(tmp_path / "small.hdf5", raw(flags(10), flags(10)))
    arrays = raw(np.zeros(n), np.arange(n) % 1000 == 999, obs_dim=17, action_dim=6)
    size = sum(array.nbytes for array in arrays.values())
    with h5py.File(tmp_path / "large.hdf5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    command = [sys.executable, "-c", MEASURE, small, str(tmp_path / "large.hdf5")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows, seconds, peak = map(float, result.stdout.split())
    assert rows == n - n // 1000
    assert seconds < 10
    assert peak < 3 * size + 32e6  # HDF5 keeps up to 16 MB of freed blocks
