"""What tests of whole runs need: tiny budgets, own data, the commands in this process, checkpoints compared."""

import contextlib
import dataclasses
import importlib
import io
import json
import sys

import h5py
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common import arguments, runs, trained

FILES = ["iql_critic", "gmpo", "gmpg", "idql"]
TINY = dict(
    critic_steps=6, behaviour_steps=4, policy_steps=6, batch_size=8, policy_batch_size=8, candidates=2,
    sampler_steps=2, eval_episodes=2, log_every=1, device="cpu",
)  # fmt: skip


def write_data(path, obs_dim=3, action_dim=1, rows=200, **changes):
    """A file in D4RL's layout, by default of Pendulum-v1's sizes."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(5, 3, (rows, obs_dim)),
        "actions": rng.uniform(-1, 1, (rows, action_dim)),
        "rewards": rng.normal(size=rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 50 == 49,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changes).items():
            file[key] = array
    return path


def tiny_args(name, **changes):
    """The Args of a file; what it does not know is left out."""
    module = importlib.import_module(name)
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{key: value for key, value in (TINY | changes).items() if key in known})


def train(name, **changes):
    return importlib.import_module(name).train(tiny_args(name, **changes))


def tiny_flags(name, **changes):
    args, default = tiny_args(name, **changes), importlib.import_module(name).Args()
    changed = {key: value for key, value in vars(args).items() if value != getattr(default, key)}
    return [word for key, value in changed.items() for word in ("--" + key.replace("_", "-"), str(value))]


def command(name, *words):
    """python <name>.py <words>, in this process: exit code, stdout, stderr."""
    module, out, err, code = importlib.import_module(name), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            arguments.main(name, module.train, module.Args, module.SETTINGS)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def refused(code, err, *fragments):
    """One sentence, exit code 2."""
    lines = err.splitlines()
    return code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and all(part in err for part in fragments)


def content(folder):
    """Every file but the lock, which has no content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{key: value for key, value in row.items() if key != "time/steps_per_s"} for row in rows]


def differences(a, b, where=""):
    """The places at which two checkpoints differ, but for the arguments and the clock."""
    if isinstance(a, dict):
        keys = {key for key in a.keys() | b.keys() if where or key not in ("args", "seconds", "best")}
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list | tuple):
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{k}")]
    return [] if (torch.equal(a, b) if torch.is_tensor(a) else a == b) else [where]


def draw_nothing(monkeypatch):
    """curves.png takes ten times as long as a tiny run: only runs that module fixtures make draw it."""
    monkeypatch.setattr(trained, "curves", lambda folder: Figure())


class Stopped(Exception):
    pass


def at_step(step, monkeypatch, what):
    """Let the next runs call `what` in the middle of this step, after its line of metrics and before its checkpoint."""
    log = runs.Run.log

    def logging(self, now, metrics):
        log(self, now, metrics)
        if now == step:
            what()

    monkeypatch.setattr(runs.Run, "log", logging)


def stop_at(step, monkeypatch):
    def stop():
        raise Stopped

    at_step(step, monkeypatch, stop)
