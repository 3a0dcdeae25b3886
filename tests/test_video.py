"""`--video`: a real mp4 of one episode, from a random stream of its own; what is missing is said before any work."""

import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from running import command, draw_nothing, load, train, write_data

from common import UserError, environments

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
TINY = dict(env="own.hdf5", eval_env="hopper", critic_steps=2, behaviour_steps=2, policy_steps=2, eval_episodes=1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with data of Hopper's sizes."""
    write_data(tmp_path / "own.hdf5", 11, 3)
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)


@pytest.fixture
def renderer(monkeypatch):
    """What draws here without a screen; MUJOCO_GL is as before afterwards."""
    pytest.importorskip("imageio_ffmpeg")
    found = environments.renderer()
    if found is None:
        pytest.skip("MuJoCo can't draw here")
    monkeypatch.setenv("MUJOCO_GL", found)
    return found


def frames(path):
    import imageio.v2 as imageio

    with imageio.get_reader(path) as video:
        return np.stack(list(video.iter_data())), video.get_meta_data()


def distance(one, other):
    return np.abs(one.astype(float) - other).mean()


# What is missing


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # import raises ImportError
    code, _, err = command("gmpo", "--env", "own.hdf5", "--eval-env", "hopper", "--video")
    assert code == 2 and not Path("runs").exists()
    assert err == "error: --video needs an optional package: pip install imageio-ffmpeg==0.8.1\n"
    assert err.split()[-1] in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_missing_environment():
    with pytest.raises(UserError, match="--video needs an environment to play an episode in"):
        train("gmpo", env="own.hdf5", video=True)


def test_missing_renderer(monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(UserError, match="--video: MuJoCo can't draw here by MUJOCO_GL=none; install"):
        train("gmpo", **TINY, video=True)
    assert not Path("runs").exists()


def test_the_renderer_is_chosen_once(renderer, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    environments.check_video("hopper")
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa")
    monkeypatch.setenv("MUJOCO_GL", renderer)
    environments.check_video("hopper")
    assert os.environ["MUJOCO_GL"] == renderer


# The video


def test_frames_are_those_of_the_episode(renderer, tmp_path):
    """The still policy's episode, played here step by step: as many frames, the first and last one as drawn here."""
    env = environments.make("hopper", "rgb_array")
    env.reset(seed=0)
    first, steps, over = env.render(), 0, False
    while not over:
        _, _, terminated, truncated, _ = env.step(np.zeros(3, np.float32))
        steps, over = steps + 1, terminated or truncated
    last = env.render()
    env.close()
    environments.record(lambda obs: torch.zeros(1, 3), "hopper", 0, tmp_path)
    drawn, facts = frames(tmp_path / "video.mp4")
    assert steps > 20 and len(drawn) == -(-steps // 4) + 1  # every 4th of 125 a second, and the last
    assert facts["fps"] == pytest.approx(125 / 4, abs=0.01) and drawn.shape[1:] == first.shape
    assert 1.5 * distance(drawn[0], first) < distance(drawn[0], last)
    assert 1.5 * distance(drawn[-1], last) < distance(drawn[-1], first)


def test_the_policy_gets_what_act_takes(renderer, tmp_path):
    def actor(obs):
        assert obs.shape == (1, 11) and obs.dtype == torch.float32 and not torch.is_grad_enabled()
        seen.append(obs)
        return torch.ones(1, 3)

    seen = []
    environments.record(actor, "hopper", 0, tmp_path)
    first, seen = seen, []
    environments.record(actor, "hopper", 0, tmp_path)
    assert len(seen) > 5 and all(map(torch.equal, seen, first))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.hdf5", "video.mp4"]


class Endless(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


def test_an_episode_without_end_is_cut(tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(environments, "LIMIT", 10)
    gymnasium.register("Endless-v0", entry_point=Endless)
    try:
        environments.record(lambda obs: torch.zeros(1, 1), "Endless-v0", 0, tmp_path)
    finally:
        gymnasium.registry.pop("Endless-v0")
    assert len(frames(tmp_path / "video.mp4")[0]) == 11


@pytest.mark.parametrize("name", ["iql_critic", "gmpo"])
def test_a_run_with_and_without(name, renderer, tmp_path):
    """The video changes no weight and no random number; --eval-only --video plays the same episode of the same run."""
    train(name, **TINY, run_dir=tmp_path / "without")
    train(name, **TINY, run_dir=tmp_path / "with", video=True)
    assert not (tmp_path / "without" / "video.mp4").exists()
    without, filmed = load(tmp_path / "without"), load(tmp_path / "with")
    assert all(map(torch.equal, without["policy"].values(), filmed["policy"].values()))
    assert torch.equal(without["rng"], filmed["rng"])
    code, _, err = command(name, "--run-dir", tmp_path / "without", "--eval-only", "--video")
    assert (code, err) == (0, "")
    played, again = (frames(tmp_path / folder / "video.mp4")[0] for folder in ("with", "without"))
    assert len(played) > 2 and np.array_equal(played, again)
