"""D4RL's mazes end to end: a file in its layout, a tiny training by each of the four files, the score, the picture."""

import json

import h5py
import matplotlib.image
import numpy as np
import pytest
from running import FILES, train

from common import datasets, environments


def write_rollouts(path, name, rows, limit):
    """Random actions in D4RL's environment, stored as D4RL stores AntMaze: float terminals, timeouts, infos."""
    env, rng = environments.make(name), np.random.default_rng(0)
    columns = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": [], "infos/goal": []}
    while len(columns["rewards"]) < rows:
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        for step in range(limit):
            action = rng.uniform(-1, 1, env.action_space.shape)
            next_obs, reward, terminal, timeout, _ = env.step(action)
            goal = env.unwrapped.target
            for column, value in zip(columns.values(), (obs, action, reward, terminal, step == limit - 1, goal)):
                column.append(value)
            obs = next_obs
            if terminal or timeout:
                break
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            dtype = bool if key == "timeouts" else np.float32  # D4RL's terminals are numbers there
            file[key] = np.array(column[:rows], dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d4rl")
    for name, rows, limit in (("antmaze-umaze-v2", 20_000, 700), ("maze2d-umaze-v1", 3_000, 300)):
        write_rollouts(folder / datasets.TASKS[name]["url"].rsplit("/", 1)[1], name, rows, limit)
    return folder


@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "maze2d-umaze-v1"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_d4rls_mazes_trains_and_is_scored(name, env, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    result = train(name, env=env, network="mlp", run_dir=tmp_path / "run", allow_unverified=True)
    low, high = environments.ENVIRONMENTS[env]
    assert result["eval/score"] == pytest.approx(100 * (result["eval/return"] - low) / (high - low), abs=1e-4)
    assert 0 <= result["eval/return"] <= (1 if env.startswith("antmaze") else 300)
    assert matplotlib.image.imread(tmp_path / "run" / "maze.png").std() > 0.05
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    rule = "minus 1" if env.startswith("antmaze") else "as they are"
    assert config["args"]["eval_env"] == env and rule in config["data"]["reward_rule"]
    out = capsys.readouterr().out
    assert f"score: {env}" in out and ("antmaze" in out or "maze2d" in out)
