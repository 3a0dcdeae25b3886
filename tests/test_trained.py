"""What a run left behind, read back: policies as functions, critics, checkpoints of other versions."""

import importlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from running import FILES, differences, draw_nothing, load, train, write_data

from common import UserError, datasets, trained

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=FILES)
def policy(request, tmp_path_factory):
    """A module, the folder of a run of it with two-dimensional actions, and its data."""
    folder = tmp_path_factory.mktemp("policy")
    own = write_data(folder / "own.hdf5", action_dim=2)
    train(request.param, env=str(own), run_dir=folder / "run", normalize_obs=True)
    return importlib.import_module(request.param), folder / "run", datasets.load(str(own)).obs[:64]


@pytest.mark.parametrize("file", ["", "checkpoint.pt"])
def test_load_policy_takes_folder_or_file_and_answers_in_kind(policy, file):
    module, folder, _ = policy
    act = module.load_policy(folder / file)
    for shape in ((4, 3), (3,), (0, 3), (1, 3)):
        obs = np.random.default_rng(0).normal(5, 100, shape)
        for given, kind in ((obs, np.ndarray), (torch.as_tensor(obs), torch.Tensor), (obs.tolist(), np.ndarray)):
            if isinstance(given, list) and not given:
                continue  # a list of no rows does not know their size
            action = act(given)
            assert isinstance(action, kind) and action.shape == (*shape[:-1], 2)
            assert shape[0] == 0 or (abs(action).max() <= 1 and np.isfinite(np.asarray(action)).all())
    assert act(torch.zeros(3, 5).T).shape == (5, 2)  # a view that is not contiguous
    for kind in (">f8", np.longdouble, object, np.uint16):  # big-endian, as HDF5 may have it
        assert act(np.ones((4, 3), kind)).shape == (4, 2)


@pytest.mark.parametrize("shape", [(4,), (2,), (1,), (), (5, 1), (5, 2), (3, 1), (2, 5, 3), (0, 2), (0,)])
def test_load_policy_refuses_other_sizes_and_names_both(policy, shape):
    module, folder, _ = policy
    with pytest.raises(ValueError, match=rf"shape {re.escape(str(shape))}; must be \(3,\) or \(B, 3\)"):
        module.load_policy(folder)(np.ones(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_load_policy_refuses_nan_and_infinite_numbers(policy, bad):
    module, folder, _ = policy
    with pytest.raises(ValueError, match="NaN or infinite"):
        module.load_policy(folder)(np.array([[1, 2, 3], [bad, 0, 0]]))


def test_load_policy_takes_raw_observations(policy, tmp_path):
    """The networks' own normalisation undone, and done by hand: the same actions."""
    module, folder, obs = policy
    plain = load(folder)
    mean, std = (plain["critic"][f"v.normalize.{x}"].clone() for x in ("mean", "std"))
    assert torch.allclose(mean, torch.tensor(5.0), atol=1) and torch.allclose(std, torch.tensor(3.0), atol=1)
    for part in ("critic", "policy", "behaviour", "ema"):
        for key, tensor in plain.get(part, {}).items():
            if "normalize." in key:
                assert torch.equal(tensor, mean if key.endswith("mean") else std)
                tensor.fill_(0 if key.endswith("mean") else 1)
    torch.save(plain, tmp_path / "checkpoint.pt")
    actions = []
    for path, given in ((folder, obs), (tmp_path, (obs - mean) / std)):
        torch.manual_seed(3)
        actions.append(module.load_policy(path)(given))
    assert actions[0].std() > 0 and torch.allclose(*actions, atol=1e-5)


def test_several_threads_may_ask_one_policy(policy):
    module, folder, obs = policy
    act, failed = module.load_policy(folder), []

    def work():
        try:
            assert all(act(obs).isfinite().all() for _ in range(20))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_load_policy_works_from_another_folder(policy, tmp_path):
    module, folder, _ = policy
    code = f"from {module.__name__} import load_policy; print(load_policy({str(folder)!r})([1, 2, 3]).shape)"
    words, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(2,)\n", "")
    assert "`PYTHONPATH`" in (ROOT / "README.md").read_text()  # which says how


def test_load_policy_leaves_gradients_as_they_are(policy):
    module, folder, obs = policy
    assert not module.load_policy(folder)(obs).requires_grad and torch.is_grad_enabled()


VERSIONS = {  # what is done to a checkpoint -> what load_policy says, None: nothing
    "newer": (lambda c: c["args"].update(new_option=1), "an argument 'new_option' that this version does not know"),
    "older": (lambda c: c["args"].pop("discount"), None),
    "other format": (lambda c: c.update(format=1), "format 1, 3 is read"),
    "no format": (lambda c: c.pop("format"), "format unknown, 3 is read"),
    "no sizes": (lambda c: c.pop("sizes"), "no whole checkpoint"),
    "no policy": (lambda c: c.pop("policy"), "no whole checkpoint"),
    "another algorithm": (lambda c: c.update(algorithm="td3"), "of td3.py, not of"),
}


@pytest.mark.parametrize("change, message", VERSIONS.values(), ids=VERSIONS)
def test_a_checkpoint_of_another_version(change, message, policy, tmp_path):
    module, folder, obs = policy
    checkpoint = load(folder)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.pt")
    if message is None:
        assert module.load_policy(tmp_path / "other.pt")(obs).shape == (64, 2)
    else:
        with pytest.raises(UserError, match=message) as failure:
            module.load_policy(tmp_path / "other.pt")
        assert str(tmp_path / "other.pt") in str(failure.value) or "argument" in message


def test_a_checkpoint_that_is_none(policy, tmp_path):
    module, folder, _ = policy
    (tmp_path / "half.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    whys = {"nothing": "exist", "half.pt": "whole", "foreign.pt": "format unknown", "list.pt": "format unknown"}
    for path, why in whys.items():
        with pytest.raises(UserError, match=f"{path}.*{why}"):
            module.load_policy(tmp_path / path)
    with pytest.raises(UserError, match="checkpoint.pt does not exist"):
        module.load_policy(tmp_path)


def test_load_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError):
        trained.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_trained_critic_is_taken_as_it_is_with_its_normalisation(name, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    changes = dict(env=str(write_data(tmp_path / "own.hdf5")))
    train("iql_critic", run_dir=tmp_path / "critic", **changes)
    train(name, run_dir=tmp_path / "run", critic=tmp_path / "critic", normalize_obs=False, **changes)
    old, new = load(tmp_path / "critic"), load(tmp_path / "run")
    assert differences(old["critic"], new["critic"], "critic") == []
    assert new["args"]["critic_steps"] == 0 and new["args"]["critic"] == str(tmp_path / "critic")
    assert (old["critic"]["v.normalize.mean"] - 5).abs().max() < 1 and new["policy"]["normalize.mean"].abs().max() == 0
