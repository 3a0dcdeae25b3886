"""The bandit's closed form by importance weighting, and whole training runs against it."""

import itertools
import math

import pytest
import torch

import gmpg
import gmpo
import iql_critic
from common import bandit, datasets

STEP_FREE = dict(env="bandit", device="cpu", eval_every=100_000, log_every=100_000, save_every=100_000)


def soft(beta):
    return torch.softmax(beta * bandit.REWARDS, -1)


# The closed form


def test_modes_lie_on_a_circle_inside_the_box_and_far_apart():
    assert bandit.MODES.shape == (8, 2) and bandit.REWARDS.shape == (8,)
    torch.testing.assert_close(bandit.MODES.norm(dim=-1), torch.full((8,), 0.8))
    nearest = min((a - b).norm().item() for a, b in itertools.combinations(bandit.MODES, 2))
    assert nearest > 8 * bandit.STD
    assert 0.8 + 3 * bandit.STD <= 1.001


def test_the_two_best_modes_are_opposite_and_their_mean_is_no_mode():
    best, second = bandit.REWARDS.argsort(descending=True)[:2]
    torch.testing.assert_close(bandit.MODES[best], -bandit.MODES[second], atol=1e-6, rtol=0)


def test_the_data_are_the_mixture_and_always_the_same():
    obs, action, reward, _, done = data = bandit.make_data(80_000)
    assert all(torch.equal(a, b) for a, b in zip(data, bandit.make_data(80_000)))
    distance, mode = torch.cdist(action, bandit.MODES).min(-1)
    torch.testing.assert_close(mode.bincount() / len(action), torch.full((8,), 1 / 8), atol=0.005, rtol=0)
    assert (reward == bandit.REWARDS[mode]).float().mean() > 0.999
    assert distance.square().mean().sqrt().item() == pytest.approx(math.sqrt(2) * bandit.STD, rel=0.01)
    assert (done == 1).all() and not obs.any()


def test_frequencies_count_the_nearest_mode():
    action = bandit.MODES[[0, 0, 3, 7]] + 0.1
    assert bandit.frequencies(action).tolist() == [0.5, 0, 0, 0.25, 0, 0, 0, 0.25]


@pytest.mark.parametrize("beta", [0.0, 2.0, 5.0])
def test_the_softmax_is_the_data_reweighted_by_exp_beta_q(beta):
    _, action, reward, _, _ = bandit.make_data(200_000)
    drawn = torch.multinomial(torch.exp(beta * reward), 100_000, True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bandit.frequencies(action[drawn]), soft(beta), atol=0.008, rtol=0)


def test_report_measures_total_variation_and_what_is_off_the_modes():
    action = bandit.MODES[[0, 0, 4, 4]].clone()
    action[0, 0] -= 5 * bandit.STD
    action[1, 0] += 3 * bandit.STD
    metrics, figure = bandit.report(action, torch.tensor([0.25, 0.25, 0, 0, 0.5, 0, 0, 0]), other=action)
    assert [axis.get_title() for axis in figure.axes] == ["data", "policy", "other", "share of each mode"]
    assert metrics["eval/total_variation"] == pytest.approx(0.25)
    assert metrics["eval/score"] == pytest.approx(75)
    assert metrics["eval/off_modes"] == pytest.approx(0.25)
    assert metrics["eval/return"] == pytest.approx(0.5 * 1.0 + 0.5 * 0.9)


class Run:
    """In the place of a run, whose picture nobody needs."""

    step, data = 0, datasets.Dataset(*bandit.make_data(64))

    def picture(self, name, figure):
        assert name == "bandit"


@pytest.fixture
def targets(monkeypatch):
    """What actions are compared with."""
    found = []
    monkeypatch.setattr(bandit, "report", lambda action, target, **others: found.append(target) or ({}, None))
    return found


@pytest.mark.parametrize("algorithm", [gmpo, gmpg], ids=lambda module: module.__name__)
def test_gmpo_and_gmpg_are_compared_with_exp_beta_q(algorithm, targets):
    args = algorithm.Args(env="bandit", beta=3.0, device="cpu")
    algorithm.evaluate_bandit(lambda obs: torch.zeros(len(obs), 2), Run(), args)
    torch.testing.assert_close(targets[0], soft(3.0))


@pytest.mark.parametrize("loss", ["expectile", "exponential"])
def test_iql_is_compared_with_the_policy_its_v_is_the_value_of(targets, loss):
    args = iql_critic.Args(env="bandit", critic_loss=loss, expectile=0.7, linex_max=10**9)
    iql_critic.evaluate(None, iql_critic.Critic(1, 2), iql_critic.GaussianPolicy(1, 2, 0.0), Run(), args)
    target, q = targets[0].double(), bandit.REWARDS.double()
    v = (target * q).sum()
    expected = torch.where(q > v, 0.7, 0.3) if loss == "expectile" else torch.expm1(q - v) / (q - v)
    torch.testing.assert_close(target, (expected / expected.sum()).double(), atol=1e-4, rtol=0)
    if loss == "exponential":
        assert v.item() == pytest.approx((q.logsumexp(0) - math.log(8)).item(), abs=1e-4)


# Whole runs


@pytest.mark.parametrize("path", ["vp", "gvp", "icfm"])
def test_gmpo_learns_the_closed_form_on_every_path(tmp_path, path):
    result = gmpo.train(gmpo.Args(path=path, run_dir=tmp_path / path, **STEP_FREE))
    assert result["eval/total_variation"] < 0.05
    assert result["eval/off_modes"] < 0.2
    assert (tmp_path / path / "bandit.png").stat().st_size > 10_000


def test_iqls_implicit_policy_is_right_where_its_gaussian_cannot_be(tmp_path, monkeypatch):
    seen, report = [], bandit.report

    def spy(action, target, **others):
        seen.append(others)
        return report(action, target, **others)

    monkeypatch.setattr(bandit, "report", spy)
    result = iql_critic.train(iql_critic.Args(run_dir=tmp_path / "iql", **STEP_FREE))
    assert result["eval/total_variation"] < 0.05 and result["eval/off_modes"] < 0.01
    gaussian = seen[-1]["Gaussian"]
    off = (torch.cdist(gaussian, bandit.MODES).amin(-1) > 4 * bandit.STD).float().mean()
    assert off > 0.5
    assert gaussian.mean(0).norm() < 0.3  # between the two best modes: the mean of good actions is no good action
