"""A run's folder and the command line's manners.

    runs/<env>/<algorithm>/seed<k>/
        config.json      arguments, command, versions, commit
        metrics.jsonl    one line a log step, the same scalars as in the TensorBoard events beside it
        checkpoint.pt    networks, optimizers, step and random states: all that `--resume` needs
        result.json      the last score, the best one, and how long it took

Nothing of the user's is ever overwritten: a folder that holds a run is only entered with `--resume`, and only with the same configuration.
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import TrainingError, UserError

# What `--resume` may change: none of these alters the weights that a given step arrives at.
FREE = {"resume", "eval_only", "device", "eval_every", "eval_episodes", "save_every", "log_every", "policy_steps"}


def main(train: Callable, args_type: type) -> None:
    """Read the command line into `args_type` and train; a mistake is one sentence and exit code 2, a failed training exit code 1."""
    try:
        train(tyro.cli(args_type))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as failure:
        print(f"error: {failure}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def fill_in(args, paper: dict):
    """A copy of `args` in which a field that is None holds the value of `paper[args.env]`, else of `paper["*"]`.

    Raises UserError for a number that makes no sense, and for a device that is not there.
    """
    values = paper["*"] | paper.get(args.env, {})
    args = dataclasses.replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not to be had here; use cpu, cuda or cuda:<number>") from None
    for name, value in vars(args).items():
        flag, number = "--" + name.replace("_", "-"), isinstance(value, int | float) and not isinstance(value, bool)
        if number and (value < 0 or not math.isfinite(value)):
            raise UserError(f"{flag} {value}: must be a finite number that is not negative")
        if value == 0 and name in ("batch_size", "eval_every", "eval_episodes", "save_every", "log_every", "sampler_steps"):
            raise UserError(f"{flag} 0: must be at least 1")
    return args


class Run:
    """One training run: where its files are, what it has logged, how far it is."""

    def __init__(self, args, algorithm: str):
        """Enters or makes the run's folder; raises UserError if it holds another run."""
        name = Path(args.env).stem if "/" in args.env or args.env.endswith(".hdf5") else args.env
        self.folder = Path(args.run_dir or f"runs/{name}/{algorithm}/seed{args.seed}")
        self.args = args
        self.restored = args.resume or args.eval_only
        config = json.loads(json.dumps(dataclasses.asdict(args), default=str))
        old = self._read("config.json")
        if old is None and args.eval_only:
            raise UserError(f"{self.folder} holds no run to evaluate; name its folder with --run-dir")
        if old is not None and not self.restored:
            raise UserError(f"{self.folder} holds a run already; add --resume to go on with it, or choose another --run-dir")
        changed = [k for k in (old or {"args": {}})["args"] if k not in FREE | {"run_dir"} and old["args"][k] != config.get(k)]
        if changed and not args.eval_only:
            raise UserError(f"{self.folder} holds a run with another --{changed[0].replace('_', '-')}; choose another --run-dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not args.eval_only:
            self._write("config.json", {"algorithm": algorithm, "args": config} | _origin())
        self.start_time, self.seconds_before, self.best, self.last = time.time(), 0.0, -math.inf, {}
        self.writer = self.bar = None

    def restore(self, parts: dict) -> int:
        """Load the checkpoint into `parts` (name -> module or optimizer) and the random states; returns the step to go on from, 0 for a new run."""
        path = self.folder / "checkpoint.pt"
        if not (self.restored and path.exists()):
            return 0
        state = load_checkpoint(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.seconds_before, self.best, self.last = state["seconds"], state["best"], state["last"]
        return state["step"]

    def save(self, step: int, parts: dict, **facts) -> None:
        """Write the checkpoint under a temporary name, then rename: a killed run never leaves half a file."""
        state = {name: part.state_dict() for name, part in parts.items()}
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module) and not all(torch.isfinite(p).all() for p in part.parameters()):
                raise TrainingError(f"step {step}: the weights of {name} are no longer finite; {self._advice()}")
        config = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        state |= {"step": step, "rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "args": config, **facts}
        state |= {"seconds": self._seconds(), "best": self.best, "last": self.last}
        temporary = self.folder / "checkpoint.pt.tmp"
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "checkpoint.pt")

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The training steps start + 1 .. total behind a progress bar; lines of a previous life after `start` are forgotten."""
        path = self.folder / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start] if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines))
        self.writer = SummaryWriter(str(self.folder), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, disable=not sys.stderr.isatty(), unit="step", dynamic_ncols=True)
        self.printed, self.clock = time.time(), (time.time(), start)
        for step in range(start + 1, total + 1):
            yield step
            self.bar.update()
        self.bar.close()

    def log(self, step: int, metrics: dict) -> None:
        """Read the tensors, write them to metrics.jsonl and TensorBoard, show progress. Raises TrainingError at NaN or inf, naming step and term."""
        values = {k: float(v) for k, v in metrics.items()}
        now = time.time()
        values["time/steps_per_s"] = (step - self.clock[1]) / max(now - self.clock[0], 1e-9)
        self.clock = (now, step)
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            raise TrainingError(f"step {step}: {bad[0]} is {values[bad[0]]}; {self._advice()}")
        if "eval/score" in values:
            self.best = max(self.best, values["eval/score"])
            self.last = {k: v for k, v in values.items() if k.startswith("eval/")}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self._show(step, values)

    def finish(self, step: int, **facts) -> dict:
        """Write result.json and print the headline: the last score, with the best beside it."""
        self.writer.close()
        best = self.best if math.isfinite(self.best) else None
        result = {"step": step, "minutes": round(self._seconds() / 60, 2), "best_score": best, **self.last, **facts}
        self._write("result.json", result)
        score = f"last score {self.last['eval/score']:.1f} (best {best:.1f})" if best is not None else "no score"
        print(f"{score} after {step} steps, {result['minutes']} minutes; everything is in {self.folder}")
        return result

    def _show(self, step: int, values: dict) -> None:
        shown = {k.split("/")[1]: f"{v:.3g}" for k, v in values.items() if k in ("eval/score", "critic/v", "policy/loss")}
        self.bar.set_postfix(shown)
        if self.bar.disable and ("eval/score" in values or time.time() - self.printed > 10):
            self.printed = time.time()
            left = (self.bar.total - step) / max(values["time/steps_per_s"], 1e-9)
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"step {step}/{self.bar.total}  {values['time/steps_per_s']:.0f}/s  {left:.0f} s left  {text}", flush=True)

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.start_time

    def _advice(self) -> str:
        return f"the last good checkpoint is kept in {self.folder}; try a smaller learning rate or beta"

    def _read(self, name: str) -> dict | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def _write(self, name: str, content: dict) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2, default=str) + "\n")


def load_checkpoint(path: str | Path) -> dict:
    """The content of a run's checkpoint.pt, given the file or its folder. Raises UserError if there is none or it is damaged."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a run writes it at its first checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}); use another one") from None


def numpy_or_torch(act: Callable, device: str | torch.device) -> Callable:
    """Wrap `act`, (B, O) tensor -> (B, A) tensor, so that it takes numpy or torch observations, (B, O) or (O,), and answers in kind."""

    @torch.no_grad()
    def friendly(obs):
        batch = torch.as_tensor(np.asarray(obs) if not torch.is_tensor(obs) else obs, dtype=torch.float32, device=device)
        action = act(batch.unsqueeze(0)).squeeze(0) if batch.ndim == 1 else act(batch)
        return action.to(obs.device) if torch.is_tensor(obs) else action.cpu().numpy()

    return friendly


def _origin() -> dict:
    """Where a result comes from: command, versions, commit."""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "h5py")
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": git.stdout.strip() or None,
    }
