"""halfcheetah-demo: made once, the same each time, by a policy that scores 100."""

import os
from functools import partial

import h5py
import numpy as np
import pytest
import torch

from common import datasets, demo, environments


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))


def test_the_demo_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        demo.generate(tmp_path / f"{name}.hdf5", episodes=2)
    a, b = (datasets.read_file(tmp_path / f"{name}.hdf5") for name in ("a", "b"))
    assert all(np.array_equal(a[key], b[key]) for key in datasets.RANKS)
    assert a["observations"].shape == (2000, 17) and list(np.flatnonzero(a["timeouts"])) == [999, 1999]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.hdf5", "b.hdf5"]


def test_the_policy_behind_the_demo_scores_about_100():
    env, returns = environments.make("halfcheetah"), []
    for seed in (101, 102, 103):
        (obs, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            obs, reward, _, over, _ = env.step(demo.linear_policy(obs))
            total += reward
        returns.append(total)
    assert np.mean(returns) > 3000
    assert environments.normalized_score(np.mean(returns), "halfcheetah-demo") == pytest.approx(100, abs=10)


def test_the_demo_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "generate", partial(demo.generate, episodes=2))
    first = datasets.load("halfcheetah-demo")
    monkeypatch.delattr(demo, "generate")
    assert torch.equal(first.rows, datasets.load("halfcheetah-demo").rows)
    assert os.listdir(tmp_path / "d4rl") == ["halfcheetah-demo.hdf5"]


def test_an_interrupted_demo_leaves_no_file_under_its_name(tmp_path, monkeypatch):
    create = h5py.File.create_dataset

    def failing(self, key, *args, **kwargs):
        if key == "rewards":
            raise Stopped
        return create(self, key, *args, **kwargs)

    monkeypatch.setattr(demo, "generate", partial(demo.generate, episodes=1))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(h5py.File, "create_dataset", failing)
        datasets.load("halfcheetah-demo")
    assert not list((tmp_path / "d4rl").iterdir())
    assert len(datasets.load("halfcheetah-demo")) == 999
