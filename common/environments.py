"""A D4RL name, Gymnasium id or Minari dataset -> the environment to score a policy in; the score; and a video.

D4RL's scores are returns in MuJoCo 2.1.0. Gymnasium's -v4 environments pose the same tasks on today's MuJoCo, where two
things differ: the inertia of a capsule and the margin of a contact. That can halve a score: one Hopper policy has
73.0 in D4RL's own environment, 34.6 in Hopper-v4 as shipped, 73.0 in `make("hopper")`, which undoes both differences
(common/physics.py). AntMaze and Maze2D are in common/mazes.py, Adroit and Kitchen in common/robotics.py.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box, Dict, Space, flatten_space
from gymnasium.wrappers import FlattenObservation, RescaleAction, TransformAction, TransformObservation

from common import UserError, mazes, robotics
from common.physics import restore_capsules, restore_contacts

LIMIT = 1000  # steps of an episode in an environment that has no limit of its own
MINARI = "minari:"  # before the name of a dataset of the optional package minari
LOCOMOTION = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
LOCOMOTION["halfcheetah-demo"] = "HalfCheetah-v4"  # another score, the same task

ENVIRONMENTS = {  # name: mean returns of a random policy and of an expert, from D4RL's infos.py
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "halfcheetah-demo": (-280.178953, 3484.0),  # our own scale: 100 is the policy behind the data, on 50 episodes
}
ENVIRONMENTS |= {name: task.reference for name, task in mazes.TASKS.items()}
ENVIRONMENTS |= dict.fromkeys(robotics.KITCHEN, (0.0, 4.0))


def task(dataset_name: str) -> str | None:
    """The key of ENVIRONMENTS that D4RL scores this dataset in, None for other names.

    `halfcheetah-medium-expert-v2` -> `halfcheetah`, `maze2d-umaze-remade` -> `maze2d-umaze-v1`; a maze's own name.
    """
    name, first = dataset_name.replace("-remade", "-v1"), dataset_name.split("-")[0]
    return name if name in ENVIRONMENTS else first if first in ENVIRONMENTS else None


def evaluation_env(env: str, eval_env: str | None) -> str | None:
    """What `make` takes to score a policy of the dataset `env`: `eval_env` if given, else by its name, else None.

    Raises UserError as `make` does, and if a first step fails; says so in a line if there is no environment.
    """
    if env == "bandit":
        return None
    from_minari = env.startswith(MINARI) and minari_dataset(env)
    file = Path(env).suffix or os.path.isfile(env)  # a file's name says nothing about its data
    name = eval_env or (env if from_minari else None if file else task(env))
    try:
        if name is None:
            raise UserError("no environment for it is known here; --eval-env names one")
        envs = gymnasium.vector.SyncVectorEnv([partial(make, name)])
        with contextlib.closing(envs), blamed(name, "fails in its first step"):  # now, not after hours of training
            envs.reset(seed=0)
            envs.step(envs.action_space.sample())
    except UserError as error:
        if name and (eval_env or not from_minari):
            raise
        print(f"{env} is trained without a score (see --eval-env): {error}")
        return None
    return name


def normalized_score(returns: float | np.ndarray, name: str) -> float | np.ndarray | None:
    """D4RL's score (Fu et al., arXiv:2004.07219): 0 for a random policy, 100 for an expert.

    `returns` are undiscounted, unscaled sums of reward, of any shape, in `make(name)` or in a D4RL dataset `name`. None
    for a name without reference returns, such as a Gymnasium id; a Minari dataset brings its own, or none.
    """
    if name.startswith(MINARI):
        metadata = minari_dataset(name).storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    else:
        low, high = ENVIRONMENTS.get(task(name), (None, None))
    return None if None in (low, high) else 100 * (returns - low) / (high - low)


@contextlib.contextmanager
def blamed(name: str, what: str) -> Iterator[None]:
    """Whatever the code of an environment raises within is a UserError: `name` does `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"the environment {name!r} {what} ({reason}); mend that, or give another") from error


def make(name: str, render_mode: str | None = None, own_units: bool = False) -> gymnasium.Env:
    """The environment of a D4RL task (a key of ENVIRONMENTS), of a Gymnasium id (`Pendulum-v1`, `module:Id-v0`), or of
    a local Minari dataset (`minari:NAME`), as its metadata has it.

    Observations are (O,); a Dict is flattened as by FlattenObservation. Actions are (A,) in [-1, 1]. They are clipped
    before they reach the environment, so that its control cost is that of the clipped action, as in D4RL, and rescaled
    to its bounds; with `own_units` neither is done. An episode has at most 1000 steps in locomotion, 100 in pen, 200 in
    the rest of Adroit, 280 in Kitchen; mazes differ.

    Raises UserError: no such environment; a package it needs is missing; observations or actions that are no vectors,
    or actions without bounds.
    """
    options = {"render_mode": render_mode} if render_mode else {}  # plain environments don't know this word
    with blamed(name, "can't be made"), warnings.catch_warnings():
        # old on purpose: locomotion's -v5 has other rewards and frictions than D4RL
        warnings.filterwarnings("ignore", r".*-v\d is out of date", DeprecationWarning)
        if name.startswith(MINARI):
            env = minari_dataset(name).recover_environment(eval_env=True, **options)
        elif name in robotics.ADROIT or name in robotics.KITCHEN:
            env = robotics.make(name, render_mode)
        else:  # mazes have their D4RL names in Gymnasium too
            env = gymnasium.make(LOCOMOTION.get(name, name), **options)
    if name in LOCOMOTION:
        restore_capsules(env.unwrapped.model, mujoco.MjSpec.from_file(env.unwrapped.fullpath))
        restore_contacts(env.unwrapped.model)
    if name == "ant":  # D4RL's 111 numbers end in 84 contact forces, which MuJoCo 2.1.0 left at zero
        space = Box(-np.inf, np.inf, (111,), np.float64)
        env = TransformObservation(env, lambda obs: np.pad(obs, (0, 84)), space)

    _check_vectors(name, env.observation_space, env.action_space)
    env = FlattenObservation(env) if isinstance(env.observation_space, Dict) else env
    if own_units:
        return env
    if np.any(env.action_space.low != -1) or np.any(env.action_space.high != 1):
        env = RescaleAction(env, np.float32(-1), np.float32(1))
    # gymnasium's ClipAction would clip as well, but then call the action space infinite
    return TransformAction(env, lambda a: np.clip(a, -1, 1), env.action_space)


def minari_dataset(name: str):
    """The minari.MinariDataset of `minari:NAME`, from Minari's folder ($MINARI_DATASETS_PATH, else ~/.minari/datasets).

    Only its metadata is read. Raises UserError if the package or the dataset is missing, if minari can't read it, and
    for observations that are neither vectors nor a Dict of them, actions that are no vectors or have no bounds.
    """
    try:
        import minari
    except ImportError:
        raise UserError(f'{name} needs an optional package: pip install "minari[hf]==0.5.4"') from None
    download = f"minari download {name.removeprefix(MINARI)}"
    try:
        dataset = minari.load_dataset(name.removeprefix(MINARI))
    except FileNotFoundError:
        raise UserError(f"{name} is not on this machine; get it by: {download}") from None
    except Exception as error:  # whatever a damaged or foreign folder makes minari and gymnasium raise
        raise UserError(f"{name} can't be read ({error}); mend that or get it again by: {download}") from None
    _check_vectors(name, dataset.observation_space, dataset.action_space)
    return dataset


def _check_vectors(name: str, obs: Space, action: Space) -> None:
    flat_obs = flatten_space(obs) if isinstance(obs, Dict) else obs
    flat = all(isinstance(space, Box) and len(space.shape) == 1 for space in (flat_obs, action))
    if not (flat and action.is_bounded() and action.dtype.kind == "f" and np.all(action.low < action.high)):
        raise UserError(f"{name} has observations {obs}, actions {action}: both must be vectors, actions real, bounded")


# A video

RENDERERS = ("egl", "osmesa", "glfw")  # the last one needs a screen
DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"


def check_video(name: str | None) -> None:
    """Raises UserError if `record` can't draw `make(name)` on this machine: a package or a renderer is missing.

    Sets MUJOCO_GL, if it is not set, to what draws here.
    """
    if name is None:
        raise UserError("--video needs an environment to play an episode in, and this run has none; see --eval-env")
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # RuntimeError: the package is there, its program is not
        raise UserError("--video needs an optional package: pip install imageio-ffmpeg==0.8.1") from None
    env, library = make(name, "rgb_array"), renderer()
    if library:
        os.environ["MUJOCO_GL"] = library
    elif isinstance(env.unwrapped, MujocoEnv):
        tried = os.environ.get("MUJOCO_GL") or " or ".join(RENDERERS)
        raise UserError(f"--video: MuJoCo can't draw here by MUJOCO_GL={tried}; install libegl1 or libosmesa6")
    with blamed(name, "can't be drawn for --video"):  # pygame is missing, say
        env.reset()
        drawn = np.ndim(env.render()) == 3
    env.close()
    if not drawn:
        raise UserError(f"--video: {name} draws no pictures (render_mode rgb_array); leave --video out")


def renderer() -> str | None:
    """What MuJoCo can draw with on this machine: of $MUJOCO_GL, or if it is not set of RENDERERS; None: nothing."""
    given = os.environ.get("MUJOCO_GL")
    for name in [given] if given else RENDERERS:  # each in a new process: a failed one bars the next
        environment = os.environ | {"MUJOCO_GL": name}
        if not subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True).returncode:
            return name
    return None


@torch.no_grad()
def rollout(actor: Callable, name: str, episodes: int, seed: int, device="cpu") -> tuple:
    """Play E episodes in `make(name)`, all in lock-step, with one call of `actor` a step, (E, O) -> (E, A) in [-1, 1].

    Returns their undiscounted returns (E,) and, for mazes, two lists: each episode's way (T, 2) and its goal (2,).
    """
    envs = gymnasium.vector.SyncVectorEnv([partial(make, name)] * episodes)
    limit = getattr(envs.envs[0].spec, "max_episode_steps", None)
    if not limit:
        print(f"{name} has no time limit: an episode ends after {LIMIT} steps; register it with max_episode_steps")
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(episodes).tolist())
    goals = [env.unwrapped.target for env in envs.envs] if name in mazes.TASKS else []
    total, over, ways = np.zeros(episodes), np.zeros(episodes, bool), [[] for _ in goals]
    for _ in range(limit or LIMIT):
        for k in np.flatnonzero(~over[: len(ways)]):
            ways[k].append(obs[k, :2])
        action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        total += reward * ~over  # a finished environment starts again; those rewards do not count
        over |= terminated | truncated
        if over.all():
            break
    envs.close()
    return total, [np.array(way) for way in ways], goals


def score_metrics(returns: np.ndarray, name: str) -> dict[str, float]:
    """The scalars of an evaluation with these returns (E,) in `make(name)`."""
    metrics, score = {"eval/return": returns.mean(), "eval/return_std": returns.std()}, normalized_score(returns, name)
    return metrics if score is None else metrics | {"eval/score": score.mean(), "eval/score_std": score.std()}


@torch.no_grad()
def record(actor: Callable, name: str, seed: int, folder: Path, device="cpu") -> None:
    """One episode in `make(name)` as video.mp4 in `folder`, played as by `rollout`; `check_video` comes first."""
    import imageio.v2 as imageio

    env = make(name, "rgb_array")
    rate = env.metadata.get("render_fps", 30)  # steps a second
    stride = max(1, round(rate / 30))  # steps a frame: drawing takes longer than playing
    obs, over, temporary = env.reset(seed=seed)[0], False, folder / "video.tmp.mp4"
    limit = getattr(env.spec, "max_episode_steps", None) or LIMIT
    with imageio.get_writer(temporary, fps=rate / stride, macro_block_size=2) as video:
        for step in range(limit + 1):
            if over or step % stride == 0:
                video.append_data(env.render())
            if over:
                break
            action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])
            obs, _, terminated, truncated, _ = env.step(action[0].cpu().numpy())
            over = terminated or truncated
    env.close()
    os.replace(temporary, folder / "video.mp4")  # a killed run leaves no half of it
    print(f"one episode is in {folder / 'video.mp4'}")
