"""`--video`: a real mp4 of one episode, from a random stream of its own; what is missing is said before any work."""

import dataclasses
import importlib
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import UserError, environments, runs

ROOT = Path(__file__).parents[1]
FILES = ["iql_critic", "gmpo", "gmpg", "idql"]
TINY = dict(
    env="own.hdf5", eval_env="hopper", critic_steps=2, behaviour_steps=2, policy_steps=2, batch_size=8,
    policy_batch_size=8, candidates=2, sampler_steps=2, eval_episodes=1, device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with data of Hopper's sizes."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(64, 11)), rng.uniform(-1, 1, (64, 3))
        file["rewards"], file["terminals"] = rng.normal(size=64), np.zeros(64, bool)
        file["timeouts"] = np.arange(64) % 16 == 15
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def renderer(monkeypatch):
    """What draws here without a screen; MUJOCO_GL is as before afterwards."""
    pytest.importorskip("imageio_ffmpeg")
    found = environments.renderer()
    if found is None:
        pytest.skip("MuJoCo can't draw here")
    monkeypatch.setenv("MUJOCO_GL", found)
    return found


def tiny_args(name, **changes):
    module = importlib.import_module(name)
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{key: value for key, value in (TINY | changes).items() if key in known})


def train(name, **changes):
    return importlib.import_module(name).train(tiny_args(name, **changes))


def frames(path):
    import imageio.v2 as imageio

    with imageio.get_reader(path) as video:
        return np.stack(list(video.iter_data())), video.get_meta_data()


def distance(one, other):
    return np.abs(one.astype(float) - other).mean()


def weights(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [*checkpoint["policy" if "policy" in checkpoint else "ema"].values(), checkpoint["rng"]]


# What is missing


def test_missing_package(monkeypatch, capsys, elsewhere):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # import raises ImportError
    monkeypatch.setattr(sys, "argv", ["gmpo.py", "--env", "own.hdf5", "--eval-env", "hopper", "--video"])
    gmpo = importlib.import_module("gmpo")
    with pytest.raises(SystemExit) as stop:
        runs.main(gmpo.train, gmpo.Args)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not (elsewhere / "runs").exists()
    assert message == "error: --video needs an optional package: pip install imageio-ffmpeg==0.8.1\n"
    assert message.split()[-1] in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_missing_environment():
    with pytest.raises(UserError, match="--video needs an environment to play an episode in"):
        train("gmpo", eval_env=None, video=True)


def test_missing_renderer(monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(UserError, match="--video: MuJoCo can't draw here by MUJOCO_GL=none; install"):
        train("gmpo", video=True)
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
    environments.record(lambda obs, args, generator: torch.zeros(1, 3), tiny_args("gmpo", video=True), 0, tmp_path)
    drawn, facts = frames(tmp_path / "video.mp4")
    assert steps > 20 and len(drawn) == -(-steps // 4) + 1  # every 4th of 125 a second, and the last
    assert facts["fps"] == pytest.approx(125 / 4, abs=0.01) and drawn.shape[1:] == first.shape
    assert 1.5 * distance(drawn[0], first) < distance(drawn[0], last)
    assert 1.5 * distance(drawn[-1], last) < distance(drawn[-1], first)


def test_the_policy_gets_what_act_takes(renderer, tmp_path):
    def policy(obs, args, generator):
        assert obs.shape == (1, 11) and obs.dtype == torch.float32 and not torch.is_grad_enabled()
        drawn.append(torch.rand(1, generator=generator).item())
        return torch.ones(1, 3)

    drawn, args, before = [], tiny_args("gmpo", video=True), torch.get_rng_state()
    environments.record(policy, args, 0, tmp_path)
    middle, drawn = drawn, []
    environments.record(policy, args, 0, tmp_path)
    assert drawn == middle and torch.equal(before, torch.get_rng_state())


def test_without_the_flag_nothing_is_done(tmp_path):
    train("gmpo", run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "video.mp4").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_run_with_and_without(name, renderer, tmp_path):
    train(name, run_dir=tmp_path / "without")
    train(name, run_dir=tmp_path / "with", video=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "without"), weights(tmp_path / "with")))
    played, _ = frames(tmp_path / "with" / "video.mp4")
    train(name, run_dir=tmp_path / "without", video=True, eval_only=True)
    again, _ = frames(tmp_path / "without" / "video.mp4")
    assert len(played) > 2 and np.array_equal(played, again)
