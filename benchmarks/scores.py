"""README's score tables and pictures: run what is missing of a list, gather the results, write tables and pictures.

    python benchmarks/scores.py                    bandit and halfcheetah-demo, three seeds; 47 minutes
    python benchmarks/scores.py --rolled FOLDER    as well two sets that are described below, from FOLDER
    python benchmarks/scores.py --sets d4rl        those of D4RL's nine locomotion sets whose file is there; days
    python benchmarks/scores.py --ray              on a Ray cluster whose machines share this folder
    python benchmarks/scores.py --tables-only      from the results in benchmarks/results, without a run

A run is one command, the one that a user would type, in a folder of its own under runs/scores. What is finished is not
run again, what was begun is continued. The small part of each result goes to results/<set>/<row>/seed<k>.json, and
tables and pictures are made from these files alone. Needs requirements-dev.txt; --ray needs `pip install ray==2.60.0`.
What is run stands in section 1.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pictures  # noqa: E402
import tables  # noqa: E402

from common import TrainingError, UserError, datasets, runs  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------
# 1. The list: every row is run on every set with every seed

DEMOS = ("bandit", "halfcheetah-demo")
ROLLED = ("halfcheetah-medium-expert-rolled", "hopper-medium-expert-rolled")
D4RL = tuple(f"{task}-{kind}-v2" for kind in ("medium-expert", "medium", "medium-replay")
             for task in ("halfcheetah", "hopper", "walker2d"))  # fmt: skip
SETS = {  # set: its flags; `{rolled}` is the folder of --rolled
    **{name: f"--env {name}" for name in DEMOS + D4RL},
    **{name: f"--env {{rolled}}/{name}.hdf5 --eval-env {name.split('-')[0]}" for name in ROLLED},
}
# Budgets other than PAPER's, and how often to log: (set, beginning of the row's name) -> flags.
ROLLED_BUDGETS = {
    "iql": "--critic-steps 10000 --target-rate 0.02 --policy-steps 20000 --eval-every 5000",
    "clone": "--policy-steps 15000 --policy-lr 1e-3 --eval-every 5000",
    "gmpo": "--policy-steps 15000 --policy-lr 1e-3 --eval-every 5000",
    "gmpg": "--behaviour-steps 15000 --behaviour-lr 1e-3 --policy-steps 100 --eval-every 50 --log-every 20",
    "idql": "--policy-steps 3000 --eval-every 1500 --ema-rate 0.005",
}
BUDGETS = {
    ("bandit", "gmpg"): "--policy-steps 120 --eval-every 30 --log-every 20",
    ("bandit", "idql"): "--candidates 8",
    ("halfcheetah-demo", "gmpg"): "--policy-steps 200 --eval-every 50 --log-every 20",
    ("halfcheetah-demo", "idql"): "--policy-steps 2000 --eval-every 1000 --candidates 8 --ema-rate 0.005",
    **{(name, row): flags for name in ROLLED for row, flags in ROLLED_BUDGETS.items()},
}


@dataclass(frozen=True)
class Row:
    """One command. `after` is the row whose run of the same seed comes first: its critic is taken, or with --eval-only
    in the flags its checkpoint is scored again."""

    name: str
    file: str
    flags: str = ""
    after: str | None = None
    in_table: bool = True  # some are for a picture only


def rows(name: str) -> list[Row]:
    """The rows of the set `name`. Rows of D4RL's sets share no critic: each has its paper's own."""
    critic = None if name in D4RL else "iql"
    trained = "implicit" if name in ("bandit", *ROLLED) else "argmax"  # IDQL is trained once, scored with three
    paths, extractions = ("vp", "gvp", "icfm"), ("argmax", "implicit", "softmax")
    if name in ROLLED:  # own data, with own data's defaults
        paths, extractions = ("gvp",), ("implicit",)
    table = [
        Row("iql", "iql_critic.py"),
        Row("clone", "gmpo.py", "--beta 0 --critic-steps 0"),
        *[Row(f"gmpo-{path}", "gmpo.py", f"--path {path}", critic) for path in paths],
        *[Row(f"gmpg-{path}", "gmpg.py", f"--path {path}", critic) for path in paths],
        Row(f"idql-{trained}", "idql.py", f"--extraction {trained}", critic),
        *[Row(f"idql-{extraction}", "idql.py", f"--extraction {extraction} --eval-only", f"idql-{trained}")
          for extraction in extractions if extraction != trained],
    ]  # fmt: skip
    if name == "halfcheetah-demo":
        table += [Row(f"gmpo-{path}-steps{n}", "gmpo.py", f"--path {path} --sampler-steps {n} --eval-only",
                      f"gmpo-{path}", in_table=False) for path in paths for n in (2, 5, 20, 40)]  # fmt: skip
        table += [Row(f"idql-argmax-candidates{n}", "idql.py", f"--extraction argmax --candidates {n} --eval-only",
                      "idql-argmax", in_table=False) for n in (1, 2, 4, 16)]  # fmt: skip
    return table


# ------------------------------------------------------------------------------------------------------------------
# 2. Arguments


@dataclass
class Args:
    sets: tuple[str, ...] = DEMOS
    """the data: bandit, halfcheetah-demo, names of D4RL, or d4rl: its nine locomotion sets, if their file is there"""
    rolled: Path | None = None
    """a folder with halfcheetah-medium-expert-rolled.hdf5 and hopper-medium-expert-rolled.hdf5: these sets as well"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of every row"""
    workers: int = os.cpu_count() or 1
    """runs at a time on a machine; each has its share of the cores"""
    ray: bool = False
    """hand the runs to Ray, a task each: to the cluster at $RAY_ADDRESS, else to this machine"""
    ray_gpus: float = 0.0
    """with --ray: the share of a GPU that a run takes"""
    tables_only: bool = False
    """make tables and pictures from the results that are there"""
    runs: Path = ROOT / "runs/scores"
    """the folder of the runs"""
    results: Path = ROOT / "benchmarks/results"
    """the folder of the gathered results and the pictures"""
    readme: Path = ROOT / "README.md"
    """the page that gets the tables"""


def chosen_sets(args: Args) -> list[str]:
    """The names of the sets to run. Raises UserError for arguments that make no sense."""
    if args.workers < 1 or min(args.seeds, default=-1) < 0:
        raise UserError("--workers must be at least 1, and --seeds one or more numbers that are not negative")
    names = [name for name in args.sets if name != "d4rl"]
    if unknown := set(names) - set(DEMOS + D4RL):
        raise UserError(f"--sets {unknown.pop()}: no such set; choose among {', '.join((*DEMOS, 'd4rl', *D4RL))}")
    if "d4rl" in args.sets:
        files = {name: name[:-3].replace("-", "_") + "-v2.hdf5" for name in D4RL}
        there = [name for name, file in files.items() if (datasets.cache_folder() / file).exists()]
        if not there:
            raise UserError(f"--sets d4rl: none of its files is in {datasets.cache_folder()}; name one to download it")
        names += there
    if args.rolled:
        for name in ROLLED:
            if not (args.rolled / f"{name}.hdf5").exists():
                raise UserError(f"--rolled: {args.rolled / f'{name}.hdf5'} does not exist; name the folder that has it")
        names += ROLLED
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------------------------
# 3. Running


@dataclass(frozen=True)
class Job:
    """A row on a set with a seed: `python <command>` in ROOT leaves its result in `folder`."""

    set: str
    row: str
    seed: int
    folder: Path  # from ROOT on, or absolute
    command: tuple[str, ...]
    after: Path | None  # the folder of the job that comes first

    @property
    def done(self) -> bool:
        return (ROOT / self.folder / "result.json").exists()


def list_jobs(args: Args) -> list[Job]:
    """Every job after the one it waits for: critics, the runs that take them, further scores of their checkpoints."""
    base, found = args.runs.resolve(), []
    base = base.relative_to(ROOT) if base.is_relative_to(ROOT) else base
    for name in chosen_sets(args):
        for row in rows(name):
            flags = SETS[name].format(rolled=args.rolled and args.rolled.resolve())
            flags = f"{flags} {BUDGETS.get((name, row.name.split('-')[0]), '')} {row.flags}".split()
            for seed in args.seeds:
                folder, wave = base / name / row.name / f"seed{seed}", 0
                after, more = row.after and base / name / row.after / f"seed{seed}", ["--run-dir", str(folder)]
                if row.after:
                    again = "--eval-only" in flags
                    wave, more = (2, ["--run-dir", str(after)]) if again else (1, ["--critic", str(after), *more])
                command = (row.file, *flags, "--seed", str(seed), *more)
                found.append((wave, Job(name, row.name, seed, folder, command, after)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def check_folder(job: Job) -> None:
    """Raises UserError if the job's folder holds a run by another command."""
    config = ROOT / job.folder / "config.json"
    old = json.loads(config.read_text())["command"].replace(" --resume", "") if config.exists() else None
    if old not in (None, " ".join(job.command)):
        raise UserError(f"{job.folder} holds `{old}`, the list says `{' '.join(job.command)}`; remove that folder")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def printed(text: str) -> dict:
    """The headline that a run prints, under the keys of result.json."""
    headline = re.search(r"^last (score|return) (\S+)(?: \+- (\S+) over)?", text, re.M)
    if headline is None:  # a set without an environment
        return {}
    kind, last, spread = headline.groups()
    candidates = re.search(r"(\d+) candidates", text)
    values = {f"eval/{kind}": float(last.rstrip(",")), f"eval/{kind}_std": spread and float(spread)}
    values["eval/candidates"] = candidates and float(candidates[1])
    return {key: value for key, value in values.items() if value is not None}


def run(job: Job, before: str, threads: int) -> str:
    """Do the job, unless it is done; returns what went wrong, or "". `before` is this answer of the job before it."""
    if before:
        return f"{job.folder} was not begun, because {before}"
    folder = ROOT / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # the run inherits it: one that outlives a killed call is waited for
        fcntl.flock(lock, fcntl.LOCK_EX)
        if job.done:
            return ""
        resume = ["--resume"] if (folder / "config.json").exists() else []
        environment, start = os.environ | {"OMP_NUM_THREADS": str(threads)}, time.time()
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run([sys.executable, *job.command, *resume], cwd=ROOT, env=environment, stdout=log,
                                  stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]).returncode  # fmt: skip
        text = (folder / "log.txt").read_text()
        if code == 0 and "--eval-only" in job.command:  # such a call prints its score and writes nothing
            config = json.loads((ROOT / job.after / "config.json").read_text()) | {"command": " ".join(job.command)}
            values = {"minutes": round((time.time() - start) / 60, 2), **printed(text)}
            write(folder / "config.json", json.dumps(config, indent=2) + "\n")
            write(folder / "result.json", json.dumps(values, indent=2) + "\n")
    return "" if job.done else f"{job.folder} ended with code {code}, see its log.txt"


def in_pool(jobs: list[Job], args: Args, threads: int) -> Iterator[str]:
    """The answers of `run`, as they come, k at a time. A job that waits for another one comes after it, so that none
    waits for ever."""
    pool, futures = ThreadPoolExecutor(args.workers), {}
    try:
        for job in jobs:
            before = futures.get(job.after)
            futures[job.folder] = pool.submit(lambda j, b: run(j, b.result() if b else "", threads), job, before)
        for future in as_completed(futures.values()):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_ray(jobs: list[Job], args: Args, threads: int) -> Iterator[str]:
    """The same by Ray's tasks, which wait for each other by themselves."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs an optional package: pip install ray==2.60.0") from None
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # else the workers would have to find this file
    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        task, refs = ray.remote(num_cpus=threads, num_gpus=args.ray_gpus)(run), {}
        for job in jobs:
            refs[job.folder] = task.remote(job, refs.get(job.after, ""), threads)
        waiting = list(refs.values())
        while waiting:
            (done,), waiting = ray.wait(waiting)
            yield ray.get(done)
    finally:
        ray.shutdown()


def run_all(jobs: list[Job], args: Args) -> list[str]:
    """Run what is not done; returns what went wrong."""
    missing, problems = [job for job in jobs if not job.done], []
    if not missing:
        return []
    answers = (in_ray if args.ray else in_pool)(missing, args, max(1, (os.cpu_count() or 1) // args.workers))
    for problem in tqdm(answers, total=len(jobs), initial=len(jobs) - len(missing), unit="run", smoothing=0):
        if problem:
            problems.append(problem)
            tqdm.write(problem)
    return problems


# ------------------------------------------------------------------------------------------------------------------
# 4. Gathering

BUDGET = ("critic_steps", "behaviour_steps", "policy_steps", "batch_size", "policy_batch_size", "eval_episodes")


def gather(jobs: list[Job], args: Args) -> None:
    """The small part of every finished run, as one JSON file each, with no path of this machine."""
    for job in jobs:
        if not job.done:
            continue
        result, config = (json.loads((ROOT / job.folder / f"{name}.json").read_text()) for name in ("result", "config"))
        metrics = ROOT / job.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        command = "python " + " ".join(job.command)
        record = {
            "command": command.replace(str(args.rolled.resolve()), "FOLDER") if args.rolled else command,
            "result": {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()},
            "budget": {k: config["args"][k] for k in BUDGET if k in config["args"]},
            "versions": config["versions"],
            "commit": config["commit"],
            "curve": [[m["step"], round(tables.headline(m), 2)] for m in lines if tables.headline(m) is not None],
            "kl": [[m["step"], round(m["policy/kl"], 4)] for m in lines if "policy/kl" in m],
        }
        text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        write(args.results / job.set / job.row / f"seed{job.seed}.json", "{\n" + text + "\n}\n")


# ------------------------------------------------------------------------------------------------------------------
# 5. README

INTRO = """Made by `python benchmarks/scores.py`: mean of the last scores ± standard deviation over seeds; mean of each
seed's best score; interquartile mean (of three seeds: the mean) with the 95 % interval of a stratified bootstrap;
gradient steps and minutes of a run (one thread, another run beside it), without the critic's where that is the one of
IQL's row."""
NOTES = {
    DEMOS: """`bandit`: 100 (1 - total variation) to each method's own closed form, for cloning the behaviour; IQL's is
that of the policy its critic implies, Eq. (11), not of its Gaussian, which is in the picture. `halfcheetah-demo`: 100
is the undisturbed runner.""",
    ROLLED: """These are not D4RL's files, and the scores are no D4RL scores. Each set has 100 000 steps in the physics
of `common/environments.py`, half of them by a medium agent (halfcheetah: a linear policy with action noise of 0.1;
hopper: SAC, sampled), half by an expert (TQC, sampled). 0 and 100 are D4RL's reference returns.""",
    D4RL: """D4RL's own files, with the budgets of `PAPER`. Sources of the published figures:
`benchmarks/published.tsv`.""",
}
START, END = "<!-- scores: made by benchmarks/scores.py -->\n", "<!-- end -->"


def split_readme(path: Path) -> tuple[str, str]:
    """README before and after the part that is made here. Raises UserError if it is not marked."""
    text = path.read_text() if path.exists() else ""
    before, _, after = text.partition(START)
    if END not in after:
        raise UserError(f"{path} has no line `{START.strip()}` with `{END}` after it; add them")
    return before + START, after[after.index(END) :]


def write_readme(args: Args) -> None:
    """Pictures, then tables and pictures between README's marks, from the gathered results."""
    found = [name for name in SETS if any((args.results / name).glob("*/seed*.json"))]
    parts = [INTRO]
    for names, note in NOTES.items():
        shown = {n: [row.name for row in rows(n) if row.in_table] for n in names if names == DEMOS or n in found}
        if shown:
            parts += ["", note, "", *tables.table(args.results, shown, over_sets=names != DEMOS)]
    records = {name: {r.name: tables.read_records(args.results, name, r.name) for r in rows(name)} for name in found}
    for path, caption in pictures.draw(records, args.results).items():
        link = os.path.relpath(path.resolve(), args.readme.resolve().parent)
        parts += ["", f"{caption}:", "", f"![{caption}]({link})"]
    before, after = split_readme(args.readme)
    write(args.readme, before + "\n".join(parts) + "\n" + after)


def main(args: Args) -> None:
    """All of it. Raises UserError for wrong arguments, TrainingError if runs are missing at the end."""
    split_readme(args.readme)
    jobs, problems = [] if args.tables_only else list_jobs(args), []
    for job in jobs:
        check_folder(job)
    try:
        problems = run_all(jobs, args)
    except KeyboardInterrupt:
        raise TrainingError("interrupted; the same command goes on where it stopped") from None
    finally:
        gather(jobs, args)
    bandits = [job for job in jobs if job.set == "bandit" and job.seed == args.seeds[0] and job.done]
    pictures.sample({job.row: ROOT / job.folder for job in bandits}, args.results)
    write_readme(args)
    if problems:
        raise TrainingError(f"{len(problems)} of {len(jobs)} runs are missing; the same command tries them again")


if __name__ == "__main__":
    runs.main(main, Args)
