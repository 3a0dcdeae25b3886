"""D4RL's mazes rebuilt on today's MuJoCo, AntMaze and Maze2D; and Maze2D's data, made anew.

AntMaze (`antmaze-large-play-v2`): a four-legged ant walks through a maze. Its reward is 1 at the goal, and there the
episode ends. Maze2D (`maze2d-large-v1`): a ball is pushed about in a maze seen from above. Its reward is 1 in each step
near the goal, or exp(-distance) in the `dense` tasks, and no step ends the episode before its time.

Rules and numbers are those of D4RL (Fu et al., arXiv:2004.07219); the physics is MuJoCo 2.1.0's, in which D4RL's scores
were made (see physics.py), but for one thing: there, nothing was ever deeper in a wall than its own radius. Only a limb
that crashes into a wall at 2 m/s or more would tell. `import common.mazes` registers every name with Gymnasium.
"""

import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

import gymnasium
import h5py
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from tqdm import trange

from common.physics import restore_capsules, restore_contacts

# Rows of cells; # is a wall. The ant walks from R to G. The ball starts in any free cell and has its goal at G too, but
# in umaze and eval-umaze at R.
MAPS = {
    "umaze": "##### #R..# ###.# #G..# #####",
    "medium": "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
    "open": "####### #.....# #..G..# #.....# #######",
    "eval-umaze": "##### #..R# #.### #..G# #####",
    "eval-medium": "######## #R....G# #.#.##.# #....#.# ###..### #......# #..##..# ########",
    "eval-large": "############ #R.#...#.G.# ##.###.#.#.# #..#.#.....# ##.#.#..##.# #......#...# ##.#.#.###.# "
    "#....#.....# ############",
}  # fmt: skip
GOAL_RADIUS = 0.5  # metres
WIDTH = {"ant": 4.0, "ball": 1.0}  # of a cell, in metres


class Task(NamedTuple):
    """What one of D4RL's names stands for."""

    kind: str  # ant or ball
    maze: str  # a key of MAPS
    max_steps: int  # the longest episode
    reference: tuple[float, float]  # the returns whose scores are 0 and 100
    dense: bool = False  # the ball's reward
    new_goals: bool = False  # the ant's goal: drawn at every reset, or once for an environment


def _ant_tasks() -> dict[str, Task]:
    """antmaze-*. `play` and `diverse` are one environment: their data differ."""
    tasks = {}
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        maze = name.split("-")[0]
        steps = 700 if maze == "umaze" else 1000
        for version in ("v0", "v1", "v2"):
            tasks[f"antmaze-{name}-{version}"] = Task("ant", maze, steps, (0.0, 1.0), new_goals=version == "v2")
        tasks[f"antmaze-eval-{name}-v0"] = Task("ant", f"eval-{maze}", steps, (0.0, 1.0))
    return tasks


BALL_TASKS = {  # maze and version: longest episode, reference returns of the sparse reward, of the dense one
    "open-v0": (150, (0.01, 20.66), (11.17817, 27.166538620695782)),
    "umaze-v0": (150, (0.94, 62.6), (23.249793, 81.78995240126592)),
    "medium-v0": (250, (5.77, 85.14), (19.47762, 96.03474232952358)),
    "large-v0": (600, (4.83, 191.99), (27.38831, 215.09965671563742)),
    "umaze-v1": (300, (23.85, 161.86), (68.537689, 193.66285642381482)),
    "medium-v1": (600, (13.13, 277.39), (44.264742, 297.4552547777125)),
    "large-v1": (800, (6.7, 273.99), (30.569041, 303.4857382709002)),
    "eval-umaze-v1": (300, (36.63, 141.4), (56.95455, 178.21373133248397)),
    "eval-medium-v1": (600, (13.07, 204.93), (42.28578, 235.5658957482388)),
    "eval-large-v1": (800, (16.4, 302.22), (56.95455, 326.09647655082637)),  # the same 56.95455 as eval-umaze, in D4RL
}
REMADE = [f"maze2d-{maze}{dense}-remade" for maze in ("umaze", "medium", "large") for dense in ("", "-dense")]


def _ball_tasks() -> dict[str, Task]:
    """maze2d-*."""
    tasks = {}
    for name, (steps, sparse, dense) in BALL_TASKS.items():
        maze, version = name.rsplit("-", 1)
        tasks[f"maze2d-{maze}-{version}"] = Task("ball", maze, steps, sparse)
        tasks[f"maze2d-{maze}-dense-{version}"] = Task("ball", maze, steps, dense, dense=True)
    return tasks | {name: tasks[name.replace("remade", "v1")] for name in REMADE}


TASKS = _ant_tasks() | _ball_tasks()


def walls(maze: str) -> np.ndarray:
    """(rows, columns), True where a wall is."""
    return np.array([[cell == "#" for cell in row] for row in MAPS[maze].split()])


def cell(maze: str, letter: str) -> np.ndarray:
    """(2,): row and column of R or G."""
    return np.argwhere([[cell == letter for cell in row] for row in MAPS[maze].split()])[0]


def wall_centres(task: Task) -> np.ndarray:
    """(W, 2): x and y of each wall's middle, in metres. Walls are squares, of WIDTH."""
    cells = np.argwhere(walls(task.maze))
    if task.kind == "ant":  # x grows with the column, y with the row, and R is at (0, 0)
        return WIDTH["ant"] * (cells - cell(task.maze, "R"))[:, ::-1]
    return cells - 0.2  # x is the row, y the column; a free cell reaches from -0.7 to +0.3 about its whole number


# ------------------------------------------------------------------------------------------------------------------
# The environments

BALL = """
<mujoco>
  <option timestep="0.01" gravity="0 0 0" iterations="20"/>
  <visual><headlight ambient=".6 .6 .6"/></visual>
  <default><geom friction=".5 .1 .1" margin=".002" condim="1"/></default>
  <worldbody>
    <geom type="plane" pos="0 0 -.1" size="40 40 1" contype="0" conaffinity="0" rgba=".8 .9 .8 1"/>
    <body name="ball">
      <geom type="sphere" size=".1" rgba=".2 .3 .8 1"/>
      <joint name="x" type="slide" axis="1 0 0" damping="1"/>
      <joint name="y" type="slide" axis="0 1 0" damping="1"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="y" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


class Maze(MujocoEnv):
    """What both have in common: walls, a goal `target` (2,), an observation of all positions and velocities."""

    def __init__(self, name: str, frame_skip: int, render_mode: str | None):
        self.task, self.target = TASKS[name], None
        centres = wall_centres(self.task)
        low, high = centres.min(0), centres.max(0)
        distance = 1.3 * (max(high - low) + WIDTH[self.task.kind])
        camera = {"lookat": np.array([*(low + high) / 2, 0]), "distance": distance, "azimuth": 90, "elevation": -90}
        # the file is the ant's; the ball has none, and MujocoEnv only looks whether there is one
        super().__init__("ant.xml", frame_skip, None, render_mode, default_camera_config=camera)
        self.observation_space = Box(-np.inf, np.inf, (self.model.nq + self.model.nv,), np.float64)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        spec, half = self.agent(), WIDTH[self.task.kind] / 2
        z, half_height = (1.0, 1.0) if self.task.kind == "ant" else (0.0, 0.2)
        box = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=[half, half, half_height], rgba=[0.6, 0.5, 0.4, 1])
        for x, y in wall_centres(self.task):
            spec.worldbody.add_geom(pos=[x, y, z], contype=1, conaffinity=1, **box)
        goal = dict(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[GOAL_RADIUS, 0.01, 0], rgba=[0.1, 0.8, 0.2, 1])
        spec.worldbody.add_site(**goal)  # it is drawn, but nothing touches it
        model = spec.compile()
        self.restore(model, spec)
        return model, mujoco.MjData(model)

    def at_goal(self) -> bool:
        return np.linalg.norm(self.data.qpos[:2] - self.target) <= GOAL_RADIUS

    def render(self):
        self.data.site_xpos[0, :2] = self.target
        return super().render()


class AntMaze(Maze):
    """Observation (29,): position and velocity. Action (8,) in [-1, 1]. The goal is not observed: learn it from data.

    With a seed, `reset` draws a new goal in every version, as a new environment would.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 10}

    def __init__(self, name: str, render_mode: str | None = None):
        super().__init__(name, 5, render_mode)

    def agent(self) -> mujoco.MjSpec:
        """Gymnasium's ant, but for the three things in which D4RL's differs."""
        spec = mujoco.MjSpec.from_file(self.fullpath)
        spec.option.timestep = 0.02
        for motor in spec.actuators:
            motor.gear[0] = 30
        for geom in spec.geoms:
            geom.solimp = [0.8, 0.8, 0.01, 0.5, 2]
        spec.default.geom.solimp = [0.8, 0.8, 0.01, 0.5, 2]  # for the walls
        spec.delete(spec.camera("track"))  # the maze is seen from above
        return spec

    def restore(self, model: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
        restore_capsules(model, spec)
        restore_contacts(model)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None or self.task.new_goals:
            self.target = None
        return super().reset(seed=seed, options=options)

    def reset_model(self) -> np.ndarray:
        if self.target is None:  # beyond the middle of G, in both directions: D4RL's noise is never negative
            middle = WIDTH["ant"] * (cell(self.task.maze, "G") - cell(self.task.maze, "R"))[::-1]
            self.target = np.maximum(0, middle + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2))
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, 15)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])  # the torso's orientation, a quaternion
        self.set_state(qpos, self.np_random.normal(0, 0.1, 14))
        return self.state_vector()

    def step(self, action: np.ndarray):
        self.do_simulation(action, self.frame_skip)
        terminated = bool(self.at_goal())
        return self.state_vector(), float(terminated), terminated, False, {}


class Maze2D(Maze):
    """Observation (4,): position and velocity. Action (2,) in [-1, 1]: force. An episode ends after its steps only."""

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 100}

    def __init__(self, name: str, render_mode: str | None = None):
        super().__init__(name, 1, render_mode)
        maze = self.task.maze
        self.target = cell(maze, "R" if maze.endswith("umaze") else "G").astype(float)
        self.free = np.argwhere(~walls(maze))  # (C, 2)

    def agent(self) -> mujoco.MjSpec:
        return mujoco.MjSpec.from_string(BALL)

    def restore(self, model: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
        restore_contacts(model)
        # how easily contacts move the ball: 2.1.0 took the mean over x, y and z, and along z it is fixed
        model.body_invweight0[1, 0] = 2 / 3 / model.body_mass[1]

    def reset_model(self) -> np.ndarray:
        start = self.free[self.np_random.integers(len(self.free))]
        self.set_state(start + self.np_random.uniform(-0.1, 0.1, 2), self.np_random.normal(0, 0.1, 2))
        return self.state_vector()

    def simulate(self, action) -> None:
        """One step of 0.01 s. The speed is limited before it: afterwards it may be a little above 5 m/s."""
        self.data.ctrl[:] = action
        np.clip(self.data.qvel, -5, 5, out=self.data.qvel)
        mujoco.mj_step(self.model, self.data)

    def step(self, action: np.ndarray):
        self.simulate(action)
        if self.task.dense:
            reward = float(np.exp(-np.linalg.norm(self.data.qpos - self.target)))
        else:
            reward = float(self.at_goal())
        return self.state_vector(), reward, False, False, {}


for name, task in TASKS.items():
    env_type = AntMaze if task.kind == "ant" else Maze2D
    gymnasium.register(name, env_type, max_episode_steps=task.max_steps, kwargs={"name": name})


# ------------------------------------------------------------------------------------------------------------------
# Maze2D's data, made anew


class Controller:
    """D4RL's controller of the ball: from cell to cell along a shortest path, until it rests in the target's cell.

    It plans only when the target's cell is another one than before. A user who keeps one controller over episodes with
    the same goal, as D4RL did for its reference returns, sees it push straight at the goal from the second episode on.
    """

    STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # of equally short ways the first in this order

    def __init__(self, maze: str, rng: np.random.Generator):
        self.rng, self.free, self.goal = rng, [tuple(c) for c in np.argwhere(~walls(maze)).tolist()], None

    def act(self, x: float, y: float, vx: float, vy: float, target: tuple[float, float]) -> tuple[float, float, bool]:
        """Position, velocity, target -> the action, before noise, and whether the ball rests in the target's cell."""
        goal = (round(target[0]), round(target[1]))
        if goal != self.goal:
            self.plan(x, y, goal)
        slow = math.hypot(x - self.before[0], y - self.before[1]) < 0.1
        solved = slow and math.hypot(x - goal[0], y - goal[1]) < 0.1
        ahead = goal if solved else self.way[0]
        if slow and not solved and math.hypot(x - ahead[0], y - ahead[1]) < 0.1:
            self.way.popleft()
        self.before = (x, y)
        return _clip(10 * (ahead[0] - x) - vx), _clip(10 * (ahead[1] - y) - vy), solved

    def plan(self, x: float, y: float, goal: tuple[int, int]) -> None:
        """Set `way`, the points to pass on a shortest path to the goal, by breadth-first search from the goal."""
        distance, queue = {goal: 0}, deque([goal])
        while queue:
            last = queue.popleft()
            for cell in [cell for cell in self.neighbours(last) if cell not in distance]:
                distance[cell] = distance[last] + 1
                queue.append(cell)
        here = min(self.free, key=lambda cell: math.hypot(x - cell[0], y - cell[1]))
        self.goal, self.before, self.way = goal, here, deque()
        while here != goal:
            here = min(self.neighbours(here), key=distance.get)
            # whole numbers lie off the middle of a cell, so D4RL moves the points towards it, but for the last
            dx, dy = self.rng.uniform(0, 0.2, 2).tolist() if here != goal else (0, 0)
            self.way.append((here[0] - dx, here[1] - dy))
        self.way = self.way or deque([goal])

    def neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        cells = [(cell[0] + i, cell[1] + j) for i, j in self.STEPS]
        return [cell for cell in cells if cell in self.free]


def _clip(force: float) -> float:
    return max(-1.0, min(1.0, force))


def generate(name: str, path: Path, rows: int = 1_000_000, seed: int = 0) -> None:
    """Write data for a name of REMADE to `path`, in D4RL's layout, by D4RL's recipe; the same ones for one seed.

    The ball is never reset: when it rests at a target, another one is drawn, and the row is marked as a timeout. These
    are not D4RL's files byte for byte, which have other random numbers, but they are made in the same way, with its
    oddities: the row after a mark repeats the observation of the marked row, and the action answers that old one; a
    reward is that of a row's own observation, not of the next one; every action carries noise of deviation 0.5, as the
    published umaze file's do. Rewards know nothing of the targets: they are those of the task's one goal.
    """
    task, rng, sim = TASKS[name], np.random.default_rng(seed), Maze2D(name)
    controller, qpos, qvel = Controller(task.maze, rng), sim.data.qpos, sim.data.qvel
    sizes = {"observations": 4, "actions": 2, "infos/goal": 2, "infos/qpos": 2, "infos/qvel": 2}
    data = {key: np.zeros((rows, size), np.float32) for key, size in sizes.items()}
    data |= {"terminals": np.zeros(rows, bool), "timeouts": np.zeros(rows, bool)}
    noise = rng.normal(0, 0.5, (rows, 2))

    def new_target() -> tuple[float, float]:
        return tuple((sim.free[rng.integers(len(sim.free))] + rng.uniform(-0.1, 0.1, 2)).tolist())

    state, target, steps = sim.reset(seed=seed)[0].tolist(), new_target(), 0
    for t in trange(rows, desc=f"making {name}", unit="row", unit_scale=True):
        force_x, force_y, solved = controller.act(*state, target)
        action = (_clip(force_x + noise[t, 0]), _clip(force_y + noise[t, 1]))
        over = solved or steps >= task.max_steps
        for key, value in zip(data, (state, action, target, qpos, qvel)):
            data[key][t] = value
        data["timeouts"][t] = over
        sim.simulate(action)
        if over:
            target, steps = new_target(), 0
        else:
            state, steps = [*qpos.tolist(), *qvel.tolist()], steps + 1

    distance = np.linalg.norm(data["observations"][:, :2] - sim.target, axis=1)
    data["rewards"] = (np.exp(-distance) if task.dense else distance <= GOAL_RADIUS).astype(np.float32)
    with h5py.File(path, "w") as file:
        for key, array in data.items():
            file.create_dataset(key, data=array, compression="gzip")


# ------------------------------------------------------------------------------------------------------------------
# The picture


def picture(name: str, positions: np.ndarray, trajectories: list[np.ndarray], goals: list[np.ndarray]) -> Figure:
    """The maze from above: walls, the data's positions (N, 2) in grey, each trajectory (T, 2) in colour, goals (2,).

    Positions are the first two numbers of an observation, in metres. At most 20,000 of the data are drawn.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    draw(figure.subplots(), name, positions, trajectories, goals)
    return figure


def draw(axes: Axes, name: str, positions: np.ndarray, trajectories: list[np.ndarray], goals: list[np.ndarray]) -> None:
    """What `picture` shows, on `axes`."""
    task, width = TASKS[name], WIDTH[TASKS[name].kind]
    for centre in wall_centres(task):
        axes.add_patch(Rectangle(centre - width / 2, width, width, color="0.3", linewidth=0))
    axes.scatter(*positions[:: len(positions) // 20_000 + 1].T, s=0.5, color="0.75", linewidths=0, rasterized=True)
    for k, trajectory in enumerate(trajectories):
        axes.plot(*trajectory.T, color=f"C{k}", linewidth=1)
        axes.plot(*trajectory[0], "o", color=f"C{k}", markersize=4)
    for goal in np.unique(np.reshape(goals, (-1, 2)), axis=0):
        axes.add_patch(Circle(goal, GOAL_RADIUS, color="tab:green", alpha=0.3, linewidth=0))
    axes.set(title=name, xlabel="x in metres", ylabel="y in metres", aspect="equal")
    axes.autoscale_view()
