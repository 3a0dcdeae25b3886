"""A run's folder and the command line's manners.

    runs/<env>/<algorithm>/seed<k>/
        config.json      arguments, command, versions, commit
        metrics.jsonl    one line a log step, the same scalars as in the TensorBoard events beside it
        checkpoint.pt    networks, optimizers, step and random states: all that `--resume` needs
        result.json      the last score, the best one, and how long it took

Nothing of the user's is ever overwritten: a folder that holds a run is only entered with `--resume`, and only with the
same configuration, or with `--eval-only`, which writes nothing but a video.
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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import TrainingError, UserError, datasets, environments
from common.datasets import Dataset
from common.training import Adam, Seeds

# What `--resume` may change: none of these alters the weights that a given step arrives at by more than rounding, but
# for policy_steps with lr_decay, where the learning rate follows the new length from then on.
FREE = {
    "run_dir",
    "act_noise",
    "num_seeds",
    "compile",
    "cudagraph",
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
CRITIC = {"env", "critic_loss", "expectile", "linex_alpha", "linex_max"}  # what a critic's weights mean
MODEL = CRITIC | {"path", "network", "preset", "schedule", "diffusion_steps", "beta"}  # and a policy's
AT_LEAST_1 = {
    "batch_size",
    "candidates",
    "eval_every",
    "eval_episodes",
    "linex_max",
    "log_every",
    "num_seeds",
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
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint, if any", file=sys.stderr)
        raise SystemExit(130) from None


def fill_in(args, paper: dict):
    """A copy of `args` in which a field that is None holds the value of `paper[args.env]`, else of `paper["*"]`.

    Raises UserError for a number that makes no sense, for a device or an environment that is not there.
    """
    name = "own file" if _own_file(args.env) else args.env
    if name not in paper:  # AntMaze's -v2 are its -v0 with mistakes corrected
        name = re.sub("^(antmaze-.*)-v[12]$", r"\1-v0", name)
    values = paper["*"] | paper.get(name, {})
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
    if torch.device(args.device).index:
        torch.cuda.set_device(args.device)  # a CUDA graph is captured on the current device
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


def prepare(models: dict[str, torch.nn.Module], data: Dataset, args, seed: int) -> dict[str, torch.nn.Module]:
    """One seed's untrained networks, on the device, normalised by `data`; or the critic as the run `args.critic` left.

    Raises UserError if the data, the evaluation environment and that critic do not belong together.
    """
    if args.eval_env:
        datasets.check_sizes(data, environments.make(args.eval_env))
    for model in models.values():
        model.to(args.device)
    if args.normalize_obs:
        models["critic"].v.normalize.fit(data.obs)  # one module, shared by all networks
    if args.critic:
        own = Path(args.critic) / f"seed{seed}"
        checkpoint = load_checkpoint(own if own.is_dir() else args.critic)
        if other := _other(CRITIC, checkpoint["args"], vars(args)):
            raise UserError(f"the critic in {args.critic} is one with {other}; give the same")
        try:
            models["critic"].load_state_dict(checkpoint["critic"])
        except RuntimeError:
            raise UserError(f"the critic in {args.critic} is another network (of a --preset?); train one") from None
    return models


class Folder:
    """One seed's run: its folder, and what it has logged."""

    def __init__(self, args, algorithm: str):
        """Only looks; `open` makes the folder. Raises UserError if it holds another run."""
        name = Path(args.env).stem if _own_file(args.env) else args.env
        name = re.sub("[:/]", "-", args.env) if args.env.startswith(datasets.MINARI) else name
        self.path = Path(args.run_dir or f"runs/{name}/{algorithm}/seed{args.seed}")
        self.arguments = json.loads(json.dumps(dataclasses.asdict(args), default=str))
        self.config = {"algorithm": algorithm, "args": self.arguments} | _origin()
        self.seconds_before, self.best, self.last = 0.0, -math.inf, {}
        self.writer = None
        path = self.path / "config.json"
        if not path.exists():
            return
        config = json.loads(path.read_text())
        if config["algorithm"] != algorithm:
            raise UserError(f"{self.path} holds a run of {config['algorithm']}.py; choose another --run-dir")
        if not args.resume and not args.eval_only:
            raise UserError(
                f"{self.path} holds a run already; add --resume to go on with it, or choose another --run-dir"
            )
        if other := _other(MODEL if args.eval_only else config["args"].keys() - FREE, config["args"], self.arguments):
            advice = "give the same" if args.eval_only else "choose a new --run-dir"
            raise UserError(f"{self.path} holds a run with {other}; {advice}")

    def load(self) -> dict:
        """The checkpoint. Raises UserError if it is missing or damaged."""
        state = load_checkpoint(self.path / "checkpoint.pt")
        self.seconds_before, self.best, self.last = state["seconds"], state["best"], state["last"]
        return state

    def load_next(self, step: int) -> dict:
        """The checkpoint of `step` that was written but not renamed. Raises UserError if there is none."""
        temporary = self.path / "checkpoint.pt.tmp"
        if not temporary.exists() or load_checkpoint(temporary)["step"] != step:
            raise UserError(f"{self.path} is not as far as the other seeds, at step {step}; resume each seed alone")
        self.keep()
        return self.load()

    def open(self, start: int) -> None:
        """Make the folder, drop logs after step `start`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} can't be written ({error.strerror}); choose another --run-dir") from None
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run killed while writing leaves half a line
        _write(path, "".join(line for line in whole if json.loads(line)["step"] <= start))
        self.writer = SummaryWriter(str(self.path), purge_step=start + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write them to metrics.jsonl and TensorBoard. Raises TrainingError at NaN or inf."""
        for key, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: {key} is {value}; {self._advice()}")
        if "eval/return" in values:
            self.last = {key: value for key, value in values.items() if key.startswith("eval/")}
            self.best = max(self.best, headline(self.last))
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def write(self, step: int, models: dict, state: dict) -> None:
        """Write the checkpoint under a temporary name. Raises TrainingError at weights that are NaN or inf."""
        for name, model in models.items():
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                raise TrainingError(f"step {step}: the weights of {name} are no longer finite; {self._advice()}")
        state = {name: model.state_dict() for name, model in models.items()} | state
        state |= {"step": step, "args": self.arguments, "best": self.best, "last": self.last}
        with (self.path / "checkpoint.pt.tmp").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def keep(self) -> None:
        """Give the checkpoint its name: a killed run never leaves half a file."""
        os.replace(self.path / "checkpoint.pt.tmp", self.path / "checkpoint.pt")

    def _advice(self) -> str:
        kept = f"the last good checkpoint is kept in {self.path}"
        there = (self.path / "checkpoint.pt").exists()
        return f"{kept if there else 'no checkpoint was written yet'}; try a smaller learning rate or beta"


class Run:
    """A command's training run, of one seed or several: their folders, the progress bar, how far it is."""

    def __init__(self, args, algorithm: str):
        """Raises UserError if a folder holds another run."""
        self.args, self.folders = args, []
        for seed in range(args.seed, args.seed + args.num_seeds):
            own = args.run_dir and (Path(args.run_dir) / f"seed{seed}" if args.num_seeds > 1 else args.run_dir)
            self.folders.append(Folder(dataclasses.replace(args, seed=seed, num_seeds=1, run_dir=own), algorithm))
        self.start, self.warned, self.on_cuda = time.time(), False, torch.device(args.device).type == "cuda"

    def restore(self, seeds: Seeds, optimizers: dict[str, Adam]) -> int:
        """Load the checkpoints into networks and optimizers; returns their step, or 0 if there is nothing to load.

        Raises UserError if one is damaged, of other networks, or missing where it is to be evaluated.
        """
        here = [(folder.path / "checkpoint.pt").exists() for folder in self.folders]
        if not self.args.eval_only and not (self.args.resume and any(here)):
            return 0
        states = [
            folder.load() if found or not any(here) else {"step": -1} for folder, found in zip(self.folders, here)
        ]
        step = max(state["step"] for state in states)
        for k, folder in enumerate(self.folders):
            if states[k]["step"] < step:  # killed between two renames? The other files were complete before the first
                states[k] = folder.load_next(step)
        try:
            for models, state in zip(seeds.separate, states):
                for name, model in models.items():
                    model.load_state_dict(state[name])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dicts([state[name] for state in states])
        except (KeyError, ValueError, RuntimeError):
            config = self.folders[0].path / "config.json"
            raise UserError(f"{config.parent} has other networks; give the arguments in {config}") from None
        seeds.take_over()
        torch.set_rng_state(states[0]["rng"])
        if states[0]["cuda_rng"] is not None and self.on_cuda:
            torch.cuda.set_rng_state(states[0]["cuda_rng"], self.args.device)
        return step

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The training steps start + 1 .. total, with a progress bar. Makes the folders, drops logs after `start`."""
        for folder in self.folders:
            folder.open(start)
        self.total, self.printed, self.clock = total, time.time(), (time.time(), start)
        self.bar = tqdm(total=total, initial=start, disable=not sys.stderr.isatty(), unit="step", dynamic_ncols=True)
        for step in range(start + 1, total + 1):
            yield step
            self.bar.update()
        self.bar.close()

    def record(self, step: int, metrics: dict, seeds: Seeds, optimizers: dict[str, Adam], **facts) -> None:
        """Log every `log_every` steps, save every `save_every` steps; both after evaluations and at the end.

        A metric is a tensor or an array, of one number a seed. `facts` are kept in the checkpoint.
        """
        always = step == self.total or any(key.startswith("eval/") for key in metrics)
        if always or step % self.args.log_every == 0:
            self.log(step, metrics)
        if always or step % self.args.save_every == 0:
            self.save(step, seeds, optimizers, **facts)

    def log(self, step: int, metrics: dict) -> None:
        """Read the tensors, write them to every seed's log. Raises TrainingError at NaN or inf."""
        now = time.time()
        speed = (step - self.clock[1]) / max(now - self.clock[0], 1e-9)
        self.clock = (now, step)
        columns = {key: np.ravel(torch.as_tensor(value).tolist()) for key, value in metrics.items()}
        rows = [
            {key: float(column[k]) for key, column in columns.items()} | {"time/steps_per_s": speed}
            for k in range(len(self.folders))
        ]
        for folder, values in zip(self.folders, rows):
            folder.log(step, values)
        share = min(values.get("policy/ess", 1) for values in rows)
        if share < 0.1 and not self.warned:
            self.warned = True
            few = f"only {100 * share:.1f} % of the samples carry the weight (policy/ess)"
            self._say(f"step {step}: {few}: the policy fits a few outliers; a smaller beta may do better")
        self._show(step, {key: np.mean([values[key] for values in rows]) for key in rows[0]})

    def save(self, step: int, seeds: Seeds, optimizers: dict[str, Adam], **facts) -> None:
        """Write all checkpoints, then rename them. Raises TrainingError at weights that are NaN or inf."""
        seeds.write_back()
        cuda_rng = torch.cuda.get_rng_state(self.args.device) if self.on_cuda else None
        facts |= {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng}
        states = {name: optimizer.state_dicts() for name, optimizer in optimizers.items()}
        for k, folder in enumerate(self.folders):
            own = {name: state[k] for name, state in states.items()} | {"seconds": self._seconds(folder)}
            folder.write(step, seeds.separate[k], own | facts)
        for folder in self.folders:
            folder.keep()

    def film(self, seeds: Seeds, play: Callable) -> None:
        """With `--video`, one episode of every seed into its folder, by `play(models, obs, args, generator)`."""
        folders = iter(self.folders)
        if self.args.video:
            seeds.each(lambda m, seed: environments.record(partial(play, m), self.args, seed, next(folders).path))

    def finish(self) -> dict:
        """Write result.json of every seed and print the headline: the last score, with the best beside it.

        Returns what result.json holds, of the first seed.
        """
        results = []
        for folder in self.folders:
            folder.writer.close()
            minutes = round(self._seconds(folder) / 60, 2)
            best = folder.best if folder.last else None
            results.append({"steps": self.total, "minutes": minutes, **folder.last, "best": best})
            _write(folder.path / "result.json", json.dumps(results[-1], indent=2) + "\n")
        self.show()
        everything = self.folders[0].path if len(self.folders) == 1 else self.folders[0].path.parent
        print(f"{self.total} steps in {results[0]['minutes']} minutes; everything is in {everything}")
        return results[0]

    def show(self, metrics: dict | None = None) -> dict:
        """Print the scores, those in `metrics` or the last ones; returns those of the first seed."""
        for k, folder in enumerate(self.folders):
            if metrics is not None:
                folder.last = {key: float(np.ravel(value)[k]) for key, value in metrics.items()}
            prefix = f"seed {folder.arguments['seed']}: " if len(self.folders) > 1 else ""
            print(prefix + _headline_text(folder.last, folder.best))
        if len(self.folders) > 1 and self.folders[0].last:
            scores = np.array([headline(folder.last) for folder in self.folders])
            low, high = _interval(scores)
            print(f"mean of {len(scores)} seeds {scores.mean():.1f}, 95 % interval {low:.1f} to {high:.1f} (bootstrap)")
        return self.folders[0].last

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

    def _seconds(self, folder: Folder) -> float:
        return folder.seconds_before + time.time() - self.start


def headline(evaluation: dict[str, float]) -> float:
    """The score, or the return where there is none."""
    return evaluation.get("eval/score", evaluation["eval/return"])


def _headline_text(last: dict[str, float], best: float) -> str:
    if "eval/return" not in last:
        return "not evaluated"
    name = "score" if "eval/score" in last else "return"
    spread = f" +- {last[f'eval/{name}_std']:.1f} over episodes" if f"eval/{name}_std" in last else ""
    text = f"last {name} {headline(last):.1f}{spread}" + (f", best {best:.1f}" if math.isfinite(best) else "")
    return text + (f", {last['eval/candidates']:.0f} candidates" if "eval/candidates" in last else "")


def _interval(scores: np.ndarray) -> tuple[float, float]:
    """Of the mean, 95 %, by bootstrap over seeds."""
    means = np.random.default_rng(0).choice(scores, (10_000, len(scores))).mean(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def _other(keys: Iterable[str], old: dict, new: dict) -> str:
    """The first of `keys` that both have and that differs, as "--key old, not new", or ""."""
    for key in sorted(keys):
        if key in old and key in new and old[key] != new[key]:
            return f"--{key.replace('_', '-')} {old[key]}, not {new[key]}"
    return ""


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
    packages = ("numpy", "gymnasium", "mujoco", "h5py")
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # torch's own tells CPU from CUDA
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions | {name: version(name) for name in packages},
        "commit": commit or None,
    }
