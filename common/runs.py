"""A run's folder and the command line's manners.

    runs/<env>/<algorithm>/seed<k>/
        config.json      arguments, command, versions, commit
        metrics.jsonl    one line a log step, the same scalars as in the TensorBoard events beside it
        checkpoint.pt    networks, optimizers, step and random states: all that `--resume` needs
        result.json      the last score, the best one, and how long it took

Nothing of the user's is ever overwritten: a folder that holds a run is only entered with `--resume`, and only with the
same configuration.
"""

import dataclasses
import json
import math
import os
import platform
import re
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

from common import TrainingError, UserError, datasets, environments
from common.datasets import Dataset

# What `--resume` may change: none of these alters the weights that a given step arrives at, but for policy_steps with
# lr_decay, where the learning rate follows the new length from then on.
FREE = {
    "run_dir",
    "resume",
    "eval_only",
    "video",
    "device",
    "eval_every",
    "eval_episodes",
    "save_every",
    "log_every",
    "policy_steps",
}
AT_LEAST_1 = {
    "batch_size",
    "candidates",
    "eval_every",
    "eval_episodes",
    "linex_max",
    "log_every",
    "policy_batch_size",
    "sampler_steps",
    "save_every",
}
AT_MOST_1 = {"discount", "dropout", "target_rate"}


def main(train: Callable, args_type: type) -> None:
    """Read the command line into `args_type` and train. A mistake is one sentence and exit code 2, a failure code 1."""
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

    Raises UserError for a number that makes no sense, for a device or an environment that is not there.
    """
    values = paper["*"] | paper.get("own file" if _own_file(args.env) else args.env, {})
    args = dataclasses.replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.critic:
        args.critic_steps = 0
    args.eval_env = environments.evaluation_env(args.env, args.eval_env)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not to be had here; use cpu, cuda or cuda:<number>") from None
    for name, value in vars(args).items():
        flag, number = "--" + name.replace("_", "-"), isinstance(value, int | float) and not isinstance(value, bool)
        if number and (value < 0 or not math.isfinite(value)):
            raise UserError(f"{flag} {value}: must be a finite number that is not negative")
        if name in AT_LEAST_1 and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
        if (name in AT_MOST_1 and value > 1) or (name == "expectile" and not 0 < value < 1):
            raise UserError(f"{flag} {value}: must lie between 0 and 1")
    if args.video:
        environments.check_video(args.eval_env)
    return args


def prepare(models: dict[str, torch.nn.Module], data: Dataset, args) -> None:
    """Put untrained networks on the device, normalised by `data`, or the critic as the run `args.critic` left it.

    Raises UserError if the data, the evaluation environment and that critic do not belong together.
    """
    if args.eval_env:
        datasets.check_sizes(data, environments.make(args.eval_env))
    for model in models.values():
        model.to(args.device)
    if args.normalize_obs:
        models["critic"].v.normalize.fit(data.obs)  # one module, shared by all networks
    if args.critic:
        checkpoint = load_checkpoint(args.critic)
        if checkpoint["args"]["env"] != args.env:
            raise UserError(
                f"the critic in {args.critic} is of {checkpoint['args']['env']}, not of {args.env}; choose that data"
            )
        models["critic"].load_state_dict(checkpoint["critic"])


class Run:
    """One training run: its folder, what it has logged, how far it is."""

    def __init__(self, args, algorithm: str):
        """Only looks; the folder is made by `steps`. Raises UserError if it holds another run."""
        name = Path(args.env).stem if _own_file(args.env) else args.env
        name = re.sub("[:/]", "-", args.env) if args.env.startswith(datasets.MINARI) else name
        self.folder = Path(args.run_dir or f"runs/{name}/{algorithm}/seed{args.seed}")
        self.args, self.arguments = args, json.loads(json.dumps(dataclasses.asdict(args), default=str))
        self.config = {"algorithm": algorithm, "args": self.arguments} | _origin()
        self.start, self.seconds_before, self.best, self.last = time.time(), 0.0, -math.inf, {}
        self.writer, self.warned, self.on_cuda = None, False, torch.device(args.device).type == "cuda"
        path = self.folder / "config.json"
        if not path.exists():
            return
        config = json.loads(path.read_text())
        if config["algorithm"] != algorithm:
            raise UserError(f"{self.folder} holds a run of {config['algorithm']}.py; choose another --run-dir")
        if args.eval_only:
            return
        if not args.resume:
            raise UserError(
                f"{self.folder} holds a run already; add --resume to go on with it, or choose another --run-dir"
            )
        for key, old in config["args"].items():
            if key not in FREE and old != self.arguments.get(key):
                flag = key.replace("_", "-")
                raise UserError(
                    f"{self.folder} holds a run with --{flag} {old}, not {self.arguments[key]}; choose a new --run-dir"
                )

    def restore(self, parts: dict) -> int:
        """Load the checkpoint into `parts` (name -> module or optimizer) and the random states; returns its step, or 0.

        Raises UserError if the checkpoint is damaged, or missing where it is to be evaluated.
        """
        path = self.folder / "checkpoint.pt"
        if not self.args.eval_only and not (self.args.resume and path.exists()):
            return 0
        state = load_checkpoint(path)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError):
            raise UserError(f"{path} has other networks; give the arguments in {self.folder / 'config.json'}") from None
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.on_cuda:
            torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)
        self.seconds_before, self.best, self.last = state["seconds"], state["best"], state["last"]
        return state["step"]

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The training steps start + 1 .. total, with a progress bar. Makes the folder, drops logs after `start`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder} can't be written ({error.strerror}); choose another --run-dir") from None
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run killed while writing leaves half a line
        _write(path, "".join(line for line in whole if json.loads(line)["step"] <= start))
        self.writer = SummaryWriter(str(self.folder), purge_step=start + 1)
        self.total, self.printed, self.clock = total, time.time(), (time.time(), start)
        self.bar = tqdm(total=total, initial=start, disable=not sys.stderr.isatty(), unit="step", dynamic_ncols=True)
        for step in range(start + 1, total + 1):
            yield step
            self.bar.update()
        self.bar.close()

    def record(self, step: int, metrics: dict, parts: dict, **facts) -> None:
        """Log every `log_every` steps and at evaluations, save every `save_every` steps; both at the end."""
        if step % self.args.log_every == 0 or step == self.total or any(key.startswith("eval/") for key in metrics):
            self.log(step, metrics)
        if step % self.args.save_every == 0 or step == self.total:
            self.save(step, parts, **facts)

    def log(self, step: int, metrics: dict) -> None:
        """Read the tensors, write them to metrics.jsonl and TensorBoard. Raises TrainingError at NaN or inf."""
        values = {key: float(value) for key, value in metrics.items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: {key} is {value}; {self._advice()}")
        now = time.time()
        values["time/steps_per_s"] = (step - self.clock[1]) / max(now - self.clock[0], 1e-9)
        self.clock = (now, step)
        if "eval/return" in values:
            self.last = {key: value for key, value in values.items() if key.startswith("eval/")}
            self.best = max(self.best, self._headline())
        if values.get("policy/ess", 1) < 0.1 and not self.warned:
            self.warned = True
            share = f"only {100 * values['policy/ess']:.1f} % of the samples carry the weight (policy/ess)"
            self._say(f"step {step}: {share}: the policy fits a few outliers; a smaller beta may do better")
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self._show(step, values)

    def save(self, step: int, parts: dict, **facts) -> None:
        """Write checkpoint.pt under a temporary name, then rename: a killed run never leaves half a file.

        Raises TrainingError at weights that are NaN or inf.
        """
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module) and not all(torch.isfinite(p).all() for p in part.parameters()):
                raise TrainingError(f"step {step}: the weights of {name} are no longer finite; {self._advice()}")
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {
            "step": step,
            "args": self.arguments,
            "seconds": self._seconds(),
            "best": self.best,
            "last": self.last,
        }
        state |= {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.args.device) if self.on_cuda else None,
        }
        temporary = self.folder / "checkpoint.pt.tmp"
        with temporary.open("wb") as file:
            torch.save(state | facts, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "checkpoint.pt")

    def finish(self) -> dict:
        """Write result.json and print the headline: the last score, with the best beside it."""
        self.writer.close()
        minutes = round(self._seconds() / 60, 2)
        result = {"steps": self.total, "minutes": minutes, **self.last, "best": self.best if self.last else None}
        _write(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        self.show(self.last)
        print(f"{self.total} steps in {minutes} minutes; everything is in {self.folder}")
        return result

    def show(self, metrics: dict) -> dict:
        """Print the score in `metrics`; returns them."""
        self.last = metrics
        name = "score" if "eval/score" in metrics else "return"
        spread = f" +- {metrics[f'eval/{name}_std']:.1f} over episodes" if f"eval/{name}_std" in metrics else ""
        best = f", best {self.best:.1f}" if math.isfinite(self.best) else ""
        best += f", {metrics['eval/candidates']:.0f} candidates" if "eval/candidates" in metrics else ""
        print(f"last {name} {self._headline():.1f}{spread}{best}" if "eval/return" in metrics else "not evaluated")
        return metrics

    def _headline(self) -> float:
        return self.last.get("eval/score", self.last["eval/return"])

    def _show(self, step: int, values: dict) -> None:
        shown = {
            k: f"{v:.3g}"
            for k, v in values.items()
            if k in ("eval/score", "eval/return", "eval/candidates", "critic/v", "behaviour/loss", "policy/loss")
        }
        self.bar.set_postfix(shown)
        if self.bar.disable and ("eval/return" in values or time.time() - self.printed > 10):
            self.printed = time.time()
            left = (self.total - step) / max(values["time/steps_per_s"], 1e-9)
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            self._say(f"step {step}/{self.total}  {values['time/steps_per_s']:.0f} steps/s  {left:.0f} s left  {text}")

    def _say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.start

    def _advice(self) -> str:
        return f"the last good checkpoint is kept in {self.folder}; try a smaller learning rate or beta"


def _own_file(env: str) -> bool:
    return env.endswith((".hdf5", ".h5")) or env.startswith(datasets.MINARI) or Path(env).is_file()


def _write(path: Path, text: str) -> None:
    """All of it or nothing, as in `Run.save`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> dict:
    """The content of a run's checkpoint.pt, given it or its folder. Raises UserError if it is missing or damaged."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a run writes it at its first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}); use another one") from None
    if not isinstance(checkpoint, dict) or "step" not in checkpoint:
        raise UserError(f"{path} is a file of torch, but not the checkpoint of a run; use another one")
    return checkpoint


def numpy_or_torch(act: Callable, device: str | torch.device) -> Callable:
    """`act`, (B, O) -> (B, A) on tensors, for numpy or torch observations, (B, O) or (O,); it answers in kind."""

    @torch.no_grad()
    def friendly(obs):
        batch = torch.as_tensor(
            np.asarray(obs) if not torch.is_tensor(obs) else obs, dtype=torch.float32, device=device
        )
        action = act(batch.unsqueeze(0)).squeeze(0) if batch.ndim == 1 else act(batch)
        return action.to(obs.device) if torch.is_tensor(obs) else action.cpu().numpy()

    return friendly


def _origin() -> dict:
    """Where a result comes from: command, versions, commit."""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "h5py")
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": commit or None,
    }
