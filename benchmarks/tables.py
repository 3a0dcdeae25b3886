"""The statistics and tables of benchmarks/scores.py, from the gathered results alone."""

import csv
import json
from pathlib import Path

import numpy as np
import scipy.stats

PUBLISHED = Path(__file__).with_name("published.tsv")


def headline(values: dict) -> float | None:
    """The score in a result or a line of metrics, or the return where there is no score."""
    return values.get("eval/score", values.get("eval/return"))


def read_records(results: Path, name: str, row: str) -> list[dict]:
    """The gathered results of the set `name` and a row, by seed; those that have a score."""
    paths = sorted((results / name / row).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
    records = [json.loads(path.read_text()) for path in paths]
    return [record for record in records if headline(record["result"]) is not None]


def last_scores(records: list[dict]) -> np.ndarray:
    return np.array([headline(record["result"]) for record in records])


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean of all seeds of all sets: the mean without the lowest and the highest quarter."""
    return scipy.stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def interval(samples: list[np.ndarray]) -> tuple[float, float] | None:
    """95 % interval of the IQM by a stratified bootstrap: the seeds of each set are drawn again for themselves.

    `samples` holds the scores of one set each. None if a set has one seed only.
    """
    if min(len(sample) for sample in samples) < 2:
        return None
    options = dict(n_resamples=2000, vectorized=True, method="percentile", rng=np.random.default_rng(0))
    found = scipy.stats.bootstrap(samples, iqm, **options).confidence_interval
    return float(found.low), float(found.high)


def label(row: str) -> str:
    method, _, variant = row.partition("-")
    return "cloning" if row == "clone" else f"{method.upper()}, {variant}" if variant else method.upper()


def iqm_cell(samples: list[np.ndarray]) -> str:
    bounds = interval(samples)
    return f"{iqm(*samples):.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")


def cells(records: list[dict]) -> list[str]:
    """last, best, IQM, seeds, steps, minutes; empty where nothing was run."""
    if not records:
        return [""] * 6
    last, result = last_scores(records), [record["result"] for record in records]
    best = [values["best"] for values in result if values.get("best") is not None]
    return [
        f"{last.mean():.1f}" + (f" ± {last.std(ddof=1):.1f}" if len(last) > 1 else ""),
        f"{np.mean(best):.1f}" if best else "",
        iqm_cell([last]),
        str(len(last)),
        str(result[0].get("steps", "")),
        f"{np.mean([values['minutes'] for values in result]):.1f}",
    ]


def table(results: Path, sets: dict[str, list[str]], over_sets: bool) -> list[str]:
    """The lines of one table; `sets`: set -> its rows. `over_sets` adds each row's mean and IQM over all sets."""
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    reader = csv.DictReader(lines, delimiter="\t")
    published = {(line["dataset"], line["name"]): [line["paper"], line["code"]] for line in reader}
    compared = any(name == dataset for name in sets for dataset, _ in published)
    header = ["", "", "last", "best", "IQM, 95 %", "seeds", "steps", "minutes"]
    header += ["paper", "reference code"] if compared else []
    body, records = [], {}
    for name, rows in sets.items():
        for row in rows:
            records[name, row] = read_records(results, name, row)
            figures = published.get((name, row), ["", ""]) if compared else []
            candidates = [record["result"].get("eval/candidates") for record in records[name, row]]
            title = label(row) + (f", N = {candidates[0]:.0f}" if candidates and candidates[0] else "")
            body.append([name, title, *cells(records[name, row]), *figures])
    for row in next(iter(sets.values())) if over_sets and len(sets) > 1 else []:
        if all(records[name, row] for name in sets):
            samples = [last_scores(records[name, row]) for name in sets]
            mean = f"{np.mean([sample.mean() for sample in samples]):.1f}"
            body.append(["all", label(row), mean, "", iqm_cell(samples), *[""] * (len(header) - 5)])
    text = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]
    return text + details([several for several in records.values() if several])


def details(records: list[list[dict]]) -> list[str]:
    """What was typed, with which versions, at which commit."""
    if not records:
        return []
    every = [record for several in records for record in several]
    versions = sorted({f"{package} {number}" for record in every for package, number in record["versions"].items()})
    commits = sorted({record["commit"] or "unknown" for record in every})
    commands = [several[0]["command"] for several in records]
    summary = "<details><summary>commands of the first seed, versions</summary>"
    end = [f"{', '.join(versions)}; commit {', '.join(commits)}", "", "</details>"]
    return ["", summary, "", "```sh", *commands, "```", "", *end]
