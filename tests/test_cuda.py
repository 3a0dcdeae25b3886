"""On a GPU: every file trains, stops, resumes and is evaluated, as it is and with --cudagraph. Tiny budgets."""

import importlib

import numpy as np
import pytest
import torch
from running import FILES, Stopped, draw_nothing, load, logged, stop_at, train, without_clock, write_data

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TINY = dict(eval_env="Pendulum-v1", eval_every=4, critic_steps=8, behaviour_steps=8, policy_steps=8, device="cuda")


@pytest.mark.parametrize("cudagraph", [False, True], ids=["plain", "cudagraph"])
@pytest.mark.parametrize("name", FILES)
def test_a_run_on_a_gpu_resumes_and_its_policy_acts_without_one(name, cudagraph, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    changes = TINY | dict(env=str(write_data(tmp_path / "own.hdf5")), cudagraph=cudagraph)
    train(name, run_dir=tmp_path / "whole", **changes)
    whole, rows = load(tmp_path / "whole"), without_clock(logged(tmp_path / "whole"))
    scored = [row["step"] for row in rows if "eval/return" in row]
    assert scored and scored[-1] == whole["step"] and all(step % 4 == 0 for step in scored)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(whole["step"] - 2, patch)
        train(name, run_dir=tmp_path / "run", save_every=5, **changes)
    train(name, run_dir=tmp_path / "run", resume=True, **changes)
    found = load(tmp_path / "run")
    for key, weight in whole["policy"].items():
        torch.testing.assert_close(found["policy"][key], weight, rtol=1e-4, atol=1e-4)
    assert [row.keys() for row in without_clock(logged(tmp_path / "run"))] == [row.keys() for row in rows]

    policy = importlib.import_module(name).load_policy(tmp_path / "run")  # on the CPU
    action = policy(np.zeros((5, 3), np.float32))
    assert action.shape == (5, 1) and np.abs(action).max() <= 1
    train(name, run_dir=tmp_path / "run", eval_only=True, **changes)
    assert (tmp_path / "run" / "eval.json").exists()
