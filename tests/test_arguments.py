"""The command line: whose settings are taken, what is said of them, what a resumed run takes, and every mistake."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from running import FILES, command, content, differences, draw_nothing, load, refused, tiny_flags, train, write_data

from common import UserError, arguments, datasets, environments, trained

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
each_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of good and bad data, of the sizes of Pendulum-v1, and of checkpoints."""
    folder = tmp_path_factory.mktemp("files")
    own = write_data(folder / "own.hdf5")
    write_data(folder / "nan.hdf5", rewards=np.where(np.arange(200) == 7, np.nan, 1.0))
    (folder / "damaged.hdf5").write_bytes(own.read_bytes()[: own.stat().st_size // 2])
    train("iql_critic", env=str(own), run_dir=folder / "critic")
    checkpoint = (folder / "critic" / "checkpoint.pt").read_bytes()
    (folder / "damaged.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    torch.save({"weights": torch.ones(2)}, folder / "foreign.pt")
    return folder


def module_of(name):
    return importlib.import_module(name)


def fill_in(name, **changes):
    module = module_of(name)
    return arguments.fill_in(module.Args(device="cpu", **changes), module.SETTINGS, name)


# ---------------------------------------------------------------- settings


@each_file
@pytest.mark.parametrize("env", ["halfcheetah-medium-expert-v2", "hopper-random-v2", "halfcheetah-demo", "bandit"])
def test_a_field_that_is_none_takes_the_datasets_value_else_that_for_all(name, env):
    settings = module_of(name).SETTINGS
    expected, filled = settings["*"] | settings.get(env, {}), fill_in(name, env=env)
    assert {key: getattr(filled, key) for key in expected} == expected
    default = module_of(name).Args()
    empty = {field for field, value in vars(default).items() if value is None}
    assert expected.keys() <= empty  # a field with a default would never take a setting
    assert empty - expected.keys() <= {"eval_env", "run_dir", "critic", "behaviour", "reward_scale", "eval_episodes"}
    assert default == module_of(name).Args()  # the caller's own arguments are left as they are


@each_file
def test_every_setting_is_of_an_argument(name):
    module = module_of(name)
    known = {field.name for field in dataclasses.fields(module.Args)}
    assert all(values.keys() <= known for values in module.SETTINGS.values())


FAMILIES = {
    "antmaze-umaze-v2": "antmaze-umaze-v0",
    "antmaze-large-diverse-v1": "antmaze-large-diverse-v0",
    "antmaze-umaze-v0": "antmaze-umaze-v0",
    "pen-human-v1": "pen",
    "hopper-medium-v2": "hopper-medium-v2",
    "hopper-medium-remade": "remade",
    "hopper-other-v9": "all datasets",
    "my.hdf5": "own data",
    "a/b.h5": "own data",
    "minari:D4RL/pen/human-v2": "own data",
}


@pytest.mark.parametrize("env", FAMILIES)
def test_whose_settings_a_dataset_has(env):
    names = {*FAMILIES.values()} - {"all datasets"}
    settings = {"*": dict(a=0, b=0)} | {name: dict(b=name) for name in names}
    whose, values = arguments.lookup(settings, env)
    assert whose == FAMILIES[env] and values == dict(a=0, b=whose if whose in names else 0)
    assert settings["*"] == dict(a=0, b=0)


def test_a_files_name_means_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hopper-medium-v2", "bandit", "pen-human"):
        write_data(tmp_path / name)
        filled = fill_in("gmpo", env=name)
        assert filled.env == str(tmp_path / name) and filled.eval_env is None
        assert filled.policy_steps == module_of("gmpo").SETTINGS["own data"]["policy_steps"]


@each_file
def test_own_data_have_settings_of_their_own_and_what_is_given_wins(name, files):
    filled = fill_in(name, env=str(files / "own.hdf5"), critic_steps=0, expectile=0.6)
    assert filled.normalize_obs is True
    assert filled.policy_steps == module_of(name).SETTINGS["own data"]["policy_steps"]
    assert (filled.critic_steps, filled.expectile) == (0, 0.6)


def help_of(name, *words):
    """Flag -> its help, of python <name>.py --help <words>."""
    code, out, _ = command(name, "--help", *words)
    assert code == 0
    entries = [re.sub(r"[\s│╰╯─]+", " ", entry).strip() for entry in re.split(r"\n[│ ] (?=-)", out)]
    return {re.match("-[^ ,]*", entry)[0]: entry for entry in entries[1:]} | {"": entries[0]}


@each_file
@pytest.mark.parametrize("env", ["bandit", "hopper-medium-v2"])
def test_help_shows_the_datasets_values(name, env):
    shown = help_of(name, "--env", env, "--seed", 4)
    settings = module_of(name).SETTINGS
    assert f"those of {env if env in settings else 'all datasets'}." in shown[""]
    for key, value in (arguments.lookup(settings, env)[1] | {"env": env}).items():
        default = re.search(r"\(default: ([^)]*)\)$", shown[f"--{key.replace('_', '-')}"])[1]
        assert float(default) == value if isinstance(value, float) else default == str(value)


@each_file
def test_every_argument_has_a_sentence(name):
    shown = help_of(name)
    known = {field.name for field in dataclasses.fields(module_of(name).Args)}
    assert {f"--{field.replace('_', '-')}" for field in known} <= shown.keys()
    for flag, entry in shown.items():
        sentence = re.sub(r" \(default: [^)]*\)$", "", entry).removeprefix(flag)
        assert flag == "" or re.search(r"[A-Z}\]] \w.*|no-.* \w.*", sentence) or flag == "-h", entry


@pytest.mark.parametrize("env, episodes", [("antmaze-umaze-v2", 100), ("hopper-medium-v2", 10), ("bandit", 10)])
def test_antmaze_is_scored_over_100_episodes_unless_told_otherwise(env, episodes, tmp_path):
    for given, expected in ((None, episodes), (3, 3)):
        assert fill_in("gmpo", env=env, run_dir=tmp_path / "run", eval_episodes=given).eval_episodes == expected


def test_the_first_lines_say_data_score_device_settings_and_phases(files, tmp_path):
    flags = tiny_flags("gmpo", env=str(files / "own.hdf5"), eval_env="Pendulum-v1", run_dir=tmp_path / "run")
    code, out, _ = command("gmpo", *flags, "--beta", "2")
    lines = [line for line in out.splitlines() if not line.startswith("step")]
    lines = lines[[line.split()[0] for line in lines].index("data:") :]  # after what the loader says of the file
    assert code == 0
    assert lines[0].startswith(f"data: {files / 'own.hdf5'}, 196 transitions, 4 episodes of returns ")
    assert lines[1].startswith("observations of size 3, actions of size 1; rewards times 1000")
    assert lines[2] == "score: Pendulum-v1, 2 episodes; device: cpu"
    assert lines[3].startswith("settings of own data: critic_lr 0.0003, ") and "beta 3.0" in lines[3]
    assert lines[4].startswith("but for: ") and "beta 2.0" in lines[4] and "policy_steps 6" in lines[4]
    assert "critic_lr" not in lines[4] and "eval_episodes" not in lines[4]
    assert lines[5] == "gradient steps: critic 6, then policy 6"


# ---------------------------------------------------------------- resume


@pytest.fixture(scope="module", params=FILES)
def begun(request, files):
    """A run on own data with flags of its own: name, folder, flags."""
    name, folder = request.param, files / f"begun-{request.param}"
    flags = ["--env", files / "own.hdf5", "--expectile", 0.8, "--seed", 2, "--run-dir", folder, *tiny_flags(name)]
    assert command(name, *flags)[0] == 0
    return name, folder, flags


def test_resume_alone_takes_the_runs_own_arguments(begun):
    name, folder, flags = begun
    before, config = load(folder), json.loads((folder / "config.json").read_text())
    code, _, err = command(name, "--resume", "--run-dir", folder)
    assert (code, err) == (0, "") and differences(before, load(folder)) == []
    after = json.loads((folder / "config.json").read_text())
    assert after["args"] == config["args"] | {"resume": True}
    for key in ("command", "versions", "commit", "data"):
        assert after[key] == config[key]
    commands = [resumed["command"] for resumed in after["resumed"]]
    assert commands[-1] == f"{name}.py --resume --run-dir {folder}" and "torch" in after["resumed"][-1]["versions"]
    assert command(name, "--resume", "--run-dir", folder)[0] == 0
    again = json.loads((folder / "config.json").read_text())
    assert len(again["resumed"]) == len(commands) + 1 and again["command"] == " ".join([f"{name}.py", *map(str, flags)])


def test_flags_may_agree_or_be_free_on_resume(begun, monkeypatch):
    name, folder, flags = begun
    monkeypatch.chdir(folder.parent)
    code, _, err = command(name, *flags, "--resume")  # all the first flags again
    assert (code, err) == (0, "")
    words = ["--env", "./own.hdf5", "--run-dir", folder.name, "--log-every", 7, "--save-every", 5, "--eval-every", 3]
    code, _, err = command(name, "--resume", *words, "--expectile", "0.80")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "flag, value", [("--expectile", 0.81), ("--seed", 1), ("--env", "bandit"), ("--critic-lr", 1.0)]
)
def test_other_flags_are_refused_on_resume(begun, flag, value):
    name, folder, _ = begun
    before = content(folder)
    code, _, err = command(name, "--run-dir", folder, "--resume", flag, value)
    assert refused(code, err, str(folder), flag, f"not {value}; leave it out") and content(folder) == before


def test_from_python_a_resumed_run_needs_no_settings(begun):
    name, folder, _ = begun
    before = load(folder)
    args = arguments.trained.saved_args(before, module_of(name).Args)
    empty = {key: None for key in ("expectile", "critic_lr", "eval_every", "policy_lr")}
    module_of(name).train(dataclasses.replace(args, resume=True, **empty))
    assert differences(before, load(folder)) == [] and load(folder)["args"]["expectile"] == 0.8


@pytest.mark.parametrize("flag, value", [("--network", "paper"), ("--path", "vp"), ("--beta", "7.0")])
def test_eval_only_of_another_model_is_refused(flag, value, files):
    train("gmpo", env="bandit", run_dir=files / "bandit", resume=True)
    code, _, err = command("gmpo", "--run-dir", files / "bandit", flag, value, "--eval-only")
    assert refused(code, err, f"holds a run with {flag} ", f", not {value}; leave it out")


def test_eval_only_may_act_in_another_way(files):
    train("gmpo", env="bandit", run_dir=files / "bandit", resume=True)
    flags = ["--run-dir", files / "bandit", "--solver", "euler", "--sampler-steps", 3, "--act-noise", 0.5]
    code, out, _ = command("gmpo", *flags, "--eval-only")
    assert code == 0 and "last score" in out
    found = json.loads((files / "bandit" / "eval.json").read_text())
    assert [found[key] for key in ("solver", "sampler_steps", "act_noise")] == ["euler", 3, 0.5]
    code, _, err = command("gmpo", *flags, "--resume")
    assert refused(code, err, "holds a run with --s")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # bash leaves --env=~/mine as it is
    write_data(tmp_path / "mine")
    code, out, _ = command("gmpo", "--env=~/mine", "--run-dir=~/run", *tiny_flags("gmpo"))
    assert code == 0 and "settings of own data" in out and not Path("~").exists()
    code, _, err = command("gmpo", "--env", tmp_path / "mine", "--run-dir", tmp_path / "run", "--resume")
    assert (code, err) == (0, "")
    flags = ["--env", tmp_path / "mine", "--critic=~/run", "--run-dir", "with", *tiny_flags("gmpo")]
    assert command("gmpo", *flags)[0] == 0


def test_a_link_names_the_folder_of_its_run(tmp_path):
    write_data(tmp_path / "blobs" / "3fa9")
    Path("link.hdf5").symlink_to(tmp_path / "blobs" / "3fa9")
    assert command("gmpo", "--env", "link.hdf5", "--expectile", 0.8, *tiny_flags("gmpo"))[0] == 0
    before = load(Path("runs/link/gmpo/seed0"))
    code, _, err = command("gmpo", "--env", "link.hdf5", "--resume")
    assert (code, err) == (0, "") and differences(before, load(Path("runs/link/gmpo/seed0"))) == []


def test_what_is_free_is_an_argument():
    known = {field.name for name in FILES for field in dataclasses.fields(module_of(name).Args)}
    assert known >= arguments.FREE | trained.ACTING


# ---------------------------------------------------------------- checks


@each_file
def test_every_number_has_a_rule_beside_it(name):
    for field, kind in get_type_hints(module_of(name).Args, include_extras=True).items():
        parts = [kind] if hasattr(kind, "__metadata__") else get_args(kind) or [kind]  # Annotated, or a union
        assert int not in parts and float not in parts, field
        assert all(isinstance(part.__metadata__[0], arguments.Rule) for part in parts if hasattr(part, "__metadata__"))


def test_a_word_in_a_numbers_place_is_refused():  # from Python, or a config.json edited by hand
    with pytest.raises(UserError, match="--beta 0.3: must be a finite number"):
        fill_in("gmpo", env="bandit", beta="0.3")


@pytest.mark.parametrize("kind, good, bad", [
    (arguments.Count, [1, 7], [0, -1]),
    (arguments.AtLeast2, [2, 7], [1, 0]),
    (arguments.Positive, [1e-9, 1e9], [0, -1, math.inf, math.nan]),
    (arguments.Steps, [0, 7], [-1]),
    (arguments.Amount, [0, 1e9], [-1e-9, math.inf, math.nan]),
    (arguments.Share, [0, 0.3, 1], [-0.1, 1.1, math.nan]),
    (arguments.Inside, [0.001, 0.999], [0, 1, math.nan]),
])  # fmt: skip
def test_rules(kind, good, bad):
    (rule,) = kind.__metadata__
    assert all(rule.holds(x) for x in good) and not any(rule.holds(x) for x in bad) and rule.words.startswith("must")


BAD = {  # flags -> what the sentence must say
    "--env hoper-medium-v2": "hopper-medium-v2",
    "--env {files}/missing.hdf5": "missing.hdf5 is neither a file that exists",
    "--env {files}/damaged.hdf5": "damaged.hdf5 can't be read",
    "--env {files}/nan.hdf5": "rewards is NaN or infinite, first in row 7",
    "--env {files}/own.hdf5 --eval-env hopper": "observations have size 3",
    "--env {files}/own.hdf5 --eval-env Nothing-v0": "Nothing",
    "--env {files}/own.hdf5 --eval-env nothing:Nothing-v0": "nothing",
    "--env {files}/own.hdf5 --eval-env CartPole-v1": "CartPole-v1",
    "--env {files}/own.hdf5 --run-dir {files}/own.hdf5": "choose another --run-dir",
    "--env bandit --device cuda:99": "--device cuda:99",
    "--env bandit --device nonsense": "--device nonsense",
    "--env bandit --batch-size 0": "--batch-size 0: must be at least 1",
    "--env bandit --eval-every 0": "--eval-every 0",
    "--env bandit --eval-episodes 0": "--eval-episodes 0",
    "--env bandit --save-every 0": "--save-every 0",
    "--env bandit --log-every -3": "--log-every -3",
    "--env bandit --critic-lr -1": "--critic-lr -1.0: must be a finite number that is not negative",
    "--env bandit --policy-lr nan": "--policy-lr nan",
    "--env bandit --policy-lr inf": "--policy-lr inf",
    "--env bandit --policy-steps -1": "--policy-steps -1: must not be negative",
    "--env bandit --seed -1": "--seed -1",
    "--env bandit --seed 18446744073709551616": "--seed 18446744073709551616: must not be negative, and be less than",
    "--env ~nobody.hdf5": "~nobody.hdf5 is neither a file that exists",
    "--env bandit --expectile 1.5": "--expectile 1.5: must lie between 0 and 1, and be neither",
    "--env bandit --expectile 0": "--expectile 0",
    "--env bandit --discount 2": "--discount 2.0: must lie between 0 and 1",
    "--env bandit --target-rate 1.1": "--target-rate 1.1",
    "--env bandit --reward-scale -1": "--reward-scale -1",
    "--env bandit --video": "--video needs an environment",
}
BAD_CRITIC = {
    "--env bandit --critic {files}/nothing": "nothing does not exist",
    "--env bandit --critic {files}/critic": "own.hdf5, not bandit; give the same",
    "--env {files}/own.hdf5 --critic {files}/critic --expectile 0.6": "with --expectile 0.7, not 0.6; give",
    "--env {files}/own.hdf5 --critic {files}/damaged.pt": "damaged.pt is not a whole checkpoint",
    "--env {files}/own.hdf5 --critic {files}/foreign.pt": "foreign.pt",
}
BAD_LOSS = {  # each would leave V or the choice among candidates without a gradient or a weight
    "--env bandit --critic-loss exponential --linex-max 1": "--linex-max 1: must be at least 2",
    "--env bandit --critic-loss exponential --linex-alpha 0": "--linex-alpha 0.0: must be a finite number above 0",
}
MISTAKES = [(FILES[k % len(FILES)], flags, BAD[flags]) for k, flags in enumerate(BAD)]  # in turn: the code is common
MISTAKES += [(name, flags, BAD_CRITIC[flags]) for flags in BAD_CRITIC for name in FILES[::3]]
MISTAKES += [(name, flags, BAD_LOSS[flags]) for flags in BAD_LOSS for name in ("iql_critic", "idql")]


@pytest.mark.parametrize("name, flags, message", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(name, flags, message, files, tmp_path):
    before = content(files)
    code, _, err = command(name, *flags.format(files=files).split())
    assert refused(code, err, message), err
    assert content(files) == before and not list(tmp_path.glob("cwd/*"))


@pytest.mark.parametrize("flags", ["--batch-size 1.5", "--path huber", "--no-such-flag 1"])
def test_a_usage_error_has_code_2(flags):
    assert command("gmpo", "--env", "bandit", *flags.split())[0] == 2


def test_the_real_command_ends_with_code_2_and_no_traceback():
    words = [sys.executable, ROOT / "idql.py", "--env", "hoper-medium-v2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert refused(done.returncode, done.stderr, "hopper-medium-v2") and not Path("runs").exists()


def test_a_critic_of_another_network_is_refused(files):
    write_data(files / "wide.hdf5", obs_dim=4)
    checkpoint = load(files / "critic")
    checkpoint["data"] = datasets.load(str(files / "wide.hdf5")).facts
    torch.save(checkpoint, files / "wide.pt")
    flags = ["--env", files / "wide.hdf5", "--critic", files / "wide.pt", *tiny_flags("gmpo")]
    code, _, err = command("gmpo", *flags)
    assert refused(code, err, "is another network or has other sizes")


def test_a_model_of_other_data_is_refused(files, tmp_path):
    write_data(tmp_path / "other.hdf5", obs_dim=4)
    train("gmpo", env=str(tmp_path / "other.hdf5"), run_dir=tmp_path / "other")
    flags = ["--env", files / "own.hdf5", "--behaviour", tmp_path / "other", *tiny_flags("gmpo")]
    code, _, err = command("gmpo", *flags)
    assert refused(code, err, f"{tmp_path / 'other'} had {tmp_path / 'other.hdf5'}, this one has", "own.hdf5: sha256")


@pytest.mark.parametrize(
    "flag, name, changes", [("--critic", "iql_critic", {}), ("--behaviour", "gmpo", {"beta": 0.0})]
)
def test_a_run_on_data_that_changed_since_is_refused_and_on_moved_data_taken(flag, name, changes, tmp_path):
    own, moved = write_data(tmp_path / "own.hdf5"), tmp_path / "moved.hdf5"
    train(name, env=str(own), run_dir=tmp_path / "first", **changes)
    own.rename(moved)
    write_data(own, rewards=np.arange(200.0))  # another file of the same name
    for env, fine in ((own, False), (moved, True)):
        code, _, err = command("gmpo", "--env", env, flag, tmp_path / "first", *tiny_flags("gmpo"))
        assert (code, err) == (0, "") if fine else refused(code, err, "had", "sha256", "give the same data"), err


def test_a_critic_of_other_rewards_is_refused(files):
    flags = ["--env", files / "own.hdf5", "--critic", files / "critic", "--reward-scale", 2, *tiny_flags("idql")]
    code, _, err = command("idql", *flags)
    assert refused(code, err, "reward_rule", "times 2 (--reward-scale)", "give the same data")


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    def compile_(*_):
        raise RuntimeError("no C++ compiler\nand forty lines more")

    monkeypatch.setattr(torch, "compile", compile_)
    code, _, err = command("gmpo", "--env", "bandit", "--compile", "--device", "cpu")
    assert refused(code, err, "--compile does not work here (no C++ compiler); install")


def test_cudagraph_off_a_gpu_is_left_out_with_a_line(capsys):
    filled = fill_in("gmpo", env="bandit", cudagraph=True)
    assert filled.cudagraph is False and capsys.readouterr().out.startswith("--cudagraph is left out: it needs a GPU")


def test_a_failing_disk_is_a_sentence_with_code_1(monkeypatch):
    def read(*_):
        raise OSError(28, "No space left on device", "events.out")

    monkeypatch.setattr(arguments, "read_command_line", read)
    code, _, err = command("gmpo")
    assert code == 1 and err.startswith("error: [Errno 28] No space left on device: 'events.out'; mend that")


def test_no_memory_is_a_sentence_with_code_1():
    code, _, err = command("gmpo", "--env", "bandit", "--batch-size", 10**12, "--device", "cpu")
    assert code == 1 and err.count("\n") == 1 and "memory" in err


# ---------------------------------------------------------------- D4RL's files


def test_a_file_in_d4rls_folder_serves_its_name_if_verified_or_allowed(tmp_path, monkeypatch):
    write_data(tmp_path / "d4rl" / "halfcheetah_medium_expert-v2.hdf5", 17, 6)
    flags = tiny_flags("gmpo", env="halfcheetah-medium-expert-v2", run_dir=tmp_path / "run", eval_episodes=1)
    flags += ["--network", "mlp"]
    code, _, err = command("gmpo", *flags)
    assert refused(code, err, "sha256", "--allow-unverified") and not (tmp_path / "run").exists()
    code, out, err = command("gmpo", *flags, "--allow-unverified")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (code, err) == (0, "") and "last score" in out
    (tmp_path / "d4rl").rename(tmp_path / "moved")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "moved"))
    assert command("gmpo", "--run-dir", tmp_path / "run", "--resume", "--allow-unverified")[0] == 0
    score = environments.normalized_score(result["eval/return"], "halfcheetah")
    assert result["eval/score"] == pytest.approx(score, abs=1e-6)
