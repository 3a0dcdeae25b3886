"""How fast a gradient step of each file is: as it is, with --compile, and on a GPU with --cudagraph and with both.

    python benchmarks/speed.py                              minutes; batches of 256, on a GPU if there is one
    python benchmarks/speed.py --batch-size 4096            the batch of GMPO's paper

Each file's own `train` runs, on halfcheetah-demo, made to pause, so that the ways take turns in one process. The table
has the medians of all rounds and, in brackets, how many times as fast as the first way that is. Timed are batches,
losses, backward passes, optimizers and schedules; not logging, evaluations, checkpoints. `acting` is an action of ten
environments in lock-step. The last column is a floor that no way of writing the same update goes below: `products`, its
multiplications at the rate of one large product; on a GPU `launches`, its kernels at the time of a tiny one in a CUDA
graph in which each needs the one before. Small networks are bound by that.
"""

import contextlib
import importlib
import io
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import UserError, runs  # noqa: E402

PHASES = {"iql_critic": ["critic and policy"], "gmpo": ["critic", "policy"]}
PHASES |= {"gmpg": ["behaviour", "policy"], "idql": ["policy"]}
EVALUATION, NEVER = 10**8, 10**9  # steps


@dataclass
class Args:
    files: tuple[str, ...] = tuple(PHASES)
    """which of the four"""
    batch_size: int = 256
    """transitions, or states, of every update"""
    rounds: int = 9
    """how often every way gets its turn"""
    seconds: float = 0.5
    """of each turn"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where"""


def timed(function: Callable, device: str) -> float:
    """The seconds that function() takes, on a device that is idle."""
    begin = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class Paused(runs.Run):
    """A run that takes steps when its thread is told to. An evaluation hands over the actor instead of scoring it."""

    def steps(self, start: int):
        thread = threading.current_thread()
        yield EVALUATION, "policy"
        while True:
            thread.answers.put(None)
            phase, count, context = thread.orders.get()
            with context:
                for _ in range(count):
                    yield 1, phase

    def scores(self, actor: Callable) -> dict[str, float]:
        threading.current_thread().play = lambda: actor(self.data.obs[:10])
        return {}


class Training(threading.Thread):
    """The `train` of a file, which pauses after every order."""

    def __init__(self, file: str, folder: str, args: Args, flags: dict):
        super().__init__(daemon=True)
        given = dict.fromkeys(("critic_steps", "behaviour_steps", "policy_steps", "log_every", "save_every"), NEVER)
        given |= dict(batch_size=args.batch_size, policy_batch_size=args.batch_size, eval_every=EVALUATION)
        given |= dict(device=args.device, run_dir=Path(tempfile.mkdtemp(dir=folder))) | flags
        self.file, self.orders, self.answers = importlib.import_module(file), queue.Queue(), queue.Queue()
        self.args = self.file.Args(**{k: v for k, v in given.items() if k in self.file.Args.__dataclass_fields__})
        self.start()
        self.wait()

    def run(self) -> None:
        try:
            self.file.train(self.args)
        except BaseException as error:
            self.answers.put(error)

    def wait(self) -> None:
        if error := self.answers.get():
            raise error

    def take(self, phase: str, count: int, context: Any = None) -> None:
        """`count` gradient steps of a phase, in a context; of the phase "acting": actions of ten environments."""
        if phase == "acting":
            with torch.no_grad():
                return [self.play() for _ in range(count)]
        self.orders.put((phase, count, context or contextlib.nullcontext()))
        self.wait()


def floor(training: Training, phase: str, device: str, size: int = 2048) -> str:
    """What bounds an update from below, in ms."""
    counter, matrix = FlopCounterMode(display=False), torch.randn(size, size, device=device)
    training.take(phase, 1, counter)
    product = min(timed(lambda: matrix @ matrix, device) for _ in range(9))
    text = f"products {1000 * product * counter.get_total_flops() / (2 * size**3):.3f}"
    if torch.device(device).type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            timed(lambda: training.take(phase, 1), device)
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
        number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(1000):
                number += 1
        launch = min(timed(graph.replay, device) for _ in range(9)) / 1000
        text += f", {kernels} launches {1000 * kernels * launch:.3f}"
    return text


def alternate(ways: list[Training], phase: str, args: Args) -> list[str]:
    """Milliseconds of a step in each way, and how many times as fast as the first way it is."""
    counts, times = [], [[] for _ in ways]
    for way in ways:
        way.take(phase, 5)  # the first compiles, the fourth is captured
        counts.append(max(1, int(2 * args.seconds / timed(lambda: way.take(phase, 2), args.device))))  # noqa: B023
    for _ in range(args.rounds):
        for way, count, found in zip(ways, counts, times):
            found.append(1000 * timed(lambda: way.take(phase, count), args.device) / count)  # noqa: B023
    ratios = [statistics.median(a / b for a, b in zip(times[0], found)) for found in times]
    return [f"{statistics.median(found):.3f} ({ratio:.2f})" for found, ratio in zip(times, ratios)]


def main(args: Args) -> None:
    """Print the table. Raises UserError for arguments that make no sense."""
    if args.rounds < 1 or args.seconds <= 0 or not set(args.files) <= PHASES.keys():
        raise UserError(f"--rounds must be at least 1, --seconds more than 0, --files among {', '.join(PHASES)}")
    ways, name, out = {"as it is": {}, "--compile": dict(compile=True)}, "CPU", sys.stdout
    if torch.device(args.device).type == "cuda":
        ways |= {"--cudagraph": dict(cudagraph=True), "both": dict(compile=True, cudagraph=True)}
        name = torch.cuda.get_device_name(args.device)
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}; ms\n")
    print(f"| | {' | '.join(ways)} | floor |\n" + "| --- " * (len(ways) + 2) + "|", flush=True)
    runs.Run, nowhere = Paused, io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(nowhere):  # what a run prints at first
        for file, phases in ((file, PHASES[file]) for file in args.files):
            trainings = [Training(file, folder, args, flags) for flags in ways.values()]
            for phase in (*phases, "acting"):
                cells = alternate(trainings, phase, args)
                cells.append("" if phase == "acting" else floor(trainings[0], phase, args.device))
                print(f"| {file}.py, {phase} | {' | '.join(cells)} |", file=out, flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
