"""The pictures of benchmarks/scores.py, made from benchmarks/results alone: the same results give the same bytes.

Samples and trajectories of the bandit need trained networks: `sample` takes them from the runs and keeps them, rounded,
in results/bandit/samples.json and paths.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 0)]

from tables import interval, iqm, last_scores  # noqa: E402

COUNT = 600  # samples of each policy
LINES = 96  # trajectories of each path
STEPS, CANDIDATES = (2, 5, 10, 20, 40), (1, 2, 4, 8, 16)  # the x axes; the demo's runs themselves have 10 and 8
GROUPS = {"IQL, cloning": ("iql", "clone"), "GMPO": ("gmpo",), "GMPG": ("gmpg",), "IDQL": ("idql",)}
PATHS = {"vp": "variance-preserving", "gvp": "trigonometric", "icfm": "straight"}


# ------------------------------------------------------------------------------------------------------------------
# 1. What is drawn of trained policies


def sample(runs: dict[str, Path], results: Path) -> None:
    """Actions of the bandit's policies and the way of the noise on the three paths; `runs`: row -> folder of a run."""
    wanted = ("iql", "gmpo-gvp", "gmpg-gvp", "idql-implicit")
    if all(row in runs for row in wanted):
        write(results / "bandit/samples.json", bandit_samples({row: runs[row] for row in wanted}))
    if all(f"gmpo-{path}" in runs for path in PATHS):
        write(results / "bandit/paths.json", {path: trajectories(runs[f"gmpo-{path}"]) for path in PATHS})


def bandit_samples(runs: dict[str, Path]) -> dict[str, np.ndarray]:
    """Name -> actions (COUNT, 2): the data, the policies, and the data's actions drawn again by exp(beta Q) / Z."""
    import torch

    import gmpg
    import gmpo
    import idql
    import iql_critic
    from common import bandit
    from common.runs import load_checkpoint

    torch.manual_seed(0)
    obs, data = torch.zeros(COUNT, 1), bandit.make_data()[1]
    std = load_checkpoint(runs["iql"])["policy"]["log_std"].clamp(-5, 2).exp()  # load_policy acts by the mean
    mode = torch.cdist(data, bandit.MODES).argmin(-1)
    weight = torch.softmax(gmpo.PAPER["bandit"]["beta"] * bandit.REWARDS, -1)[mode]
    files = {"GMPO": (gmpo, "gmpo-gvp"), "GMPG": (gmpg, "gmpg-gvp"), "IDQL": (idql, "idql-implicit")}
    gaussian = iql_critic.load_policy(runs["iql"])(obs) + std * torch.randn(COUNT, 2)
    policies = {name: file.load_policy(runs[row])(obs) for name, (file, row) in files.items()}
    again = data[torch.multinomial(weight, COUNT, replacement=True)]
    return {"data": data[:COUNT], "IQL's Gaussian": gaussian, **policies, "closed form": again}


def trajectories(run: Path) -> np.ndarray:
    """The network's inputs x_t on the way from noise to action, and the action: (LINES, nodes, 2). Only sees the calls
    of the network, so that it needs to know nothing of the sampler."""
    import torch

    import gmpo

    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if isinstance(module, gmpo.StateMLP) else None
    )
    try:
        torch.manual_seed(0)
        action = gmpo.load_policy(run)(torch.zeros(LINES, 1))
    finally:
        hook.remove()
    return torch.stack([*seen[::2], action], 1)  # every other node will do


def write(path: Path, arrays: dict) -> None:
    """One line an array, two digits."""
    lines = [f"{json.dumps(name)}: {json.dumps(np.round(a.tolist(), 2).tolist())}" for name, a in arrays.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ------------------------------------------------------------------------------------------------------------------
# 2. Pictures


def draw(records: dict, results: Path) -> dict[Path, str]:
    """Draw what `records`, set -> row -> gathered results, have; returns file -> caption."""
    pictures = {}

    def add(name: str, caption: str, figure: Figure | None) -> None:
        if figure:
            figure.savefig(results / name, dpi=100, metadata={"Software": None})
            pictures[results / name] = caption

    add(
        "bandit.png",
        "The bandit: data, policies, the closed form of GMPO and GMPG; IDQL has IQL's weights",
        scatter(results / "bandit/samples.json"),
    )
    add("paths.png", "From noise to action on the three paths of GMPO", ways(results / "bandit/paths.json"))
    for name, rows in records.items():
        add(f"curves_{name}.png", f"Learning curves on {name}", curves(rows, name))
    demo = records.get("halfcheetah-demo", {})
    add("steps.png", "GMPO's score against the sampler's steps", by_steps(demo))
    add("candidates.png", "IDQL's score against N", by_candidates(demo))
    add("kl.png", "GMPG's KL over training", kl(records))
    return pictures


def line(axis: Axes, points: dict[int, list[float]], name: str) -> None:
    """The IQM of the samples at each x, in its 95 % interval: `points` is x -> values, one a seed."""
    if not points:
        return
    x = sorted(points)
    samples = [np.array(points[k]) for k in x]
    axis.plot(x, [iqm(sample) for sample in samples], marker="o", ms=3, label=name)
    bounds = [interval([sample]) or (sample[0], sample[0]) for sample in samples]
    axis.fill_between(x, *np.transpose(bounds), alpha=0.2, lw=0)


def gathered(records: list[dict], key: str) -> dict[int, list[float]]:
    """Step -> the values of all seeds at it, of `curve` or `kl`."""
    points = {}
    for record in records:
        for step, value in record[key]:
            points.setdefault(step, []).append(value)
    return {step: values for step, values in points.items() if len(values) == len(records)}


def panels(titles: list[str], **options) -> tuple[Figure, list]:
    figure = Figure(figsize=(3.2 * len(titles), 3), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, **options)[0]
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
    return figure, axes


def scatter(path: Path) -> Figure | None:
    if not path.exists():
        return None
    samples = json.loads(path.read_text())
    figure, axes = panels(list(samples), sharex=True, sharey=True)
    for k, (axis, action) in enumerate(zip(axes, samples.values())):
        axis.scatter(*np.transpose(action), s=2, alpha=0.4, c="black" if k == len(samples) - 1 else f"C{k}")
        axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    return figure


def ways(path: Path) -> Figure | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    figure, axes = panels([f"{name}: {PATHS[name]}" for name in found], sharey=True)
    for axis, lines in zip(axes, found.values()):
        x, y = np.transpose(lines)  # (nodes, LINES) each
        axis.plot(x, y, c="C0", lw=0.5, alpha=0.5)
        axis.scatter(x[0], y[0], s=4, c="grey", label="noise")
        axis.scatter(x[-1], y[-1], s=6, c="C3", zorder=3, label="action")
        axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    axes[0].legend(fontsize=7)
    return figure


def curves(rows: dict, name: str) -> Figure | None:
    drawn = [row for row, records in rows.items() if any(len(record["curve"]) > 1 for record in records)]
    groups = {title: [row for row in drawn if row.split("-")[0] in methods] for title, methods in GROUPS.items()}
    groups = {title: found for title, found in groups.items() if found}
    if not groups:
        return None
    figure, axes = panels(list(groups), sharey=True)
    for axis, found in zip(axes, groups.values()):
        for row in found:
            line(axis, gathered(rows[row], "curve"), row)
        axis.set(xlabel="gradient steps of the run")
        axis.legend(fontsize=7)
    axes[0].set(ylabel=f"score, {name}")
    return figure


def by_steps(rows: dict) -> Figure | None:
    found = {}
    for path in PATHS:
        names = {n: f"gmpo-{path}" + f"-steps{n}" * (n != 10) for n in STEPS}
        found[path] = {n: last_scores(rows[row]) for n, row in names.items() if rows.get(row)}
    return one_axis(found, "sampler steps")


def by_candidates(rows: dict) -> Figure | None:
    names = {n: "idql-argmax" + f"-candidates{n}" * (n != 8) for n in CANDIDATES}
    points = {n: last_scores(rows[row]) for n, row in names.items() if rows.get(row)}
    return one_axis({"argmax": points}, "candidates, N")


def one_axis(found: dict[str, dict], xlabel: str) -> Figure | None:
    if not any(len(points) > 1 for points in found.values()):
        return None
    figure, (axis,) = panels([""])
    for name, points in found.items():
        line(axis, points, name)
    axis.set(xlabel=xlabel, ylabel="score, halfcheetah-demo", xscale="log")
    ticks = sorted({x for points in found.values() for x in points})
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.legend(fontsize=7)
    return figure


def kl(records: dict) -> Figure | None:
    found = {name: [row for row in rows if any(len(r["kl"]) > 1 for r in rows[row])] for name, rows in records.items()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return None
    figure, axes = panels(list(found))
    for axis, (name, rows) in zip(axes, found.items()):
        for row in rows:
            points = gathered(records[name][row], "kl")
            budget = records[name][row][0]["budget"]
            start = budget["critic_steps"] + budget["behaviour_steps"]
            line(axis, {step - start: values for step, values in points.items()}, row)
        axis.set(xlabel="updates of the policy")
        axis.legend(fontsize=7)
    axes[0].set(ylabel="KL(pi, mu), nats")
    return figure
