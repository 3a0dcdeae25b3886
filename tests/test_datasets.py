"""common/datasets.py: D4RL's rule on hand-made episodes, reward rules, damaged files, downloads, memory."""

import hashlib
import http.server
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from common import UserError, datasets, demo, mazes
from common.datasets import Dataset, check_sizes, load, read_file, transitions

ROOT = Path(__file__).parents[1]
ROLLED = ROOT.parent / "shared" / "data"
CHEETAH = "halfcheetah-medium-expert-v2"


def raw(terminals, timeouts=None, rewards=None, seed=0, obs_dim=3, action_dim=2):
    """Arrays as read_file returns them; observation i is (i, ..., i) plus noise, so that neighbours differ."""
    rng = np.random.default_rng(seed)
    n = len(terminals)
    arrays = {
        "observations": (np.arange(n)[:, None] + rng.uniform(0, 0.5, (n, obs_dim))).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, (n, action_dim)).astype(np.float32),
        "rewards": np.asarray(rng.normal(size=n) if rewards is None else rewards, np.float32),
        "terminals": np.asarray(terminals, bool),
    }
    return arrays if timeouts is None else arrays | {"timeouts": np.asarray(timeouts, bool)}


def write(path, arrays, **changes):
    """An HDF5 file of `arrays`; a change of None leaves the key out."""
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changes).items():
            if array is not None:
                file[key] = array
    return str(path)


def flags(n, *rows):
    return [i in rows for i in range(n)]


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "terminal_rows, timeout_rows, kept, done",
    [
        ([], [], [0, 1, 2, 3, 4], []),  # the last row is dropped
        ([2], [], [0, 1, 2, 3, 4], [2]),  # a terminal row stays
        ([], [2], [0, 1, 3, 4], []),  # a timeout row goes
        ([2], [2], [0, 1, 3, 4], []),  # both: goes
        ([5], [], [0, 1, 2, 3, 4], []),  # the last row goes, terminal or not
        ([], [5], [0, 1, 2, 3, 4], []),
        ([0, 4], [1, 2], [0, 3, 4], [0, 4]),
    ],
)
def test_rule_on_six_rows(terminal_rows, timeout_rows, kept, done):
    source = raw(flags(6, *terminal_rows), flags(6, *timeout_rows))
    data = transitions(source, "kitchen")
    assert np.array_equal(data.obs, source["observations"][kept])
    assert np.array_equal(data.next_obs, source["observations"][np.array(kept) + 1])
    assert np.array_equal(data.action, source["actions"][kept])
    assert np.array_equal(data.reward, source["rewards"][kept])
    assert [row for row, d in zip(kept, data.done.tolist()) if d] == done


def slow_rule(source, limit):
    """The rule as a loop over rows, and the returns of the episodes it leaves."""
    rows, returns, total, steps = [], [], None, 0
    for i in range(len(source["rewards"]) - 1):
        steps += 1
        timeout = source["timeouts"][i] if "timeouts" in source else steps == limit
        if not timeout:
            rows.append(i)
            total = (total or 0.0) + float(source["rewards"][i])
        if timeout or source["terminals"][i]:
            steps = 0
            if total is not None:
                returns.append(total)
            total = None
    return rows, returns if total is None else [*returns, total]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_timeouts", [True, False])
def test_rule_against_slow_loop(seed, with_timeouts, monkeypatch):
    monkeypatch.setattr(datasets, "STEP_LIMITS", {"hopper": 7})
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    rate = rng.choice([0.0, 0.05, 0.4])
    source = raw(rng.random(n) < rate, np.append(False, rng.random(n - 1) < 0.2) if with_timeouts else None, seed=seed)
    rows, returns = slow_rule(source, 7)
    data = transitions(source, "hopper-medium-v2")
    scale = 1000 / (max(returns) - min(returns)) if len(returns) > 1 else 1
    assert np.array_equal(data.obs, source["observations"][rows])
    assert np.array_equal(data.next_obs, source["observations"][np.array(rows) + 1])
    assert np.array_equal(data.done, source["terminals"][rows])
    np.testing.assert_allclose(data.reward, source["rewards"][rows] * scale, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["hopper-medium-v2", "antmaze-umaze-v2", "maze2d-umaze-v1", "pen-human-v1"])
def test_files_of_d4rl_follow_d4rls_rule_bit_for_bit(name, seed, folder):
    rng, n = np.random.default_rng(seed), 40_000
    ends = rng.random((2, n)) < [[3e-3], [3e-3]]
    ends[:, [7, n - 1]] = True  # both marks in one row, and in the last one
    source = raw(*ends, seed=seed, obs_dim=2, action_dim=1) | {"actions": rng.normal(size=(n, 1)).astype(np.float32)}
    stored = {"next_observations": np.full((n, 2), np.nan), "terminals": ends[0].astype(np.float32)}
    write(folder / datasets.TASKS[name]["url"].split("/")[-1], source, **stored)
    data = load(name, allow_unverified=True, eval_env="Pendulum-v1")

    rows, reward = np.flatnonzero(~ends[1][:-1]), source["rewards"]
    if name[:6] == "hopper":
        cuts = np.flatnonzero(ends.any(0)[:-1]) + 1
        parts = np.split(np.where(ends[1], np.nan, reward)[:-1], cuts)
        returns = [np.nansum(part.astype(float)) for part in parts if not np.isnan(part).all()]
        reward = reward * np.float32(1000 / (max(returns) - min(returns)))
    elif name[:7] == "antmaze":
        reward = reward - 1
    assert torch.equal(data.reward, torch.tensor(reward[rows]))
    assert np.array_equal(data.obs, source["observations"][rows])
    assert np.array_equal(data.next_obs, source["observations"][rows + 1])
    assert np.array_equal(data.done, ends[0][rows])
    assert np.array_equal(data.action, source["actions"][rows].clip(-np.float32(1 - 1e-5), np.float32(1 - 1e-5)))


@pytest.mark.parametrize(
    "name, limit",
    [
        ("maze2d-umaze-v1", 300),
        ("maze2d-medium-dense-v1", 600),
        ("maze2d-large-v1", 800),
        ("antmaze-umaze-diverse-v2", 700),
        ("antmaze-large-play-v2", 1000),
        ("pen", 100),
        ("pendulum", 1000),
        ("", 1000),
    ],
)
def test_step_limit_without_timeouts(name, limit, capsys):
    source = raw(flags(2500, 50))
    dropped = sorted(set(range(2500)) - set(transitions(source, name).obs[:, 0].long().tolist()))
    assert dropped == [*range(50 + limit, 2499, limit), 2499]  # the terminal in row 50 starts the count anew
    assert f"after {limit} steps" in capsys.readouterr().out


# ---------------------------------------------------------------- own files


def own(path, source, **changes):
    return load(write(path / "own.hdf5", source, **changes), reward_scale=1)


def followed(source, *rows):
    """The true next observations: the next row's, and something else after each of `rows` and the last one."""
    following = np.roll(source["observations"], -1, axis=0)
    following[[*rows, -1]] = -100 - np.arange(len(rows) + 1)[:, None]
    return following


@pytest.mark.parametrize(
    "terminal_rows, timeout_rows, kept, done",
    [
        ([], [], [0, 1, 2, 3, 4], []),
        ([2], [2], [0, 1, 2, 3, 4], [2]),  # the terminal wins
        ([5], [], [0, 1, 2, 3, 4, 5], [5]),  # also in the last row
        ([5], [5], [0, 1, 2, 3, 4, 5], [5]),
        ([0, 4], [1, 2], [0, 3, 4], [0, 4]),
        (range(6), range(6), range(6), range(6)),  # done stored in both keys, episodes of one step
    ],
)
def test_terminals_of_own_files(terminal_rows, timeout_rows, kept, done, tmp_path):
    source = raw(flags(6, *terminal_rows), flags(6, *timeout_rows))
    data = own(tmp_path, source)
    assert np.array_equal(data.obs, source["observations"][list(kept)])
    assert np.array_equal(data.reward, source["rewards"][list(kept)])
    assert [row for row, d in zip(kept, data.done.tolist()) if d] == list(done)
    going_on = data.done == 0
    following = source["observations"][[row + 1 for row in kept if row not in done]]
    assert np.array_equal(data.next_obs[going_on], following)


def test_next_observations_that_say_the_same_change_nothing(tmp_path, capsys):
    source = raw(flags(20, 4), flags(20, 9))
    plain = own(tmp_path, source)
    following = np.roll(source["observations"], -1, axis=0).astype(np.float64)
    assert torch.equal(own(tmp_path, source, next_observations=following).rows, plain.rows)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("pad", ["true", "zeros", "again"])
def test_next_observations_at_marks_are_not_trusted(pad, tmp_path, capsys):
    source = raw(flags(20, 4), flags(20, 9, 19))
    plain, stored = own(tmp_path, source), followed(source, 4, 9)
    if pad != "true":  # what many writers store where they don't know it
        stored[[4, 9, 19]] = 0 if pad == "zeros" else source["observations"][[4, 9, 19]]
    assert torch.equal(own(tmp_path, source, next_observations=stored).rows, plain.rows)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("timeouts", [True, False])
def test_ends_without_a_mark_are_found_by_next_observations(timeouts, tmp_path, capsys):
    source = raw(flags(80, 19), flags(80, 39) if timeouts else None, rewards=np.arange(80))
    stored = followed(source, 19, 39, 59)
    data = own(tmp_path, source, next_observations=stored)
    rows = [row for row in range(79) if not timeouts or row != 39]
    assert np.array_equal(data.next_obs, stored[rows]) and len(data) == len(rows)
    assert data.facts["episodes"] == 4 and data.facts["returns"][2] == sum(range(60, 79))
    out = capsys.readouterr().out
    assert (
        f"in {1 if timeouts else 2} of 80 rows next_observations is not the next row's" in out and out.count("\n") == 1
    )


def test_shuffled_rows_keep_their_own_next_observations(tmp_path, capsys):
    source = raw(flags(2000, *range(99, 2000, 200)), flags(2000, *range(199, 2000, 200)))
    source["next_observations"] = followed(source, *range(99, 2000, 100))
    after = {tuple(obs): tuple(then) for obs, then in zip(source["observations"], source["next_observations"])}
    order = np.random.default_rng(0).permutation(2000)
    data = load(write(tmp_path / "own.hdf5", {key: array[order] for key, array in source.items()}))
    assert len(data) > 1980
    assert all(after[tuple(obs)] == tuple(then) for obs, then in zip(data.obs.tolist(), data.next_obs.tolist()))
    assert (data.facts["episodes"], data.facts["returns"]) == (None, None)
    text = capsys.readouterr().out + "".join(data.describe())
    for part in ("of 2,000 rows next_observations is not", "rows in no order", "--reward-scale gives a factor"):
        assert part in text
    kept = np.isin(source["rewards"][order], data.reward)  # as they are: episodes have no returns here
    assert kept.sum() == len(data)


def test_pieces_in_no_order_have_no_returns(tmp_path):
    source = raw(flags(2000), flags(2000))
    source["next_observations"] = followed(source)
    order = np.random.default_rng(0).permutation(200)[:, None] * 10 + np.arange(10)  # pieces of ten rows
    data = load(write(tmp_path / "own.hdf5", {key: array[order.ravel()] for key, array in source.items()}))
    assert data.facts["returns"] is None and "as they are (no episodes" in data.facts["reward_rule"]


def test_an_own_file_without_timeouts_is_refused(tmp_path):
    path = write(tmp_path / "own.hdf5", raw(flags(2000, 50)))
    with pytest.raises(UserError, match="own.hdf5 has no timeouts, .* write zeros if every episode ends in a terminal"):
        load(path)


def test_one_transition_and_constant_columns(tmp_path):
    data = load(write(tmp_path / "own.hdf5", raw(flags(2), flags(2)) | {"observations": np.ones((2, 3))}))
    assert len(data) == 1 and torch.isfinite(data.rows).all() and data.obs.tolist() == [[1, 1, 1]]
    assert "as they are (all returns are equal)" in data.describe()[1]


def test_npz(tmp_path):
    source = raw(flags(9, 3), flags(9, 6)) | {"next_observations": np.full((9, 3), 7.0)}
    np.savez(tmp_path / "a.npz", **source)
    np.savez_compressed(tmp_path / "b", **source | {"actions": source["actions"].astype(np.float64)})
    (tmp_path / "b.npz").rename(tmp_path / "b.hdf5")  # a name says nothing
    hdf5 = load(write(tmp_path / "c.hdf5", source))
    assert torch.equal(load(str(tmp_path / "a.npz")).rows, hdf5.rows)
    assert torch.equal(load(str(tmp_path / "b.hdf5")).rows, hdf5.rows)
    content = (tmp_path / "a.npz").read_bytes()
    for damaged in (content[:-50], content[:300], content[:2]):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="a.npz can't be read"):
            load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **source | {"rewards": np.array([None] * 9)})
    with pytest.raises(UserError, match="a.npz can't be read"):
        load(str(tmp_path / "a.npz"))


# ---------------------------------------------------------------- actions and their units

UNITS = "units:Units-v0"


@pytest.fixture
def bounds(tmp_path, monkeypatch):
    """A function that gives the environment UNITS these bounds."""
    (tmp_path / "units.py").write_text("import gymnasium\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Units(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (3,))

        def __init__(self, low, high):
            self.action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))

    def give(low, high):
        monkeypatch.setitem(gymnasium.registry, "Units-v0", None)
        gymnasium.registry.pop("Units-v0")
        gymnasium.register("Units-v0", entry_point=lambda: Units(low, high))

    return give


def acting(path, low, high, n=500, dims=2):
    action = np.random.default_rng(0).uniform(low, high, (n, dims))
    source = raw(flags(n), flags(n)) | {"actions": action}
    return write(path / "own.hdf5", source), action[:-1]


@pytest.mark.parametrize(
    "env_bounds, data_bounds",
    [
        (([-0.4, -0.4], [0.4, 0.4]), (-0.4, 0.4)),
        (([0, 0], [1, 1]), (0, 1)),
        (([-1, -0.4], [1, 0.4]), ([-1, -0.4], [1, 0.4])),
        (([-2, -2], [2, 2]), (-2, 2)),
        (([-0.4, -3], [0.4, 5]), ([-0.4, -3], [0.4, 5])),
    ],
)
def test_actions_in_the_environments_units_are_refused_or_rescaled(env_bounds, data_bounds, bounds, tmp_path):
    bounds(*env_bounds)
    path, action = acting(tmp_path, *data_bounds)
    with pytest.raises(UserError) as caught:
        load(path, eval_env=UNITS)
    for part in (path, "actions reach", UNITS, "--rescale-actions", f"{min(env_bounds[0])} to {max(env_bounds[1])}"):
        assert part in str(caught.value)
    low, high = np.array(env_bounds)
    expected = -1 + 2 * (action - low) / (high - low)
    np.testing.assert_allclose(load(path, eval_env=UNITS, rescale_actions=True).action, expected, atol=2e-5)


@pytest.mark.parametrize("limit", [0.4, 2])
def test_actions_rescaled_already_are_taken_and_said(limit, bounds, tmp_path, capsys):
    bounds([-limit] * 2, [limit] * 2)
    path, action = acting(tmp_path, -1, 1)
    np.testing.assert_allclose(load(path, eval_env=UNITS).action, action, atol=2e-5)
    assert f"taken as rescaled already, from the bounds of {UNITS}, -{limit} to {limit}" in capsys.readouterr().out


def test_nothing_to_say_of_actions_in_bounds_of_one(bounds, tmp_path, capsys):
    bounds([-1, -1], [1, 1])
    path, action = acting(tmp_path, -0.1, 0.1)
    for rescale in (True, False):
        np.testing.assert_allclose(load(path, eval_env=UNITS, rescale_actions=rescale).action, action, atol=2e-5)
    assert capsys.readouterr().out == ""


def test_rescaling_that_cannot_be(bounds, tmp_path):
    bounds([-0.4] * 2, [0.4] * 2)
    path, _ = acting(tmp_path, -0.6, 0.6)
    with pytest.raises(
        UserError, match=r"actions reach 1.499 and .* clip them to the bounds of units:Units-v0, -0.4 to 0.4"
    ):
        load(path, eval_env=UNITS, rescale_actions=True)
    for other in (None, "Pendulum-v1", "no-such-env"):  # none, one of another size, none
        with pytest.raises(UserError, match="--rescale-actions needs the bounds of an --eval-env with 2 actions"):
            load(path, eval_env=other, rescale_actions=True)
    assert len(load(path)) == len(load(path, eval_env="no-such-env")) == 499


# ---------------------------------------------------------------- rewards, actions


def test_reward_scale_counts_the_rows_left_after_the_cut():
    # episodes {0, 1, 2 terminal}, {3, 4, (5 timeout)}, {(6 timeout)}, {7, (8 last)}: returns 6, 20, none and 2
    rewards = [1, 2, 3, 10, 10, 1000, -500, 2, 1000]
    data = transitions(raw(flags(9, 2), flags(9, 5, 6), rewards), "hopper")
    assert data.reward.tolist() == pytest.approx([r * 1000 / (20 - 2) for r in (1, 2, 3, 10, 10, 2)])


def test_reward_scale_of_equal_returns_is_one():
    data = transitions(raw(flags(5, 1), flags(5), [0.1, 0.2, 0.2, 0.1, 9]), "hopper")
    assert data.reward.tolist() == pytest.approx([0.1, 0.2, 0.2, 0.1])
    assert transitions(raw(flags(3), flags(3), [0, 0, 0])).reward.tolist() == [0, 0]


@pytest.mark.parametrize(
    "eval_env, expected",
    [
        ("antmaze-umaze-v2", [0.0, 2.0]),
        ("antmaze", [0.0, 2.0]),
        *[(name, [1.0, 3.0]) for name in ("pen-human-v1", "door", "kitchen", "maze2d-large-v1")],
        *[(name, [500.0, 1500.0]) for name in ("hopper", "ant", "Hopper-v5", "my_module:My-v0", None)],
    ],
)
def test_reward_rule_of_an_own_file(eval_env, expected, tmp_path):
    path = write(tmp_path / "own.hdf5", raw([True, False, False], flags(3), [1, 3, 7]))
    assert load(path, eval_env=eval_env).reward.tolist() == pytest.approx(expected)


def test_actions_are_clipped_and_far_ones_refused(tmp_path):
    source = raw(flags(3), flags(3)) | {"actions": np.array([[1, -1], [1.009, 0.5], [0, 0]])}
    limit = np.float32(1 - 1e-5)
    expected = np.array([[limit, -limit], [limit, 0.5]], np.float32)
    assert np.array_equal(load(write(tmp_path / "own.hdf5", source)).action, expected)
    with pytest.raises(UserError, match=r"own.hdf5: actions reach 2 and .*; rescale them, or see --rescale-actions"):
        load(write(tmp_path / "own.hdf5", source, actions=np.array([[0, 0], [0, -2], [0, 0]])))


# ---------------------------------------------------------------- the tensor


def test_batch_device_and_views():
    source = raw(flags(50, 9), flags(50, 19))
    data = transitions(source, "pen")
    index = torch.tensor([3, 0, 3, 47])
    batch = data[index]
    for got, whole in zip(batch, (data.obs, data.action, data.reward, data.next_obs, data.done)):
        assert got.dtype == torch.float32 and torch.equal(got, whole[index])
    assert [tuple(x.shape) for x in batch] == [(4, 3), (4, 2), (4,), (4, 3), (4,)]
    assert (len(data), data.obs_dim, data.action_dim, data.rows.shape) == (48, 3, 2, (48, 10))
    data.rows.zero_()
    assert not data.obs.any() and not data.done.any()
    assert transitions(source, "pen", device="meta").obs.device.type == "meta"


def test_sample_follows_torchs_own_seed():
    data = transitions(raw(flags(50), flags(50)), "pen")
    torch.manual_seed(0)
    rows = torch.randint(49, (1000,))
    torch.manual_seed(0)
    for got, expected in zip(data.sample(1000), data[rows]):
        assert torch.equal(got, expected)
    assert rows.unique().numel() == 49


def test_facts_and_description(tmp_path):
    path = write(tmp_path / "own.hdf5", raw(flags(9, 2), flags(9, 5, 6), [1, 2, 3, 10, 10, 1000, -500, 2, 1000]))
    data, content = load(path, eval_env="hopper"), Path(path).read_bytes()
    assert data.facts.pop("reward_rule") == "times 1000 / 18, the returns' spread (locomotion's rule)"
    file = {"source": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert data.facts == file | {"episodes": 3, "returns": [2, pytest.approx(28 / 3), 20]}
    assert load(path, eval_env="pen").facts["reward_rule"] == "as they are (pen's rule)"
    assert load(path, eval_env="antmaze").facts["reward_rule"] == "minus 1 (antmaze's rule)"
    assert (
        transitions(raw(flags(3), flags(3)), "pointmaze-umaze-v2").facts["reward_rule"].startswith("as they are (poi")
    )
    text = "\n".join(load(path, eval_env="pen").describe())
    for part in (
        path,
        "6 transitions, 3 episodes of returns 2 to 20, mean 9.3333",
        "of size 3, actions of size 2",
        "as they are",
    ):
        assert part in text
    facts = load("bandit").facts
    assert (facts["sha256"], facts["episodes"], facts["returns"][0], facts["returns"][2]) == (None, 20_000, 0, 1)


@pytest.mark.parametrize("eval_env", ["hopper", "antmaze", "pen"])
def test_reward_scale_takes_the_place_of_the_rule(eval_env, tmp_path):
    path = write(tmp_path / "own.hdf5", raw([True, False, False], flags(3), [1, 3, 7]))
    assert load(path, eval_env=eval_env, reward_scale=1).reward.tolist() == [1, 3]
    data = load(path, eval_env=eval_env, reward_scale=0.5)
    assert data.reward.tolist() == [0.5, 1.5] and data.facts["reward_rule"] == "times 0.5 (--reward-scale)"


def test_dataset_of_tensors_and_float64():
    x = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    data = Dataset(x, x + 1, x[:, 0], x + 2, torch.tensor([0, 1, 0]))
    assert torch.equal(data.action, (x + 1).float()) and data.done.tolist() == [0, 1, 0]


# ---------------------------------------------------------------- HDF5 files


def test_dtypes_and_columns_do_not_matter(tmp_path):
    source = raw(flags(9, 3), flags(9, 6))
    plain = load(write(tmp_path / "plain.hdf5", source))
    odd = {key: source[key].astype(np.float64) for key in source}
    odd |= {key: odd[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    odd |= {"infos/qpos": np.zeros((4, 2)), "metadata/algorithm": "SAC"}
    assert torch.equal(load(write(tmp_path / "odd.hdf5", odd)).rows, plain.rows)
    whole = load(write(tmp_path / "whole.hdf5", source, rewards=np.arange(9), terminals=np.uint8(source["terminals"])))
    assert whole.done.sum() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rewards": None, "terminals": None},
            "lacks rewards, terminals; it has actions, observations, timeouts; README shows how to write",
        ),
        (
            {"rewards": None, "rewards/group": np.zeros(9)},
            "lacks rewards; it has actions, observations, rewards/, term",
        ),
        ({"actions": np.zeros(9)}, r"actions holds .* of shape \(9,\), but needs numbers of \(N, size\)"),
        ({"actions": np.zeros((9, 0))}, r"actions holds float64 of shape \(9, 0\)"),
        ({"observations": np.zeros((9, 3, 1))}, r"observations holds float64 of shape \(9, 3, 1\)"),
        ({"rewards": np.zeros((9, 2))}, r"rewards holds .* \(9, 2\), but needs numbers of \(N,\)"),
        ({"rewards": 1.0}, r"rewards holds float64 of shape \(\)"),
        ({"terminals": np.array([b"no"] * 9)}, r"terminals holds \|S2 of shape \(9,\), but needs numbers"),
        (
            {"next_observations": np.zeros((9, 2))},
            "next_observations holds .*, but needs numbers of that of observations",
        ),
        ({"next_observations": np.array([[0.0] * 3] * 6 + [[np.nan] * 3] * 3)}, "next_observations is NaN .* in row 6"),
        ({"rewards": np.zeros(8)}, r"differ in their number of rows \(observations 9, actions 9, rewards 8"),
        ({"observations": np.array([[0.0]] * 4 + [[np.nan]] * 5)}, "observations is NaN or infinite, first in row 4"),
        ({"rewards": np.array([0.0] * 8 + [np.inf])}, "rewards is NaN or infinite, first in row 8"),
        ({"actions": np.array([[0.0, 1e300]] * 9)}, "actions is NaN or infinite, first in row 0"),  # in float32
        ({"terminals": np.array([np.nan] * 9)}, "terminals is NaN"),
        ({"timeouts": np.ones(9, bool)}, "every row is a timeout"),
    ],
)
def test_unusable_data(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "bad.hdf5", raw(flags(9), flags(9)), **changes))
    assert str(tmp_path / "bad.hdf5") in str(caught.value)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows(n, tmp_path):
    with pytest.raises(UserError, match=f"has {n} rows; a transition needs at least 2"):
        load(write(tmp_path / "few.hdf5", raw(flags(n), flags(n))))


def test_damaged_files(tmp_path):
    path = Path(write(tmp_path / "whole.hdf5", raw(flags(900), flags(900))))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"<html>Not found</html>", content[:-100], content[: len(content) // 2], content[:600]]
    for _ in range(200):  # random bytes in the header: whatever h5py raises, the user gets one sentence, or the data
        noisy = bytearray(content)
        noisy[rng.integers(8, 4000)] = rng.integers(256)
        damaged.append(bytes(noisy))
    for k, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            load(str(path))
            assert k >= 5
        except UserError as error:
            assert "whole.hdf5" in str(error)
    with pytest.raises(UserError, match="can't be read .*; it must be a whole HDF5 or .npz file"):
        load(str(tmp_path))


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="nor the name of a dataset, such as halfcheetah-medium-expert-v2 or half"):
        load("halfcheeta-medium-expert-v2")
    with pytest.raises(UserError, match="zzz is neither a file that exists nor .* as hopper-medium-v2 or minari:NAME"):
        load("zzz")
    with pytest.raises(UserError, match="none.npz is neither a file that exists"):
        load(str(tmp_path / "none.npz"))
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="is neither a file that exists"):
            load(name)


def test_a_file_that_is_being_written(tmp_path):
    write(tmp_path / "own.hdf5", raw(flags(9), flags(9)))
    with h5py.File(tmp_path / "own.hdf5", "a"):  # another process's lock, or this one's
        code = f"from common.datasets import load; load({str(tmp_path / 'own.hdf5')!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert (
        "can't be read" in last and "lock" in last and "no other program is writing" in last and "damaged" not in last
    )


def test_check_sizes():
    data = transitions(raw(flags(5), flags(5), obs_dim=3, action_dim=1), "pen")
    check_sizes(data, "Pendulum-v1")
    with pytest.raises(UserError, match=r"observations have size 3, but those of MountainCarContinuous-v0 are .*\(2,"):
        check_sizes(data, "MountainCarContinuous-v0")
    data = transitions(raw(flags(5), flags(5), obs_dim=3, action_dim=2), "pen")
    with pytest.raises(UserError, match=r"actions have size 2, but those of Pendulum-v1 are .*\(1,"):
        check_sizes(data, "Pendulum-v1")


@pytest.mark.parametrize("name, sizes", [("halfcheetah", (17, 6)), ("hopper", (11, 3))])
def test_rolled_files(name, sizes):
    path = ROLLED / f"{name}-medium-expert-rolled.hdf5"
    if not path.exists():
        pytest.skip("the rolled data sets are not part of the repository")
    data, source = load(str(path), eval_env=name), read_file(path)
    rows, returns = slow_rule(source, 1000)
    assert (data.obs_dim, data.action_dim, len(data)) == (*sizes, len(rows))
    scale = 1000 / (max(returns) - min(returns))
    np.testing.assert_allclose(data.reward, source["rewards"][rows] * scale, rtol=1e-5)


# ---------------------------------------------------------------- D4RL's folder and downloads


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("D4RL_MIRROR", "http://127.0.0.1:9")  # nobody listens there
    (tmp_path / "d4rl").mkdir()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "d4rl"


@pytest.fixture
def server(tmp_path):
    """http://127.0.0.1:port serving one file under any name: /whole, /cut half-way, /wrong a byte; else a 404."""
    content = Path(write(tmp_path / "served.hdf5", raw(flags(400, 100), flags(400, 200)))).read_bytes()
    folders = {"whole": content, "cut": content[: len(content) // 2], "wrong": content[:-1] + b"?"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            sent = folders.get(self.path.split("/")[1])
            self.send_response(404 if sent is None else 200)
            self.send_header("Content-Length", str(len(content) if sent else 0))
            self.end_headers()
            self.wfile.write(sent or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        httpd.url, httpd.sha256 = f"http://127.0.0.1:{httpd.server_port}", hashlib.sha256(content).hexdigest()
        yield httpd
        httpd.shutdown()


def set_task(monkeypatch, url, sha256):
    monkeypatch.setitem(datasets.TASKS, CHEETAH, {"url": url, "bytes": "474567252", "sha256": sha256})


def test_task_table():
    tasks = datasets.TASKS
    assert len(tasks) == 115 and sum(bool(task["sha256"]) for task in tasks.values()) == 38
    assert all(len(task["sha256"]) == 64 and int(task["bytes"]) > 1e6 for task in tasks.values() if task["sha256"])
    assert len({task["url"].rsplit("/", 1)[1] for task in tasks.values()}) == 115  # so that one folder holds them all
    assert tasks[CHEETAH]["url"].endswith("/halfcheetah_medium_expert-v2.hdf5")


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", "/somewhere")
    assert datasets.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert datasets.cache_folder() == Path.home() / ".d4rl" / "datasets"


def test_file_in_place_with_another_checksum(folder, capsys):
    path = folder / "halfcheetah_medium_expert-v2.hdf5"
    write(path, raw(flags(30), flags(30, 9, 19)))
    content = path.read_bytes()
    with pytest.raises(UserError) as caught:
        load(CHEETAH)
    for part in (str(path), hashlib.sha256(content).hexdigest(), "015db75dae5bbe8e", "--allow-unverified"):
        assert part in str(caught.value)
    assert path.read_bytes() == content  # the user's file is left alone
    assert len(load(CHEETAH, allow_unverified=True)) == 27
    assert capsys.readouterr().out.count("\n") == 1


def test_actions_of_a_task_are_only_clipped(folder):
    write(folder / "halfcheetah_medium_expert-v2.hdf5", raw(flags(3), flags(3)), actions=np.full((3, 2), 5.0))
    assert load(CHEETAH, allow_unverified=True).action.max() < 1


def test_no_network(folder, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(CHEETAH)
    assert time.monotonic() - start < 5
    task = datasets.TASKS[CHEETAH]
    for part in (task["url"], "474.6 MB", task["sha256"], str(folder / "halfcheetah_medium_expert-v2.hdf5"), "by hand"):
        assert part in str(caught.value)
    assert not list(folder.iterdir()) and "\n" not in str(caught.value)


@pytest.mark.parametrize("known", [True, False])
def test_download(known, folder, server, monkeypatch, capsys):
    set_task(monkeypatch, f"{server.url}/whole/a.hdf5", server.sha256 if known else "")
    assert len(load(CHEETAH)) == 398
    assert [path.name for path in folder.iterdir()] == ["a.hdf5"]
    assert ("no checksum is known" in capsys.readouterr().out) == (not known)
    server.shutdown()
    assert len(load(CHEETAH)) == 398  # from the folder


DOWN = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "host, failure", [(DOWN, "ConnectionError"), ("cut", ""), ("wrong", "wrong sha256"), ("gone", "HTTP 404")]
)
@pytest.mark.parametrize("setting", [True, False])
def test_the_mirror_takes_over(host, failure, setting, folder, server, monkeypatch, capsys):
    set_task(monkeypatch, f"{host if host == DOWN else f'{server.url}/{host}'}/a.hdf5", server.sha256)
    monkeypatch.setattr(datasets, "MIRROR", DOWN if setting else f"{server.url}/whole/")
    monkeypatch.setenv("D4RL_MIRROR", f"{server.url}/whole" if setting else "")
    assert len(load(CHEETAH)) == 398
    assert [path.name for path in folder.iterdir()] == ["a.hdf5"]
    out = capsys.readouterr().out
    assert failure in out and f"downloading {server.url}/whole/a.hdf5" in out


def test_a_file_without_checksum_comes_from_no_mirror_but_the_users_own(folder, server, monkeypatch):
    set_task(monkeypatch, f"{DOWN}/a.hdf5", "")
    monkeypatch.setattr(datasets, "MIRROR", f"{server.url}/whole")
    monkeypatch.delenv("D4RL_MIRROR")
    with pytest.raises(UserError, match="the download failed"):
        load(CHEETAH)
    monkeypatch.setenv("D4RL_MIRROR", f"{server.url}/whole")
    assert len(load(CHEETAH)) == 398


@pytest.mark.parametrize(
    "host, mirror, known, messages",
    [
        ("wrong", "gone", True, ["/wrong/a.hdf5: wrong sha256", "/gone/a.hdf5: HTTP 404"]),
        ("gone", "wrong", True, ["/gone/a.hdf5: HTTP 404", "/wrong/a.hdf5: wrong sha256"]),
        ("cut", "cut", True, ["/cut/a.hdf5: "]),
        ("cut", "cut", False, ["/cut/a.hdf5: "]),
        ("gone", "", True, ["/gone/a.hdf5: HTTP 404", "no-scheme/a.hdf5: "]),
    ],
)
def test_failed_download_leaves_nothing(host, mirror, known, messages, folder, server, monkeypatch):
    set_task(monkeypatch, f"{server.url}/{host}/a.hdf5", server.sha256 if known else "")
    monkeypatch.setenv("D4RL_MIRROR", f"{server.url}/{mirror}" if mirror else "no-scheme")
    with pytest.raises(UserError, match="the download failed") as caught:
        load(CHEETAH)
    for part in (*messages, str(folder / "a.hdf5"), "by hand"):
        assert part in str(caught.value)
    assert not list(folder.iterdir())


def test_maze2d_remade_is_made_once_and_read_by_d4rls_rule(folder, monkeypatch):
    name = "maze2d-umaze-remade"
    monkeypatch.setitem(datasets.MADE_HERE, name, partial(mazes.generate, rows=2000))
    data, source = load(name), read_file(folder / f"{name}.hdf5")
    monkeypatch.setitem(datasets.MADE_HERE, name, None)
    assert torch.equal(load(name).rows, data.rows) and [path.name for path in folder.iterdir()] == [f"{name}.hdf5"]
    rows = np.flatnonzero(~source["timeouts"][:-1])
    assert 1900 < len(rows) < 1999 and np.array_equal(data.next_obs, source["observations"][rows + 1])
    assert np.array_equal(data.reward, source["rewards"][rows]) and not data.done.any()


@pytest.mark.parametrize("name", ["hopper-medium-expert-remade", "halfcheetah-medium-replay-remade"])
def test_remade_locomotion_follows_locomotions_rule(name, folder, monkeypatch):
    def generate(given, path):
        assert given == name
        write(path, raw(flags(6, 2), flags(6, 4), [1, 1, 1, 5, 3, 3]))

    monkeypatch.setitem(datasets.MADE_HERE, name, generate)
    assert load(name).reward.tolist() == pytest.approx([500, 500, 500, 2500])  # times 1000 / (5 - 3)


@pytest.mark.parametrize("name", [CHEETAH, "halfcheetah-demo"])
def test_a_folder_that_cannot_be_written_is_found_at_once(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(demo, "generate", lambda path: pytest.fail("made all the same"))
    with pytest.raises(
        UserError, match=r"file/halfcheetah.*hdf5 can't be written \(.*\); make room, or choose"
    ) as caught:
        load(name)
    assert "download" not in str(caught.value) + capsys.readouterr().out


def test_a_full_disk(folder, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def generate(path):
        assert not path.exists()
        path.symlink_to("/dev/full")
        path.write_bytes(bytes(100_000))

    monkeypatch.setattr(demo, "generate", generate)
    with pytest.raises(UserError, match="halfcheetah-demo.hdf5 can't be written .No space left on device.; make room"):
        load("halfcheetah-demo")
    assert not list(folder.iterdir())


# ---------------------------------------------------------------- cost

# VmHWM, not getrusage's ru_maxrss: a child process inherits the peak of its parent there
MEASURE = """
import sys, time, torch
from common.datasets import load
def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
load(sys.argv[1])  # a small file first, so that libraries are loaded
before, start = status("VmRSS"), time.perf_counter()
data = load(sys.argv[2])
print(len(data), time.perf_counter() - start, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_time_and_memory(tmp_path):
    n = 200_000
    small = write(tmp_path / "small.hdf5", raw(flags(10), flags(10)))
    arrays = raw(np.zeros(n), np.arange(n) % 1000 == 999, obs_dim=17, action_dim=6)
    size = sum(array.nbytes for array in arrays.values())
    with h5py.File(tmp_path / "large.hdf5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    command = [sys.executable, "-c", MEASURE, small, str(tmp_path / "large.hdf5")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows, seconds, peak = map(float, result.stdout.split())
    assert rows == n - n // 1000
    assert seconds < 10
    assert peak < 3 * size + 32e6  # HDF5 keeps up to 16 MB of freed blocks
