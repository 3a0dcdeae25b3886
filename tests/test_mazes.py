"""common/mazes.py: steps and rollouts against D4RL's own mazes, resets, names, Maze2D's data, the picture."""

from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest

from common import environments, mazes
from common.environments import make, normalized_score

# Single steps recorded in D4RL's own environments (mujoco_py, MuJoCo 2.1.0), as f"{task}/{key}" with the keys qpos,
# qvel, act, target -> obs2, rew, done (Maze2D: rew_dense); kind is 0 for random actions, 1 for a drive into a wall, 2
# for a ball set down in a wall. f"{task}/roll0/{key}" is a rollout of 200 steps from the reset distribution. Rows of
# the fixture: at random of those in reach (nothing deeper in a wall than its radius), most of them touch a wall;
# the rollout's positions are every 20th.
PARITY = Path(__file__).parent / "data" / "parity_mazes.npz"
PARITY_ALL = Path(__file__).parents[2] / "shared" / "data" / "parity_mazes.npz"
RECORDED = {  # task: one of its names
    "antmaze-umaze": "antmaze-umaze-v2",
    "antmaze-medium": "antmaze-medium-play-v2",
    "antmaze-large": "antmaze-large-diverse-v2",
    "maze2d-umaze": "maze2d-umaze-v1",
    "maze2d-medium": "maze2d-medium-v1",
    "maze2d-large": "maze2d-large-v1",
}
ANT = [task for task in RECORDED if task.startswith("antmaze")]
BALL = [task for task in RECORDED if task.startswith("maze2d")]


def environment(task):
    return make(RECORDED[task])


def errors(env, task, recorded):
    """One step from each recorded state -> errors of next obs (N,) and reward (N,), wrong terminations (N,)."""
    qpos, qvel, act, target = (recorded[f"{task}/{key}"] for key in ("qpos", "qvel", "act", "target"))
    obs2, done = recorded[f"{task}/obs2"], recorded[f"{task}/done"]
    rew = recorded[f"{task}/rew_dense" if env.unwrapped.task.dense else f"{task}/rew"]
    result = np.zeros((3, len(rew)))
    for i in range(len(rew)):
        start(env, qpos[i], qvel[i])
        env.unwrapped.target = target[i]
        obs, reward, terminated, _, _ = env.step(act[i])
        result[:, i] = np.abs(obs - obs2[i]).max(), abs(reward - rew[i]), terminated != done[i]
    return result


def start(env, qpos, qvel):
    env.reset(seed=0)
    mujoco.mj_resetData(env.unwrapped.model, env.unwrapped.data)
    env.unwrapped.set_state(qpos, qvel)


# ---- D4RL's physics and rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", RECORDED)
def test_steps_like_d4rl(task):
    obs_error, reward_error, wrong = errors(environment(task), task, np.load(PARITY))
    assert obs_error.max() < 1e-9 and reward_error.max() < 1e-9 and not wrong.any()


@pytest.mark.parametrize("task", BALL)
def test_dense_rewards_like_d4rl(task):
    obs_error, reward_error, _ = errors(make(RECORDED[task].replace("-v1", "-dense-v1")), task, np.load(PARITY))
    assert obs_error.max() < 1e-9 and reward_error.max() < 1e-9


@pytest.mark.parametrize("task", RECORDED)
def test_all_recorded_steps(task):
    """Out of reach are the steps in which something gets deeper in a wall than its radius."""
    if not PARITY_ALL.exists():
        pytest.skip(f"{PARITY_ALL.name} is not here")
    recorded = np.load(PARITY_ALL)
    obs_error, reward_error, wrong = errors(environment(task), task, recorded)
    kind, depth = recorded[f"{task}/kind"], -recorded[f"{task}/dist"]  # at the start of the step
    if task in BALL:
        assert obs_error[depth < 0.0999].max() < 1e-9
    else:  # a step has 20 stages, and the depth in them is not recorded
        assert obs_error[kind == 0].max() < 1e-9 and np.mean(obs_error[kind == 1] > 1e-9) < 0.02
    reached = obs_error < 1e-9
    assert np.mean(reached[kind < 2]) > 0.9 and reward_error[reached].max() < 1e-9 and not wrong[reached].any()


@pytest.mark.parametrize("task", RECORDED)
def test_rollouts_like_d4rl(task):
    recorded, env = np.load(PARITY), environment(task)
    act, qpos = recorded[f"{task}/roll0/act"], recorded[f"{task}/roll0/qpos"]
    start(env, qpos[0], recorded[f"{task}/roll0/qvel"][0])
    for step, action in enumerate(act, 1):
        obs, *_ = env.step(action)
        if step % 20 == 0:
            assert obs[: qpos.shape[1]] == pytest.approx(qpos[step // 20], abs=1e-6)
    assert step == 200


@pytest.mark.parametrize("task", ANT)
@pytest.mark.parametrize("correction", ["restore_capsules", "restore_contacts"])
def test_the_ant_needs_each_correction(task, correction, monkeypatch):
    monkeypatch.setattr(mazes, correction, lambda *_: None)
    assert errors(environment(task), task, np.load(PARITY))[0].max() > 1e-3


@pytest.mark.parametrize("task", BALL)
def test_the_ball_needs_each_correction(task, monkeypatch):
    env = environment(task)
    env.unwrapped.model.body_invweight0[1, 0] *= 3 / 2
    assert errors(env, task, np.load(PARITY))[0].max() > 1e-3
    monkeypatch.setattr(mazes, "restore_contacts", lambda model: None)
    assert errors(environment(task), task, np.load(PARITY))[0].max() > 1e-3


def test_masses():
    """Of the torso, the legs and the ankles, in MuJoCo 2.1.0."""
    mass = make("antmaze-umaze-v2").unwrapped.model.body_mass
    assert mass[1:5] == pytest.approx([0.3272492347, 0.036476928, 0.036476928, 0.0649113788])
    assert make("maze2d-open-v0").unwrapped.model.body_mass[1] == pytest.approx(4.1887902)


def test_the_worlds_boxes_are_left_alone():
    """Else every wall would be looked at in every step: on antmaze-large that costs half as much again."""
    model = make("antmaze-large-play-v2").unwrapped.model
    world = model.body_bvhnum[0]
    assert np.median(model.bvh_aabb[:world, 3:]) == 2 and np.all(model.bvh_aabb[world:, 3:] == 100)


# ---- Resets, goals, ends ---------------------------------------------------------------------------------------------


def test_starts_and_goals_of_the_ant():
    env = make("antmaze-medium-play-v2")
    resets = [(env.reset(seed=0 if k == 0 else None)[0], env.unwrapped.target) for k in range(2000)]
    obs, goals = (np.array(column) for column in zip(*resets))
    noise = obs[:, :15] - env.unwrapped.init_qpos
    assert np.linalg.norm(obs[:, 3:7], axis=1) == pytest.approx(np.ones(2000), abs=1e-12)
    noise = np.delete(noise, [3, 4, 5, 6], axis=1)  # the quaternion is normalised
    assert 0.0999 < np.abs(noise).max() <= 0.1
    assert noise.mean(0) == pytest.approx(np.zeros(11), abs=0.006) and noise.std() == pytest.approx(0.0577, abs=0.001)
    assert 0.09 < np.abs(obs[:, 4:7]).max() < 0.12 and obs[:, 4:7].std() == pytest.approx(0.0577, abs=0.002)
    assert obs[:, 15:].mean(0) == pytest.approx(np.zeros(14), abs=0.01)
    assert obs[:, 15:].std() == pytest.approx(0.1, abs=0.002)
    beyond = goals - [20, 20]
    assert beyond.min() >= 0 and 1.4 < beyond.max() < 1.5
    assert beyond.mean(0) == pytest.approx([0.75, 0.75], abs=0.03) and beyond.std() == pytest.approx(0.323, abs=0.01)
    assert abs(np.corrcoef(beyond.T)[0, 1]) < 0.1


@pytest.mark.parametrize(
    "name, middle",
    {
        "antmaze-umaze-v2": (0, 8),
        "antmaze-large-diverse-v2": (32, 24),
        "antmaze-eval-umaze-v0": (0, 8),
        "antmaze-eval-medium-diverse-v0": (20, 0),
        "antmaze-eval-large-play-v0": (32, 0),
    }.items(),
)
def test_goals_of_the_other_mazes(name, middle):
    env = make(name)
    goals = []
    for seed in range(100):
        env.reset(seed=seed)
        goals.append(env.unwrapped.target)
    beyond = np.array(goals) - middle
    assert beyond.min() >= 0 and beyond.max() < 1.5 and beyond.mean() == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("version, new", [("v0", False), ("v1", False), ("v2", True)])
def test_a_new_goal_at_every_reset_only_in_v2(version, new):
    env = make(f"antmaze-umaze-diverse-{version}")
    env.reset(seed=0)
    first = env.unwrapped.target
    env.reset()
    assert np.array_equal(first, env.unwrapped.target) != new


def test_starts_and_goals_of_the_ball():
    env = make("maze2d-umaze-v1")
    obs = np.array([env.reset(seed=0 if k == 0 else None)[0] for k in range(2000)])
    cells, counts = np.unique(np.rint(obs[:, :2]), axis=0, return_counts=True)
    assert cells.tolist() == [[1, 1], [1, 2], [1, 3], [2, 3], [3, 1], [3, 2], [3, 3]]
    assert counts == pytest.approx(np.full(7, 2000 / 7), abs=60)
    noise = obs[:, :2] - np.rint(obs[:, :2])
    assert 0.0999 < np.abs(noise).max() <= 0.1 and noise.mean(0) == pytest.approx([0, 0], abs=0.005)
    assert obs[:, 2:].mean(0) == pytest.approx([0, 0], abs=0.01) and obs[:, 2:].std() == pytest.approx(0.1, abs=0.005)
    goals = {"umaze-v1": (1, 1), "medium-v1": (6, 6), "large-v1": (7, 9), "open-v0": (2, 3)}
    goals |= {"eval-umaze-v1": (1, 3), "eval-medium-v1": (1, 6), "eval-large-v1": (1, 9)}
    for name, goal in goals.items():
        assert tuple(make(f"maze2d-{name}").unwrapped.target) == goal


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "antmaze-umaze-v0", "maze2d-medium-dense-v1"])
def test_equal_seeds_give_equal_episodes(name):
    def episode(env, seed):
        rng = np.random.default_rng(0)
        obs = [env.reset(seed=seed)[0]]
        obs += [env.step(rng.uniform(-1, 1, env.action_space.shape))[0] for _ in range(10)]
        return np.array(obs), env.unwrapped.target

    env = make(name)
    (one, goal), (other, _), (again, same_goal) = episode(env, 3), episode(make(name), 4), episode(env, 3)
    assert np.array_equal(one, again) and np.array_equal(goal, same_goal) and not np.array_equal(one, other)


def test_an_episode_ends_at_the_goal():
    env = make("antmaze-umaze-v2")
    env.reset(seed=0)
    env.unwrapped.target = np.array([0.0, 0.0])
    assert env.step(np.zeros(8))[1:3] == (1.0, True)
    env.unwrapped.target = np.array([0.0, 0.7])
    assert env.step(np.zeros(8))[1:3] == (0.0, False)


@pytest.mark.parametrize(
    "name, steps", {"antmaze-umaze-v0": 700, "antmaze-large-play-v2": 1000, "maze2d-open-v0": 150,
    "maze2d-umaze-v1": 300, "maze2d-umaze-v0": 150, "maze2d-medium-remade": 600, "maze2d-large-v0": 600,
    "maze2d-large-dense-v1": 800}.items(),
)  # fmt: skip
def test_time_limit(name, steps):
    assert make(name).spec.max_episode_steps == steps
    if name == "maze2d-open-v0":
        env = make(name)
        env.reset(seed=0)
        assert [env.step(np.zeros(2))[2:4] for _ in range(150)] == [(False, False)] * 149 + [(False, True)]


# ---- Names and scores ------------------------------------------------------------------------------------------------


def test_every_name():
    assert sum(name.startswith("antmaze") for name in mazes.TASKS) == 24
    assert sum(name.startswith("maze2d") for name in mazes.TASKS) == 26
    table = Path(environments.__file__).with_name("d4rl_tasks.tsv").read_text().splitlines()
    names = [line.split("\t")[0] for line in table if line.startswith(("antmaze", "maze2d"))]
    assert len(names) == 20
    for name in [*names, *mazes.TASKS]:
        env = make(name)
        obs, _ = env.reset(seed=0)
        assert obs in env.observation_space and normalized_score(0.5, name) is not None
        assert environments.evaluation_env(name, None) == name.replace("remade", "v1")


def test_scores():
    assert normalized_score(np.array([0.0, 0.25, 1.0]), "antmaze-large-play-v2").tolist() == [0, 25, 100]
    for name in ("maze2d-umaze-v1", "maze2d-umaze-remade"):
        assert normalized_score(np.array([23.85, 161.86]), name) == pytest.approx([0, 100])
    assert normalized_score(44.264742, "maze2d-medium-dense-remade") == pytest.approx(0)
    assert normalized_score(0.94, "maze2d-umaze-v0") == pytest.approx(0)


# ---- Maze2D's data and its controller --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    path = tmp_path_factory.mktemp("remade") / "umaze.hdf5"
    mazes.generate("maze2d-umaze-remade", path, 300_000)
    with h5py.File(path) as file:
        return {key: file[key][:] for key in ("observations", "actions", "rewards", "terminals", "timeouts")} | {
            key: file[f"infos/{key}"][:] for key in ("goal", "qpos", "qvel")
        }


def test_remade_statistics(remade):
    """D4RL's umaze-v1 has 80.26 rows an episode; the recipe gives 80.7, within 1.3 (two deviations) in so few rows."""
    assert 300_000 / remade["timeouts"].sum() == pytest.approx(80.5, abs=2)
    assert np.mean(np.abs(remade["actions"]) == 1, axis=0) == pytest.approx([0.28, 0.34], abs=0.02)
    assert np.diff(np.flatnonzero(remade["timeouts"])).max() <= 301 and not remade["terminals"].any()


def test_remade_rows(remade):
    obs, marks = remade["observations"], np.flatnonzero(remade["timeouts"][:-1])
    state = np.concatenate([remade["qpos"], remade["qvel"]], 1)
    stale = np.zeros(len(obs), bool)
    stale[marks + 1] = True
    assert np.array_equal(obs[~stale], state[~stale]) and np.array_equal(obs[marks + 1], obs[marks])
    assert not np.array_equal(state[marks + 1], state[marks])
    at_goal = np.linalg.norm(obs[:, :2] - [1, 1], axis=1) <= 0.5
    assert np.array_equal(remade["rewards"], at_goal) and 0.05 < at_goal.mean() < 0.1
    moved = np.any(np.diff(remade["goal"], axis=0) != 0, axis=1)
    assert np.array_equal(np.flatnonzero(moved), marks)  # a target lasts until its mark
    resting = np.linalg.norm(remade["qpos"][marks] - np.rint(remade["goal"][marks]), axis=1)
    assert resting.max() < 0.1


def test_remade_is_the_same_for_one_seed(tmp_path):
    def rows(name, seed):
        mazes.generate(name, tmp_path / "data.hdf5", 2000, seed)
        with h5py.File(tmp_path / "data.hdf5") as file:
            return file["observations"][:], file["rewards"][:]

    (one, sparse), (again, dense) = rows("maze2d-large-remade", 0), rows("maze2d-large-dense-remade", 0)
    assert np.array_equal(one, again) and not np.array_equal(one, rows("maze2d-large-remade", 1)[0])
    assert dense == pytest.approx(np.exp(-np.linalg.norm(one[:, :2] - [7, 9], axis=1))) and set(sparse) <= {0, 1}


def test_ways():
    rng = np.random.default_rng(0)
    controller = mazes.Controller("open", rng)
    controller.plan(1.0, 1.0, (2, 3))
    assert [(round(x + 0.1), round(y + 0.1)) for x, y in controller.way] == [(1, 2), (1, 3), (2, 3)]
    assert controller.way[-1] == (2, 3)  # exactly, the others are moved by up to 0.2
    controller.plan(3.0, 5.0, (2, 3))
    assert [(round(x + 0.1), round(y + 0.1)) for x, y in controller.way] == [(3, 4), (3, 3), (2, 3)]
    controller.plan(2.1, 3.1, (2, 3))
    assert list(controller.way) == [(2, 3)]
    large, longest = mazes.Controller("large", rng), 0
    for x, y in large.free:
        for goal in large.free:
            large.plan(x, y, goal)
            longest = max(longest, len(large.way))
    assert longest == 19


def returns(policy):
    """Of 100 episodes in maze2d-umaze-v1; policy: obs, goal, rng -> action."""
    env, rng, total = make("maze2d-umaze-v1").unwrapped, np.random.default_rng(0), np.zeros(100)
    for episode in range(100):
        obs, _ = env.reset(seed=episode)
        for _ in range(300):
            obs, reward, *_ = env.step(policy(obs, env.target, rng))
            total[episode] += reward
    return total


def test_scores_of_the_controller_and_of_a_random_policy():
    """D4RL's own scripts, 100 episodes: 149.6 +- 13 and 25.4 +- 5; the reference returns are 161.86 and 23.85."""
    controller = mazes.Controller("umaze", np.random.default_rng(0))
    total = returns(lambda obs, goal, rng: np.array(controller.act(*obs.tolist(), tuple(goal))[:2]))
    assert total.mean() == pytest.approx(161, abs=30) and 0.25 < np.mean(total == 0) < 0.55
    assert returns(lambda obs, goal, rng: rng.uniform(-1, 1, 2)).mean() == pytest.approx(27, abs=10)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_picture(remade, tmp_path):
    positions = remade["observations"][:, :2]
    figure = mazes.picture("maze2d-umaze-remade", positions, [positions[:200], positions[500:600]], [np.ones(2)])
    (axes,) = figure.axes
    rectangles = [patch for patch in axes.patches if hasattr(patch, "get_width") and hasattr(patch, "get_xy")]
    assert len(rectangles) == 18 and len(axes.patches) == 19
    for wall in rectangles:  # the ball's middle is never in a wall
        low = np.array(wall.get_xy())
        assert not np.all((positions > low + 0.03) & (positions < low + wall.get_width() - 0.03), axis=1).any()
    low, high = axes.viewLim.min, axes.viewLim.max
    assert np.all(low < -0.6) and np.all(high > 4.2)
    figure.savefig(tmp_path / "maze.png")
    assert (tmp_path / "maze.png").stat().st_size > 5000


def test_walls_of_the_ant_are_where_its_model_has_them():
    for name in ("antmaze-large-play-v2", "maze2d-large-v1"):
        model = make(name).unwrapped.model
        boxes = model.geom_pos[model.geom_type == mujoco.mjtGeom.mjGEOM_BOX]
        assert boxes[:, :2] == pytest.approx(mazes.wall_centres(mazes.TASKS[name]))


@pytest.mark.parametrize(
    "name, left, right", [("antmaze-umaze-v2", (0, 0), (6, 0)), ("maze2d-umaze-v1", (1, 3), (3, 3))]
)
def test_the_goal_is_drawn_where_it_is(name, left, right, monkeypatch):
    if (renderer := environments.renderer()) is None:
        pytest.skip("MuJoCo can't draw here")
    monkeypatch.setenv("MUJOCO_GL", renderer)
    env, found = make(name, "rgb_array"), []
    env.reset(seed=0)
    for target in (left, right):
        env.unwrapped.target = np.array(target)
        red, green, blue = env.render().astype(int).transpose(2, 0, 1)
        found.append(np.argwhere((green > red + 60) & (green > blue + 60)).mean(0))  # pixel row, column
    env.close()
    assert found[1][1] > found[0][1] + 20 and abs(found[1][0] - found[0][0]) < 15  # x grows to the right


def test_gymnasium_knows_the_names():
    assert gymnasium.make("antmaze-medium-diverse-v2").spec.max_episode_steps == 1000
