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
