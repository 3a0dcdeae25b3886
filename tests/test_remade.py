"""The remade locomotion sets: the agents as shipped, real MuJoCo; and how benchmarks/agents.py trains and chooses."""

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Linear, ReLU, Sequential

from common import UserError, datasets, environments, remade

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import agents  # noqa: E402

KEYS = ["observations", "actions", "rewards", "terminals", "timeouts"]
ROLE = (
    r"\| (\w+) (\w+) \| [\d,]+ \| (-?\d+) ± (\d+) \|"  # family, role, mean return and deviation in benchmarks/README.md
)
TABLE = re.findall(ROLE, (ROOT / "benchmarks" / "README.md").read_text())


def random_agent(obs: int = 11, action: int = 3, width: int = 16) -> dict[str, np.ndarray]:
    rng, shapes = np.random.default_rng(0), {"w0": (obs, width), "b0": width, "w1": (width, width), "b1": width}
    shapes |= {"w2": (width, 2 * action), "b2": 2 * action}
    agent = {key: rng.normal(size=shape).astype(np.float32) / 3 for key, shape in shapes.items()}
    agent["b2"][action:] -= 2  # a small deviation: arctanh of a float32 at 1 is infinite
    return agent


@pytest.fixture(scope="module")
def replay(tmp_path_factory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("remade") / "replay.hdf5"
    remade.generate("hopper-medium-replay-remade", path, rows=4000)
    return datasets.read_file(path)


def ends(raw: dict[str, np.ndarray]) -> np.ndarray:
    return np.flatnonzero(raw["terminals"] | raw["timeouts"])


# ---------------------------------------------------------------- the agents


def test_an_action_is_tanh_of_the_network():
    agent, obs = random_agent(), np.random.default_rng(1).normal(size=11)
    layers = [Linear(11, 16), ReLU(), Linear(16, 16), ReLU(), Linear(16, 6)]
    for k, layer in enumerate(layers[::2]):
        layer.weight.data, layer.bias.data = torch.tensor(agent[f"w{k}"].T), torch.tensor(agent[f"b{k}"])
    mean, log_std = Sequential(*layers)(torch.tensor(obs).float()).detach().split(3)
    np.testing.assert_allclose(remade.act(agent, obs, None), mean.tanh(), rtol=1e-5)

    rng = np.random.default_rng(0)
    draws = np.arctanh([remade.act(agent, obs, rng).astype(np.float64) for _ in range(20_000)])
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * log_std.exp().max().item() / 20_000**0.5)
    np.testing.assert_allclose(draws.std(0), log_std.exp(), rtol=0.05)


@pytest.mark.parametrize("bias, deviation", [(-100, np.exp(-20)), (100, np.exp(2))])
def test_the_deviation_is_bounded(bias, deviation):
    agent = {key: np.zeros_like(array) for key, array in random_agent().items()}
    agent["b2"][3:] = bias
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    expected = np.tanh(deviation * same.standard_normal(3, np.float32))
    np.testing.assert_allclose(remade.act(agent, np.zeros(11), rng), expected, rtol=1e-5)


def test_the_weights_are_small():
    assert remade.AGENTS.stat().st_size < 2.5e6
    with np.load(remade.AGENTS) as file:
        assert {array.dtype for array in file.values()} == {np.dtype(np.float16)}
        roles = {key.rpartition("/")[0] for key in file.files}
    wanted = {role for makers in remade.MAKERS.values() for role in makers}
    assert roles == {f"{family}/{role}" for family in remade.FAMILIES for role in wanted}


def test_the_table_lists_every_agent():
    assert {f"{family}/{role}" for family, role, *_ in TABLE} == {
        f"{family}/{role}" for family in remade.FAMILIES for role in agents.ROLES
    }


@pytest.mark.parametrize("family, role, mean, deviation", TABLE)
def test_agents_return_what_the_table_says(family, role, mean, deviation):
    returns, _ = agents.measure(environments.make(family), remade.load_agent(family, role), 4)
    tolerance = 4 * float(deviation) / 2 + 0.02 * abs(float(mean)) + 1
    assert returns.mean() == pytest.approx(float(mean), abs=tolerance)


# ---------------------------------------------------------------- the sets


def test_layout(replay):
    assert list(replay) == KEYS
    n = len(replay["rewards"])
    assert 4000 <= n < 5000
    assert [replay[key].shape for key in KEYS] == [(n, 11), (n, 3), (n,), (n,), (n,)]
    assert np.abs(replay["actions"]).max() <= 1
    assert not (replay["terminals"] & replay["timeouts"]).any()
    assert ends(replay)[-1] == n - 1, "the last episode is whole"
    assert len(datasets.transitions(replay, "hopper")) == n - replay["timeouts"].sum() - replay["terminals"][-1]


def test_the_rows_are_what_the_environment_does(replay):
    env, row = environments.make("hopper"), 0
    for episode in range(3):
        (obs, _), over = env.reset(seed=episode), False
        while not over:
            np.testing.assert_array_equal(replay["observations"][row], obs.astype(np.float32))
            obs, reward, terminal, truncated, _ = env.step(replay["actions"][row])
            assert replay["rewards"][row] == np.float32(reward)
            assert (replay["terminals"][row], replay["timeouts"][row]) == (terminal, truncated and not terminal)
            over, row = terminal or truncated, row + 1
    assert row == ends(replay)[2] + 1


def test_the_agents_take_turns(replay):
    """Each episode is that of its agent and seed; an agent's turn ends with the first episode that fills its share."""
    env, row = environments.make("hopper"), 0
    for episode, end in enumerate(ends(replay)):
        number = next(k for k in range(5) if row < 800 * (k + 1))
        played = remade.play(env, remade.load_agent("hopper", agents.ROLES[number]), episode)
        np.testing.assert_array_equal(replay["actions"][row : end + 1], played["actions"])
        row = end + 1


def test_an_episode_that_lasts_ends_in_a_timeout():
    episode = remade.play(environments.make("halfcheetah"), random_agent(obs=17, action=6), 0)
    assert not episode["terminals"].any()
    assert list(np.flatnonzero(episode["timeouts"])) == [999]


def test_the_same_file_for_one_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        remade.generate("hopper-medium-expert-remade", tmp_path / name, rows=1500, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    a, c = (datasets.read_file(tmp_path / name) for name in ("a", "c"))
    assert not np.array_equal(a["actions"][:100], c["actions"][:100])


@pytest.mark.parametrize("family", remade.FAMILIES)
def test_half_of_medium_expert_is_the_expert(tmp_path, family):
    remade.generate(f"{family}-medium-expert-remade", tmp_path / "file", rows=2000)
    raw = datasets.read_file(tmp_path / "file")
    first = np.append(0, ends(raw)[:-1] + 1)
    returns = np.add.reduceat(raw["rewards"], first)
    expert = first >= 1000
    assert expert.any() and returns[expert].mean() > 1.5 * returns[~expert].mean()


def test_a_set_by_its_name(monkeypatch, tmp_path):
    """`--env hopper-medium-remade`: made once, in D4RL's folder."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    name = "hopper-medium-remade"
    monkeypatch.setitem(datasets.MADE_HERE, name, partial(datasets.MADE_HERE[name], rows=1500))
    first = datasets.load(name)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.hdf5"]
    monkeypatch.setitem(datasets.MADE_HERE, name, None)
    assert torch.equal(datasets.load(name).rows, first.rows)
    assert environments.evaluation_env(name, None) == "hopper"
    assert environments.normalized_score(3234.3, name) == pytest.approx(100)


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="hopper-expert-remade is none of the remade sets, which are hopper-"):
        remade.generate("hopper-expert-remade", tmp_path / "file")
    with pytest.raises(UserError, match="hopper-medum-remade is neither .*hopper-medium-remade"):
        datasets.load("hopper-medum-remade")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- benchmarks/agents.py


def test_choosing():
    scores = {5: 1, 10: 20, 15: 34, 20: 25, 25: 60, 30: 70, 35: 80, 40: 50, 45: 40, 50: 45, 91: 90, 95: 102, 100: 95}
    low, high = environments.ENVIRONMENTS["hopper"]
    returns = {step: low + score / 100 * (high - low) for step, score in scores.items()}
    chosen = agents.choose(agents.Args(Path(), "hopper"), returns)
    assert chosen == {"replay1": 5, "replay2": 5, "replay3": 10, "replay4": 10, "medium": 15, "expert": 95}
    assert agents.choose(agents.Args(Path(), "hopper", medium=50), returns)["replay3"] == 30


def test_training_goes_on_and_exports(tmp_path, monkeypatch, capsys):
    """A budget that learns nothing: a run that is stopped goes on, and the actor saved is the one that acts."""
    sac = pytest.importorskip("sbx").SAC
    monkeypatch.setattr(remade, "AGENTS", tmp_path / "agents.npz")
    args = agents.Args(tmp_path, "hopper", steps=400, snapshot_every=200, save_every=200, episodes=1)
    agents.train(args)
    args.steps = 600
    agents.train(args)
    assert "from step 400 to 600" in capsys.readouterr().out
    model, obs = sac.load(tmp_path / "model.zip"), np.random.default_rng(0).normal(size=(20, 11)).astype(np.float32)
    with np.load(tmp_path / "step0000600.npz") as file:
        saved = dict(file)
    for o in obs:
        np.testing.assert_allclose(remade.act(saved, o, None), model.predict(o, deterministic=True)[0], atol=1e-5)
    agents.export(args)
    assert "| hopper expert | 600 |" in capsys.readouterr().out
    np.testing.assert_allclose(remade.load_agent("hopper", "expert")["w1"], saved["w1"], atol=1e-3)
