"""Several seeds in one process, random numbers, compiled updates: all must be what one seed, written plainly, gives."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from common import UserError, datasets, runs, training
from common.training import BLOCK, Draws, Seeds, Update, generator

ROOT = Path(__file__).parents[1]
FILES = ["iql_critic", "gmpo", "gmpg", "idql"]
OBS, ACTION = 5, 2
TINY = dict(
    device="cpu", critic_steps=4, behaviour_steps=4, policy_steps=4, batch_size=8, policy_batch_size=8, candidates=2,
    sampler_steps=2, eval_every=4, log_every=1, dropout=0.0, env="bandit",
    critic_lr=1e-4, behaviour_lr=1e-4, policy_lr=1e-4,
)  # fmt: skip
VARIANTS = [(name, {}) for name in FILES]
VARIANTS += [("gmpo", dict(actions="static")), ("gmpo", dict(actions="resampled", solver="sde"))]
VARIANTS += [("gmpo", dict(network="paper", path="icfm", icfm_sigma=0.1)), ("idql", dict(extraction="implicit"))]
VARIANTS += [("gmpg", dict(gradient="reinforce", divergence="hutchinson")), ("gmpg", dict(gradient="matching"))]
variants = pytest.mark.parametrize(
    "name, changes", VARIANTS, ids=lambda x: x if isinstance(x, str) else str([*x.values()])
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def few_samples():
    """A bandit of 40 states and pictures of 512 samples: IDQL's are slow."""
    with pytest.MonkeyPatch.context() as patch:
        load = importlib.import_module("common.bandit").load
        patch.setattr("common.bandit.load", lambda device="cpu", size=512: load(device, size))
        yield


def args_of(name, **changes):
    module = importlib.import_module(name)
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{key: value for key, value in (TINY | changes).items() if key in known})


def train(name, **changes):
    return importlib.import_module(name).train(args_of(name, **changes))


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def distance(one, other):
    """The largest difference of two checkpoints' networks."""
    parts = [part for part in ("critic", "behaviour", "policy", "ema") if part in one]
    return max((one[p][key] - other[p][key]).abs().max().item() for p in parts for key in one[p])


# ---------------------------------------------------------------- several seeds


@variants
def test_each_of_several_seeds_is_its_own_separate_run(name, changes, tmp_path):
    train(name, num_seeds=2, seed=3, run_dir=tmp_path / "both", **changes)
    for seed in (3, 4):
        train(name, seed=seed, run_dir=tmp_path / str(seed), **changes)
        alone, among = checkpoint(tmp_path / str(seed)), checkpoint(tmp_path / "both" / f"seed{seed}")
        assert distance(alone, among) < 1e-5
        assert among["args"]["seed"] == seed and among["args"]["num_seeds"] == 1
        results = [json.loads((folder / "result.json").read_text()) for folder in
                   (tmp_path / str(seed), tmp_path / "both" / f"seed{seed}")]  # fmt: skip
        assert results[0]["eval/score"] == pytest.approx(results[1]["eval/score"], abs=1)
    assert distance(*(checkpoint(tmp_path / "both" / f"seed{seed}") for seed in (3, 4))) > 1e-2


def test_several_seeds_play_the_episodes_that_each_plays_alone(tmp_path):
    rows = [torch.randn(60, n, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 2)]
    import h5py

    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        file["observations"], file["actions"], file["rewards"] = rows[0], rows[1].clamp(-1, 1), rows[2][:, 0]
        file["terminals"], file["timeouts"] = torch.zeros(60).bool(), torch.arange(60) % 20 == 19
    changes = dict(env="own.hdf5", eval_env="Pendulum-v1", eval_episodes=2, sampler_steps=2, normalize_obs=True)
    train("gmpo", num_seeds=2, run_dir=tmp_path / "both", **changes)
    returns = []
    for seed in (0, 1):
        alone = train("gmpo", seed=seed, run_dir=tmp_path / str(seed), **changes)
        among = json.loads((tmp_path / "both" / f"seed{seed}" / "result.json").read_text())
        assert among["eval/return"] == pytest.approx(alone["eval/return"], rel=1e-3)
        assert among["eval/return_std"] == pytest.approx(alone["eval/return_std"], rel=1e-2)
        returns.append(among["eval/return"])
    assert returns[0] != returns[1]


@pytest.mark.parametrize("name", FILES)
def test_several_seeds_resume_at_the_same_bits(name, tmp_path):
    total = train(name, num_seeds=2, run_dir=tmp_path / "once", policy_steps=6, lr_decay=False)["steps"]
    train(name, num_seeds=2, run_dir=tmp_path / "twice", policy_steps=4, lr_decay=False)
    train(name, num_seeds=2, run_dir=tmp_path / "twice", policy_steps=6, lr_decay=False, resume=True)
    for seed in (0, 1):
        one, other = (checkpoint(tmp_path / folder / f"seed{seed}") for folder in ("once", "twice"))
        assert one["step"] == other["step"] == total and distance(one, other) == 0


def test_a_checkpoint_among_seeds_is_as_small_as_one_alone(tmp_path):
    train("gmpo", num_seeds=3, run_dir=tmp_path / "three")
    train("gmpo", run_dir=tmp_path / "one")
    sizes = [(tmp_path / folder / "checkpoint.pt").stat().st_size for folder in ("three/seed1", "one")]
    assert sizes[0] < 1.02 * sizes[1]


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    changes = dict(num_seeds=2, policy_steps=8, lr_decay=False)
    train("gmpo", run_dir=tmp_path / "whole", **changes)
    keep, count = runs.Folder.keep, []

    def killed(folder):
        count.append(folder)
        if len(count) == 4:  # the second seed's at the second save
            raise KeyboardInterrupt
        keep(folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Folder, "keep", killed)
        train("gmpo", run_dir=tmp_path / "killed", save_every=5, **changes)
    assert [checkpoint(tmp_path / "killed" / f"seed{seed}")["step"] for seed in (0, 1)] == [8, 5]
    train("gmpo", run_dir=tmp_path / "killed", resume=True, **changes)
    for seed in (0, 1):
        assert distance(*(checkpoint(tmp_path / folder / f"seed{seed}") for folder in ("whole", "killed"))) == 0


def test_seeds_at_different_steps_are_refused_in_a_sentence(tmp_path):
    for seed, steps in ((0, 4), (1, 6)):
        train("gmpo", seed=seed, run_dir=tmp_path / f"seed{seed}", policy_steps=steps, lr_decay=False)
    with pytest.raises(UserError, match="seed0 is not as far as the other seeds, at step 10"):
        train("gmpo", num_seeds=2, run_dir=tmp_path, policy_steps=8, lr_decay=False, resume=True)


def test_each_seed_takes_its_own_critic_or_all_take_the_one_that_is_named(tmp_path):
    train("iql_critic", num_seeds=2, run_dir=tmp_path / "critics")
    critics = [checkpoint(tmp_path / "critics" / f"seed{seed}")["critic"]["v.net.0.weight"] for seed in (0, 1)]
    train("gmpo", num_seeds=2, critic=tmp_path / "critics", run_dir=tmp_path / "own")
    train("gmpo", num_seeds=2, critic=tmp_path / "critics" / "seed1", run_dir=tmp_path / "same")
    for seed in (0, 1):
        taken = [checkpoint(tmp_path / run / f"seed{seed}")["critic"]["v.net.0.weight"] for run in ("own", "same")]
        assert torch.equal(taken[0], critics[seed]) and torch.equal(taken[1], critics[1])


def test_scores_are_told_for_each_seed_with_mean_and_interval(tmp_path, capsys):
    train("gmpo", num_seeds=2, run_dir=tmp_path / "run")
    out = capsys.readouterr().out
    scores = [json.loads((tmp_path / "run" / f"seed{s}" / "result.json").read_text())["eval/score"] for s in (0, 1)]
    assert all(f"seed {seed}: last score {score:.1f}" in out for seed, score in enumerate(scores))
    low, high = sorted(scores)
    assert f"mean of 2 seeds {sum(scores) / 2:.1f}, 95 % interval {low:.1f} to {high:.1f}" in out


# ---------------------------------------------------------------- random numbers


def test_draws_depend_on_the_seed_and_the_step_alone():
    seeds = Seeds(lambda seed: {"net": torch.nn.Linear(1, 1)}, args_of("gmpo", seed=5, num_seeds=2))
    draw = lambda n, g: {"x": torch.randn(n, 3, generator=g)}  # noqa: E731
    forward, backward = Draws(seeds, draw), Draws(seeds, draw)
    steps = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK]
    first = {step: forward(step)["x"].clone() for step in steps}
    torch.rand(7)
    assert all(torch.equal(backward(step)["x"], first[step]) for step in reversed(steps))
    rows = torch.cat([*first.values()])
    assert rows.shape == (12, 3) and len({tuple(row.tolist()) for row in rows}) == 12
    alone = Seeds(lambda seed: {"net": torch.nn.Linear(1, 1)}, args_of("gmpo", seed=6))
    assert all(torch.equal(Draws(alone, draw)(step)["x"], first[step][1]) for step in steps)


def test_a_stream_depends_on_its_whole_key():
    keys = [(0, 1), (1, 0), (0, 1, 1), (0, 2)]
    assert len({torch.rand(1, generator=generator("cpu", *key)).item() for key in keys}) == 4
    assert torch.equal(*(torch.rand(3, generator=generator("cpu", 4, 2)) for _ in range(2)))


# ---------------------------------------------------------------- compiled


def stepper(name, compiled, changes):
    """The updates of a file on random data, with all that they change."""
    module, g = importlib.import_module(name), torch.Generator().manual_seed(0)
    defaults = module.PAPER["*"] | module.PAPER["own file"] | TINY | changes
    known = {field.name for field in dataclasses.fields(module.Args)}
    args = module.Args(**{key: value for key, value in defaults.items() if key in known} | {"compile": compiled})
    obs, action = torch.randn(50, OBS, generator=g), torch.rand(50, ACTION, generator=g) * 2 - 1
    data = datasets.Dataset(obs, action, torch.randn(50, generator=g), obs.flip(0), torch.zeros(50))
    seeds = Seeds(lambda seed: module.build(OBS, ACTION, args), args)
    optimizers = module.optimizers_of(seeds, args)
    table = ()
    if name == "gmpo":
        table = (seeds.join(seeds.each(partial(module.weighted_actions, data=data, args=args))),)
    updates = module.updates(seeds, optimizers, data, *table, args)
    phase = {} if name == "iql_critic" else {"phase": None}
    draws = lambda p: Draws(seeds, partial(module.draw, data=data, args=args, **({"phase": p} if phase else {})))  # noqa: E731
    return seeds, {p: (Update(update, args), draws(p)) for p, update in updates.items()}, module, args


PHASES = [(name, "critic", {}) for name in FILES] + [(name, "policy", {}) for name in FILES]
PHASES += [
    ("gmpo", "behaviour", dict(actions="static")),
    ("gmpg", "behaviour", {}),
    ("gmpo", "policy", dict(num_seeds=2)),
]


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="compiles with torch 2.13 and newer")
@pytest.mark.parametrize("name, phase, changes", PHASES, ids=lambda x: x if isinstance(x, str) else str([*x.values()]))
def test_a_compiled_update_is_the_eager_one(name, phase, changes, capsys):
    found, metrics = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        seeds, steps, *_ = stepper(name, compiled, changes)
        update, draws = steps[phase]
        for step in range(1, 21):
            metrics.append(update(**draws(step)))
        found.append(torch.cat([tensor.detach().flatten() for tensor in seeds.tensors.values()]))
    assert "not compiled" not in capsys.readouterr().out
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    for key, value in metrics[19].items():
        torch.testing.assert_close(metrics[39][key], value, rtol=1e-3, atol=1e-4)
    fresh = torch.cat([tensor.detach().flatten() for tensor in stepper(name, False, changes)[0].tensors.values()])
    assert (found[0] - fresh).abs().max() > 3e-4


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="compiles with torch 2.13 and newer")
def test_two_updates_of_the_same_source_are_compiled_apart():
    def times(factor):
        return Update(lambda x: {"y": factor * x}, args_of("gmpo", compile=True))

    one, two, x = times(torch.tensor(2.0)), times(torch.tensor(3.0)), torch.ones(3)
    for _ in range(2):
        assert (one(x=x)["y"], two(x=x)["y"]) == (pytest.approx([2.0] * 3), pytest.approx([3.0] * 3))
    with pytest.raises(RuntimeError):  # not silently wrong
        one(x=torch.ones(4))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="compiles with torch 2.13 and newer")
@pytest.mark.parametrize("name", ["gmpo", "idql"])
def test_a_compiled_run_resumes_where_it_would_have_been(name, tmp_path):
    changes = dict(compile=True, lr_decay=False)
    train(name, run_dir=tmp_path / "once", policy_steps=8, **changes)
    for steps in (4, 8):
        torch._dynamo.reset()
        train(name, run_dir=tmp_path / "twice", policy_steps=steps, resume=steps == 8, **changes)
    one, other = checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice")
    assert one["step"] == other["step"] and distance(one, other) < 1e-6


def test_what_cannot_be_compiled_runs_and_says_so(tmp_path):
    words = ["--env", "bandit", "--critic-steps", "3", "--policy-steps", "2", "--batch-size", "4"]
    words += ["--sampler-steps", "2", "--run-dir"]
    broken = os.environ | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = []
    for more in (["eager"], ["run", "--compile"]):
        command = [sys.executable, str(ROOT / "gmpo.py"), *words, *more]
        out.append(subprocess.run(command, capture_output=True, text=True, env=broken, check=True).stdout)
    assert "not compiled" not in out[0] and "not compiled" in out[1] and "last score" in out[1]
    assert distance(checkpoint("run"), checkpoint("eager")) == 0


# ---------------------------------------------------------------- precision


@pytest.fixture
def default_products():
    yield
    torch.set_float32_matmul_precision("highest")


def test_fast_products_give_nearly_the_same_weights(default_products, tmp_path):
    for fast in (False, True):
        train("gmpo", fast_matmul=fast, run_dir=tmp_path / str(fast))
        assert torch.get_float32_matmul_precision() == ("medium" if fast else "highest")
    assert distance(*(checkpoint(tmp_path / str(fast)) for fast in (False, True))) < 1e-5


def test_fast_products_that_are_not_exact_are_refused(default_products, monkeypatch, capsys):
    monkeypatch.setattr(training, "MATMUL_ERROR", 1e-9)
    training.set_matmul(args_of("gmpo", fast_matmul=True))
    assert torch.get_float32_matmul_precision() == "highest"
    assert "--fast-matmul is ignored: the relative error of such products is " in capsys.readouterr().out


@pytest.mark.parametrize("name, phase", [("iql_critic", "critic"), ("gmpo", "policy"), ("idql", "policy")])
def test_bf16_changes_little_and_leaves_float32_weights(name, phase):
    found, values = [], []
    for bf16 in (False, True):
        seeds, steps, *_ = stepper(name, False, dict(bf16=bf16, critic_lr=1e-5, policy_lr=1e-5))
        update, draws = steps[phase]
        values.append([{k: v.item() for k, v in update(**draws(step)).items()} for step in range(1, 11)][-1])
        assert all(tensor.dtype == torch.float32 for tensor in seeds.tensors.values())
        found.append(torch.cat([tensor.detach().flatten() for tensor in seeds.tensors.values()]))
    assert not torch.equal(*found)
    loss = next(key for key in values[0] if key.endswith("loss"))
    assert values[1][loss] == pytest.approx(values[0][loss], rel=0.03)


def test_a_critic_of_50_is_not_rounded_to_quarters_in_bf16():
    module = importlib.import_module("iql_critic")
    value = module.Value(module.Normalize(OBS), OBS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value.net[-1].bias.fill_(50.1)
        value.net[-1].weight.zero_()
        assert value(torch.randn(3, OBS)).tolist() == pytest.approx([50.1] * 3, abs=1e-4)
