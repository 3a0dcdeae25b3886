"""A run's folder, its logs and checkpoints, and what it prints while it trains.

runs/<env>/<algorithm>/seed<k>/, or --run-dir
    config.json      arguments, commands, versions, commit, size and hash of the data
    metrics.jsonl    one line a log step, the same scalars as in the TensorBoard events beside it
    curves.png       the scalars as curves
    checkpoint.pt    networks, optimizers, step, random state: all that `--resume` needs
    maze.png         the ways through a maze; bandit.png: the bandit's actions; video.mp4: with --video
    result.json      the last score, the best one, and how long it took
    eval.json        what `--eval-only` found
    lock             held by the process that writes here
"""

import io
import json
import math
import os
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

from common import Interrupted, TrainingError, UserError, datasets, environments, mazes, trained

INTERVAL = 10  # seconds between two lines of a run that is not on a terminal


def write(path: Path, content: bytes | dict) -> None:
    """Bytes, or a dictionary as JSON: all of it or nothing. Raises TrainingError if it can't be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk
        text = f"{path} can't be written ({error.strerror}); what was there is whole: make room, then add --resume"
        raise TrainingError(text) from None
    finally:
        temporary.unlink(missing_ok=True)


def origin() -> dict:
    """Where a result comes from: command, versions, commit, with -dirty if code was changed after it."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}  # torch's own tells CPU from CUDA
    versions |= {name: version(name) for name in ("numpy", "gymnasium", "mujoco", "h5py")}
    git = 'git describe --always && (git diff --quiet HEAD -- "*.py" "*.npz" || echo dirty)'  # says nothing without git
    said = subprocess.run(git, shell=True, cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": versions, "commit": "-".join(said.split()) or None}


def captured(update: Callable[[], dict], warm_up: int = 3) -> Callable[[], dict]:
    """`update()`, a whole gradient step, as a CUDA graph: the first calls run as they are, the next one is recorded,
    and from then on it is replayed (PyTorch's notes on CUDA, "whole-network capture"). Its optimizers need
    capturable=True. The metrics that it returns are overwritten by the next call."""

    def updates() -> Iterator[dict]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for _ in range(warm_up):  # on a side stream, as capturing demands
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = update()
            torch.cuda.current_stream().wait_stream(stream)
            yield dict(metrics)
        with torch.cuda.graph(graph):  # records, computes nothing
            metrics = update()
        while True:
            graph.replay()
            yield dict(metrics)

    return updates().__next__


class Run:
    """One run: it prints, logs, saves and stops, and computes nothing."""

    def __init__(self, args, algorithm: str, data: datasets.Dataset, phases: dict[str, int], **parts):
        """`phases`: name -> gradient steps, in order. `parts`: what a checkpoint holds; each has a state_dict.
        Raises UserError if the folder can't be written, is in use, or holds a run on other data."""
        self.args, self.algorithm, self.data, self.phases, self.parts = args, algorithm, data, phases, parts
        self.path, self.total, self.step, self.scored = args.run_dir, sum(phases.values()), 0, None
        self.best, self.last, self.started, self.signal = -math.inf, {}, time.time(), None
        config = {"format": trained.FORMAT, "algorithm": algorithm, "args": vars(args)}
        config = json.loads(json.dumps(config | {"data": data.facts} | origin(), default=str))
        self.config, old = config, trained.read_config(self.path)
        if old and old["data"] | {"source": ""} != config["data"] | {"source": ""}:  # a file may have been moved
            raise UserError(f"{args.env}: not the data that the run in {self.path} has; use a new --run-dir")
        if args.eval_only:
            return
        if old:  # the first command and its origin stay
            config |= {key: old[key] for key in ("command", "versions", "commit")}
            config["resumed"] = [*old.get("resumed", []), origin()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.path / "lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"another run is writing into {self.path}; wait, or choose another --run-dir") from None
        except OSError as error:
            raise UserError(f"{self.path} can't be written ({error.strerror}); choose another --run-dir") from None
        print("gradient steps:", ", then ".join(f"{name} {n:,}" for name, n in phases.items() if n) or "none")

    def restore(self) -> int:
        """Load the checkpoint into the parts; returns its step, or 0 if there is none to go on from. Raises UserError
        if it is damaged, of other networks, too far, or missing from a finished or evaluated run."""
        if not self.args.eval_only and not any((self.path / x).exists() for x in ("checkpoint.pt", "result.json")):
            return 0
        state = trained.load_checkpoint(self.path, self.algorithm, self.args.device)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError):
            raise UserError(f"the checkpoint in {self.path} has other networks than these arguments make") from None
        self.best, self.last, self.step = state["best"], state["last"], state["step"]
        self.started -= state["seconds"]  # as if the run had never stopped
        if self.step > self.total and not self.args.eval_only:
            raise UserError(f"the run in {self.path} is at step {self.step} already, beyond the {self.total} wanted")
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        return self.step

    def steps(self, start: int) -> Iterator[tuple[int, str]]:
        """(step, phase) for all steps after `start`; what was logged after it is dropped. Ctrl-C and SIGTERM raise
        Interrupted when the step is done and saved."""
        write(self.path / "config.json", self.config)  # only now: nothing of a refused resume is kept
        rows = [json.dumps(row) + "\n" for row in trained.read_metrics(self.path) if row["step"] <= start]
        write(self.path / "metrics.jsonl", "".join(rows).encode())
        self.writer, self.logged, end = SummaryWriter(str(self.path), purge_step=start + 1), (time.time(), start), 0
        self.bar = tqdm(total=self.total, initial=start, disable=not sys.stderr.isatty(), unit="step")
        handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for phase, count in self.phases.items():
                end += count
                yield from self.phase(phase, end)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            self.writer.close()
            self.lock.release()

    def interrupt(self, number: int, _) -> None:
        """A first signal waits for the end of the step, a second one does not."""
        self.signal = number
        signal.signal(number, signal.default_int_handler)

    def phase(self, name: str, end: int) -> Iterator[tuple[int, str]]:
        """The steps up to `end`; says early, and off a terminal every INTERVAL seconds, how long they will take."""
        first = None
        while self.step < end:
            self.step += 1
            yield self.step, name
            self.bar.update()
            now = time.time()
            if first is None:  # a first step may take longer: it is not measured
                first, begun, due = self.step, now, now + INTERVAL / 2
            elif now > due and self.step < end:
                speed = (self.step - first) / (now - begun)
                needed = timedelta(seconds=(end - self.step) // speed)
                look = "; for a shorter look: --critic-steps 10000 --policy-steps 10000" if needed.days else ""
                text = f"step {self.step:,} of {self.total:,}; {name}: {speed:.3g} steps/s"
                self.say(f"{text}, {needed} to go{look}")
                due = now + INTERVAL if self.bar.disable else math.inf  # the bar says it
            if self.signal:
                self.save(self.step, now=True)
                text = f"stopped at step {self.step} and saved; the same command with --resume goes on"
                raise Interrupted(self.signal, text)

    def log(self, step: int, metrics: dict) -> None:
        """Write metrics to metrics.jsonl and TensorBoard every log_every steps, after an evaluation and at the end.
        Raises TrainingError at NaN or inf."""
        if "eval/return" not in metrics and step % self.args.log_every and step != self.total:
            return
        values, (before, first) = {key: float(value) for key, value in metrics.items()}, self.logged
        self.logged = (time.time(), step)
        values["time/steps_per_s"] = (step - first) / max(self.logged[0] - before, 1e-9)
        for key, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(f"{key} is {value}")
            self.writer.add_scalar(key, value, step)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if "eval/return" in values:
            self.last, self.scored = {key: v for key, v in values.items() if key.startswith("eval/")}, step
            self.best = max(self.best, trained.headline(self.last))
            self.bar.set_postfix_str(trained.headline_text(self.last, self.best), refresh=False)
            self.say(f"step {step:,}: {trained.headline_text(self.last, self.best)}")

    def save(self, step: int, now: bool = False) -> None:
        """Write the checkpoint every save_every steps, after an evaluation and at the end. Raises TrainingError at
        weights that are NaN or inf, and if it can't be written."""
        if not now and step % self.args.save_every and step not in (self.scored, self.total):
            return
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                raise self.diverged(f"the weights of {name} are no longer finite")
        cuda_rng = torch.cuda.get_rng_state() if torch.device(self.args.device).type == "cuda" else None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {key: self.config[key] for key in ("format", "algorithm", "args", "data")} | {"step": step}
        state |= {"sizes": (self.data.obs_dim, self.data.action_dim), "best": self.best, "last": self.last}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "seconds": time.time() - self.started}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.path / "checkpoint.pt", buffer.getvalue())

    def finish(self, actor: Callable) -> dict:
        """Write curves.png and result.json, with --video a video; returns what result.json holds."""
        self.film(actor)
        result = {"steps": self.total, "minutes": round((time.time() - self.started) / 60, 2), **self.last}
        result["best"] = self.best if self.last else None
        trained.curves(self.path).savefig(self.path / "curves.png", dpi=90)
        write(self.path / "result.json", result)
        print(trained.headline_text(self.last, self.best))
        print(f"{self.total:,} steps in {result['minutes']} minutes; everything is in {self.path}")
        return result

    def show(self, metrics: dict, actor: Callable) -> dict:
        """Print what `--eval-only` found, write it to eval.json, with --video a video; returns it."""
        self.film(actor)
        found = {key: float(value) for key, value in metrics.items()}
        about = {"step": self.step, "episodes": self.args.eval_episodes, "seed": self.args.seed}
        about |= {key: value for key, value in vars(self.args).items() if key in trained.ACTING - {"candidates"}}
        write(self.path / "eval.json", about | found)
        print(trained.headline_text(found, -math.inf))
        return found

    def scores(self, actor: Callable) -> dict[str, float]:
        """The scalars of an evaluation: `actor` plays args.eval_episodes episodes, seeded by seed and step."""
        args, env, seed = self.args, self.args.eval_env, 10**8 * self.args.seed + self.step
        with environments.blamed(env, f"fails in an evaluation, step {self.step}"):
            found = environments.rollout(actor, env, args.eval_episodes, seed, args.device)
        returns, ways, goals = found
        if ways:
            self.picture("maze", mazes.picture(env, self.data.obs[:, :2].cpu().numpy(), ways[:20], goals[:20]))
        return environments.score_metrics(returns, env)

    def film(self, actor: Callable) -> None:
        if (args := self.args).video:
            with environments.blamed(args.eval_env, "fails in the video"):
                environments.record(actor, args.eval_env, args.seed, self.path, args.device)

    def picture(self, name: str, figure: Figure) -> None:
        """Into the folder, and while training to TensorBoard."""
        figure.savefig(self.path / f"{name}.png", dpi=120)
        if not self.args.eval_only:
            self.writer.add_figure(name, figure, self.step)

    def diverged(self, what: str) -> TrainingError:
        kept = f"the last good checkpoint, if there is one, is kept in {self.path}"
        return TrainingError(f"step {self.step}: {what}; {kept}; try a smaller learning rate or beta")

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()
