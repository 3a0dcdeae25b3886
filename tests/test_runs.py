"""The four files as commands: run folders, resume, evaluation, bad input, NaN; bandit and demo. Tiny budgets, CPU."""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import TrainingError, UserError, datasets, demo, environments, runs

ROOT = Path(__file__).parents[1]
FILES = [name for name in ("iql_critic", "gmpo", "gmpg", "idql") if (ROOT / f"{name}.py").exists()]
SCALARS = {
    *("critic/v_loss", "critic/q_loss", "critic/q", "critic/v", "behaviour/loss", "policy/loss", "policy/weight"),
    *("policy/clipped", "policy/ess", "policy/q", "policy/kl", "eval/score", "eval/score_std", "eval/return"),
    *("eval/return_std", "time/steps_per_s"),
}
BANDIT_SCALARS = {"eval/total_variation", "eval/off_modes"}
OWN_SCALARS = {"gmpg": {"policy/undone"}, "idql": {"eval/candidates"}}
TINY = dict(
    critic_steps=6, behaviour_steps=4, policy_steps=6, batch_size=8, policy_batch_size=8, candidates=2,
    sampler_steps=2, eval_episodes=2, log_every=1, device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write_data(path, obs_dim=3, action_dim=1, rows=200, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(5, 3, (rows, obs_dim)),
        "actions": rng.uniform(-1, 1, (rows, action_dim)),
        "rewards": rng.normal(size=rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 50 == 49,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changes).items():
            file[key] = array
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of good and bad data, of the sizes of Pendulum-v1, and of checkpoints."""
    folder = tmp_path_factory.mktemp("files")
    own = write_data(folder / "own.hdf5")
    write_data(folder / "nan.hdf5", rewards=np.where(np.arange(200) == 7, np.nan, 1.0))
    (folder / "damaged.hdf5").write_bytes(own.read_bytes()[: own.stat().st_size // 2])
    train("iql_critic", env=str(own), run_dir=folder / "critic", normalize_obs=True)
    checkpoint = (folder / "critic" / "checkpoint.pt").read_bytes()
    (folder / "damaged.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    torch.save({"weights": torch.ones(2)}, folder / "foreign.pt")
    return folder


def tiny_args(name, **changes):
    module = importlib.import_module(name)
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{key: value for key, value in (TINY | changes).items() if key in known})


def train(name, **changes):
    return importlib.import_module(name).train(tiny_args(name, **changes))


def command(name, *words):
    """python <name>.py <words>, in this process: exit code, stdout, stderr."""
    module, out, err, code = importlib.import_module(name), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            runs.main(module.train, module.Args)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def tiny_flags(name, **changes):
    args, default = tiny_args(name, **changes), importlib.import_module(name).Args()
    changed = {key: value for key, value in vars(args).items() if value != getattr(default, key)}
    return [word for key, value in changed.items() for word in ("--" + key.replace("_", "-"), str(value))]


def refused(code, err, *fragments):
    lines = err.splitlines()
    return code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and all(part in err for part in fragments)


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def differences(a, b, where=""):
    """The places at which two checkpoints differ, but for the arguments and the clock."""
    if isinstance(a, dict):
        keys = {key for key in a.keys() | b.keys() if where or key not in ("args", "seconds", "best")}
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list | tuple):
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{k}")]
    return [] if (torch.equal(a, b) if torch.is_tensor(a) else a == b) else [where]


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


def stop_after(step, monkeypatch):
    """Let the next run end by an exception, after what it does at `step`."""
    record = runs.Run.record

    def stopping(self, now, *args, **kwargs):
        record(self, now, *args, **kwargs)
        if now == step:
            raise Stopped

    monkeypatch.setattr(runs.Run, "record", stopping)


# ---------------------------------------------------------------- resume

CASES = [("iql_critic", dict(dropout=0.2)), ("gmpo", dict(actions="static")), ("gmpo", dict(actions="resampled"))]
CASES += [(name, {}) for name in FILES if name != "iql_critic"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join([case[0], *map(str, case[1].values())]))
def uninterrupted(request, files, tmp_path_factory):
    name, changes = request.param
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(name, env=str(files / "own.hdf5"), run_dir=folder, **changes)
    return name, changes, folder


@pytest.mark.parametrize("share", [0.2, 0.5, 0.85])  # in the first phase, in the middle, in the last phase
def test_a_resumed_run_arrives_at_the_same_bits(uninterrupted, files, tmp_path, monkeypatch, share):
    name, changes, whole = uninterrupted
    total, folder = load(whole)["step"], tmp_path / "run"
    stop = min(max(2, int(share * total)), total - 2)
    changes = dict(env=str(files / "own.hdf5"), run_dir=folder, **changes)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(stop + 1, patch)  # one step after the checkpoint, so that its log line is made twice
        train(name, save_every=stop, **changes)
    assert load(folder)["step"] == stop and logged(folder)[-1]["step"] == stop + 1
    train(name, resume=True, **changes)
    assert differences(load(whole), load(folder)) == []
    assert [line["step"] for line in logged(folder)] == list(range(1, total + 1))
    strip = [{key: value for key, value in line.items() if key != "time/steps_per_s"} for line in logged(folder)]
    assert strip == [{key: line[key] for key in line if key != "time/steps_per_s"} for line in logged(whole)]


@pytest.mark.parametrize("name", FILES)
def test_more_policy_steps_go_on_with_a_finished_run(name, files, tmp_path):
    changes = dict(env=str(files / "own.hdf5"), lr_decay=False, critic_steps=3)
    train(name, run_dir=tmp_path / "once", policy_steps=12, **changes)
    train(name, run_dir=tmp_path / "twice", policy_steps=6, **changes)
    train(name, run_dir=tmp_path / "twice", policy_steps=12, resume=True, **changes)
    assert differences(load(tmp_path / "once"), load(tmp_path / "twice")) == []


def test_a_run_without_a_checkpoint_starts_again_on_resume(files, tmp_path, monkeypatch):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(3, patch)
        train("gmpo", **changes)
    train("gmpo", resume=True, **changes)
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 13))


def test_half_a_line_of_metrics_is_dropped_on_resume(files, tmp_path):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run", lr_decay=False)
    train("gmpo", **changes)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "policy/lo')
    train("gmpo", resume=True, policy_steps=8, **changes)
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 15))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("env, eval_env", [("bandit", None), ("own.hdf5", "Pendulum-v1")])
def test_evaluating_more_often_leaves_the_weights_alone(name, env, eval_env, files, tmp_path):
    env = "bandit" if env == "bandit" else str(files / env)
    for eval_every in (5, 1000):
        changes = dict(run_dir=tmp_path / str(eval_every), eval_every=eval_every, dropout=0.2)
        train(name, env=env, eval_env=eval_env, **changes)
    often, once = load(tmp_path / "5"), load(tmp_path / "1000")
    evaluations = [sum("eval/return" in line for line in logged(tmp_path / n)) for n in ("5", "1000")]
    assert evaluations[0] > evaluations[1] == 1
    assert differences(often, once) == []


def test_a_killed_run_leaves_a_whole_checkpoint_and_resumes(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a fork server that has imported both spares 4 s a run
    folder, rng, step = tmp_path / "run", random.Random(0), 0
    changes = dict(env=str(files / "own.hdf5"), run_dir=folder, lr_decay=False, critic_steps=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gmpo", "torch._dynamo"])
    for _ in range(6):
        args = tiny_args("gmpo", policy_steps=10**6, save_every=1, resume=step > 0, **changes)
        process = context.Process(target=importlib.import_module("gmpo").train, args=[args], daemon=True)
        process.start()
        seen, deadline = step, time.time() + 60
        while seen <= step:
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.01)
            seen = runs.load_checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        step = load(folder)["step"]
    (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    train("gmpo", policy_steps=step, resume=True, **changes)
    assert load(folder)["step"] == step + 2 and not (folder / "checkpoint.pt.tmp").exists()
    assert [line["step"] for line in logged(folder)] == list(range(1, step + 3))


def test_a_save_that_fails_half_way_leaves_the_last_checkpoint(files, tmp_path, monkeypatch):
    changes, save, count = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run", save_every=2), torch.save, []

    def failing(state, file):
        count.append(state["step"])
        if len(count) == 2:
            file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
            raise Stopped
        save(state, file)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(torch, "save", failing)
        train("gmpo", **changes)
    assert count == [2, 4] and load(tmp_path / "run")["step"] == 2


# ---------------------------------------------------------------- the folder of a run


@pytest.fixture(scope="module", params=FILES)
def finished(request, tmp_path_factory):
    """A run on the bandit by the real command: name, folder, flags, stdout."""
    name, folder = request.param, tmp_path_factory.mktemp("finished")
    flags = ["--env", "bandit", "--run-dir", str(folder), *tiny_flags(name)]
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return name, folder, flags, done.stdout


def test_config_says_where_a_result_comes_from(finished):
    name, folder, flags, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["algorithm"] == name
    assert config["command"] == " ".join([f"{name}.py", *flags])
    assert config["versions"].keys() >= {"python", "torch", "numpy", "gymnasium", "mujoco"}
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config
    fields = {field.name for field in dataclasses.fields(importlib.import_module(name).Args)}
    assert config["args"].keys() == fields and config["args"]["critic_steps"] == 6
    assert config["args"]["expectile"] is not None


def test_metrics_have_the_documented_names_and_tensorboard_the_same_numbers(finished):
    name, folder, _, _ = finished
    lines = logged(folder)
    names = {key for line in lines for key in line} - {"step"}
    assert names <= SCALARS | BANDIT_SCALARS | OWN_SCALARS.get(name, set())
    assert names >= {"critic/v_loss", "critic/q_loss", "eval/score"} and names & {"policy/loss", "behaviour/loss"}
    events = EventAccumulator(str(folder)).Reload()
    seen = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    written = {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}
    assert seen == pytest.approx(written, rel=1e-6)


def test_the_bandit_is_drawn_into_the_folder_and_tensorboard(finished):
    _, folder, _, _ = finished
    assert (folder / "bandit.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.image.imread(folder / "bandit.png").std() > 0.05
    assert "bandit" in EventAccumulator(str(folder)).Reload().Tags()["images"]


def test_result_is_the_last_evaluation_and_is_printed(finished):
    _, folder, _, out = finished
    result, last = json.loads((folder / "result.json").read_text()), logged(folder)[-1]
    assert result["steps"] == last["step"] == load(folder)["step"]
    assert result["eval/score"] == last["eval/score"]
    assert result["best"] == max(line.get("eval/score", -math.inf) for line in logged(folder))
    assert f"last score {result['eval/score']:.1f}" in out and f"best {result['best']:.1f}" in out


def test_the_checkpoint_holds_networks_optimizers_and_random_states(finished):
    _, folder, _, _ = finished
    checkpoint = load(folder)
    assert {"critic", "policy", "v_optimizer", "q_optimizer", "policy_optimizer", "rng", "cuda_rng", "step"} <= set(
        checkpoint
    )
    assert any(key.startswith("target_q") for key in checkpoint["critic"])


def test_a_second_run_in_the_same_folder_is_refused(finished):
    name, folder, flags, _ = finished
    before = content(folder)
    code, _, err = command(name, *flags)
    assert refused(code, err, str(folder), "--resume", "--run-dir")
    assert content(folder) == before


@pytest.mark.parametrize("flag, value", [("--expectile", 0.81), ("--seed", 1), ("--critic-loss", "quantile")])
def test_resume_with_another_configuration_is_refused(finished, flag, value):
    name, folder, flags, _ = finished
    before = content(folder)
    code, _, err = command(name, *flags, "--resume", flag, value)
    assert refused(code, err, flag, str(value))
    assert content(folder) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
def test_a_folder_of_another_algorithm_is_refused(finished, mode):
    name, folder, _, _ = finished
    other = FILES[FILES.index(name) - 1]
    before = content(folder)
    code, _, err = command(other, "--env", "bandit", "--run-dir", folder, *tiny_flags(other), mode)
    assert refused(code, err, str(folder), f"{name}.py")
    assert content(folder) == before


def test_eval_only_prints_the_score_again_and_changes_nothing(finished):
    name, folder, flags, _ = finished
    before = content(folder)
    code, out, err = command(name, *flags, "--eval-only")
    assert (code, err) == (0, "")
    assert f"last score {logged(folder)[-1]['eval/score']:.1f}" in out
    assert content(folder) == before


@pytest.mark.parametrize("name", FILES)
def test_eval_only_without_a_run_is_refused(name, tmp_path):
    code, _, err = command(name, "--env", "bandit", "--run-dir", tmp_path / "none", *tiny_flags(name), "--eval-only")
    assert refused(code, err, "checkpoint.pt does not exist")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", FILES)
def test_eval_only_without_an_environment_says_so(name, files, tmp_path):
    flags = tiny_flags(name, env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    assert command(name, *flags)[0] == 0
    code, out, err = command(name, *flags, "--eval-only")
    assert (code, err) == (0, "") and "not evaluated" in out


@pytest.mark.parametrize("flag, value", [("--network", "paper"), ("--path", "vp"), ("--beta", "7.0")])
def test_eval_only_of_another_model_is_refused(flag, value, finished_gmpo):
    flags = ["--env", "bandit", "--run-dir", finished_gmpo, *tiny_flags("gmpo"), flag, value, "--eval-only"]
    code, _, err = command("gmpo", *flags)
    assert refused(code, err, f"holds a run with {flag} ", f", not {value}; give the same")


def test_eval_only_may_sample_in_another_way(finished_gmpo):
    flags = ["--env", "bandit", "--run-dir", finished_gmpo, *tiny_flags("gmpo", sampler_steps=3), "--eval-only"]
    code, out, _ = command("gmpo", *flags, "--solver", "euler")
    assert code == 0 and "last score" in out


@pytest.fixture(scope="module")
def finished_gmpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train("gmpo", env="bandit", run_dir=folder / "run")
    return folder / "run"


def test_every_evaluation_leaves_a_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(9, patch)
        train("gmpo", env="bandit", run_dir=tmp_path / "run", eval_every=4, save_every=1000)
    assert load(tmp_path / "run")["step"] == 8


def test_tensorboard_has_each_step_once_after_a_resume(files, tmp_path, monkeypatch):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(5, patch)
        train("gmpo", save_every=3, **changes)
    train("gmpo", resume=True, **changes)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("time/steps_per_s")] == list(range(1, 13))


def test_a_critic_of_another_network_is_refused(files):
    flags = ["--env", files / "own.hdf5", "--critic", files / "critic", "--preset", "head", *tiny_flags("idql")]
    code, _, err = command("idql", *flags)
    assert refused(code, err, "is another network")


@pytest.mark.parametrize("name", FILES)
def test_without_run_dir_the_folder_is_named_by_data_algorithm_and_seed(name, files):
    train(name, env=str(files / "own.hdf5"), seed=3)
    assert Path("runs/own", name, "seed3", "checkpoint.pt").exists()


def test_a_computer_without_git_trains_all_the_same(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


# ---------------------------------------------------------------- mistakes

BAD = {  # flags -> what the sentence must say
    "--env hoper-medium-v2": "did you mean hopper-medium-v2",
    "--env {files}/missing.hdf5": "missing.hdf5 does not exist",
    "--env {files}/damaged.hdf5": "damaged.hdf5 is damaged",
    "--env {files}/nan.hdf5": "rewards is NaN or infinite, first in row 7",
    "--env {files}/own.hdf5 --eval-env hopper": "observations have size 3",
    "--env {files}/own.hdf5 --eval-env Nothing-v0": "Nothing",
    "--env {files}/own.hdf5 --eval-env nothing:Nothing-v0": "nothing",
    "--env {files}/own.hdf5 --eval-env CartPole-v1": "CartPole-v1",
    "--env {files}/own.hdf5 --run-dir {files}/own.hdf5": "choose another --run-dir",
    "--env bandit --device cuda:99": "--device cuda:99",
    "--env bandit --device nonsense": "--device nonsense",
    "--env bandit --batch-size 0": "--batch-size 0",
    "--env bandit --batch-size -3": "--batch-size -3",
    "--env bandit --eval-every 0": "--eval-every 0",
    "--env bandit --eval-episodes 0": "--eval-episodes 0",
    "--env bandit --save-every 0": "--save-every 0",
    "--env bandit --log-every 0": "--log-every 0",
    "--env bandit --critic-lr -1": "--critic-lr -1",
    "--env bandit --policy-lr nan": "--policy-lr nan",
    "--env bandit --policy-lr inf": "--policy-lr inf",
    "--env bandit --policy-steps -1": "--policy-steps -1",
    "--env bandit --expectile 1.5": "--expectile 1.5",
    "--env bandit --expectile 0": "--expectile 0",
    "--env bandit --discount 2": "--discount 2",
    "--env bandit --target-rate 1.1": "--target-rate 1.1",
    "--env bandit --linex-max 0": "--linex-max 0",
    "--env bandit --critic {files}/nothing": "nothing does not exist",
    "--env bandit --critic {files}/critic": "own.hdf5, not bandit; give the same",
    "--env {files}/own.hdf5 --critic {files}/critic --expectile 0.6": "with --expectile 0.7, not 0.6; give",
    "--env {files}/own.hdf5 --critic {files}/damaged.pt": "damaged.pt is not a whole checkpoint",
    "--env {files}/own.hdf5 --critic {files}/foreign.pt": "foreign.pt",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing(name, flags, files, tmp_path):
    before = content(files)
    code, _, err = command(name, *flags.format(files=files).split())
    assert refused(code, err, BAD[flags]), err
    assert content(files) == before and not list(tmp_path.glob("cwd/*"))


@pytest.mark.parametrize("flags", ["--batch-size 1.5", "--critic-loss huber", "--no-such-flag 1"])
def test_a_usage_error_has_code_2(flags):
    assert command("gmpo", "--env", "bandit", *flags.split())[0] == 2


def test_the_real_command_ends_with_code_2_and_no_traceback():
    words = [sys.executable, ROOT / FILES[-1], "--env", "hoper-medium-v2"]
    words[1] = words[1].with_suffix(".py")
    done = subprocess.run(words, capture_output=True, text=True)
    assert refused(done.returncode, done.stderr, "did you mean")
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("log_every, where", [(1, "step 5: critic/v_loss is nan"), (1000, "step 6: the weights of")])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(name, log_every, where, files, tmp_path, monkeypatch):
    module, calls = importlib.import_module(name), []
    v_loss = module.v_loss

    def failing(*args):
        calls.append(1)
        loss, metrics = v_loss(*args)
        factor = math.nan if len(calls) == 5 else 1
        return loss * factor, metrics | {"critic/v_loss": loss.detach() * factor}

    monkeypatch.setattr(module, "v_loss", failing)
    with pytest.raises(TrainingError, match=where) as failure:
        changes = dict(log_every=log_every, save_every=2, policy_steps=8)
        train(name, env=str(files / "own.hdf5"), run_dir=tmp_path / "run", **changes)
    assert str(tmp_path / "run") in str(failure.value)
    assert load(tmp_path / "run")["step"] == 4
    assert all(torch.isfinite(p).all() for p in load(tmp_path / "run")["critic"].values())


@pytest.mark.parametrize("name", FILES)
def test_a_learning_rate_beyond_all_measure_ends_with_code_1(name, files, tmp_path):
    flags = tiny_flags(name, env=str(files / "own.hdf5"), run_dir=tmp_path / "run", policy_lr=1e38)
    code, _, err = command(name, *flags)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: step ") and ("policy" in err or "behaviour" in err)


# ---------------------------------------------------------------- trained policies and critics


@pytest.fixture(scope="module", params=FILES)
def trained(request, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(request.param, env=str(files / "own.hdf5"), run_dir=folder, normalize_obs=True)
    return importlib.import_module(request.param), folder


@pytest.mark.parametrize("file", ["", "checkpoint.pt"])
def test_load_policy_takes_folder_or_file_and_answers_in_kind(trained, file):
    module, folder = trained
    act = module.load_policy(folder / file)
    for shape in ((4, 3), (3,)):
        obs = np.random.default_rng(0).normal(5, 100, shape)
        for given, kind in ((obs, np.ndarray), (torch.as_tensor(obs), torch.Tensor)):
            action = act(given)
            assert isinstance(action, kind) and action.shape == (*shape[:-1], 1)
            assert abs(action).max() <= 1


def test_load_policy_takes_raw_observations(trained, files):
    module, folder = trained
    checkpoint, obs = load(folder), datasets.load(str(files / "own.hdf5")).obs[:64]
    models = module.build(*checkpoint["sizes"], module.Args(**checkpoint["args"]))
    for model_name, model in models.items():
        model.load_state_dict(checkpoint[model_name])
    normalize = models["critic"].v.normalize
    mean, std = normalize.mean.clone(), normalize.std.clone()
    assert torch.allclose(mean, torch.tensor(5.0), atol=1)
    normalize.mean.zero_(), normalize.std.fill_(1)
    action = module.load_policy(folder, seed=3)(obs)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        expected = module.play(models, (obs - mean) / std, module.Args(**checkpoint["args"]), generator)
    assert action.std() > 0 and torch.allclose(action, expected, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_a_trained_critic_is_taken_as_it_is_with_its_normalisation(name, files, tmp_path):
    changes = dict(env=str(files / "own.hdf5"), critic=files / "critic", normalize_obs=False)
    train(name, run_dir=tmp_path / "run", **changes)
    old, new = load(files / "critic"), load(tmp_path / "run")
    assert differences(old["critic"], new["critic"], "critic") == []
    assert new["args"]["critic_steps"] == 0
    assert abs(new["policy"]["normalize.mean"] - 5).max() < 1


@pytest.mark.parametrize("value", [np.zeros((4, 3)), np.zeros(3, np.float32), torch.zeros(4, 3), torch.zeros(3)])
def test_numpy_or_torch_answers_in_kind(value):
    seen = []
    action = runs.numpy_or_torch(lambda obs: seen.append(obs) or obs[:, :2] + 1, "cpu")(value)
    assert seen[0].shape == (4 if value.ndim == 2 else 1, 3) and seen[0].dtype == torch.float32
    assert type(action) is type(value) and action.shape == (*value.shape[:-1], 2) and (action == 1).all()


@pytest.mark.parametrize("path, why", [("nothing", "exist"), ("damaged.pt", "whole"), ("foreign.pt", "checkpoint")])
def test_load_checkpoint_refuses(files, path, why):
    with pytest.raises(UserError, match=f"{path}.*{why}"):
        runs.load_checkpoint(files / path)


def test_load_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- arguments and logs


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("env", ["halfcheetah-medium-expert-v2", "antmaze-umaze-v0", "hopper-random-v2", "bandit"])
def test_a_field_that_is_none_takes_the_value_for_the_name_else_for_all(name, env):
    module = importlib.import_module(name)
    expected, filled = module.PAPER["*"] | module.PAPER.get(env, {}), runs.fill_in(module.Args(env=env), module.PAPER)
    default = module.Args()
    empty = {field.name for field in dataclasses.fields(module.Args) if getattr(default, field.name) is None}
    assert expected.keys() <= empty  # a field with a default would never take PAPER's value
    assert {key: getattr(filled, key) for key in expected} == expected
    assert empty - expected.keys() == {"eval_env", "run_dir", "critic"}


@pytest.mark.parametrize("name", FILES)
def test_an_own_file_takes_own_files_values_and_the_command_line_wins(name, files):
    module = importlib.import_module(name)
    args = module.Args(env=str(files / "own.hdf5"), critic_steps=0, expectile=0.6)
    filled = runs.fill_in(args, module.PAPER)
    assert args.normalize_obs is None and filled.normalize_obs is True
    assert filled.policy_steps == module.PAPER["own file"]["policy_steps"]
    assert (filled.critic_steps, filled.expectile) == (0, 0.6)


def test_few_samples_that_carry_the_weight_are_told_once(tmp_path, capsys):
    run = runs.Run(tiny_args("gmpo", env="bandit", run_dir=tmp_path / "run"), "gmpo")
    for step in run.steps(0, 4):
        run.log(step, {"policy/ess": 0.5 if step == 1 else 0.05})
    out = capsys.readouterr().out
    assert out.count("policy/ess") == 1 and "step 2: only 5.0 %" in out and "smaller beta" in out


# ---------------------------------------------------------------- own data, D4RL's files, the demo


def test_an_own_file_with_a_gymnasium_environment_reports_a_raw_return(files, tmp_path):
    flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), eval_env="Pendulum-v1", run_dir=tmp_path / "run")
    code, out, err = command("gmpo", *flags)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (code, err) == (0, "") and "eval/score" not in result
    assert -2000 < result["eval/return"] < 0 and result["best"] == result["eval/return"]
    assert f"last return {result['eval/return']:.1f}" in out


def test_an_own_file_without_an_environment_trains_and_says_that_it_is_not_evaluated(files, tmp_path):
    code, out, _ = command("gmpo", *tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run"))
    assert code == 0 and "trained without a score" in out and "--eval-env" in out and "not evaluated" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"] is None


def test_a_file_in_d4rls_folder_serves_its_name_if_verified_or_allowed(tmp_path):
    write_data(tmp_path / "d4rl" / "halfcheetah_medium_expert-v2.hdf5", 17, 6)
    flags = tiny_flags("gmpo", env="halfcheetah-medium-expert-v2", run_dir=tmp_path / "run", eval_episodes=1)
    code, _, err = command("gmpo", *flags)
    assert refused(code, err, "sha256", "--allow-unverified") and not (tmp_path / "run").exists()
    code, out, err = command("gmpo", *flags, "--allow-unverified")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (code, err) == (0, "") and "last score" in out
    assert result["eval/score"] == pytest.approx(
        environments.normalized_score(result["eval/return"], "halfcheetah"), abs=1e-6
    )


def test_the_demo_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        demo.generate(tmp_path / f"{name}.hdf5", episodes=2)
    a, b = (datasets.read_file(tmp_path / f"{name}.hdf5") for name in ("a", "b"))
    assert all(np.array_equal(a[key], b[key]) for key in datasets.RANKS)
    assert a["observations"].shape == (2000, 17) and list(np.flatnonzero(a["timeouts"])) == [999, 1999]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.hdf5", "b.hdf5"]


def test_the_policy_behind_the_demo_scores_about_100():
    env, returns = environments.make("halfcheetah"), []
    for seed in (101, 102, 103):
        (obs, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            obs, reward, _, over, _ = env.step(demo.linear_policy(obs))
            total += reward
        returns.append(total)
    assert np.mean(returns) > 3000
    assert environments.normalized_score(np.mean(returns), "halfcheetah-demo") == pytest.approx(100, abs=10)


def test_the_demo_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "generate", partial(demo.generate, episodes=2))
    first = datasets.load("halfcheetah-demo")
    monkeypatch.delattr(demo, "generate")
    assert torch.equal(first.rows, datasets.load("halfcheetah-demo").rows)
    assert os.listdir(tmp_path / "d4rl") == ["halfcheetah-demo.hdf5"]


def test_an_interrupted_demo_leaves_no_file_under_its_name(tmp_path, monkeypatch):
    create = h5py.File.create_dataset

    def failing(self, key, *args, **kwargs):
        if key == "rewards":
            raise Stopped
        return create(self, key, *args, **kwargs)

    monkeypatch.setattr(demo, "generate", partial(demo.generate, episodes=1))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(h5py.File, "create_dataset", failing)
        datasets.load("halfcheetah-demo")
    assert not list((tmp_path / "d4rl").iterdir())
    assert len(datasets.load("halfcheetah-demo")) == 999
