"""The four files' runs: folders, resume, interruption, evaluation, NaN, and what is read back. Tiny budgets, CPU."""

import importlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import matplotlib.image
import numpy as np
import pytest
import torch
from running import (
    FILES,
    Stopped,
    at_step,
    command,
    content,
    differences,
    draw_nothing,
    load,
    logged,
    refused,
    stop_at,
    tiny_args,
    tiny_flags,
    train,
    without_clock,
    write_data,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import Interrupted, TrainingError, UserError, arguments, datasets, runs, trained
from common.trained import curves

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SCALARS = {
    *("critic/v_loss", "critic/q_loss", "critic/q", "critic/v", "behaviour/loss", "policy/loss", "policy/weight"),
    *("policy/clipped", "policy/ess", "policy/q", "policy/kl", "eval/score", "eval/score_std", "eval/return"),
    *("eval/return_std", "time/steps_per_s", "eval/total_variation", "eval/off_modes"),
}
OWN_SCALARS = {"gmpg": {"policy/undo_error"}, "idql": {"eval/candidates"}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of data, a critic trained on them, a model of their behaviour."""
    folder = tmp_path_factory.mktemp("files")
    own = write_data(folder / "own.hdf5")
    train("iql_critic", env=str(own), run_dir=folder / "critic")
    train("gmpo", env=str(own), run_dir=folder / "cloned", beta=0.0, critic_steps=0)
    return folder


# ---------------------------------------------------------------- resume

CASES = [
    ("iql_critic", dict(dropout=0.2)),
    ("gmpo", {}),
    ("gmpo", dict(behaviour="cloned")),
    ("gmpg", {}),
    ("idql", {}),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join([case[0], *map(str, case[1].values())]))
def uninterrupted(request, files, tmp_path_factory):
    name, changes = request.param
    changes = {key: files / value if key == "behaviour" else value for key, value in changes.items()}
    changes |= dict(env=str(files / "own.hdf5"), lr_decay=True)
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(name, run_dir=folder, **changes)
    return name, changes, folder


@pytest.mark.parametrize("share", [0.2, 0.5, 0.85])  # in the first phase, in the middle, in the last phase
def test_a_resumed_run_arrives_at_the_same_bits(uninterrupted, tmp_path, monkeypatch, share):
    name, changes, whole = uninterrupted
    total, folder = load(whole)["step"], tmp_path / "run"
    stop = min(max(2, int(share * total)), total - 2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(stop + 1, patch)  # one step after the checkpoint, so that its log line is made twice
        train(name, run_dir=folder, save_every=stop, **changes)
    assert load(folder)["step"] == stop and logged(folder)[-1]["step"] == stop + 1
    train(name, run_dir=folder, resume=True, **changes)
    assert differences(load(whole), load(folder)) == []
    assert [line["step"] for line in logged(folder)] == list(range(1, total + 1))
    assert without_clock(logged(folder)) == without_clock(logged(whole))


def test_the_comparison_sees_weights_moments_steps_and_random_state(files):
    whole = files / "critic"
    for change in (
        lambda c: next(iter(c["critic"].values())).view(-1)[0].add_(1e-3),
        lambda c: next(iter(c["policy_optimizer"]["state"].values()))["exp_avg"].view(-1)[0].add_(1e-3),
        lambda c: c.update(step=0),
        lambda c: c["rng"][-1].add_(1),
    ):
        other = load(whole)
        change(other)
        assert len(differences(load(whole), other)) == 1


@pytest.mark.parametrize("name", FILES)
def test_more_policy_steps_go_on_with_a_finished_run(name, files, tmp_path):
    changes = dict(env=str(files / "own.hdf5"), lr_decay=False, critic_steps=3)
    train(name, run_dir=tmp_path / "once", policy_steps=12, **changes)
    train(name, run_dir=tmp_path / "twice", policy_steps=6, **changes)
    train(name, run_dir=tmp_path / "twice", policy_steps=12, resume=True, **changes)
    once, twice = load(tmp_path / "once"), load(tmp_path / "twice")
    if name == "idql":  # its learning rate falls to 0 by the 6th step, whatever --lr-decay
        once, twice = ({key: state[key] for key in ("critic", "rng", "step")} for state in (once, twice))
    assert differences(once, twice) == []
    with pytest.raises(UserError, match="at step 1[259] already"):
        train(name, run_dir=tmp_path / "twice", policy_steps=6, resume=True, **changes)


def test_a_run_without_a_checkpoint_starts_again_on_resume(files, tmp_path, monkeypatch):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(3, patch)
        train("gmpo", **changes)
    train("gmpo", resume=True, **changes)
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 13))


def test_half_a_line_of_metrics_is_dropped_on_resume(files, tmp_path):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run", lr_decay=False)
    train("gmpo", **changes)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "policy/lo')
    train("gmpo", resume=True, policy_steps=8, **changes)
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 15))


def test_tensorboard_has_each_step_once_after_a_resume(files, tmp_path, monkeypatch):
    changes = dict(env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(5, patch)
        train("gmpo", save_every=3, **changes)
    train("gmpo", resume=True, **changes)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("time/steps_per_s")] == list(range(1, 13))


def test_a_killed_run_leaves_a_whole_checkpoint_and_resumes(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a fork server that has imported the file spares seconds a run
    folder, rng, step = tmp_path / "run", random.Random(0), 0
    changes = dict(env=str(files / "own.hdf5"), run_dir=folder, lr_decay=False, critic_steps=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gmpo"])
    for _ in range(3):
        args = tiny_args("gmpo", policy_steps=10**6, save_every=1, resume=step > 0, **changes)
        process = context.Process(target=importlib.import_module("gmpo").train, args=[args], daemon=True)
        process.start()
        seen, deadline = step, time.time() + 120
        while seen <= step:
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.02)
            seen = load(folder)["step"] if (folder / "checkpoint.pt").exists() else 0
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        step = load(folder)["step"]
    (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    train("gmpo", policy_steps=step, resume=True, **changes)
    assert load(folder)["step"] == step + 2 and not (folder / "checkpoint.pt.tmp").exists()
    assert [line["step"] for line in logged(folder)] == list(range(1, step + 3))


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(files, tmp_path):
    folder = tmp_path / "run"
    flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=folder)
    assert command("gmpo", *flags)[0] == 0
    before, limit = load(folder), (folder / "checkpoint.pt").stat().st_size // 2
    words = [sys.executable, ROOT / "gmpo.py", "--run-dir", folder, "--resume", "--policy-steps", "9"]
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    limited += f"; import os, sys; os.execv(sys.executable, {[str(word) for word in words]})"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "checkpoint.pt can't be written (File too large)" in done.stderr and "--resume" in done.stderr
    assert differences(before, load(folder)) == [] and not list(folder.glob("*.tmp"))
    assert command("gmpo", "--run-dir", folder, "--resume")[0] == 0 and load(folder)["step"] == 15


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(name, number, code, files, tmp_path, monkeypatch):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    flags = tiny_flags(name, env=str(files / "own.hdf5"))
    with monkeypatch.context() as patch:
        at_step(5, patch, lambda: signal.raise_signal(number))
        found, out, err = command(name, *flags, "--run-dir", tmp_path / "stopped")
    assert found == code and err == "stopped at step 5 and saved; the same command with --resume goes on\n"
    assert load(tmp_path / "stopped")["step"] == 5 and "Traceback" not in out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert command(name, *flags, "--run-dir", tmp_path / "stopped", "--resume")[0] == 0
    assert command(name, *flags, "--run-dir", tmp_path / "whole")[0] == 0
    assert differences(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []


def test_a_second_signal_does_not_wait(files, tmp_path, monkeypatch):
    at_step(5, monkeypatch, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run", save_every=3)
    code, _, err = command("gmpo", *flags)
    assert code == 130 and err.startswith("interrupted") and load(tmp_path / "run")["step"] == 3


def test_the_real_command_speaks_and_stops(tmp_path):
    words = ["--env", "bandit", "--policy-steps", "1000000", "--log-every", "1000000", "--run-dir", "run"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import gmpo; from common import arguments, runs"
    code += f"; runs.INTERVAL = 0.2; sys.argv = ['gmpo.py', *{words}]"
    code += "; arguments.main('gmpo', gmpo.train, gmpo.Args, gmpo.SETTINGS)"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    while sum("steps/s" in line for line in lines) < 3:
        lines.append(run.stdout.readline())
        assert lines[-1]  # not the end
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    step = load(Path("run"))["step"]
    assert run.returncode == 143 and err.startswith(f"stopped at step {step} and saved") and step > 0
    assert lines[0].startswith("data: bandit, 20,000 transitions") and "gradient steps: critic 1,500" in "".join(lines)


# ---------------------------------------------------------------- what a run prints


@pytest.fixture
def bare_run(tmp_path):
    """A Run that trains nothing."""

    def make(**phases):
        args = tiny_args("gmpo", env="bandit", run_dir=tmp_path / "bare", log_every=10**9)
        return runs.Run(args, "gmpo", datasets.load("bandit"), phases, net=torch.nn.Linear(1, 1))

    return make


@pytest.mark.parametrize("terminal", [False, True])
def test_how_long_a_phase_takes_is_said_early_and_off_a_terminal_again(terminal, bare_run, monkeypatch, capsys):
    monkeypatch.setattr(runs, "INTERVAL", 0.4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    begun, seen = time.time(), []
    for step, phase in bare_run(critic=50, policy=50).steps(0):
        assert phase == ("critic" if step <= 50 else "policy")
        time.sleep(0.02)  # a second a phase, or more
        seen += [(time.time() - begun, line) for line in capsys.readouterr().out.splitlines() if "steps/s" in line]
    found = re.match(r"step (\d+) of 100; critic: ([\d.]+) steps/s, 0:00:\d\d to go$", seen[0][1])
    assert seen[0][0] > 0.2 and 2 <= int(found[1]) <= 12 and float(found[2]) < 50
    counts = [sum(f"; {phase}: " in line for _, line in seen) for phase in ("critic", "policy")]
    assert counts == [1, 1] if terminal else min(counts) >= 2


def test_days_are_said_with_the_flags_for_a_shorter_look(bare_run, monkeypatch, capsys):
    monkeypatch.setattr(runs, "INTERVAL", 0.02)
    for step, _ in bare_run(critic=10**9).steps(0):
        time.sleep(0.02)
        if step == 3:
            break
    assert re.search(r"\d+ days?, .* to go; for a shorter look: --critic-steps", capsys.readouterr().out)


# ---------------------------------------------------------------- the folder of a run


@pytest.fixture(scope="module", params=FILES)
def finished(request, tmp_path_factory):
    """A run on the bandit: name, folder, flags, stdout. gmpo's by the real command."""
    name, folder = request.param, tmp_path_factory.mktemp("finished")
    flags = ["--env", "bandit", "--run-dir", str(folder), *tiny_flags(name)]
    if name == "gmpo":
        done = subprocess.run([sys.executable, ROOT / f"{name}.py", *flags], capture_output=True, text=True)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = command(name, *flags)
    assert (code, err) == (0, "")
    return name, folder, flags, out


def test_config_says_where_a_result_comes_from(finished):
    name, folder, flags, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["algorithm"] == name and config["format"] == trained.FORMAT
    assert config["command"] == " ".join([f"{name}.py", *flags])
    assert config["versions"].keys() >= {"python", "torch", "numpy", "gymnasium", "mujoco"}
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["python"] == sys.version.split()[0]
    assert "commit" in config and "resumed" not in config
    assert config["data"] == json.loads(json.dumps(datasets.load("bandit").facts))
    assert config["args"].keys() == vars(tiny_args(name)).keys() and config["args"]["critic_steps"] == 6
    assert config["args"]["expectile"] is not None and config["args"]["run_dir"] == str(folder)


def test_data_from_a_file_are_known_by_size_and_hash(files):
    data = json.loads((files / "critic" / "config.json").read_text())["data"]
    own = files / "own.hdf5"
    sha256 = subprocess.run(["sha256sum", own], capture_output=True, text=True).stdout.split()[0]
    assert (data["source"], data["bytes"], data["sha256"]) == (str(own), own.stat().st_size, sha256)


def test_metrics_have_the_documented_names_and_tensorboard_the_same_numbers(finished):
    name, folder, _, _ = finished
    lines = logged(folder)
    names = {key for line in lines for key in line} - {"step"}
    assert names <= SCALARS | OWN_SCALARS.get(name, set())
    assert names >= {"critic/v_loss", "critic/q_loss", "eval/score"} and names & {"policy/loss", "behaviour/loss"}
    events = EventAccumulator(str(folder)).Reload()
    seen = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    written = {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}
    assert seen == pytest.approx(written, rel=1e-6)
    assert "bandit" in events.Tags()["images"]


@pytest.mark.parametrize("picture", ["bandit.png", "curves.png"])
def test_pictures_are_in_the_folder(finished, picture):
    _, folder, _, _ = finished
    assert (folder / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.image.imread(folder / picture).std() > 0.05


def test_curves_hold_every_scalar(finished):
    _, folder, _, _ = finished
    drawn = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in curves(folder).axes}
    rows = logged(folder)
    names = {key for row in rows for key in row} - {"step"}
    assert drawn == {name: [[row["step"], row[name]] for row in rows if name in row] for name in names}


def test_result_is_the_last_evaluation_and_is_printed(finished):
    _, folder, _, out = finished
    result, last = json.loads((folder / "result.json").read_text()), logged(folder)[-1]
    assert result["steps"] == last["step"] == load(folder)["step"]
    assert result["eval/score"] == last["eval/score"]
    assert result["best"] == max(line.get("eval/score", -math.inf) for line in logged(folder))
    assert f"last score {result['eval/score']:.1f}" in out and f"best {result['best']:.1f}" in out


def test_the_checkpoint_holds_networks_optimizers_and_random_states(finished):
    name, folder, _, _ = finished
    checkpoint = load(folder)
    parts = {"critic", "policy", "critic_optimizer", "policy_optimizer", "rng", "cuda_rng", "step", "sizes"}
    own = {"gmpg": {"behaviour", "behaviour_optimizer", "behaviour_schedule"}, "idql": {"ema", "policy_schedule"}}
    assert parts | own.get(name, set()) <= checkpoint.keys()
    assert any(key.startswith("target_q") for key in checkpoint["critic"])


def test_a_second_run_in_the_same_folder_is_refused(finished):
    name, folder, flags, _ = finished
    before = content(folder)
    code, _, err = command(name, *flags)
    assert refused(code, err, str(folder), "--resume", "--run-dir") and content(folder) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
def test_a_folder_of_another_algorithm_is_refused(finished, mode):
    name, folder, _, _ = finished
    other = FILES[FILES.index(name) - 1]
    before = content(folder)
    code, _, err = command(other, "--run-dir", folder, *tiny_flags(other), mode)
    assert refused(code, err, str(folder), f"{name}.py") and content(folder) == before


def test_eval_only_finds_the_same_score_and_writes_nothing_but_its_result(finished):
    name, folder, _, _ = finished
    before = content(folder)
    code, out, err = command(name, "--run-dir", folder, "--eval-only")
    assert (code, err) == (0, "")
    last, found = logged(folder)[-1], json.loads((folder / "eval.json").read_text())
    assert f"last score {last['eval/score']:.1f}" in out
    assert found.pop("step") == last["step"] and found.pop("seed") == 0 and found.pop("episodes") == 2
    acting = {key: value for key, value in found.items() if not key.startswith("eval/")}
    args = json.loads((folder / "config.json").read_text())["args"]
    assert acting == {key: args[key] for key in trained.ACTING & args.keys() - {"candidates"}}
    assert found == acting | {key: value for key, value in last.items() if key.startswith("eval/")}
    after = content(folder)
    assert {path.name for path in after if after[path][0] != before.get(path, [b""])[0]} <= {"eval.json", "bandit.png"}


@pytest.mark.parametrize("name", FILES)
def test_eval_only_without_a_run_is_refused(name, tmp_path):
    code, _, err = command(name, "--env", "bandit", "--run-dir", tmp_path / "none", "--eval-only")
    assert refused(code, err, "none does not exist; a run writes it") and not (tmp_path / "none").exists()


def test_eval_only_without_an_environment_says_so(files):
    code, out, err = command("gmpo", "--run-dir", files / "cloned", "--eval-only")
    assert (code, err) == (0, "") and "not evaluated" in out


@pytest.mark.parametrize(
    "name, env, eval_env", [("iql_critic", "bandit", None), *((name, "own.hdf5", "Pendulum-v1") for name in FILES)]
)
def test_evaluating_more_often_leaves_the_weights_alone(name, env, eval_env, files, tmp_path):
    env = "bandit" if env == "bandit" else str(files / env)
    for eval_every in (5, 1000):
        changes = dict(run_dir=tmp_path / str(eval_every), eval_every=eval_every, dropout=0.2)
        train(name, env=env, eval_env=eval_env, **changes)
    often, once = load(tmp_path / "5"), load(tmp_path / "1000")
    evaluations = [sum("eval/return" in line for line in logged(tmp_path / n)) for n in ("5", "1000")]
    assert evaluations[0] > evaluations[1] == 1
    assert differences(often, once) == []


def test_every_evaluation_leaves_a_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(9, patch)
        train("gmpo", env="bandit", run_dir=tmp_path / "run", eval_every=8, save_every=1000)
    assert load(tmp_path / "run")["step"] == 8


@pytest.mark.parametrize("name", FILES)
def test_without_run_dir_the_folder_is_named_by_data_algorithm_and_seed(name, files):
    train(name, env=str(files / "own.hdf5"), seed=3)
    assert Path("runs/own", name, "seed3", "checkpoint.pt").exists()


@pytest.mark.parametrize("name", FILES)
def test_one_transition_trains_without_nan(name, tmp_path):
    own = write_data(tmp_path / "own.hdf5", rows=2)
    code, _, err = command(name, *tiny_flags(name, env=str(own), run_dir=tmp_path / "run"))
    assert (code, err) == (0, "") and all(map(math.isfinite, logged(tmp_path / "run")[-1].values()))


def test_a_computer_without_git_trains_all_the_same(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_dirty_after_a_change_of_code_but_not_of_results(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", tmp_path]
    for name in ("common/runs.py", "gmpo.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "common" / "runs.py"))
    (tmp_path / "README.md").write_text("2")
    clean = runs.origin()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "gmpo.py").write_text("2")
    assert runs.origin()["commit"] == f"{clean}-dirty"


def test_own_data_with_a_gymnasium_environment_report_a_raw_return(files, tmp_path):
    flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), eval_env="Pendulum-v1", run_dir=tmp_path / "run")
    code, out, err = command("gmpo", *flags)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (code, err) == (0, "") and "eval/score" not in result
    assert -2000 < result["eval/return"] < 0 and result["best"] == result["eval/return"]
    assert f"last return {result['eval/return']:.1f}" in out


def test_own_data_without_an_environment_train_and_say_that_they_are_not_evaluated(files, tmp_path):
    code, out, _ = command("gmpo", *tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run"))
    assert code == 0 and "trained without a score" in out and "--eval-env" in out and "not evaluated" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"] is None


# ---------------------------------------------------------------- folders that are not what they should be


def test_a_folder_in_use_is_refused(files, tmp_path):
    with filelock.FileLock(tmp_path / "lock"):
        flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path)
        code, _, err = command("gmpo", *flags)
        assert refused(code, err, f"another run is writing into {tmp_path}") and content(tmp_path) == {}
    assert command("gmpo", *flags)[0] == 0


def test_a_run_is_in_use_until_it_ends(files, tmp_path, monkeypatch):
    flags, seen = tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / "run"), []
    with monkeypatch.context() as patch:
        second = lambda: seen.append(command("gmpo", *flags, "--resume"))  # noqa: E731
        at_step(3, patch, second)
        assert command("gmpo", *flags)[0] == 0
    assert refused(seen[0][0], seen[0][2], "another run is writing into")
    assert command("gmpo", *flags, "--resume")[0] == 0


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "result.json", "metrics.jsonl", "eval.json", "curves.png", "config.json"]
)
def test_files_of_the_users_are_not_overwritten(name, files, tmp_path):
    (tmp_path / name).write_text('{"mine": true}\n')
    before = content(tmp_path)
    for mode in ([], ["--resume"]):
        code, _, err = command("gmpo", *tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path), *mode)
        assert refused(code, err, name, "choose another --run-dir") and content(tmp_path) == before


def test_other_files_in_the_folder_do_no_harm(files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    train("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


DAMAGE = {  # what is done to a file of a finished run -> what the sentence says
    ("config.json", lambda text: b""): "config.json is damaged",
    ("config.json", lambda text: text[: len(text) // 2]): "config.json is damaged",
    ("config.json", lambda text: b"[1, 2]"): "config.json is damaged",
    ("config.json", lambda text: text.replace(b'"format": 3', b'"format": 1')): "of another version",
    ("config.json", lambda text: text.replace(b'"beta"', b'"betta"')): "an argument 'betta' that this version",
    ("metrics.jsonl", lambda text: b"x" + text): "metrics.jsonl is damaged",
    ("metrics.jsonl", lambda text: b"3\n" + text): "metrics.jsonl is damaged",
    ("metrics.jsonl", lambda text: b"\xff\xfe\n" + text): "metrics.jsonl is damaged",
    ("config.json", lambda text: json.dumps(json.loads(text) | {"args": []}).encode()): "config.json is damaged",
    ("checkpoint.pt", lambda text: b""): "checkpoint.pt is not a whole checkpoint",
    ("checkpoint.pt", lambda text: text[: len(text) // 2]): "checkpoint.pt is not a whole checkpoint",
}


@pytest.mark.parametrize("file, change", DAMAGE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_file_is_one_sentence_on_resume(file, change, files, tmp_path):
    train("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path)
    (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
    before = content(tmp_path)
    code, _, err = command("gmpo", "--env", files / "own.hdf5", "--run-dir", tmp_path, "--resume", "--policy-steps", 8)
    assert refused(code, err, DAMAGE[file, change], str(tmp_path)), err
    assert {path: before[path] for path in before if path.name != "config.json"} == {
        path: state for path, state in content(tmp_path).items() if path.name != "config.json"
    }


def test_data_replaced_since_are_refused(tmp_path):
    own = write_data(tmp_path / "own.hdf5")
    train("gmpo", env=str(own), run_dir=tmp_path / "run")
    before = content(tmp_path / "run")
    write_data(own, rewards=np.arange(200.0))
    for mode in ("--resume", "--eval-only"):
        code, _, err = command("gmpo", "--run-dir", tmp_path / "run", mode)
        assert refused(code, err, f"{own}: not the data that the run in") and content(tmp_path / "run") == before


def test_data_that_were_moved_are_the_same_data(tmp_path):
    own, moved = write_data(tmp_path / "own.hdf5"), tmp_path / "elsewhere.hdf5"
    train("gmpo", env=str(own), run_dir=tmp_path / "run")
    before = load(tmp_path / "run")
    own.rename(moved)
    for mode in ("--eval-only", "--resume"):
        code, _, err = command("gmpo", "--run-dir", tmp_path / "run", "--env", moved, mode)
        assert (code, err) == (0, "") and differences(before, load(tmp_path / "run")) == []
    assert command("gmpo", "--run-dir", tmp_path / "run", "--resume")[0] == 0  # their new place is known from now on


def test_a_finished_run_without_its_checkpoint_is_not_begun_again(files, tmp_path):
    train("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    before = content(tmp_path)
    code, _, err = command("gmpo", "--run-dir", tmp_path, "--resume")
    assert refused(code, err, f"{tmp_path / 'checkpoint.pt'} does not exist") and content(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused_before_any_training(files, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o500)
    folders = {"file/run": "Not a directory"}
    folders |= {"closed/run": "Permission denied"} if os.getuid() else {}  # root may write everywhere
    for folder, why in folders.items():
        flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), run_dir=tmp_path / folder)
        code, out, err = command("gmpo", *flags)
        assert refused(code, err, f"{folder} can't be written ({why}); choose another --run-dir")
        assert "gradient steps" not in out


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("log_every, where", [(1, "step 5: critic/v_loss is nan"), (1000, "step 6: the weights of")])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(name, log_every, where, files, tmp_path, monkeypatch):
    module, calls = importlib.import_module(name), []
    critic_loss = module.critic_loss

    def failing(*args):
        calls.append(1)
        loss, metrics = critic_loss(*args)
        factor = math.nan if len(calls) == 5 else 1
        return loss * factor, metrics | {"critic/v_loss": loss.detach() * factor}

    monkeypatch.setattr(module, "critic_loss", failing)
    with pytest.raises(TrainingError, match=where) as failure:
        changes = dict(log_every=log_every, save_every=2, policy_steps=8)
        train(name, env=str(files / "own.hdf5"), run_dir=tmp_path / "run", **changes)
    assert f"the last good checkpoint, if there is one, is kept in {tmp_path / 'run'}" in str(failure.value)
    assert load(tmp_path / "run")["step"] == 4
    assert all(torch.isfinite(p).all() for p in load(tmp_path / "run")["critic"].values())


@pytest.mark.parametrize("name", FILES)
def test_a_learning_rate_beyond_all_measure_ends_with_code_1(name, files, tmp_path):
    rates = dict(policy_lr=1e38, behaviour_lr=1e38)
    flags = tiny_flags(name, env=str(files / "own.hdf5"), run_dir=tmp_path / "run", **rates)
    code, _, err = command(name, *flags)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: step ") and ("policy" in err or "behaviour" in err) and "learning rate" in err


def test_an_interrupted_run_says_which_signal():
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "read_command_line", lambda *_: None)

        def train(_):
            raise Interrupted(15, "told to")

        arguments.main("gmpo", train, None, None)
    assert stop.value.code == 143
