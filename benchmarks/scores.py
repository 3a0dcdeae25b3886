"""The score table: train every method on every set, score it, and write tables and pictures.

    python benchmarks/scores.py                                   everything that is missing; days on two cores
    python benchmarks/scores.py --sets bandit halfcheetah-demo    these sets alone, in some hours
    python benchmarks/scores.py --folder again                    all of it anew, with its own results and pages
    python benchmarks/scores.py --workers 24 --flags=--cudagraph  on a GPU, which two dozen runs share
    python benchmarks/scores.py --tables-only                     tables and pictures from the results that are there

A run is the one command that a user would type, with the settings of the files; it lies in runs/scores. After it the
last policy is scored over 100 episodes: that is the number in the tables. Each finished run leaves a small file,
benchmarks/results/<set>/<row>/seed<k>.json, and is not run again. A run that was interrupted goes on where it was.
Needs requirements-dev.txt. What is run stands in section 1.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tables  # noqa: E402

from common import TrainingError, UserError, datasets  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------
# 1. The list

PLANNED = (
    "bandit", "halfcheetah-demo",
    "maze2d-umaze-remade", "maze2d-medium-remade", "maze2d-large-remade",
    "hopper-medium-replay-remade", "hopper-medium-expert-remade",
    "walker2d-medium-replay-remade", "walker2d-medium-expert-remade",
    "halfcheetah-medium-replay-remade", "halfcheetah-medium-expert-remade",
    "hopper-medium-remade", "walker2d-medium-remade", "halfcheetah-medium-remade",
)  # fmt: skip
SETS = tuple(name for name in PLANNED if name in ("bandit", *datasets.MADE_HERE))  # remade sets need their agents
# Row -> command. All but cloning take the critic of IQL's run of the same seed.
METHODS = {
    "iql": "iql_critic.py",
    "cloning": "gmpo.py --beta 0 --critic-steps 0",
    "gmpo": "gmpo.py",  # its path is gvp, and so is GMPG's
    "gmpg": "gmpg.py",
    "idql": "idql.py --extraction argmax",
}
PATHS = {f"{method}-{path}": f"{method}.py --path {path}" for method in ("gmpo", "gmpg") for path in ("vp", "icfm")}
# The same diffusion model, acting in another way: the run of the row `idql`, scored again.
EXTRACTIONS = {f"idql-{name}": f"idql.py --extraction {name} --eval-only" for name in ("implicit", "softmax")}
MORE = {"bandit": EXTRACTIONS | PATHS, "halfcheetah-demo": PATHS}
EPISODES = 100
BUDGET = ("critic_steps", "behaviour_steps", "policy_steps", "batch_size", "policy_batch_size", "beta", "device")


@dataclass
class Args:
    sets: tuple[str, ...] = SETS
    """which of the sets, in the order in which they are run"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of every row"""
    workers: int = os.cpu_count() or 1
    """runs at a time; each has its share of the cores, or OMP_NUM_THREADS threads if that is set"""
    flags: str = ""
    """added to every command, such as --cudagraph"""
    tables_only: bool = False
    """run nothing"""
    folder: Path = ROOT
    """where runs/scores and benchmarks/results lie, and the two pages, README.md and benchmarks/README.md"""


def rows(name: str) -> dict[str, str]:
    """Row -> command, of the set `name`; a row comes after those that it needs."""
    return METHODS | MORE.get(name, {})


# ------------------------------------------------------------------------------------------------------------------
# 2. Running


@dataclass(frozen=True)
class Job:
    """A row of a set with a seed. `after` is the job that has to be finished before it."""

    set: str
    row: str
    seed: int
    after: "Job | None" = field(default=None, repr=False)

    @property
    def again(self) -> bool:
        """Whether it only scores another row's run again."""
        return "--eval-only" in rows(self.set)[self.row]

    @property
    def run(self) -> str:
        """The folder of the run that is scored."""
        return f"runs/scores/{self.set}/{self.row.split('-')[0] if self.again else self.row}/seed{self.seed}"

    @property
    def command(self) -> str:
        about = f" --run-dir {self.run}"
        if not self.again:
            critic = f" --critic {self.after.run}" if self.after else ""
            about = f" --env {self.set} --seed {self.seed}{critic}{about}"
        return rows(self.set)[self.row] + about

    def result(self, folder: Path) -> Path:
        return folder / f"benchmarks/results/{self.set}/{self.row}/seed{self.seed}.json"

    def done(self, folder: Path) -> bool:
        """Whether there is a result of this very command."""
        path = self.result(folder)
        return path.exists() and json.loads(path.read_text())["command"].startswith(f"python {self.command}")


def list_jobs(args: Args) -> list[Job]:
    """What is to be run, each job after the one it needs. Raises UserError for arguments that make no sense."""
    if args.workers < 1 or not args.seeds or min(args.seeds) < 0:
        raise UserError("--workers must be at least 1, and --seeds one or more numbers that are not negative")
    if unknown := [name for name in args.sets if name not in SETS]:
        raise UserError(f"--sets {unknown[0]}: no such set; choose among {', '.join(SETS)}")
    jobs, needed = {}, set()
    for name in dict.fromkeys(args.sets):
        names = list(rows(name))
        for row, command in rows(name).items():
            # two jobs that score one run write the same eval.json: one after the other
            before = names[names.index(row) - 1] if "--eval-only" in command else "iql"
            before = None if row in ("iql", "cloning") else before
            for seed in args.seeds:
                jobs[name, row, seed] = Job(name, row, seed, jobs.get((name, before, seed)))
    for job in jobs.values():
        job = None if job.done(args.folder) else job
        while job:  # and what it needs, unless the folder of that run is still there
            needed.add(job)
            job = job.after if job.after and not (args.folder / job.after.run / "result.json").exists() else None
    return [job for job in jobs.values() if job in needed]


def call(command: str, log: Path, args: Args) -> None:
    """Run one of the files in args.folder, into a log. Raises TrainingError with the log's last line if it fails."""
    file, *flags = shlex.split(command)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.workers))} | os.environ
    with log.open("a") as out:
        done = subprocess.run([sys.executable, ROOT / file, *flags], cwd=args.folder, env=threads,
                              stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        last = (log.read_text().splitlines() or [""])[-1]
        raise TrainingError(f"`{command}` ended with code {done.returncode}: {last}")


def do(job: Job, args: Args) -> None:
    """Train unless that is done, score the last policy, write the result. Raises TrainingError as `call` does."""
    folder = args.folder / job.run
    if job.after and not (args.folder / job.after.run / "result.json").exists():
        raise TrainingError(f"not begun, because {job.after.run} is not finished")
    folder.mkdir(parents=True, exist_ok=True)
    log, command = folder / "log.txt", f"{job.command} {args.flags}".strip()
    if not (folder / "result.json").exists():
        begun = folder / "config.json"
        if begun.exists() and not json.loads(begun.read_text())["command"].startswith(job.command):
            raise TrainingError(f"{job.run} holds a run by another command than `{job.command}`; remove that folder")
        call(f"{command} --resume" if begun.exists() else command, log, args)
    scored = job.command if job.again else f"{job.command.split()[0]} --run-dir {job.run} --eval-only"
    call(f"{scored} --eval-episodes {EPISODES} {args.flags}", log, args)
    gather(job, command, args)


def gather(job: Job, command: str, args: Args) -> None:
    """The small part of a finished run, as one file with no path of this machine."""
    read = lambda name: json.loads((args.folder / job.run / f"{name}.json").read_text())  # noqa: E731
    lines = (args.folder / job.run / "metrics.jsonl").read_text().splitlines()
    curve = [(line["step"], tables.score(line)) for line in map(json.loads, lines) if "eval/return" in line]
    config, rounded = read("config"), lambda d: {k: round(v, 4) if isinstance(v, float) else v for k, v in d.items()}
    record = {
        "command": f"python {command if job.again else config['command']}",
        "result": rounded(read("result")),
        "eval": rounded(read("eval")),
        "curve": [] if job.again else [[step, round(value, 2)] for step, value in curve],
        "budget": {key: config["args"][key] for key in BUDGET if key in config["args"]},
        "versions": config["versions"],
        "commit": config["commit"],
    }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    tables.write(job.result(args.folder), "{\n" + text + "\n}\n")


def run_all(jobs: list[Job], args: Args) -> list[str]:
    """Do the jobs, args.workers at a time, each after the one it needs; returns what went wrong."""
    waiting, running, problems = list(jobs), {}, []
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(jobs), unit="run", smoothing=0) as bar:
        while waiting or running:
            busy = {*waiting, *running.values()}
            for job in [job for job in waiting if job.after not in busy][: args.workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(do, job, args)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                bar.update()
                if problem := future.exception():
                    problems.append(f"{job.set}, {job.row}, seed {job.seed}: {problem}")
                    bar.write(problems[-1])
    return problems


def main(args: Args) -> None:
    """All of it. Raises UserError for wrong arguments, TrainingError if runs are missing at the end."""
    args.folder = args.folder.resolve()
    jobs, problems = list_jobs(args), []
    tables.check_pages(args.folder)
    try:
        problems = [] if args.tables_only else run_all(jobs, args)
    except KeyboardInterrupt:
        raise TrainingError("interrupted; the same command goes on where it stopped") from None
    finally:
        tables.sample_bandit(args.folder)
        tables.sample_maze(args.folder)
        tables.write_pages(args.folder, {name: list(rows(name)) for name in SETS})
    if problems:
        raise TrainingError(f"{len(problems)} of {len(jobs)} runs are missing; the same command tries them again")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
