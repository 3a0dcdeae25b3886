"""common/robotics.py: Adroit's steps against D4RL's own environments, Kitchen's rules, what is missing."""

import sys
import warnings
from pathlib import Path

import mujoco
import numpy as np
import pytest

from common import UserError, environments, physics, robotics
from common.environments import make

# Single steps recorded in D4RL's own environments (mujoco_py, MuJoCo 2.1.0), as f"{task}/{key}" with the keys qpos,
# qvel, act -> obs2, rew, done; f"{task}/state/*" is the rest of the state. 24 rows a task of the 100 recorded, half of
# them with something deeper in a box than its radius, if there are as many.
PARITY = Path(__file__).parent / "data" / "parity_adroit.npz"
PARITY_ALL = Path(__file__).parents[2] / "shared" / "data" / "parity_adroit.npz"
WITH_BOXES = ["door", "hammer", "relocate"]


@pytest.fixture(autouse=True, scope="module")
def package():
    pytest.importorskip("gymnasium_robotics")


def errors(name, path=PARITY):
    """One step from each recorded state -> the largest errors of next obs and reward, the number of wrong ends."""
    recorded, env = np.load(path), make(name)
    env.reset(seed=0)
    sim, result = env.unwrapped, []
    for i in range(len(recorded[f"{name}/rew"])):
        row = {key.removeprefix(f"{name}/"): recorded[key][i] for key in recorded if key.startswith(name)}
        env.reset()
        mujoco.mj_resetData(sim.model, sim.data)
        if name == "pen":
            sim.model.body_quat[sim.target_obj_body_id] = row["state/desired_orien"]
        elif name == "door":
            sim.model.body_pos[sim.door_body_id] = row["state/door_body_pos"]
        elif name == "hammer":
            sim.model.body_pos[sim.target_body_id] = row["state/board_pos"]
        else:  # obj_pos is where the ball is, after its slides
            sim.model.body_pos[sim.obj_body_id] = row["state/obj_pos"] - row["qpos"][-6:-3]
            sim.model.site_pos[sim.target_obj_site_id] = row["state/target_pos"]
        sim.set_state(row["qpos"], row["qvel"])
        obs, reward, terminated, _, _ = env.step(row["act"])
        result.append((np.abs(obs - row["obs2"]).max(), abs(reward - row["rew"]), terminated != row["done"]))
    return np.max(result, axis=0)


# ---- Adroit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", robotics.ADROIT)
@pytest.mark.parametrize("path", [PARITY, PARITY_ALL], ids=["24 rows", "100 rows"])
def test_steps_like_d4rl(name, path):
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    obs_error, reward_error, wrong = errors(name, path)
    assert obs_error < 1e-8 and reward_error < 1e-9 and not wrong


@pytest.mark.parametrize("name", WITH_BOXES)
def test_the_depth_in_boxes_is_needed(name, monkeypatch):
    monkeypatch.setattr(physics, "step", lambda model, data, steps: mujoco.mj_step(model, data, steps))
    assert errors(name)[0] > 1e-4


@pytest.mark.parametrize("name", ["pen", "hammer", "relocate"])
def test_old_contacts_are_needed(name, monkeypatch):
    monkeypatch.setattr(physics, "restore_contacts", lambda model: None)
    assert errors(name)[0] > 1e-4


def test_the_rewards_sign_is_needed(monkeypatch):
    monkeypatch.setattr(robotics.Adroit, "step", lambda self, action: self.env.step(action))
    assert min(errors(name)[1] for name in WITH_BOXES) > 0.03 and errors("pen")[1] < 1e-9


def test_pen_ends_at_the_drop():
    env, rng = make("pen"), np.random.default_rng(0)
    heights = [env.reset(seed=0)[0][26]]
    for _ in range(100):  # random actions drop it after about 50 steps
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 24))
        heights.append(obs[26])
        if terminated:
            break
    assert terminated and not truncated and min(heights[:-1]) >= 0.075 > heights[-1]
    assert reward < -4  # the step of the drop costs 5


@pytest.mark.parametrize("name, steps", {"pen": 100, "door": 200, "hammer": 200, "relocate": 200}.items())
def test_episodes(name, steps):
    def episode():
        env.action_space.seed(0)
        obs = [env.reset(seed=0)[0]]
        while True:
            next_obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            obs.append(next_obs)
            if terminated or truncated:
                return np.array(obs), terminated, truncated

    env = make(name)
    (obs, terminated, truncated), (again, _, _) = episode(), episode()
    assert np.array_equal(obs, again) and terminated == (name == "pen" and obs[-1][26] < 0.075)
    assert truncated == (len(obs) == steps + 1) and env.spec.max_episode_steps == steps


# ---- Kitchen ---------------------------------------------------------------------------------------------------------


def test_observations_of_the_kitchen():
    env = make("kitchen-mixed-v0")
    obs = np.array([env.reset(seed=0 if k == 0 else None)[0] for k in range(300)])
    assert obs[0] in env.observation_space and env.action_space.shape == (9,) and env.spec.max_episode_steps == 280
    noise = np.abs(obs[:, :30] - env.unwrapped.data.qpos)
    assert noise[:, :9].max(0) == pytest.approx(np.full(9, 0.01), rel=0.1)
    largest = np.repeat([5e-4, 5e-5, 5e-4, 0.01, 5e-4, 0.01, 5e-4], [2, 6, 3, 3, 3, 3, 1])
    assert noise[:, 9:].max(0) == pytest.approx(largest, rel=0.1) and np.all(noise[:, 9:].max(0) <= largest)
    assert abs(np.corrcoef((obs[:, 0], obs[:, 9]))[0, 1]) < 0.2
    goal = np.zeros(30)
    goal[[11, 12]], goal[[17, 18]], goal[22] = [-0.88, -0.01], [-0.69, -0.05], -0.75
    goal[23:] = [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]
    assert np.all(obs[:, 30:] == goal)
    goal[[11, 12]], goal[19] = 0, 0.37
    for name in ("kitchen-complete-v0", "kitchen-partial-v0"):
        assert np.array_equal(make(name).reset(seed=0)[0][30:], goal)


def test_rewards_and_end_of_the_kitchen():
    env = make("kitchen-complete-v0")
    obs, _ = env.reset(seed=0)
    sim, goal = env.unwrapped, obs[30:]

    def put(place):
        qpos = sim.data.qpos.copy()
        qpos[place] = goal[place]
        sim.robot_env.set_state(qpos, 0 * sim.data.qvel)
        return env.step(np.zeros(9))[1:3]

    assert env.step(np.zeros(9))[1:3] == (0, False)
    assert put([22]) == (1, False)  # the microwave
    assert put([22]) == (0, False)  # once only
    assert put([19]) == (1, False)
    assert put([17, 18]) == (1, False)
    assert put(range(23, 30)) == (1, True)
    env.reset()
    assert put([22]) == (1, False)


# ---- Both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pen", "kitchen-partial-v0"])
def test_equal_seeds(name):
    def episode(seed):
        env = make(name)
        obs = [env.reset(seed=seed)[0]]
        return np.array(obs + [env.step(np.full(env.action_space.shape, 0.1))[0] for _ in range(3)])

    assert np.array_equal(episode(1), episode(1)) and not np.array_equal(episode(1), episode(2))


@pytest.mark.parametrize("name", ["door", "kitchen-mixed-v0"])
def test_no_warning(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(name)
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, 2.0))
    assert capsys.readouterr() == ("", "")


def test_scores():
    assert environments.normalized_score(np.array([0, 1, 4]), "kitchen-mixed-v0").tolist() == [0, 25, 100]
    assert environments.normalized_score(3076.8331017826877, "pen-human-v1") == pytest.approx(100)
    assert environments.evaluation_env("kitchen-partial-v0", None) == "kitchen-partial-v0"
    assert environments.evaluation_env("door-cloned-v1", None) == "door"


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    for name in ("pen", "kitchen-mixed-v0"):
        with pytest.raises(UserError, match=f"{name} needs an optional package: pip install gymnasium-robotics==1.4.2"):
            make(name)


def test_another_version(monkeypatch):
    monkeypatch.setattr(robotics, "version", lambda package: "1.4.3")
    with pytest.raises(UserError, match="another version"):
        make("pen")
