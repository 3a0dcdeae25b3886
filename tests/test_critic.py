"""The critic, in every file that has a copy of it, and IQL's actor: against closed forms and losses by hand."""

import copy
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from helpers import args_of, files_with, flat, seeded, smaller_q

import iql_critic
from common import datasets

OBS, ACT, BATCH = 3, 2, 16
LINEX = dict(critic_loss="exponential", linex_max=1e12, expectile=0.7)
LOSSES = {
    "expectile .7": dict(critic_loss="expectile", expectile=0.7),
    "expectile .9": dict(critic_loss="expectile", expectile=0.9),
    "quantile .6": dict(critic_loss="quantile", expectile=0.6),
    "linex 1": LINEX | dict(linex_alpha=1.0),
    "linex 3": LINEX | dict(linex_alpha=3.0),
    "linex 3, capped": LINEX | dict(linex_alpha=3.0, linex_max=6.0),
}
FILES, GENERAL = files_with("critic_loss"), files_with("implicit_weights")  # the latter have all of LOSSES
PAIRS = [(a, loss) for a in FILES for loss in LOSSES if a in GENERAL or "expectile" in loss]
each_file = pytest.mark.parametrize("algorithm", FILES, ids=lambda module: module.__name__)
each_general = pytest.mark.parametrize("algorithm", GENERAL, ids=lambda module: module.__name__)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_pair = pytest.mark.parametrize("algorithm, loss", PAIRS, ids=lambda x: x if isinstance(x, str) else x.__name__)


def make_critic(algorithm):
    """In float64, the target already different from the online critic, each network the smaller one in some rows."""
    torch.manual_seed(0)
    critic, batch = algorithm.Critic(OBS, ACT).double(), make_batch()
    with torch.no_grad():
        for parameter in critic.target_q.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for twin in (critic.q, critic.target_q):
            for q, mean in zip((twin.q1, twin.q2), twin(batch.obs, batch.action).mean(-1)):
                q[-1].bias -= mean
            assert 0 < twin(batch.obs, batch.action).argmin(0).sum() < BATCH
    return critic


def make_batch():
    g = seeded(1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    obs, action, reward, next_obs = normal(BATCH, OBS), normal(BATCH, ACT).tanh(), normal(BATCH), normal(BATCH, OBS)
    return datasets.Batch(obs, action, reward, next_obs, (torch.arange(BATCH) % 3 == 0).double())


def q_values():
    return torch.tensor(np.random.default_rng(0).normal(1.0, 1.0, 41))


def optimal_v(q, loss):
    """The closed form of argmin_v mean f(q - v)."""
    q, tau = q.numpy(), loss["expectile"]
    if loss["critic_loss"] == "quantile":
        return np.sort(q)[math.ceil(tau * len(q)) - 1]
    if loss["critic_loss"] == "exponential":
        return (scipy.special.logsumexp(loss["linex_alpha"] * q) - math.log(len(q))) / loss["linex_alpha"]
    excess = lambda v: tau * np.maximum(q - v, 0).sum() - (1 - tau) * np.maximum(v - q, 0).sum()  # noqa: E731
    return scipy.optimize.brentq(excess, q.min(), q.max(), xtol=1e-14)


def slope(algorithm, u, args):
    u = u.clone().requires_grad_()
    return torch.autograd.grad(algorithm.f(u, args).sum(), u)[0]


# f, V and the policy behind V


@pytest.mark.parametrize("algorithm, loss", [(a, loss) for a, loss in PAIRS if "capped" not in loss])
def test_v_at_the_minimum_of_f_is_the_closed_form(algorithm, loss):
    q, args = q_values(), args_of(algorithm, **LOSSES[loss])
    mean_f = lambda v: algorithm.f(q - v, args).mean().item()  # noqa: E731
    found = scipy.optimize.minimize_scalar(mean_f, bounds=(q.min().item(), q.max().item()), options=dict(xatol=1e-10))
    assert found.x == pytest.approx(optimal_v(q, LOSSES[loss]), abs=1e-6)


@each_pair
def test_f_is_convex_with_its_minimum_at_zero(algorithm, loss):
    args, u = args_of(algorithm, **LOSSES[loss]), torch.linspace(-3, 3, 601, dtype=torch.float64)
    f, df = algorithm.f(u, args), slope(algorithm, u, args)
    assert (df.diff() >= -1e-12).all() and f.argmin() == 300
    assert df[300].abs() < 1e-12 or "quantile" in loss
    assert (df[:300] < 0).all() and (df[301:] > 0).all()


@each_general
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_linex_is_exact_below_its_cap_and_linear_beyond(algorithm, alpha):
    args = args_of(algorithm, critic_loss="exponential", linex_alpha=alpha, linex_max=6.0, expectile=0.7)
    knee = math.log(6) / alpha
    below = torch.linspace(-3, knee - 1e-3, 50, dtype=torch.float64)
    torch.testing.assert_close(algorithm.f(below, args), torch.exp(alpha * below) - alpha * below)
    torch.testing.assert_close(slope(algorithm, below, args), alpha * (torch.exp(alpha * below) - 1))
    beyond = knee + torch.tensor([1e-9, 1.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(slope(algorithm, beyond, args), torch.full_like(beyond, 5 * alpha))
    torch.testing.assert_close(algorithm.f(beyond, args), 6 - alpha * knee + 5 * alpha * (beyond - knee))


@each_general
@pytest.mark.parametrize("loss", [name for name in LOSSES if "capped" not in name])
def test_v_is_the_value_of_the_implicit_policy(algorithm, loss):
    q, v = q_values(), optimal_v(q_values(), LOSSES[loss])
    weight = algorithm.implicit_weights(q - v, args_of(algorithm, **LOSSES[loss]), floor=1e-9)
    assert ((weight * q).sum() / weight.sum()).item() == pytest.approx(v, abs=1e-5)


@each_general
@each_loss
def test_implicit_weights_are_the_slope_of_f_over_u_and_finite_everywhere(algorithm, loss):
    args, u = args_of(algorithm, **loss), torch.linspace(-2.95, 2.95, 60, dtype=torch.float64)
    ratio = algorithm.implicit_weights(u, args) * u.abs() / slope(algorithm, u, args).abs()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    weight = algorithm.implicit_weights(torch.tensor([-1e4, -1e-3, -1e-20, 0.0, 1e-20, 1e-7, 1e-3, 5.0]), args)
    assert weight.isfinite().all() and (weight > 0).all()


@each_general
def test_implicit_weights_of_linex_are_smooth_at_zero_in_float32(algorithm):
    x = torch.logspace(-7, -2, 200)
    x = torch.cat([-x, x])
    weight = algorithm.implicit_weights(x, args_of(algorithm, critic_loss="exponential", expectile=0.7))
    torch.testing.assert_close(weight, 1 + x / 2 + x**2 / 6, rtol=1e-5, atol=0)


# The critic's loss and the target


def hand_losses(critic, batch, args):
    u = smaller_q(critic.target_q, batch.obs, batch.action).detach() - critic.v.net(batch.obs)[:, 0]
    bootstrapped = batch.reward + args.discount * critic.v.net(batch.next_obs)[:, 0].detach()
    y, x = torch.where(batch.done == 1, batch.reward, bootstrapped), torch.cat([batch.obs, batch.action], -1)
    v_loss = ((args.expectile - (u < 0).double()).abs() * u**2).mean()
    return v_loss, sum(((q(x)[:, 0] - y) ** 2).mean() for q in (critic.q.q1, critic.q.q2))


@each_file
def test_critic_loss_is_eq_1_plus_eq_2_by_hand_and_each_trains_its_own_network(algorithm):
    critic, batch, args = make_critic(algorithm), make_batch(), args_of(algorithm, expectile=0.8, discount=0.9)
    loss, metrics = algorithm.critic_loss(critic, batch, args)
    v_loss, q_loss = hand_losses(critic, batch, args)
    torch.testing.assert_close(loss, v_loss + q_loss)
    expected = {"v_loss": v_loss, "q_loss": q_loss, "v": critic.v(batch.obs).mean()}
    expected["q"] = critic.q(batch.obs, batch.action).mean()
    torch.testing.assert_close(metrics, {f"critic/{key}": value.detach() for key, value in expected.items()})
    loss.backward()
    for part, own in ((critic.v, v_loss), (critic.q, q_loss)):
        found, hand = [p.grad for p in part.parameters()], torch.autograd.grad(own, part.parameters())
        torch.testing.assert_close(found, list(hand))
    assert all(p.grad is None for p in critic.target_q.parameters())


@each_file
def test_the_target_starts_as_a_frozen_copy_and_moves_by_target_rate_in_place(algorithm):
    critic = algorithm.Critic(OBS, ACT)
    for q, target in zip(critic.q.parameters(), critic.target_q.parameters()):
        assert torch.equal(q, target) and q.data_ptr() != target.data_ptr() and not target.requires_grad
    critic = make_critic(algorithm)
    before, storage = copy.deepcopy(critic), [p.data_ptr() for p in critic.target_q.parameters()]
    algorithm.update_target(critic.target_q, critic.q, 0.25)
    old, new = flat(before.target_q.parameters()), flat(before.q.parameters())
    torch.testing.assert_close(flat(critic.target_q.parameters()), 0.75 * old + 0.25 * new)
    assert storage == [p.data_ptr() for p in critic.target_q.parameters()]
    assert torch.equal(flat(critic.q.parameters()), new)


@pytest.mark.parametrize("algorithm", files_with("advantages"), ids=lambda module: module.__name__)
def test_advantages_are_the_smaller_online_q_minus_v(algorithm):
    critic, batch = make_critic(algorithm).float(), datasets.Batch(*(x.float() for x in make_batch()))
    found = algorithm.advantages(critic, datasets.Dataset(*batch))
    torch.testing.assert_close(found, (smaller_q(critic.q, batch.obs, batch.action) - critic.v(batch.obs)).detach())


# Networks


def count(module):
    return sum(p.numel() for p in module.parameters())


def kinds(layers):
    return [type(layer).__name__ for layer in layers]


@each_file
def test_the_networks_are_iqls(algorithm):
    critic = algorithm.Critic(17, 6)
    assert (count(critic.q), count(critic.target_q), count(critic.v)) == (144_386, 144_386, 70_657)
    for net in (critic.q.q1, critic.q.q2, critic.v.net):
        assert kinds(net) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
        for layer in net[::2]:
            w = layer.weight if len(layer.weight) <= len(layer.weight.T) else layer.weight.T
            torch.testing.assert_close(w @ w.T, 2 * torch.eye(len(w)), atol=1e-5, rtol=0)
            assert not layer.bias.any()


@each_file
def test_layer_norm_bounds_the_values_far_from_the_data(algorithm):
    plain, normed = algorithm.Critic(OBS, ACT), algorithm.Critic(OBS, ACT, layer_norm=True)
    for net in (normed.q.q1, normed.q.q2, normed.target_q.q1, normed.v.net):
        assert kinds(net) == ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm", "ReLU", "Linear"]
    obs, action = torch.randn(50, OBS), torch.randn(50, ACT)
    grown = {}
    for name, critic in (("plain", plain), ("normed", normed)):
        near, far = (critic.q(obs * c, action * c).abs().mean() for c in (1e3, 1e6))
        grown[name] = far / near
    # |Q| <= |w| |h| + |b|, where LayerNorm makes |h| at most the root of its 256 units
    last = normed.q.q1[-1]
    assert normed.q(obs * 1e6, action * 1e6)[0].abs().max() <= 16 * last.weight.norm() + last.bias.abs() + 1e-3
    assert grown["plain"] > 900 and 0.9 < grown["normed"] < 1.1


@each_file
def test_the_twins_are_two_separate_networks(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    q, x = critic.q(batch.obs, batch.action), torch.cat([batch.obs, batch.action], -1)
    torch.testing.assert_close(q, torch.stack([critic.q.q1(x)[:, 0], critic.q.q2(x)[:, 0]]))
    assert not torch.equal(critic.q.q1[0].weight, critic.q.q2[0].weight)
    q[0].exp().sum().backward()
    assert all(p.grad.any() for p in critic.q.q1.parameters())
    assert not any(p.grad.any() for p in critic.q.q2.parameters())


@each_file
def test_normalize_is_the_identity_until_it_is_fitted_and_survives_constant_columns(algorithm):
    critic, obs = algorithm.Critic(OBS, ACT), torch.randn(100, OBS) * 5 + 2
    assert torch.equal(critic.v.normalize(obs), obs)
    obs[:, 1] = 7.0
    algorithm.fit_normalizers(obs, torch.nn.Identity(), critic)
    found = [module(obs) for module in critic.modules() if isinstance(module, algorithm.Normalize)]
    assert len(found) == 3  # of Q, Q' and V
    for out in found:
        torch.testing.assert_close(out.mean(0), torch.zeros(OBS), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.std(0, unbiased=False), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    assert critic.v.normalize(obs + 1).isfinite().all()


@each_file
def test_the_critic_sees_normalised_observations(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    values = lambda obs: [critic.v(obs), *critic.q(obs, batch.action), *critic.target_q(obs, batch.action)]  # noqa: E731
    plain = values(batch.obs)
    algorithm.fit_normalizers(batch.obs * 3 + 1, critic)
    torch.testing.assert_close(values(critic.v.normalize.std * batch.obs + critic.v.normalize.mean), plain)


# IQL's actor


def make_actor(dropout=0.0):
    torch.manual_seed(2)
    actor = iql_critic.GaussianPolicy(OBS, ACT, dropout).double()
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return actor


def test_actor_is_iqls_network_with_dropout_after_its_hidden_layers():
    actor = iql_critic.GaussianPolicy(17, 6, 0.1)
    assert count(actor) == 71_942 + 6 and not actor.log_std.any()
    assert kinds(actor.net) == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in actor.net if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.1]


def test_the_actor_is_a_gaussian_with_a_tanh_inside_its_mean():
    actor, obs = make_actor(), make_batch().obs * 3
    normal = actor(obs)
    torch.testing.assert_close(normal.mean, torch.tanh(actor.net(obs)))
    torch.testing.assert_close(normal.stddev, torch.tensor([-0.5, 0.3]).double().exp().expand(BATCH, ACT))
    assert (normal.sample((50,)).abs() > 1).any()
    actor.log_std.data.copy_(torch.tensor([-9.0, 9.0]))  # which is clipped
    torch.testing.assert_close(actor(obs).stddev[0], torch.tensor([-5.0, 2.0]).double().exp())


def test_policy_loss_is_weighted_regression_by_hand():
    actor, critic, batch = make_actor(), make_critic(iql_critic), make_batch()
    args = args_of(iql_critic, expectile=0.7, beta=2.0, weight_max=1.2)
    loss, metrics = iql_critic.policy_loss(actor, critic, batch, args)
    q = smaller_q(critic.target_q, batch.obs, batch.action)
    w = torch.exp(2 * (q - critic.v.net(batch.obs)[:, 0])).clamp(max=1.2)
    z = (batch.action - torch.tanh(actor.net(batch.obs))) / actor.log_std.exp()
    log_n = -(0.5 * z**2 + actor.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(loss, -(w * log_n).mean())
    assert 0 < metrics["policy/clipped"] < 1
    torch.testing.assert_close(metrics["policy/clipped"], (w == 1.2).float().mean())
    torch.testing.assert_close(metrics["policy/weight"], w.mean())
    loss.backward()
    assert all(p.grad is not None for p in actor.parameters()) and all(p.grad is None for p in critic.parameters())


def test_acting_is_the_mean_within_bounds():
    actor, obs = make_actor(dropout=0.5), make_batch().obs * 9
    action = iql_critic.act(actor, obs)
    assert not actor.training and torch.equal(action, torch.tanh(actor.net(obs))) and (action.abs() <= 1).all()


# Weights


@pytest.mark.parametrize("algorithm", files_with("weights"), ids=lambda module: module.__name__)
def test_weights_are_capped_exponentials_of_the_advantage(algorithm):
    args = args_of(algorithm, beta=2.0, weight_max=50.0)
    advantage = torch.tensor([-1e6, -1.0, 0.0, 1.0, 3.0, 1e6])
    expected = torch.tensor([0.0, math.exp(-2), 1.0, math.exp(2), 50.0, 50.0])
    torch.testing.assert_close(algorithm.weights(advantage, args), expected)


@pytest.mark.parametrize("algorithm", files_with("effective_share"), ids=lambda module: module.__name__)
def test_effective_share_counts_the_samples_that_matter(algorithm):
    share = algorithm.effective_share
    assert share(torch.full((8, 3), 0.3)).item() == pytest.approx(1)
    assert share(torch.eye(8)[2]).item() == pytest.approx(1 / 8)
    assert share(torch.tensor([2.0, 2.0, 0.0, 0.0])).item() == pytest.approx(1 / 2)
