"""README says what is so: its generated parts are current, and each of its commands runs, on a small budget."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import gymnasium
import h5py
import numpy as np
import pytest
import readme
import torch

import gmpo
from common import datasets, environments

TEXT = (readme.ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)  # without the blocks of Python
COMMANDS = re.findall(r"^    ((?:python|for) .*?)(?: +#.*)?$", PROSE, re.M)
SMALL = "--critic-steps 4 --policy-steps 4 --batch-size 8 --eval-episodes 1"


def write_hdf5(path, obs_dim, action_dim, rows=64):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, obs_dim))
        file["actions"] = rng.uniform(-1, 1, (rows, action_dim))
        file["rewards"] = rng.normal(size=rows)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(rows) % 16 == 15


def write_minari(name, env):
    """A Minari dataset of one random episode in `env`."""
    import minari

    obs, action, done = [env.reset(seed=0)[0]], [], False
    while not done:
        action.append(env.action_space.sample())
        next_obs, _, done, _, _ = env.step(action[-1])
        obs.append(next_obs)
    over = np.arange(len(action)) == len(action) - 1
    columns = np.array(obs), np.array(action), over.astype(float), over, np.zeros_like(over)
    episode = minari.data_collector.EpisodeBuffer(None, None, None, *columns)
    minari.create_dataset_from_buffers(name, [episode], env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data that README's commands name, and a `python` that gives every file a small budget."""
    folder = tmp_path_factory.mktemp("readme")
    write_hdf5(folder / "my_hopper.hdf5", 11, 3)
    write_hdf5(folder / "my_pendulum.hdf5", 3, 1)
    write_hdf5(folder / "my_data.hdf5", 3, 1)
    write_hdf5(folder / "halfcheetah_medium_expert-v2.hdf5", 17, 6)
    if find_spec("minari"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(folder))
            write_minari("mujoco/hopper/medium-v0", gymnasium.make("Hopper-v5"))
    shim = folder / "python"
    small = f"""case "$*" in *gmpg*) more="--behaviour-steps 4 --policy-batch-size 8 --sampler-steps 4";; esac
case "$*" in *idql*) more="--policy-batch-size 8 --candidates 2";; esac
file=$1; shift
exec {sys.executable} {readme.ROOT}/$file "$@" {SMALL} --allow-unverified $more
"""
    shim.write_text(f"#!/bin/sh\n{small}")
    shim.chmod(0o755)
    return folder


def test_the_parts_made_from_the_sources_are_current():
    assert readme.current() == TEXT, "run python tests/readme.py"


def test_every_equation_of_the_docstrings_has_a_line_in_some_file():
    tagged = set().union(*(readme.equation_lines(name) for name in readme.FILES))
    assert tagged == set(readme.formulas())


def test_the_commands_run_in_their_order(folder):
    assert len(COMMANDS) >= 8
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"D4RL_DATASET_DIR": str(folder), "MINARI_DATASETS_PATH": str(folder)}
    films = find_spec("imageio_ffmpeg") and environments.renderer()
    for command in COMMANDS:
        if ("minari:" in command and not find_spec("minari")) or ("--video" in command and not films):
            continue  # the optional packages
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.filterwarnings("ignore")
def test_an_exported_policy_acts_as_the_policy_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = gmpo.Args(env="bandit", run_dir="run", critic_steps=2, policy_steps=2, batch_size=4, device="cpu")
    gmpo.train(args)
    (recipe,) = re.findall(r"^```python\n(import torch\n.*?)^```", TEXT, re.M | re.S)
    recipe = recipe.replace("runs/halfcheetah-demo/gmpo/seed0", "run").replace("(1, 17)", "(1, 1)")
    onnx = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
    names = {}
    exec(recipe if onnx else re.sub("torch.onnx.*", "", recipe), names)
    found = []
    for policy in (names["policy"], torch.export.load("policy.pt2").module(), torch.jit.load("policy.ts")):
        torch.manual_seed(0)  # its noise is drawn inside
        with torch.no_grad():
            found.append(policy(torch.zeros(1, 1)))
    torch.testing.assert_close(found[1:], found[:1] * 2)
    assert not torch.equal(found[0], names["policy"](torch.zeros(1, 1)))
    if onnx:
        import onnxruntime

        session = onnxruntime.InferenceSession("policy.onnx")
        (action,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 1), np.float32)})
        assert action.shape == (1, 2) and abs(action).max() <= 1


def test_the_lines_that_write_a_file_write_one_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"^```python\n(import gymnasium\n.*?)^```", TEXT, re.M | re.S)
    exec(lines.replace("range(20)", "range(2)"), {})
    data = datasets.load("my_data.hdf5", eval_env="Pendulum-v1", rescale_actions=True)
    assert len(data) == 2 * 199 and data.action.abs().max() > 0.9


def test_making_the_parts_leaves_the_rest_alone():
    headings = re.findall(r"^## .*", TEXT, re.M)
    assert re.findall(r"^## .*", readme.current(), re.M) == headings and len(headings) >= 7
    assert TEXT.count("<!-- end -->") == 3
