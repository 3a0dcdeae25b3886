"""A run's folder, its logs and checkpoints, and what it prints.

runs/<env>/<algorithm>/seed<k>/
    config.json      arguments, commands, versions, commit, size and hash of the data
    metrics.jsonl    one line a log step, the same scalars as in the TensorBoard events beside it
    curves.png       the scalars as curves
    checkpoint.pt    networks, optimizers, step, random state: all that `--resume` needs
    result.json      the last score, the best one, and how long it took
    eval.json        what `--eval-only` found
"""

import dataclasses
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import filelock
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import Interrupted, TrainingError, UserError, datasets, environments, trained

FILES = ("config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "result.json", "eval.json")
INTERVAL = 10  # seconds between two lines of a run that is not on a terminal


def own_data(env: str) -> bool:
    return env.startswith(datasets.MINARI) or Path(env).suffix != "" or Path(env).is_file()


def folder(args, algorithm: str) -> Path:
    name = Path(args.env).stem if own_data(args.env) else args.env
    name = re.sub("[:/]", "-", args.env) if args.env.startswith(datasets.MINARI) else name
    return Path(args.run_dir or f"runs/{name}/{algorithm}/seed{args.seed}")


def read_config(path: Path) -> dict | None:
    """config.json in a folder; None if there is none. Raises UserError if it is damaged or of another version."""
    path = path / "config.json"
    try:
        config = json.loads(path.read_text())
        missing = {"format", "algorithm", "args", "data"} - config.keys()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        missing = True
    if missing or config["format"] != trained.FORMAT:
        raise UserError(f"{path} is damaged, not that of a run, or of another version; choose another --run-dir")
    return config


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def origin() -> dict:
    """Where a result comes from: command, versions, commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # torch's own tells CPU from CUDA
    versions |= {name: version(name) for name in ("numpy", "gymnasium", "mujoco", "h5py")}
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": versions, "commit": commit or None}


def captured(update: Callable[[], dict], warm_up: int = 3) -> Callable[[], dict]:
    """`update()`, a whole gradient step, as a CUDA graph: the first calls run as they are, the next one is recorded,
    and from then on it is replayed (PyTorch's notes on CUDA, "whole-network capture").

    Its optimizers need capturable=True. The metrics that it returns are overwritten by the next call.
    """
    graph, stream, calls, metrics = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, {}

    def replay() -> dict:
        nonlocal calls, metrics
        calls += 1
        if calls <= warm_up:  # on a side stream, as capturing demands
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = update()
            torch.cuda.current_stream().wait_stream(stream)
            return metrics
        if calls == warm_up + 1:
            with torch.cuda.graph(graph):  # records, computes nothing
                metrics = update()
        graph.replay()
        return metrics

    return replay


class Run:
    """One run: it prints, logs, saves and stops, and computes nothing."""

    def __init__(self, args, algorithm: str, data: datasets.Dataset, phases: dict[str, int], **parts):
        """`phases`: name -> gradient steps, in order. `parts`: what a checkpoint holds; each has a state_dict.

        Makes the folder and says what will be done. Raises UserError if the folder can't be written or is in use, and
        if data, environment and folder do not belong together.
        """
        self.args, self.algorithm, self.data, self.phases, self.parts = args, algorithm, data, phases, parts
        self.path, self.total, self.step, self.scored = folder(args, algorithm), sum(phases.values()), 0, None
        self.best, self.last, self.seconds, self.started = -math.inf, {}, 0.0, time.time()
        self.signal, self.warned = None, False
        if args.eval_env:
            datasets.check_sizes(data, environments.make(args.eval_env))
        config = {"format": trained.FORMAT, "algorithm": algorithm, "args": dataclasses.asdict(args)}
        config = json.loads(json.dumps(config | {"data": data.facts} | origin(), default=str))
        self.arguments, old = config["args"], read_config(self.path)
        if old and old["data"] != config["data"]:
            raise UserError(f"the data of {args.env} have changed since the run in {self.path}; use a new --run-dir")
        if args.eval_only:
            return
        if old:  # the first command and its origin stay
            config |= {key: old[key] for key in ("command", "versions", "commit")}
            config["resumed"] = [*old.get("resumed", []), origin()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.path / "lock")
            self.lock.acquire(timeout=0)
            write(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        except filelock.Timeout:
            raise UserError(f"another run is writing into {self.path}; wait, or choose another --run-dir") from None
        except OSError as error:
            raise UserError(f"{self.path} can't be written ({error.strerror}); choose another --run-dir") from None
        score = f"{args.eval_env}, {args.eval_episodes} episodes" if args.eval_env else "none, see --eval-env"
        score = "against the closed form" if args.env == "bandit" else score
        steps = ", then ".join(f"{name} {n:,}" for name, n in phases.items() if n)
        print("\n".join([*data.describe(), f"score: {score}; device: {args.device}", f"gradient steps: {steps}"]))

    def restore(self) -> int:
        """Load the checkpoint into the parts; returns its step, or 0 if there is none to go on from.

        Raises UserError if it is damaged, of other networks, or missing where it is to be evaluated.
        """
        if not self.args.eval_only and not (self.path / "checkpoint.pt").exists():
            return 0
        state = trained.load_checkpoint(self.path, self.algorithm)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError):
            raise UserError(f"the checkpoint in {self.path} has other networks than these arguments make") from None
        self.best, self.last, self.seconds, self.step = (state[key] for key in ("best", "last", "seconds", "step"))
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return self.step

    def steps(self, start: int) -> Iterator[tuple[int, str]]:
        """(step, phase) for all steps after `start`, with a progress bar, or off a terminal a line every ten seconds.

        Drops what was logged after `start`. Ctrl-C and SIGTERM raise Interrupted when the step is done and saved.
        """
        log = self.path / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run killed while writing leaves half a line
        write(log, "".join(line for line in whole if json.loads(line)["step"] <= start))
        self.writer, self.logged, first = SummaryWriter(str(self.path), purge_step=start + 1), (time.time(), start), 0
        self.bar = tqdm(total=self.total, initial=start, disable=not sys.stderr.isatty(), unit="step")
        handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for phase, count in self.phases.items():
                begun = told = time.time()
                done = max(start - first, 0)
                for k in range(done + 1, count + 1):
                    self.step = first + k
                    yield self.step, phase
                    self.bar.update()
                    now = time.time()
                    if now - told > INTERVAL / 2 if told == begun else self.bar.disable and now - told > INTERVAL:
                        self.tell(phase, count - k, (k - done) / (now - begun))
                        told = now
                    if self.signal:
                        self.save(self.step, now=True)
                        text = f"stopped at step {self.step} and saved; the same command with --resume goes on"
                        raise Interrupted(self.signal, text)
                first += count
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.bar.close()

    def interrupt(self, number: int, _) -> None:
        """A first signal waits for the end of the step, a second one does not."""
        self.signal = number
        signal.signal(number, signal.default_int_handler)

    def tell(self, phase: str, left: int, speed: float) -> None:
        """How far the run is, and how long its phase will take: once a phase, off a terminal every INTERVAL seconds."""
        needed = timedelta(seconds=left // speed)
        text = f"step {self.step:,} of {self.total:,}; {phase}: {speed:.3g} steps/s, {needed} to go"
        if left / speed > 86400:
            text += "; for a shorter look: --critic-steps 10000 --policy-steps 10000"
        self.say(text)

    def log(self, step: int, metrics: dict) -> None:
        """Write metrics to metrics.jsonl and TensorBoard, every log_every steps, after an evaluation and at the end.

        Raises TrainingError at NaN or inf.
        """
        if "eval/return" not in metrics and step % self.args.log_every and step != self.total:
            return
        values, (before, first) = {key: float(value) for key, value in metrics.items()}, self.logged
        self.logged = (time.time(), step)
        values["time/steps_per_s"] = (step - first) / max(self.logged[0] - before, 1e-9)
        for key, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: {key} is {value}; {self.advice()}")
            self.writer.add_scalar(key, value, step)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if values.get("policy/ess", 1) < 0.1 and not self.warned:
            self.warned = True
            few = f"only {100 * values['policy/ess']:.1f} % of the samples carry the weight (policy/ess)"
            self.say(f"step {step}: {few}: the policy fits a few outliers; a smaller beta may do better")
        if "eval/return" in values:
            self.last, self.scored = {key: v for key, v in values.items() if key.startswith("eval/")}, step
            self.best = max(self.best, trained.headline(self.last))
            self.bar.set_postfix_str(trained.headline_text(self.last, self.best), refresh=False)
            self.say(f"step {step:,}: {trained.headline_text(self.last, self.best)}")

    def save(self, step: int, now: bool = False) -> None:
        """Write the checkpoint every save_every steps, after an evaluation, at the end: all of it or nothing.

        Raises TrainingError at weights that are NaN or inf, and if it can't be written.
        """
        if not now and step % self.args.save_every and step not in (self.scored, self.total):
            return
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                raise TrainingError(f"step {step}: the weights of {name} are no longer finite; {self.advice()}")
        cuda_rng = torch.cuda.get_rng_state() if torch.device(self.args.device).type == "cuda" else None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"format": trained.FORMAT, "algorithm": self.algorithm, "args": self.arguments, "step": step}
        state |= {"sizes": (self.data.obs_dim, self.data.action_dim), "best": self.best, "last": self.last}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "seconds": self.elapsed()}
        temporary = self.path / "checkpoint.pt.tmp"
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
            os.replace(temporary, self.path / "checkpoint.pt")
        except (OSError, RuntimeError) as error:  # a full disk
            temporary.unlink(missing_ok=True)
            raise TrainingError(f"step {step}: the checkpoint can't be written ({error}); {self.advice()}") from None

    def finish(self, actor: Callable) -> dict:
        """Write curves.png and result.json, with --video a video; returns what result.json holds."""
        self.film(actor)
        self.writer.close()
        result = {"steps": self.total, "minutes": round(self.elapsed() / 60, 2), **self.last}
        result["best"] = self.best if self.last else None
        self.draw()
        write(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        self.lock.release()
        print(trained.headline_text(self.last, self.best))
        print(f"{self.total:,} steps in {result['minutes']} minutes; everything is in {self.path}")
        return result

    def show(self, metrics: dict, actor: Callable) -> dict:
        """Print what `--eval-only` found, write it to eval.json, with --video a video; returns it."""
        self.film(actor)
        found = {key: float(value) for key, value in metrics.items()}
        about = {"step": self.step, "episodes": self.args.eval_episodes, "seed": self.args.seed}
        write(self.path / "eval.json", json.dumps(about | found, indent=2) + "\n")
        print(trained.headline_text(found, -math.inf))
        return found

    def scores(self, actor: Callable) -> dict[str, float]:
        """The scalars of an evaluation: `actor` plays args.eval_episodes episodes, seeded by seed and step."""
        args, seed = self.args, 10**8 * self.args.seed + self.step
        returns, places = environments.rollout(
            actor, args.eval_env, args.eval_episodes, seed, args.device, args.eval_steps
        )
        return environments.score_metrics(returns, args.eval_env)

    def film(self, actor: Callable) -> None:
        if self.args.video:
            args = self.args
            environments.record(actor, args.eval_env, args.seed, self.path, args.device, args.eval_steps)

    def picture(self, name: str, figure: Figure) -> None:
        """Into the folder, and while training to TensorBoard."""
        figure.savefig(self.path / f"{name}.png", dpi=120)
        if not self.args.eval_only:
            self.writer.add_figure(name, figure, self.step)

    def draw(self) -> None:
        """curves.png: every scalar of metrics.jsonl over the steps."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        names = sorted({key for row in rows for key in row} - {"step"})
        figure = Figure(figsize=(12, 2.4 * math.ceil(len(names) / 4)), layout="constrained")
        for k, name in enumerate(names, 1):
            axes = figure.add_subplot(math.ceil(len(names) / 4), 4, k, title=name)
            axes.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), marker=".")
        figure.savefig(self.path / "curves.png", dpi=90)

    def elapsed(self) -> float:
        """Seconds, with those before a resume."""
        return self.seconds + time.time() - self.started

    def advice(self) -> str:
        there = (self.path / "checkpoint.pt").exists()
        kept = f"the last good checkpoint is kept in {self.path}" if there else "there is no checkpoint yet"
        return f"{kept}; try a smaller learning rate or beta"

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()
