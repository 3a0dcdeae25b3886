"""Tables and pictures of benchmarks/scores.py, from the small files in benchmarks/results alone.

The same results give the same bytes. The bandit's picture shows samples of trained policies: `sample_bandit` takes them
from the runs, if they are there, and keeps them in results/bandit/samples.json.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from common import UserError, environments, mazes

START, END = "<!-- scores: made by benchmarks/scores.py -->\n", "<!-- end -->"
COLUMNS = ("cloning", "iql", "gmpo", "gmpg", "idql")
MAZE = "maze2d-umaze-remade"  # the one in README's picture

README = """Score of the last policy over 100 episodes, mean ± standard deviation over {seeds} seeds. A number in
brackets says how many seeds there are where there are fewer. The best method is bold where every method has two seeds
or more. Cloning is GMPO that copies all actions of the data alike.
"""
NOTES = """\
* **Scores.** On the demo 100 is the undisturbed runner. Names that end in `remade` have D4RL's scale: 0 is a random
  policy and 100 is D4RL's expert. The experts in our own data have 106 on the hopping robot and 90 on the walking one.
  In mazes D4RL's expert is a controller that often failed, so that scores over 100 are possible.
  A ball that is in the goal's circle in every step scores 200 in umaze, 222 in medium and 297 in large. No policy gets
  that, because the ball starts elsewhere. Cloning has next to nothing in a maze, because nobody told those who made the
  data where the goal is.
* **The demo** shows that the files work, and little about which method is better. Without noise cloning has 100 too,
  since the disturbances that it copies cancel out, and IQL's mean has no noise either.
* **The bandit** shows how exact a method is, not how much reward it gets, so no winner is marked. For each method a
  formula gives how often each of the eight groups of actions should be hit, each action counting for the group nearest
  to it. The score is 100 minus the percentage of actions that would have to move to another group. IQL's number is for
  its critic: the data's actions, drawn again with the weights of Eq. (11) further down. Its Gaussian cannot cover eight
  groups and is not scored. IDQL's is for `argmax`; its default there, `implicit`, is a row of
  [benchmarks/README.md](benchmarks/README.md). 4096 actions are drawn.
* **How they act.** IQL takes the mean of its Gaussian, IDQL the sample with the largest Q (`--extraction argmax`) of 16
  on the bandit and of 32 elsewhere. Cloning, GMPO and GMPG are sampled on the bandit and the demo. On the remade sets
  they start from the mean of the noise (`--act-noise 0`), so that a state has one action.
* **Critics.** All methods of a seed but cloning share one critic. IQL's Gaussian was trained beside it, as
  `iql_critic.py` does. The other methods had the finished critic.
* **Settings.** They are ours, not the papers': a small network, minutes to an hour of training, and on the remade sets
  LayerNorm, which rescales the outputs of each layer and makes the critic rise less beyond the data, and a beta of 3
  for IQL, GMPO and GMPG. They were tried on sets that are scored here: the critic in the medium maze; GMPG in umaze,
  medium and hopper's medium-replay; GMPO in all three mazes and hopper's medium-replay; IQL in all three mazes. The
  demo's and the bandit's settings were tried on these sets themselves. That the remade sets are acted on without noise
  was chosen when GMPO's runs on all of them had been scored in both ways. After these choices all runs on the remade
  sets were made anew.
* **Budgets.** They are not equal. GMPG's policy takes 200 or 400 updates, after 8,000 to 100,000 of copying; the
  others' policies take 1,500 to 200,000. One update of GMPG goes through the whole sampler.

The commands, intervals and published figures are in [benchmarks/README.md](benchmarks/README.md).
"""
CURVES = """\
Score during training, of ten episodes (on the bandit of 4096 actions). The line is the mean of the seeds, and the
band reaches from the lowest to the highest. 100 % is the end of each policy's training. These trainings differ in
length, and GMPG's first stage, copying the data, is not shown. A single dot is a method that was scored only at its
end. In the mazes IQL's and GMPO's lines often move more from one evaluation to the next than the methods differ. The
ends differ from the table, which has 100 episodes.

![learning curves](benchmarks/results/curves.png)
"""
WAYS = """\
Eight episodes of each method in `{maze}` (seed 0, acting as in the table). Dots are starts, and the reward is 1
for each step in the green circle. Cloning passes through it and wanders on. IQL, GMPO and GMPG come back to it again
and again, and IDQL stays close to it.

![ways through the maze](benchmarks/results/maze.png)
"""
DETAILS = """Made by `python benchmarks/scores.py`, which also says what is run.

* **score**: the last policy over 100 episodes, mean ± standard deviation over seeds. The bandit's is 100 (1 - total
  variation) to each method's own closed form; IQL's is that of the policy that its critic implies, not of its Gaussian.
* **IQM, 95 %**: the interquartile mean, for which the lowest and the highest quarter of the values are left out, with
  the interval that drawing the seeds again at random gives. A quarter of three seeds is less than one of them, so that
  none is left out in a single set. With three seeds the interval is just the lowest and the highest of them, which is
  less than 95 %.
* **last**, **best**: of the evaluations during training, which have ten episodes, means over seeds. The best one is
  chosen by its own score, and so promises too much. In umaze and medium GMPO's third seed has ten evaluations, the
  others five.
* **steps**, **minutes**: of one run. They leave out the critic's training where IQL's critic was used. Some runs had
  one of two cores, others an NVIDIA H100 that two dozen runs shared (their commands have `--cudagraph`), and a row may
  have both. So compare the minutes only roughly.
* Rows at the end, once there are any, are over the sets, without the bandit, in which every method has two seeds.
"""
PUBLISHED = """Published figures for D4RL's own sets, beside ours for another dataset of much the same recipe. They show
what is usual for this kind of task. Data, settings, budgets and protocols differ: ours reproduce none of them. CORL
(arXiv:2210.07105) is a library of baselines, ReBRAC (arXiv:2305.09836) one of them. The papers of GMPO, GMPG and IDQL
have no figures for Maze2D. D4RL's medium-replay sets hold all that an agent did while it learned, ours what five
snapshots of an agent do. In ours none of the 3,103 hopping episodes reaches the end of its 1,000 steps (`timeouts` is
False in every row), so that nothing there shows how to hop on to the end. How many do in D4RL's was not counted, and
whether this is why our scores are so much lower was not tested.
"""

COMMANDS = """The commands of the first seed. They train. The table's scores were then made by the same file, with
the same `--run-dir` and with `--eval-only --eval-episodes 100`. `results/<set>/<method>/seed<k>.json` has the command,
the versions and both evaluations of every seed. A run whose command has `--cudagraph` was trained on a GPU, any other
on a CPU. `-dirty` behind a commit says that files had been changed and not committed: in 311a6bd-dirty the change
was the one of 8f23b25, which takes a row off the list of runs, in e6a6632-dirty it was LayerNorm and the mazes'
expectile, which 31f05b9 has, and in 31f05b9-dirty it is not recorded. The bandit's and the demo's runs are of older
commits than the others. Each of these commits, without such changes, and 8f23b25 log the same numbers, to the last
digit, when they train for a few hundred steps on one machine, so that all rows are of the same algorithms.
"""

# ------------------------------------------------------------------------------------------------------------------
# 1. Results and their statistics


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def score(values: dict) -> float:
    """The score in an evaluation, or the return where there is no score."""
    return values.get("eval/score", values["eval/return"])


def read(folder: Path, name: str, row: str) -> list[dict]:
    """The results of a row of the set `name`, by seed."""
    paths = (folder / "benchmarks/results" / name / row).glob("seed*.json")
    return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: int(path.stem[4:]))]


def scores(records: list[dict]) -> np.ndarray:
    """The number of the tables, of every seed."""
    return np.array([score(record["eval"]) for record in records])


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


# ------------------------------------------------------------------------------------------------------------------
# 2. Tables


def label(row: str) -> str:
    method, _, variant = row.partition("-")
    return method if method == "cloning" else method.upper() + (f", {variant}" if variant else "")


def table(header: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)) + "\n"


def mean_and_spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def iqm_cell(samples: list[np.ndarray]) -> str:
    bounds = interval(samples)
    return f"{iqm(*samples):.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")


def compact_table(found: dict, seeds: int) -> str:
    """README's: a row a set, a column a method."""
    body = []
    for name, records in found.items():
        values = {row: scores(records[row]) for row in COLUMNS if records[row]}
        cells = {row: mean_and_spread(value) for row, value in values.items()}
        if name != "bandit" and all(len(records[row]) > 1 for row in COLUMNS):
            best = max(values, key=lambda row: values[row].mean())
            cells[best] = f"**{cells[best]}**"
        for row, value in values.items():
            if len(value) < seeds:
                cells[row] += f" ({len(value)})"
        body.append([f"`{name}`", *[cells.get(row, "") for row in COLUMNS]])
    return table(["", *map(label, COLUMNS)], body)


def detailed_table(found: dict) -> str:
    """A row a method of a set; below them each method over all sets on which every method has two seeds."""
    body = []
    for name, rows in found.items():
        for row, records in rows.items():
            if records:
                results = [record["result"] for record in records]
                last, best = np.mean([score(r) for r in results]), np.mean([r["best"] for r in results])
                minutes = np.mean([result["minutes"] for result in results])
                seeds, steps = str(len(records)), f"{results[0]['steps']:,}"
                numbers = [f"{last:.1f}", f"{best:.1f}", seeds, steps, f"{minutes:.1f}"]
                if not records[0]["curve"]:  # another row's run, scored again
                    numbers = ["", "", seeds, "", ""]
                values = scores(records)
                body.append([f"`{name}`", label(row), mean_and_spread(values), iqm_cell([values]), *numbers])
    whole = [rows for name, rows in found.items() if name != "bandit"]
    whole = [rows for rows in whole if all(len(rows[row]) > 1 for row in COLUMNS)]
    for row in COLUMNS if len(whole) > 1 else ():
        samples = [scores(rows[row]) for rows in whole]
        mean = f"{np.mean([sample.mean() for sample in samples]):.1f}"
        body.append([f"{len(whole)} sets without the bandit", label(row), mean, iqm_cell(samples), *[""] * 5])
    return table(["", "", "score", "IQM, 95 %", "last", "best", "seeds", "steps", "minutes"], body)


def published_table(found: dict) -> str:
    """The figures of published.tsv for D4RL's namesakes of the sets that have been run; empty if there are none."""
    lines = Path(__file__).with_name("published.tsv").read_text().splitlines()
    reader, body = csv.DictReader((line for line in lines if not line.startswith("#")), delimiter="\t"), []
    for line in reader:
        name, row = line["dataset"].rpartition("-")[0] + "-remade", line["method"].lower()
        if name in found:
            ours = found[name].get(row)
            ours = mean_and_spread(scores(ours)) if ours else ""
            body.append([f"`{line['dataset']}`", line["method"], line["score"], ours, line["source"]])
    return PUBLISHED + "\n" + table(["", "", "published", "ours, remade", "source"], body) if body else ""


def commands(found: dict) -> str:
    """What was typed, with which versions, at which commit."""
    every = [records for rows in found.values() for records in rows.values() if records]
    if not every:
        return ""
    records = [record for several in every for record in several]
    versions = sorted({f"{package} {number}" for record in records for package, number in record["versions"].items()})
    commits = sorted({record["commit"] or "unknown" for record in records})
    devices = sorted({record["budget"]["device"] for record in records})
    typed = "\n".join(several[0]["command"] for several in every)
    about = f"On {', '.join(devices)}, with {', '.join(versions)}; commit {', '.join(commits)}."
    return f"{COMMANDS}\n```sh\n{typed}\n```\n\n{about}\n"


# ------------------------------------------------------------------------------------------------------------------
# 3. Pictures


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def curves(found: dict) -> Figure:
    """Learning curves: a panel a set, the mean of the seeds in the band from the lowest to the highest."""
    columns = min(len(found), 5)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3 * columns, 2.7 * lines), layout="constrained")
    for k, (name, rows) in enumerate(found.items(), 1):
        axes = figure.add_subplot(lines, columns, k)
        axes.set_title(name, fontsize=9)
        for colour, row in enumerate(COLUMNS):
            several = [dict(record["curve"]) for record in rows[row] if record["curve"]]
            if not several:
                continue
            common = sorted(set(several[0]).intersection(*several))  # the steps at which every seed was evaluated
            values = np.array([[curve[step] for step in common] for curve in several])  # (seeds, evaluations)
            total, steps = rows[row][0]["result"]["steps"], rows[row][0]["budget"]["policy_steps"]
            x = [100 * (step - total + steps) / steps for step in common]
            axes.plot(x, values.mean(0), marker=".", ms=4, c=f"C{colour}", label=label(row))
            axes.fill_between(x, values.min(0), values.max(0), color=f"C{colour}", alpha=0.2, lw=0)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("policy's training, %", fontsize=7)
        axes.set_ylabel("score", fontsize=7)
        if k == 1:
            axes.legend(fontsize=6)
    return figure


def sample_bandit(folder: Path, count: int = 600) -> None:
    """Actions of the bandit's policies, from the runs of seed 0 in `folder` if they are there."""
    runs = {row: folder / f"runs/scores/bandit/{row}/seed0" for row in ("iql", "gmpo", "gmpg", "idql")}
    if not all((run / "result.json").exists() for run in runs.values()):
        return
    import torch

    import gmpg
    import gmpo
    import idql
    import iql_critic
    from common import bandit, trained

    torch.manual_seed(0)
    obs, data = torch.zeros(count, 1), bandit.make_data()[1]
    std = trained.load_checkpoint(runs["iql"])["policy"]["log_std"].clamp(-5, 2).exp()  # load_policy acts by the mean
    weight = torch.softmax(gmpo.SETTINGS["bandit"]["beta"] * bandit.REWARDS, -1)  # (8,), of the modes
    again = torch.multinomial(weight[torch.cdist(data, bandit.MODES).argmin(-1)], count, replacement=True)
    actions = {
        "data": data[:count],
        "IQL's Gaussian": iql_critic.load_policy(runs["iql"])(obs) + std * torch.randn(count, 2),
        "GMPO": gmpo.load_policy(runs["gmpo"])(obs),
        "GMPG": gmpg.load_policy(runs["gmpg"])(obs),
        "their closed form": data[again],
        "IDQL, argmax": idql.load_policy(runs["idql"])(obs),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(np.round(a.tolist(), 2).tolist())}" for name, a in actions.items()]
    write(folder / "benchmarks/results/bandit/samples.json", "{\n" + ",\n".join(lines) + "\n}\n")


def sample_maze(folder: Path, episodes: int = 8) -> None:
    """The policies' ways through MAZE, every third step, from the runs of seed 0 in `folder` if they are there."""
    runs = {row: folder / f"runs/scores/{MAZE}/{row}/seed0" for row in COLUMNS}
    if not all((run / "result.json").exists() for run in runs.values()):
        return
    import torch

    import gmpg
    import gmpo
    import idql
    import iql_critic

    files, lines = dict(cloning=gmpo, iql=iql_critic, gmpo=gmpo, gmpg=gmpg, idql=idql), []
    for row, run in runs.items():
        torch.manual_seed(0)
        _, ways, goals = environments.rollout(files[row].load_policy(run), environments.task(MAZE), episodes, seed=0)
        drawn = {"ways": [np.round(way[::3], 2).tolist() for way in ways], "goals": np.round(goals, 2).tolist()}
        lines.append(f"{json.dumps(label(row))}: {json.dumps(drawn)}")
    write(folder / f"benchmarks/results/{MAZE}/ways.json", "{\n" + ",\n".join(lines) + "\n}\n")


def maze(found: dict[str, dict]) -> Figure:
    """Method -> its ways through MAZE, and their goals: a panel a method."""
    figure = Figure(figsize=(3 * len(found), 3.2), layout="constrained")
    for k, (method, drawn) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), k)
        ways = [np.array(way) for way in drawn["ways"]]
        mazes.draw(axes, environments.task(MAZE), np.zeros((0, 2)), ways, drawn["goals"])
        axes.set(title=method, xlabel="", ylabel="")
    return figure


def scatter(samples: dict[str, list]) -> Figure:
    figure = Figure(figsize=(2.6 * len(samples), 2.8), layout="constrained")
    for k, (name, action) in enumerate(samples.items()):
        axes = figure.add_subplot(1, len(samples), k + 1)
        axes.scatter(*np.transpose(action), s=2, alpha=0.4, c="black" if "closed" in name else f"C{k}")
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    return figure


# ------------------------------------------------------------------------------------------------------------------
# 4. Pages


def check_pages(folder: Path) -> dict[Path, tuple[str, str]]:
    """Each page's text before and after the part that is made here; a page that is not there has none.

    Raises UserError if a page has no marks.
    """
    found = {}
    for path in (folder / "README.md", folder / "benchmarks/README.md"):
        text = path.read_text() if path.exists() else START + END + "\n"
        before, _, after = text.partition(START)
        if END not in after:
            raise UserError(f"{path} has no line `{START.strip()}` with `{END}` after it; add them")
        found[path] = before + START, after[after.index(END) :]
    return found


def write_pages(folder: Path, sets: dict[str, list[str]]) -> None:
    """Pictures, then tables and pictures between the marks of both pages. `sets`: set -> its rows, in order."""
    results = folder / "benchmarks/results"
    found = {name: {row: read(folder, name, row) for row in rows} for name, rows in sets.items()}
    found = {name: rows for name, rows in found.items() if any(rows.values())}
    seeds = max((len(records) for rows in found.values() for records in rows.values()), default=3)
    long, typed = [DETAILS, detailed_table(found)], commands(found)
    short = [README.format(seeds=seeds), compact_table(found, seeds), NOTES]
    if found:
        save(curves(found), results / "curves.png")
        short.append(CURVES)
    if (results / MAZE / "ways.json").exists():
        save(maze(json.loads((results / MAZE / "ways.json").read_text())), results / "maze.png")
        short.append(WAYS.format(maze=MAZE))
    if (results / "bandit/samples.json").exists():
        save(scatter(json.loads((results / "bandit/samples.json").read_text())), results / "bandit.png")
        long.append("Samples on the bandit:\n\n![samples on the bandit](results/bandit.png)\n")
    long += [published_table(found), typed]
    for (path, (before, after)), parts in zip(check_pages(folder).items(), (short, long)):
        write(path, before + "\n".join(part for part in parts if part) + after)
