"""common/environments.py: one step at a time against D4RL's own environments, the wrappers, the errors, the score."""

import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import running

from common import UserError, environments
from common.environments import ENVIRONMENTS, make, normalized_score, task
from common.physics import restore_capsules, restore_contacts

# Single steps recorded in D4RL's own environments (mujoco_py, MuJoCo 2.1.0) from states met under random actions, as
# f"{family}/{key}" with the keys qpos, qvel, act -> obs2, rew, done. The fixture is 100 of the 500 rows, made by
#   rows = np.sort(np.random.default_rng(28).choice(500, 100, replace=False))
#   np.savez_compressed(PARITY, **{k: full[k][rows] for k in full.files if not k.endswith(("qpos2", "qvel2"))})
# Seed 28 has terminal steps of three families, and row 196 of halfcheetah: a dive in which its head meets the floor.
PARITY = Path(__file__).parent / "data" / "parity.npz"
PARITY_ALL = Path(__file__).parents[2] / "shared" / "data" / "parity_mujoco210.npz"
SHIPPED_ERROR = {
    "halfcheetah": 1,
    "hopper": 0.01,
    "walker2d": 0.1,
    "ant": 0.1,
}  # the least that v4 as shipped is off by


LOCOMOTION = ["halfcheetah", "hopper", "walker2d", "ant"]


def shipped(name):
    """Gymnasium's -v4 environment, without any wrapper."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return gymnasium.make(environments.LOCOMOTION[name]).unwrapped


def errors(env, name, path=PARITY):
    """One step from each recorded state -> max error of next obs, max error of reward, number of wrong terminations."""
    recorded = np.load(path)
    qpos, qvel, act, obs2, rew, done = (recorded[f"{name}/{k}"] for k in ("qpos", "qvel", "act", "obs2", "rew", "done"))
    obs_error, reward_error, wrong = 0.0, 0.0, 0
    for i in range(len(rew)):
        env.reset(seed=0)
        sim = env.unwrapped
        mujoco.mj_resetData(sim.model, sim.data)
        sim.set_state(qpos[i], qvel[i])
        obs, reward, terminated, _, _ = env.step(act[i])
        obs_error = max(obs_error, np.abs(obs - obs2[i][: len(obs)]).max())
        reward_error, wrong = max(reward_error, abs(reward - rew[i])), wrong + (terminated != done[i])
    return obs_error, reward_error, wrong


# ---- D4RL's physics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCOMOTION)
@pytest.mark.parametrize("path", [PARITY, PARITY_ALL], ids=["100 rows", "500 rows"])
def test_steps_like_d4rl(name, path):
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    env = make(name)
    assert env.observation_space.shape == np.load(path)[f"{name}/obs2"].shape[1:]
    obs_error, reward_error, wrong = errors(env, name, path)
    assert obs_error < 1e-9 and reward_error < 1e-9 and wrong == 0


@pytest.mark.parametrize("name", LOCOMOTION)
def test_as_shipped_it_does_not(name):
    assert errors(shipped(name), name)[0] > SHIPPED_ERROR[name]


@pytest.mark.parametrize("name", LOCOMOTION)
def test_contacts_alone_are_not_enough(name):
    env = shipped(name)
    restore_contacts(env.model)
    assert errors(env, name)[0] > SHIPPED_ERROR[name]


@pytest.mark.skipif(mujoco.mj_version() < 350, reason="margins are as in MuJoCo 2.1.0 before 3.5")
@pytest.mark.parametrize("name", ["hopper", "ant"])  # the two whose geoms have a margin
def test_capsules_alone_are_not_enough(name):
    env = shipped(name)
    restore_capsules(env.model, mujoco.MjSpec.from_file(env.fullpath))
    assert errors(env, name)[0] > 1e-3


def test_masses():
    assert shipped("hopper").model.body_mass[1:] == pytest.approx([3.665, 4.058, 2.781, 5.316], abs=1e-3)
    assert make("hopper").unwrapped.model.body_mass[1:] == pytest.approx(
        [3.53429174, 3.92699082, 2.71433605, 5.0893801]
    )
    assert make("halfcheetah").unwrapped.model.body_mass.sum() == pytest.approx(14)


@pytest.mark.parametrize("name", LOCOMOTION)
def test_inertia_frames_are_rotations_and_geoms_stay(name):
    ours, theirs = make(name).unwrapped, shipped(name)
    for sim in (ours, theirs):
        mujoco.mj_resetData(sim.model, sim.data)
        mujoco.mj_forward(sim.model, sim.data)
    assert np.linalg.norm(ours.model.body_iquat, axis=1) == pytest.approx(np.ones(ours.model.nbody))
    assert ours.data.geom_xpos == pytest.approx(theirs.data.geom_xpos, abs=1e-12)
    assert ours.data.geom_xmat == pytest.approx(theirs.data.geom_xmat, abs=1e-12)


# ---- What make() wraps around it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, sizes", {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "ant": (111, 8)}.items()
)
def test_spaces_and_time_limit(name, sizes):
    env = make(name)
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float64 and obs in env.observation_space
    assert obs.shape + env.action_space.shape == sizes
    assert np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)
    assert env.spec.max_episode_steps == 1000
    assert name != "ant" or not obs[27:].any()


def test_an_episode_ends_after_1000_steps():
    env = make("halfcheetah")
    env.reset(seed=0)
    ends = [env.step(np.zeros(6))[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("name", ["hopper", "Pendulum-v1"])
def test_actions_are_clipped(name):
    outside = np.array([-1.5, 4, -7])[: make(name).action_space.shape[0]]
    steps = []
    for action in (outside, np.sign(outside)):
        env = make(name)
        env.reset(seed=0)
        steps.append(env.step(action)[:2])
    assert np.array_equal(steps[0][0], steps[1][0]) and steps[0][1] == steps[1][1]


def test_pendulum_is_rescaled():
    ours, theirs = make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    assert ours.action_space.low == -1 and ours.action_space.high == 1 and theirs.action_space.high == 2
    ours.reset(seed=0), theirs.reset(seed=0)
    for a in (-1.0, -0.3, 0.7):
        assert ours.step(np.array([a], np.float32))[1] == pytest.approx(theirs.step(np.array([2 * a], np.float32))[1])


def test_the_same_seed_gives_the_same_episode():
    def episode(seed):
        env, rng = make("hopper"), np.random.default_rng(0)
        obs = [env.reset(seed=seed)[0]]
        return np.array(obs + [env.step(rng.uniform(-1, 1, 3))[0] for _ in range(10)])

    assert np.array_equal(episode(3), episode(3)) and not np.array_equal(episode(3), episode(4))


@pytest.mark.parametrize("name", [*LOCOMOTION, "Pendulum-v1"])
def test_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(name)
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, 2.0, np.float32))


def test_a_dictionary_of_observations_is_flattened():
    pytest.importorskip("gymnasium_robotics")
    env = make("gymnasium_robotics:PointMaze_UMaze-v3")
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs.shape == (8,)
    state = env.unwrapped.point_env.state_vector()  # achieved_goal, desired_goal, observation, in this order
    assert np.array_equal(obs, [*state[:2], *env.unwrapped.goal, *state])


def test_module_id(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Own-v0', 'gymnasium.envs.classic_control.pendulum:PendulumEnv', max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make("own_task:Own-v0").spec.max_episode_steps == 7


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        ("NoSuchTask-v0", "'NoSuchTask-v0'.*doesn't exist"),
        ("Hopper-v77", "'Hopper-v77'"),
        ("Hopper-v2", "'Hopper-v2' can't be made"),
        ("no_such_module:Own-v0", "No module named 'no_such_module'"),
        ("not an id", "'not an id'"),
        ("antmaze", "'antmaze'.*doesn't exist"),
        ("CartPole-v1", "Discrete"),
        ("FrozenLake-v1", "vectors"),
    ],
)
def test_errors(name, said):
    with pytest.raises(UserError, match=said) as error:
        make(name)
    assert "\n" not in str(error.value)


OWN = """
import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv
class Plain(PendulumEnv):
    def __init__(self):
        super().__init__()
class Broken(PendulumEnv):
    def __init__(self, render_mode=None):
        raise RuntimeError("no licence:\\n  buy one")
gymnasium.register("Plain-v0", "own_envs:Plain", max_episode_steps=7)
gymnasium.register("Broken-v0", "own_envs:Broken")
"""


def test_constructors_of_others(tmp_path, monkeypatch):
    (tmp_path / "own_envs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert make("own_envs:Plain-v0").spec.max_episode_steps == 7  # which knows no render_mode
    with pytest.raises(UserError, match="'own_envs:Plain-v0' can't be made .TypeError: .*render_mode"):
        make("own_envs:Plain-v0", "rgb_array")
    with pytest.raises(UserError, match="'own_envs:Broken-v0' can't be made .RuntimeError: no licence: buy one"):
        make("own_envs:Broken-v0")


FAILING = """
import gymnasium, numpy as np
class Base(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    def reset(self, seed=None, options=None):
        return np.zeros(3, np.float32), {}
    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}
class ResetRaises(Base):
    def reset(self, seed=None, options=None):
        raise RuntimeError("no\\nconnection")
class OldReset(Base):
    def reset(self):
        return np.zeros(3, np.float32)
class OldStep(Base):
    def step(self, action):
        return np.zeros(3, np.float32), 1.0, True, {}
class OtherShape(Base):
    def step(self, action):
        return np.zeros(4, np.float32), *super().step(action)[1:]
class Integers(Base):
    action_space = gymnasium.spaces.Box(0, 10, (1,), np.int64)
class NoWidth(Base):
    action_space = gymnasium.spaces.Box(np.float32([0, 0.5]), np.float32([1, 0.5]))
class RaisesLater(Base):
    def step(self, action):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 7:
            raise ZeroDivisionError("float division by zero")
        return super().step(action)
for kind in (Base, *Base.__subclasses__()):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind)
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, said",
    {
        "ResetRaises": "fails in its first step .RuntimeError: no connection.",
        "OldReset": "fails in its first step .TypeError: .*seed",
        "OldStep": "fails in its first step .ValueError",
        "OtherShape": "fails in its first step .ValueError",
        "Integers": "actions real, bounded",
        "NoWidth": "actions real, bounded",
    }.items(),
)
def test_an_environment_that_fails_is_found_before_training(name, said, failing):
    with pytest.raises(UserError, match=f"failing:{name}-v0.*{said}") as error:
        environments.evaluation_env("own.hdf5", f"failing:{name}-v0")
    assert "\n" not in str(error.value)


def test_an_environment_that_fails_in_an_evaluation_is_one_sentence(failing, tmp_path):
    own = running.write_data(tmp_path / "own.hdf5")
    flags = running.tiny_flags("gmpo", env=str(own), eval_env="failing:RaisesLater-v0", run_dir=tmp_path / "run")
    code, _, err = running.command("gmpo", *flags)
    said = "'failing:RaisesLater-v0' fails in an evaluation, step 12 (ZeroDivisionError: float division by zero)"
    assert running.refused(code, err, said)


def test_an_evaluation_without_a_time_limit_ends_and_says_so(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "LIMIT", 9)
    own = running.write_data(tmp_path / "own.hdf5")
    flags = running.tiny_flags("gmpo", env=str(own), eval_env="failing:Base-v0", run_dir=tmp_path / "run")
    code, out, err = running.command("gmpo", *flags)
    assert (code, err) == (0, "") and "last return 9.0" in out
    assert "failing:Base-v0 has no time limit: an episode ends after 9 steps; register it with max_episode_steps" in out


def test_own_units_are_neither_rescaled_nor_clipped():
    env = make("Pendulum-v1", own_units=True)
    assert env.action_space.high == 2
    theirs = gymnasium.make("Pendulum-v1")
    assert [e.reset(seed=0)[0].tolist() for e in (env, theirs)][0] == theirs.unwrapped._get_obs().tolist()
    assert env.step(np.array([1.7]))[1] == theirs.step(np.array([1.7]))[1]


# ---- Names and scores ------------------------------------------------------------------------------------------------


def test_task():
    names = {
        "halfcheetah-medium-expert-v2": "halfcheetah",
        "ant-random-v2": "ant",
        "antmaze-umaze-v2": "antmaze-umaze-v2",
        "pen-human-v1": "pen",
        "kitchen-partial-v0": "kitchen-partial-v0",
        "maze2d-umaze-v1": "maze2d-umaze-v1",
        "maze2d-umaze-dense-remade": "maze2d-umaze-dense-v1",
        "halfcheetah-demo": "halfcheetah-demo",
        "hopper": "hopper",
        "Hopper-v4": None,
        "Pendulum-v1": None,
        "my.hdf5": None,
    }
    assert {name: task(name) for name in names} == names


def test_score():
    for name, (low, high) in ENVIRONMENTS.items():
        assert normalized_score(np.array([low, high]), name) == pytest.approx([0, 100])
    returns = np.array([[-20.272305, 3234.3], [1607.0138475, 0]])
    assert normalized_score(returns, "hopper-medium-v2") == pytest.approx(np.array([[0, 100], [50, 0.62288691]]))
    assert normalized_score(3484.0, "halfcheetah-demo") == pytest.approx(100)
    assert normalized_score(3281.0, "hopper") == pytest.approx(101.4349, abs=1e-3)
    assert normalized_score(-200.0, "Pendulum-v1") is None


@pytest.mark.parametrize("env", ["hopper-mine.hdf5", "data/hopper-mine.hdf5", "hopper-medium-v2.h5"])
def test_a_files_name_chooses_no_environment(env, capsys):
    assert environments.evaluation_env(env, None) is None
    assert "--eval-env names one" in capsys.readouterr().out
    assert environments.evaluation_env(env, "hopper") == "hopper"
    assert environments.evaluation_env(env.split(".")[0].split("/")[-1], None) == "hopper"


def test_a_file_without_suffix_chooses_no_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("hopper-mine").write_text("")
    assert environments.evaluation_env("hopper-mine", None) is None
    assert "hopper-mine is trained without a score" in capsys.readouterr().out
