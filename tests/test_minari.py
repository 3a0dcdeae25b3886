"""`--env minari:NAME`: episodes to transitions, actions, environment, score, bad input; a run by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.wrappers import FlattenObservation

from common import UserError, environments
from common.datasets import load, read_minari
from common.environments import minari_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # no author, no description
ROOT = Path(__file__).parents[1]
HERE = {"observation_space": Box(-np.inf, np.inf, (2,)), "action_space": Box(-1, 1, (1,))}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def minari():
    return pytest.importorskip("minari")


def episode(minari, first, rewards, terminated=False, **changes):
    """An episode as Minari stores it; its observations count up from `first`, and one more than its rewards."""
    n = len(rewards)
    arrays = {
        "observations": np.float32(first + np.arange(n + 1))[:, None] * [1, -1],
        "actions": np.float32(rewards)[:, None] / 100,
        "rewards": np.float64(rewards),
        "terminations": np.array([False] * (n - 1) + [terminated]),
        "truncations": np.array([False] * (n - 1) + [not terminated]),
    }
    return minari.data_collector.EpisodeBuffer(**arrays | changes)


def store(minari, *episodes, name="test/numbers-v0", **facts):
    minari.create_dataset_from_buffers(name, list(episodes), **(facts if facts.get("env") else HERE | facts))
    return f"minari:{name}"


def pendulum(minari, episodes=3, name="test/pendulum-v0", **facts):
    """A random policy in a Pendulum-v1 of 20 steps."""
    env, rng, buffers = gymnasium.make("Pendulum-v1", max_episode_steps=20), np.random.default_rng(0), []
    for seed in range(episodes):
        rows, over = [(env.reset(seed=seed)[0], None, None, None, None)], False
        while not over:
            action = rng.uniform(-2, 2, 1).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated))
            over = terminated or truncated
        obs, *others = zip(*rows)
        buffers.append(
            minari.data_collector.EpisodeBuffer(None, None, None, np.array(obs), *(np.array(x[1:]) for x in others))
        )
    return store(minari, *buffers, name=name, env=env, **facts)


# The rule


def test_no_step_is_lost(minari):
    # returns 6, 9 and 3: one terminal, two truncated, the last of them of a single step
    name = store(minari, episode(minari, 0, [1, 2, 3], True), episode(minari, 10, [4, 5]), episode(minari, 20, [3]))
    data = load(name)
    assert data.obs[:, 0].tolist() == [0, 1, 2, 10, 11, 20]
    assert data.next_obs.tolist() == [[k, -k] for k in (1, 2, 3, 11, 12, 21)]
    assert data.done.tolist() == [0, 0, 1, 0, 0, 0]
    assert data.action[:, 0].tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.03])
    assert data.reward.tolist() == pytest.approx([r * 1000 / (9 - 3) for r in (1, 2, 3, 4, 5, 3)])


def test_rows_are_those_of_minari(minari):
    name = pendulum(minari)
    data, at = load(name), 0
    for stored in minari.load_dataset("test/pendulum-v0"):
        rows = slice(at, at := at + len(stored))
        assert np.array_equal(data.obs[rows], stored.observations[:-1])
        assert np.array_equal(data.next_obs[rows], stored.observations[1:])
        np.testing.assert_allclose(data.action[rows], stored.actions / 2, atol=2e-5)  # from [-2, 2]
    assert at == len(data) == 60 and not data.done.any()


def test_actions_are_rescaled_by_their_bounds_and_clipped(minari):
    space = Box(np.float32([0, -4]), np.float32([2, 4]))
    actions = np.float32([[0, -4], [1, 2], [2, 9]])
    name = store(minari, episode(minari, 0, [1, 2, 3], actions=actions), action_space=space)
    assert read_minari(name)["actions"].tolist() == [[-1, -1], [0, 0.5], [1, 2.25], [0, 0]]
    np.testing.assert_allclose(load(name).action, [[-1, -1], [0, 0.5], [1, 1]], atol=2e-5)


@pytest.mark.parametrize(
    "name, eval_env, expected",
    [
        ("D4RL/pen/human-v2", None, [1, 3]),
        ("D4RL/antmaze/umaze-v1", None, [0, 2]),
        ("mujoco/hopper/medium-v0", None, [500, 1500]),
        ("mujoco/hopper/medium-v0", "pen", [1, 3]),
        ("D4RL/pen/human-v2", "Pendulum-v1", [500, 1500]),
    ],
)
def test_reward_rule(name, eval_env, expected, minari):
    stored = store(minari, episode(minari, 0, [1]), episode(minari, 5, [3]), name=name)
    assert load(stored, eval_env=eval_env).reward.tolist() == pytest.approx(expected)


# Dict observations


class Goals(gymnasium.Env):
    """Observations of many kinds, new ones at each step."""

    observation_space = Dict(
        {
            "observation": Box(-1, 1, (2, 3)),
            "desired_goal": Dict({"z": Box(-1, 1, (1,), np.float64), "a": Tuple([Box(-1, 1, (2,)), Discrete(3)])}),
            "achieved_goal": Box(-1, 1, (2,)),
        }
    )
    action_space = Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


class Broken(gymnasium.Env):
    def __init__(self):
        raise KeyError("a file of mine")


@pytest.fixture
def goals():
    gymnasium.register("Goals-v0", entry_point=f"{__name__}:Goals", max_episode_steps=5)
    yield "Goals-v0"
    gymnasium.registry.pop("Goals-v0")


def stacked(space, steps):
    """As Minari wants the observations of an episode."""
    if isinstance(space, Dict):
        return {key: stacked(part, [step[key] for step in steps]) for key, part in space.items()}
    if isinstance(space, Tuple):
        return tuple(stacked(part, [step[k] for step in steps]) for k, part in enumerate(space))
    return np.array(steps)


def play(env, seed):
    return [env.reset(seed=seed)[0]] + [env.step(np.zeros(1, np.float32))[0] for _ in range(5)]


def test_dict_observations_are_flattened_as_gymnasium_does(goals, minari):
    plain, theirs = gymnasium.make(goals), FlattenObservation(gymnasium.make(goals))
    spaces = {"observation_space": plain.observation_space, "action_space": plain.action_space}
    episodes = [
        episode(minari, 0, np.zeros(5), observations=stacked(plain.observation_space, play(plain, seed)))
        for seed in (1, 2)
    ]
    name = store(minari, *episodes, env=goals, **spaces)
    ours, data = environments.make(name), load(name)
    expected = [play(theirs, seed) for seed in (1, 2)]
    assert np.array_equal(expected, [play(ours, seed) for seed in (1, 2)])
    assert data.obs_dim == ours.observation_space.shape[0] == 6 + 1 + 2 + 3 + 2
    np.testing.assert_allclose(data.obs, np.concatenate([obs[:-1] for obs in expected]), rtol=1e-6)
    np.testing.assert_allclose(data.next_obs, np.concatenate([obs[1:] for obs in expected]), rtol=1e-6)


# Environment and score


def test_environment_and_raw_return(minari):
    name = pendulum(minari)
    assert environments.evaluation_env(name, None) == name
    assert environments.evaluation_env(name, "hopper") == "hopper"
    env = environments.make(name)
    assert env.spec.max_episode_steps == 20 and env.action_space == Box(-1, 1, (1,))
    assert environments.normalized_score(np.array([1.0]), name) is None


def test_evaluation_environment_of_its_own(minari):
    name = pendulum(minari, eval_env=gymnasium.make("Pendulum-v1", max_episode_steps=7).spec)
    assert environments.make(name).spec.max_episode_steps == 7


def test_score_by_the_stored_references(minari):
    name = pendulum(minari, ref_min_score=-200.0, ref_max_score=-100.0)
    assert environments.normalized_score(np.array([-200.0, -50.0]), name).tolist() == [0, 150]


def test_a_dataset_without_an_environment_is_trained_without_a_score(minari, capsys):
    name = store(minari, episode(minari, 0, [1, 2]))
    assert environments.evaluation_env(name, None) is None
    assert "is trained without a score (see --eval-env): " in capsys.readouterr().out
    with pytest.raises(UserError, match="Environment cannot be recovered when env_spec is None.*give another"):
        environments.make(name)


@pytest.mark.parametrize(
    "spec, problem",
    [
        (EnvSpec("Gone-v0", entry_point="no_such_package.envs:Env"), "No module named 'no_such_package'"),
        (EnvSpec("Broken-v0", entry_point=f"{__name__}:Broken"), "KeyError: 'a file of mine'"),
        (
            EnvSpec(
                "Pendulum-v1",
                entry_point="gymnasium.envs.classic_control:PendulumEnv",
                additional_wrappers=(WrapperSpec("Monitor", "gymnasium.wrappers:TimeLimit", None),),
            ),
            "Monitor",
        ),
    ],
)
def test_an_environment_that_cannot_be_made_does_not_stop_training(spec, problem, minari, folder, capsys):
    name = store(minari, episode(minari, 0, [1, 2]))
    metadata = folder / "test" / "numbers-v0" / "data" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"env_spec": spec.to_json()}))
    assert environments.evaluation_env(name, None) is None
    out = capsys.readouterr().out
    assert f"{name} is trained without a score (see --eval-env): " in out and problem in out and out.count("\n") == 1
    assert len(load(name)) == 2
    with pytest.raises(UserError, match=f"'{name}' can't be made .*{problem}") as caught:
        environments.evaluation_env("hopper-medium-v2", name)  # asked for by --eval-env
    assert "\n" not in str(caught.value)


# Bad input


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)  # import raises ImportError
    with pytest.raises(
        UserError, match=r'minari:a/b-v0 needs an optional package: pip install "minari\[hf\]=='
    ) as caught:
        load("minari:a/b-v0")
    pins = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert str(caught.value).split('"')[1].replace("[hf]", "") in pins


@pytest.mark.parametrize("name", ["a/b-v0", "no-version", "..", ""])
def test_missing_dataset(name, minari):
    with pytest.raises(UserError, match=f"minari:{name} is not on this machine; get it by: minari download {name}"):
        load(f"minari:{name}")


@pytest.mark.parametrize(
    "spaces",
    [
        {"observation_space": Discrete(3)},
        {"observation_space": Box(0, 1, (2, 2))},
        {"action_space": Discrete(3)},
        {"action_space": Box(-np.inf, np.inf, (1,))},
        {"action_space": Box(np.float32([0.5]), np.float32([0.5]))},
    ],
)
def test_spaces_that_are_no_bounded_vectors(spaces, minari):
    name = store(minari, **spaces)
    with pytest.raises(UserError, match="test/numbers-v0 has .*: both must be vectors, actions real, bounded"):
        load(name)


def test_unusable_episodes(minari, folder):
    with pytest.raises(UserError, match="rewards is NaN or infinite in episode 1; remove that episode"):
        load(store(minari, episode(minari, 0, [1, 2]), episode(minari, 0, [1, np.nan], actions=np.zeros((2, 1)))))
    with pytest.raises(UserError, match="test/short-v0 is damaged .*; get it again by: minari download test/short-v0"):
        load(store(minari, episode(minari, 0, [1, 2], actions=np.zeros((3, 1))), name="test/short-v0"))
    name = store(minari, episode(minari, 0, [1, 2]), name="test/cut-v0")
    file = folder / "test" / "cut-v0" / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="test/cut-v0 is damaged"):
        load(name)
    (file.parent / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="test/cut-v0 can't be read .*; mend that or get it again by: minari download"):
        minari_dataset(name)


def test_no_episodes(minari):
    with pytest.raises(UserError, match="test/numbers-v0: .* no transition is left"):
        load(store(minari))


# The command line


def test_a_run_by_the_command_line(minari, tmp_path):
    name = pendulum(minari, ref_min_score=-1600.0, ref_max_score=0.0)
    tiny = {"critic-steps": 4, "policy-steps": 4, "batch-size": 8, "sampler-steps": 2, "eval-episodes": 2}
    flags = [word for key, value in tiny.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, ROOT / "gmpo.py", "--env", name, "--device", "cpu", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads((tmp_path / "runs" / "minari-test-pendulum-v0" / "gmpo" / "seed0" / "result.json").read_text())
    assert result["steps"] == 8
    assert result["eval/score"] == pytest.approx(100 * (result["eval/return"] + 1600) / 1600)
    assert -400 < result["eval/return"] < 0  # episodes of 20 steps, not of 200
