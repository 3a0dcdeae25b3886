"""benchmarks/scores.py: the list, the statistics, the pages, and runs that are killed on the way."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scores  # noqa: E402
import tables  # noqa: E402


def record(score, command="python x.py", **result):
    result = {"steps": 10, "minutes": 2.0, "best": score + 1, "eval/score": score - 1, "eval/return": 0.0} | result
    budget = {"policy_steps": 5, "device": "cpu"}
    about = {"command": command, "versions": {"torch": "1"}, "commit": "c", "budget": budget}
    return about | {"result": result, "eval": {"eval/score": score, "eval/return": 0.0}, "curve": [[5, 1.0], [10, 2.0]]}


def put(folder, name, row, *values, seed=0, **more):
    for k, value in enumerate(values):
        path = folder / f"benchmarks/results/{name}/{row}/seed{seed + k}.json"
        tables.write(path, json.dumps(record(value, **more)))


def pages(folder):
    tables.write_pages(folder, {name: list(scores.rows(name)) for name in scores.SETS})
    return [(folder / name).read_text() for name in ("README.md", "benchmarks/README.md")]


# Statistics


def test_iqm_is_the_mean_of_the_middle_half_of_all_sets():
    assert tables.iqm(np.array([100.0, 3, 0, 2, 1, -50, 4, 5])) == np.mean([1, 2, 3, 4])
    assert tables.iqm(np.array([0.0, 1]), np.array([2.0, 30])) == 1.5
    assert tables.iqm(np.array([1.0, 2, 6])) == 3  # of three nothing is cut


def test_the_interval_has_the_quantiles_of_the_binomial():
    # of n ones and zeros the IQM of a resample is (k - n / 4) / (n / 2), clipped to [0, 1], with k binomial
    n = 40
    k = scipy.stats.binom(n, 0.5).ppf([0.025, 0.975])
    expected = np.clip((k - n / 4) / (n / 2), 0, 1)
    found = tables.interval([np.repeat([0.0, 1.0], n // 2)])
    assert found == pytest.approx(expected, abs=0.051)  # one step of k
    assert found == tables.interval([np.repeat([0.0, 1.0], n // 2)])


def test_the_bootstrap_draws_each_set_for_itself():
    assert tables.interval([np.zeros(3), np.full(3, 10.0)]) == (5, 5)  # drawn from one pot, it would be wide
    assert tables.interval([np.zeros(3), np.full(1, 10.0)]) is None


# The list


def test_every_command_is_short_and_one_that_its_file_takes(tmp_path):
    assert len(scores.list_jobs(scores.Args(seeds=(0, 7), folder=tmp_path))) == 2 * (5 * len(scores.SETS) + 6 + 4)
    for job in scores.list_jobs(scores.Args(sets=("bandit", "hopper-medium-remade"), seeds=(7,), folder=tmp_path)):
        file, *flags = job.command.split()
        args = tyro.cli(importlib.import_module(file.removesuffix(".py")).Args, args=flags)
        assert str(args.run_dir) == job.run and args.eval_only == job.again
        if not job.again:
            assert (args.env, args.seed) == (job.set, job.seed)
            alone = job.row in ("iql", "cloning")
            assert args.critic == (None if alone else Path(f"runs/scores/{job.set}/iql/seed{job.seed}"))
        more = {flag for flag in flags if flag[:2] == "--"} - {"--env", "--seed", "--critic", "--run-dir"}
        assert more <= {"--beta", "--critic-steps", "--path", "--extraction", "--eval-only"}


def test_a_job_comes_after_the_one_it_waits_for_and_no_two_score_one_run_at_a_time(tmp_path):
    jobs = scores.list_jobs(scores.Args(folder=tmp_path))
    for k, job in enumerate(jobs):
        assert (job.after is None) == (job.row in ("iql", "cloning"))
        assert job.after is None or (job.after in jobs[:k] and job.after.seed == job.seed)
    last = next(job for job in jobs if job.row == "idql-softmax")
    assert [last.after.row, last.after.after.row, last.run] == ["idql-implicit", "idql", last.after.after.run]


def test_what_has_a_result_of_this_command_is_not_run_again(tmp_path):
    args = scores.Args(sets=("maze2d-umaze-remade",), seeds=(1,), folder=tmp_path)
    for job in scores.list_jobs(args):
        if job.row != "gmpg":
            command = f"python {job.command}" + " --cudagraph" * (job.row == "idql")
            put(tmp_path, job.set, job.row, 50.0, seed=1, command=command)
    assert [job.row for job in scores.list_jobs(args)] == ["iql", "gmpg"]  # whose critic is not there any more
    finished = tmp_path / "runs/scores/maze2d-umaze-remade/iql/seed1/result.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    assert [job.row for job in scores.list_jobs(args)] == ["gmpg"]
    put(tmp_path, "maze2d-umaze-remade", "cloning", 50.0, seed=1, command="python gmpo.py --beta 1")
    assert [job.row for job in scores.list_jobs(args)] == ["cloning", "gmpg"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(sets=("hoper",)), "--sets hoper: no such set; choose among bandit,"),
        (dict(workers=0), "--workers must be at least 1"),
        (dict(seeds=(0, -1)), "--seeds"),
        (dict(tables_only=True), "has no line `<!-- scores: made by benchmarks/scores.py -->`"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_run(arguments, words, tmp_path):
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(scores.UserError, match=re.escape(words)):
        scores.main(scores.Args(folder=tmp_path, **arguments))
    assert list(tmp_path.iterdir()) == [tmp_path / "README.md"]


def test_it_is_one_sentence_and_exit_code_2():
    command = [sys.executable, ROOT / "benchmarks/scores.py", "--sets", "hoper"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --sets hoper") and done.stderr.count("\n") == 1


def test_a_folder_with_a_run_by_another_command_is_refused(tmp_path):
    job = scores.list_jobs(scores.Args(sets=("bandit",), folder=tmp_path))[0]
    config = tmp_path / job.run / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"command": job.command.replace("--seed 0", "--seed 1")}))
    with pytest.raises(scores.TrainingError, match="remove that folder"):
        scores.do(job, scores.Args(folder=tmp_path))


# The pages


def test_the_compact_table_has_means_and_the_best_in_bold_once_all_methods_are_there(tmp_path):
    for k, row in enumerate(tables.COLUMNS):
        put(tmp_path, "halfcheetah-demo", row, 60.0 + k, 70.0 + k, 80.0 + k)
        put(tmp_path, "bandit", row, 90.0)
        put(tmp_path, "maze2d-large-remade", row, 50.0 + k)  # one seed each: none is called the best
    put(tmp_path, "maze2d-medium-remade", "iql", 40.0, 42.0)
    put(tmp_path, "maze2d-umaze-remade", "iql", 40.0)
    short, long = pages(tmp_path)
    cells = [f"{70.0 + k} ± 10.0" for k in range(5)]
    assert f"| `halfcheetah-demo` | {' | '.join(cells[:4])} | **{cells[4]}** |" in short
    cells = " | ".join(["90.0 (1)"] * 5)  # one seed of three; each to a closed form of its own: none is best
    assert f"| `bandit` | {cells} |" in short
    assert "| `maze2d-large-remade` | 50.0 (1) | 51.0 (1) | 52.0 (1) | 53.0 (1) | 54.0 (1) |" in short
    assert "| `maze2d-medium-remade` |  | 41.0 ± 1.4 (2) |  |  |  |" in short
    assert "| `maze2d-umaze-remade` |  | 40.0 (1) |  |  |  |" in short and "| `hopper" not in short
    assert "| `halfcheetah-demo` | GMPO | 72.0 ± 10.0 | 72.0 [62.0, 82.0] | 71.0 | 73.0 | 3 | 10 | 2.0 |" in long
    assert "| `maze2d-umaze-v1` | IQL | 42.1 | 40.0 | CORL |" in long and "hopper" not in long
    assert "On cpu, with torch 1; commit c." in long


def test_a_learning_curve_has_the_steps_at_which_every_seed_was_evaluated():
    often, seldom = record(1.0) | {"curve": [[5, 1.0], [10, 2.0]]}, record(1.0) | {"curve": [[10, 6.0]]}
    found = {"bandit": {row: [] for row in tables.COLUMNS} | {"gmpo": [often, seldom]}}
    (line,) = tables.curves(found).axes[0].lines
    assert line.get_xydata().tolist() == [[100.0, 4.0]]


def test_a_row_that_scores_a_run_again_has_no_training_of_its_own(tmp_path):
    path = tmp_path / "benchmarks/results/bandit/idql-softmax/seed0.json"
    tables.write(path, json.dumps(record(90.0) | {"curve": []}))
    assert "| `bandit` | IDQL, softmax | 90.0 | 90.0 |  |  | 1 |  |  |" in pages(tmp_path)[1]


def test_the_methods_are_compared_over_all_sets_that_are_complete(tmp_path):
    for name, value in (("bandit", 90.0), ("halfcheetah-demo", 10.0), ("hopper-medium-remade", 30.0)):
        for row in tables.COLUMNS:
            put(tmp_path, name, row, value, value)
    put(tmp_path, "maze2d-umaze-remade", "gmpg", 50.0, 50.0)  # alone there
    for row in tables.COLUMNS:
        put(tmp_path, "maze2d-large-remade", row, *[70.0] * (1 if row == "iql" else 2))  # IQL has one seed only
    assert "| 2 sets without the bandit | GMPG | 20.0 | 20.0 [20.0, 20.0] |" in pages(tmp_path)[1]


def test_published_figures_are_of_sets_in_the_list():
    lines = [line for line in (ROOT / "benchmarks/published.tsv").read_text().splitlines() if line[0] != "#"]
    names = [line.split("\t")[0].rpartition("-")[0] + "-remade" for line in lines[1:]]
    assert set(names) == set(scores.PLANNED) - {"bandit", "halfcheetah-demo"}
    assert len({tuple(line.split("\t")[:2]) for line in lines}) == len(lines)


def test_the_same_results_give_the_same_bytes_and_the_rest_of_a_page_stays(tmp_path):
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        put(folder, "bandit", "gmpo", 50.0, 60.0)
        tables.write(folder / "README.md", f"before\n{tables.START}outdated\n{tables.END}\nafter\n")
        samples = {name: [[0.1, 0.2], [0.3, -0.4]] for name in ("data", "GMPO")}
        tables.write(folder / "benchmarks/results/bandit/samples.json", json.dumps(samples))
        ways = {name: {"ways": [[[1, 1], [1, 2]]], "goals": [[1, 1]]} for name in ("cloning", "GMPO")}
        tables.write(folder / f"benchmarks/results/{tables.MAZE}/ways.json", json.dumps(ways))
        text = pages(folder)[0]
        assert text.startswith("before\n") and text.endswith(f"{tables.END}\nafter\n") and "outdated" not in text
        pages(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        made.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert made[0] == made[1]
    pictures = {f"benchmarks/results/{name}.png" for name in ("curves", "bandit", "maze")}
    assert pictures | {"benchmarks/README.md"} < made[0].keys()
    assert [axes.get_title() for axes in tables.maze(ways).axes] == ["cloning", "GMPO"]


def test_the_pages_have_what_the_committed_results_say(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(ROOT / "README.md", tmp_path)
    for name, text in zip(("README.md", "benchmarks/README.md"), pages(tmp_path)):
        assert text == (ROOT / name).read_text(), "run scores.py --tables-only"


# Whole runs, of seconds

TINY = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import scores
scores.SETS = ("bandit",)
scores.METHODS = {{
    "iql": "iql_critic.py --critic-steps 5 --policy-steps 5",
    "gmpo": "gmpo.py --policy-steps 600 --eval-every 300 --save-every 20 --log-every 20 --batch-size 8",
}}
scores.MORE = {{"bandit": {{"gmpo-noiseless": "gmpo.py --act-noise 0 --eval-only"}}}}
scores.tables.COLUMNS = ("iql", "gmpo")
try:
    scores.main(scores.tyro.cli(scores.Args))
except scores.TrainingError as error:
    raise SystemExit(f"error: {{error}}")
"""


def start(folder):
    (folder / "tiny.py").write_text(TINY)
    command = [sys.executable, folder / "tiny.py", "--sets", "bandit", "--seeds", "0", "--workers", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*command, "--folder", folder], **pipes)


def trainer(folder):
    """The id of the process that trains gmpo.py in `folder`, once it has written a checkpoint."""
    for _ in range(5000):
        time.sleep(0.02)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words, place = (process / "cmdline").read_bytes().decode(), (process / "cwd").readlink()
            except OSError:  # it has just ended
                continue
            if "gmpo.py" in words and place == folder and any(folder.glob("runs/scores/bandit/gmpo/*/checkpoint.pt")):
                return int(process.name)
    raise AssertionError(f"nothing trains in {folder}")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a list whose trainer was killed, and that was then completed."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("needs /proc to find the process to kill")
    folder = tmp_path_factory.mktemp("scores").resolve()
    first = start(folder)
    os.kill(trainer(folder), signal.SIGKILL)
    seen = {"first": (first.communicate(timeout=500)[0], first.returncode)}
    seen["gathered"] = [path.parent.name for path in folder.glob("benchmarks/results/bandit/*/seed0.json")]
    seen["metrics"] = (folder / "runs/scores/bandit/gmpo/seed0/metrics.jsonl").read_text().splitlines()
    seen["iql"] = (folder / "runs/scores/bandit/iql/seed0/eval.json").stat().st_mtime_ns
    second = start(folder)
    seen["second"] = (second.communicate(timeout=500)[0], second.returncode)
    return folder, seen


def test_a_killed_run_loses_nothing_else_and_the_next_call_goes_on(killed):
    folder, seen = killed
    text, code = seen["first"]
    assert code == 1 and "error: 2 of 3 runs are missing" in text and "Traceback" not in text
    assert "ended with code -9" in text and "gmpo-noiseless, seed 0: not begun, because" in text
    assert seen["gathered"] == ["iql"]
    assert seen["second"][1] == 0, seen["second"][0]
    assert (folder / "runs/scores/bandit/iql/seed0/eval.json").stat().st_mtime_ns == seen["iql"]  # not run again
    lines = (folder / "runs/scores/bandit/gmpo/seed0/metrics.jsonl").read_text().splitlines()
    assert lines[0] == seen["metrics"][0]  # with the time of the first attempt in it
    assert [json.loads(line)["step"] for line in lines] == list(range(20, 601, 20))


def test_what_is_gathered_is_what_the_runs_left(killed):
    folder, _ = killed
    texts = {row: (folder / f"benchmarks/results/bandit/{row}/seed0.json").read_text() for row in ("iql", "gmpo")}
    texts["again"] = (folder / "benchmarks/results/bandit/gmpo-noiseless/seed0.json").read_text()
    assert not any(str(folder) in text for text in texts.values())
    found, run = json.loads(texts["gmpo"]), folder / "runs/scores/bandit/gmpo/seed0"
    result = json.loads((run / "result.json").read_text())
    assert found["result"]["eval/score"] == round(result["eval/score"], 4)
    assert found["eval"]["episodes"] == 100 and found["eval"]["step"] == 600
    assert [step for step, _ in found["curve"]] == [300, 600]
    assert found["curve"][1][1] == round(result["eval/score"], 2)
    assert found["budget"]["critic_steps"] == 0 and found["budget"]["policy_steps"] == 600
    assert found["command"].startswith("python gmpo.py --policy-steps 600") and "--resume" not in found["command"]
    again = json.loads(texts["again"])
    assert again["curve"] == [] and again["eval"]["eval/score"] != found["eval"]["eval/score"]
    assert "| `bandit` |" in (folder / "README.md").read_text()
