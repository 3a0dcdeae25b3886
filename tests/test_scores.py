"""benchmarks/scores.py: the list, the statistics, README's part, and runs that are killed on the way."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scores  # noqa: E402
import tables  # noqa: E402

MARKS = f"before\n{scores.START}old\n{scores.END}\nafter\n"
SMALL = "--log-every 100 --save-every 100 --batch-size 8"
ROWS = ["gmpo-gvp", "gmpo-gvp-steps2", "iql"]  # of the list below
TINY = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import scores
Row = scores.Row
scores.BUDGETS = {{}}
scores.rows = lambda name: [
    Row("iql", "iql_critic.py", "--critic-steps 5 --policy-steps 5"),
    Row("gmpo-gvp", "gmpo.py", "--policy-steps 4000 --eval-every 4000 {SMALL}", "iql"),
    Row("gmpo-gvp-steps2", "gmpo.py", "--sampler-steps 2 --eval-only", "gmpo-gvp", in_table=False),
]
if __name__ == "__main__":
    scores.runs.main(scores.main, scores.Args)
"""


# Statistics


def test_iqm_is_the_mean_of_the_middle_half_of_all_sets():
    assert tables.iqm(np.array([100.0, 3, 0, 2, 1, -50, 4, 5])) == np.mean([1, 2, 3, 4])
    assert tables.iqm(np.array([0.0, 1]), np.array([2.0, 30])) == 1.5
    assert tables.iqm(np.array([1.0, 2, 6])) == 3  # of three nothing is cut


def test_the_interval_has_the_quantiles_of_the_binomial():
    # of n ones and zeros the IQM of a resample is (k - n / 4) / (n / 2), clipped to [0, 1], with k binomial
    import scipy.stats

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


@pytest.fixture
def all_jobs(tmp_path, monkeypatch):
    """The jobs of every set there is."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    for name in [f"{name}.hdf5" for name in scores.ROLLED] + ["hopper_medium_replay-v2.hdf5"]:
        (tmp_path / name).touch()
    sets = (*scores.DEMOS, "d4rl", "walker2d-medium-v2")
    return scores.list_jobs(scores.Args(sets=sets, rolled=tmp_path, seeds=(0, 7)))


def test_every_command_of_the_list_is_one_that_its_file_takes(all_jobs):
    assert {job.set for job in all_jobs} == {
        *scores.DEMOS,
        *scores.ROLLED,
        "hopper-medium-replay-v2",
        "walker2d-medium-v2",
    }
    for job in all_jobs:
        args = tyro.cli(importlib.import_module(job.command[0].removesuffix(".py")).Args, args=job.command[1:])
        assert args.seed == job.seed == int(job.folder.name.removeprefix("seed"))
        assert args.run_dir == (job.after if args.eval_only else job.folder)
        assert args.critic == (None if args.eval_only else job.after)


def test_a_job_comes_once_and_after_the_one_it_waits_for(all_jobs):
    folders = [job.folder for job in all_jobs]
    assert len(set(folders)) == len(folders)
    for k, job in enumerate(all_jobs):
        assert job.after is None or job.after in folders[:k]


def test_the_pictures_find_their_rows():
    names = {row.name for row in scores.rows("halfcheetah-demo")}
    points = {f"gmpo-{path}-steps{n}" for path in ("vp", "gvp", "icfm") for n in scores.pictures.STEPS if n != 10}
    points |= {f"idql-argmax-candidates{n}" for n in scores.pictures.CANDIDATES if n != 8}
    assert names - {row.name for row in scores.rows("hopper-medium-v2")} == points
    import gmpo
    import idql

    assert gmpo.PAPER["*"]["sampler_steps"] == 10 and "sampler_steps" not in gmpo.PAPER["halfcheetah-demo"]
    assert "--candidates 8" in scores.BUDGETS["halfcheetah-demo", "idql"] and idql.Args().candidates is None


# Wrong arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sets", "hoper"], "--sets hoper: no such set"),
        (["--sets", "d4rl"], "none of its files is in"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--seeds", "-1"], "--seeds"),
        (["--rolled", "nowhere"], "does not exist"),
        (["--readme", "nowhere.md"], "has no line `<!-- scores: made by benchmarks/scores.py -->`"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["scores.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        scores.runs.main(scores.main, scores.Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_a_folder_with_a_run_of_other_arguments_is_refused(tmp_path):
    jobs = scores.list_jobs(scores.Args(sets=("bandit",), seeds=(0,), runs=tmp_path))
    job = next(job for job in jobs if job.row == "clone")
    job.folder.mkdir(parents=True)
    config = job.folder / "config.json"
    config.write_text(json.dumps({"command": " ".join(job.command) + " --resume"}))
    scores.check_folder(job)
    config.write_text(json.dumps({"command": " ".join(job.command).replace("--beta 0", "--beta 1")}))
    with pytest.raises(scores.UserError, match="remove that folder"):
        scores.check_folder(job)


# Tables


def record(score, best=None):
    result = {"eval/score": score, "best": best, "minutes": 2.0, "steps": 5}
    return {
        "command": "python x.py",
        "result": result,
        "versions": {"torch": "1"},
        "commit": "c",
        "curve": [],
        "kl": [],
    }


def test_published_figures_stand_beside_results_on_the_published_set_only(tmp_path):
    for name in ("hopper-medium-v2", "walker2d-medium-v2", "hopper-medium-expert-rolled"):
        for seed, score in enumerate([60.0, 70.0, 80.0]):
            path = tmp_path / name / "gmpo-gvp" / f"seed{seed}.json"
            scores.write(path, json.dumps(record(score, best=score + 1)))
    lines = tables.table(tmp_path, {n: ["iql", "gmpo-gvp"] for n in ("hopper-medium-v2", "walker2d-medium-v2")}, True)
    last = "70.0 ± 10.0 | 71.0 | 70.0 [60.0, 80.0] | 3 | 5 | 2.0 |"
    assert "| hopper-medium-v2 | IQL |  |  |  |  |  |  | 66.3 |  |" in lines  # nothing was run, nothing is claimed
    assert f"| hopper-medium-v2 | GMPO, gvp | {last}  | 74.6 ± 21.2 |" in lines
    assert any(line.startswith("| all | GMPO, gvp | 70.0 |  | 70.0 [") for line in lines)
    lines = tables.table(tmp_path, {"hopper-medium-expert-rolled": ["gmpo-gvp"]}, True)
    assert f"| hopper-medium-expert-rolled | GMPO, gvp | {last}" in lines


def test_the_published_file_has_every_row_of_every_set_once():
    text = [line.split("\t")[:2] for line in tables.PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    paths = [f"{method}-{path}" for method in ("gmpo", "gmpg") for path in ("vp", "gvp", "icfm")]
    assert sorted(text[1:]) == sorted([n, row] for n in scores.D4RL for row in ["iql", *paths, "idql-argmax"])


def test_readme_has_what_the_committed_results_say(tmp_path):
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    shutil.copy(ROOT / "README.md", tmp_path)
    scores.write_readme(scores.Args(results=tmp_path / "benchmarks/results", readme=tmp_path / "README.md"))
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run scores.py --tables-only"


# Whole runs, of seconds


def start(folder, *more):
    (folder / "tiny.py").write_text(TINY)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(MARKS)
    where = [f"--{name}={folder / name}" for name in ("runs", "results")] + [f"--readme={folder / 'README.md'}"]
    command = [sys.executable, folder / "tiny.py", "--sets", "bandit", "--seeds", "0", "--workers", "2", *where, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def training(folder, file):
    """The id of the process that trains in `folder`, once it has written a checkpoint."""
    for _ in range(2400):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it has just ended
                continue
            if file in words and str(folder) in words and (folder / "checkpoint.pt").exists():
                return int(process.name)
        time.sleep(0.05)
    raise AssertionError(f"nothing trains in {folder}")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a list whose trainer was killed, then the whole call, and that was then completed."""
    if not Path("/proc").exists():
        pytest.skip("needs /proc to find the process to kill")
    folder = tmp_path_factory.mktemp("scores")
    runs = folder / "runs/bandit"
    first = start(folder)
    os.kill(training(runs / "gmpo-gvp/seed0", "gmpo.py"), signal.SIGKILL)
    out, error = first.communicate(timeout=300)
    seen = {"first": (first.returncode, out, error), "critic": (runs / "iql/seed0/result.json").stat().st_mtime_ns}
    seen["gathered"] = [path.parent.name for path in folder.glob("results/bandit/*/seed0.json")]
    seen["metrics"] = (runs / "gmpo-gvp/seed0/metrics.jsonl").read_text().splitlines()
    second = start(folder)
    training(runs / "gmpo-gvp/seed0", "gmpo.py")
    second.kill()
    second.communicate(timeout=300)
    third = start(folder)
    seen["third"] = (*third.communicate(timeout=300), third.returncode)
    return folder, seen


def test_a_killed_worker_loses_no_finished_result_and_the_next_calls_complete_the_list(killed):
    folder, seen = killed
    code, out, error = seen["first"]
    assert code == 1 and "error: 2 of 3 runs are missing" in error and "Traceback" not in error
    assert "gmpo-gvp/seed0 ended with code -9" in out + error and "steps2/seed0 was not begun" in out + error
    assert seen["gathered"] == ["iql"]
    assert seen["third"][-1] == 0, seen["third"]
    assert (folder / "runs/bandit/iql/seed0/result.json").stat().st_mtime_ns == seen["critic"]  # not run again
    for row in ROWS:
        assert (folder / f"results/bandit/{row}/seed0.json").exists()


def test_a_half_done_run_is_continued_not_begun_again(killed):
    folder, seen = killed
    lines = (folder / "runs/bandit/gmpo-gvp/seed0/metrics.jsonl").read_text().splitlines()
    assert lines[0] == seen["metrics"][0]  # with the time of the first attempt in it
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 4000


def test_what_is_gathered_is_what_the_run_left(killed):
    folder, _ = killed
    gathered = json.loads((folder / "results/bandit/gmpo-gvp/seed0.json").read_text())
    result = json.loads((folder / "runs/bandit/gmpo-gvp/seed0/result.json").read_text())
    assert gathered["result"]["eval/score"] == round(result["eval/score"], 4)
    assert gathered["curve"] == [[4000, round(result["eval/score"], 2)]]
    assert gathered["budget"]["critic_steps"] == 0 and gathered["budget"]["policy_steps"] == 4000
    assert gathered["command"].startswith("python gmpo.py --env bandit --policy-steps 4000")
    again = json.loads((folder / "results/bandit/gmpo-gvp-steps2/seed0.json").read_text())
    assert again["curve"] == [] and 0 < again["result"]["eval/score"] <= 100 and "--eval-only" in again["command"]


def test_the_same_results_give_the_same_bytes(killed, tmp_path):
    folder, _ = killed
    shutil.copytree(folder / "results", tmp_path / "results")
    for picture in tmp_path.glob("results/*.png"):
        picture.unlink()
    more = json.loads((tmp_path / "results/bandit/gmpo-gvp/seed0.json").read_text())
    samples = {name: [[0.1, 0.2], [0.3, -0.4]] for name in ("data", "GMPO")}
    for root in (folder, tmp_path):
        scores.write(root / "results/bandit/samples.json", json.dumps(samples))
        grown = more | {"curve": [[1, 20.0], [2, 30.0]], "kl": [[1, 0.0], [2, 0.5]]}
        grown["budget"] = grown["budget"] | {"behaviour_steps": 0}
        for seed in (0, 1):
            scores.write(root / f"results/bandit/gmpo-gvp/seed{seed}.json", json.dumps(grown))
        done = start(root, "--tables-only")
        assert (*done.communicate(timeout=300), done.returncode)[-1] == 0
    made = sorted(path.name for path in tmp_path.glob("results/*.png"))
    assert made == ["bandit.png", "curves_bandit.png", "kl.png"]
    for name in ["README.md", *(f"results/{name}" for name in made)]:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith(f"{scores.END}\nafter\n") and "old" not in text
    assert "| bandit | GMPO, gvp |" in text and "| halfcheetah-demo | GMPO, gvp |  |" in text
    assert "![Learning curves on bandit](results/curves_bandit.png)" in text


def test_ray_runs_the_list_into_the_same_layout(tmp_path):
    pytest.importorskip("ray")
    done = start(tmp_path, "--ray")
    out, error = done.communicate(timeout=300)
    assert done.returncode == 0, out + error
    assert [path.parent.name for path in sorted(tmp_path.glob("results/bandit/*/seed0.json"))] == ROWS
    assert [path.parents[1].name for path in sorted(tmp_path.glob("runs/bandit/*/seed0/result.json"))] == ROWS
