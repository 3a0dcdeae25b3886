"""The critic, in every file that has a copy of it, and IQL's actor: against closed forms and hand-written steps."""

import copy
import importlib
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import sync
import torch
from helpers import heads

import iql_critic
from common import datasets
from common.training import Seeds

torch.set_num_threads(1)
OBS, ACT, BATCH = 3, 2, 16
LOSSES = {
    "expectile .7": dict(critic_loss="expectile", expectile=0.7),
    "expectile .9": dict(critic_loss="expectile", expectile=0.9),
    "quantile .6": dict(critic_loss="quantile", expectile=0.6),
    "linex 1": dict(critic_loss="exponential", linex_alpha=1.0, linex_max=1e12, expectile=0.7),
    "linex 3": dict(critic_loss="exponential", linex_alpha=3.0, linex_max=1e12, expectile=0.7),
}
CAPPED = {"linex 3, capped": dict(critic_loss="exponential", linex_alpha=3.0, linex_max=6.0, expectile=0.7)}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_loss_or_capped = pytest.mark.parametrize("loss", (LOSSES | CAPPED).values(), ids=LOSSES | CAPPED)


@pytest.fixture(params=sync.files(), ids=lambda name: name.removesuffix(".py"))
def algorithm(request):
    return importlib.import_module(request.param.removesuffix(".py"))


@pytest.fixture(params=[name for name in sync.files() if "implicit_weights" in sync.definitions(name)])
def implicit_weights(request):
    return importlib.import_module(request.param.removesuffix(".py")).implicit_weights


def args_of(algorithm, **changes):
    return algorithm.Args(**dict(expectile=0.7, beta=3.0, device="cpu") | changes)


def make_critic(algorithm):
    """In float64, the target already different from the online critic, each head the smaller one in some rows."""
    torch.manual_seed(0)
    critic = algorithm.Critic(algorithm.Normalize(OBS), OBS, ACT).double()
    with torch.no_grad():
        for parameter in critic.target_q.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for twin in (critic.q, critic.target_q):
            values = twin(make_batch().obs, make_batch().action)
            twin.biases[-1] -= values.mean(-1)[:, None, None]
            assert 0 < (values - values.mean(-1, keepdim=True)).argmin(0).sum() < BATCH
    return critic


def make_batch():
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return datasets.Batch(
        normal(BATCH, OBS),
        normal(BATCH, ACT).tanh(),
        normal(BATCH),
        normal(BATCH, OBS),
        (torch.arange(BATCH) % 3 == 0).double(),
    )


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


def derivative(algorithm, u, args):
    u = u.clone().requires_grad_()
    return torch.autograd.grad(algorithm.f(u, args).sum(), u)[0]


# f, V and the policy behind V


@each_loss
def test_v_at_the_minimum_of_f_is_the_closed_form(algorithm, loss):
    q, args = q_values(), args_of(algorithm, **loss)
    mean_f = lambda v: algorithm.f(q - v, args).mean().item()  # noqa: E731
    found = scipy.optimize.minimize_scalar(mean_f, bounds=(q.min().item(), q.max().item()), options=dict(xatol=1e-10))
    assert found.x == pytest.approx(optimal_v(q, loss), abs=1e-6)


@each_loss_or_capped
def test_f_is_convex_with_its_minimum_at_zero(algorithm, loss):
    args, u = args_of(algorithm, **loss), torch.linspace(-3, 3, 601, dtype=torch.float64)
    f, slope = algorithm.f(u, args), derivative(algorithm, u, args)
    assert (slope.diff() >= -1e-12).all()
    assert f.argmin() == 300
    assert slope[300].abs() < 1e-12 or loss["critic_loss"] == "quantile"
    assert (slope[:300] < 0).all() and (slope[301:] > 0).all()


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_linex_is_exact_below_its_cap_and_linear_beyond(algorithm, alpha):
    args = args_of(algorithm, critic_loss="exponential", linex_alpha=alpha, linex_max=6.0)
    knee = math.log(6) / alpha
    below = torch.linspace(-3, knee - 1e-3, 50, dtype=torch.float64)
    torch.testing.assert_close(algorithm.f(below, args), torch.exp(alpha * below) - alpha * below)
    torch.testing.assert_close(derivative(algorithm, below, args), alpha * (torch.exp(alpha * below) - 1))
    beyond = knee + torch.tensor([1e-9, 1.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(derivative(algorithm, beyond, args), torch.full_like(beyond, 5 * alpha))
    torch.testing.assert_close(algorithm.f(beyond, args), 6 - alpha * knee + 5 * alpha * (beyond - knee))


@each_loss
def test_v_is_the_value_of_the_implicit_policy(implicit_weights, loss):
    q, v = q_values(), optimal_v(q_values(), loss)
    weight = implicit_weights(q - v, iql_critic.Args(**loss), floor=1e-9)
    assert ((weight * q).sum() / weight.sum()).item() == pytest.approx(v, abs=1e-5)


@each_loss_or_capped
def test_implicit_weights_are_the_slope_of_f_over_u(implicit_weights, loss):
    args, u = iql_critic.Args(**loss), torch.linspace(-2.95, 2.95, 60, dtype=torch.float64)
    ratio = implicit_weights(u, args) * u.abs() / derivative(iql_critic, u, args).abs()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@each_loss_or_capped
def test_implicit_weights_are_positive_and_finite_everywhere(implicit_weights, loss):
    u = torch.tensor([-1e4, -1.0, -1e-3, -1e-20, 0.0, 1e-20, 1e-7, 1e-3, 1.0, 5.0])
    weight = implicit_weights(u, iql_critic.Args(**loss))
    assert weight.isfinite().all() and (weight > 0).all()


def test_implicit_weights_of_linex_are_smooth_at_zero_in_float32(implicit_weights):
    x = torch.logspace(-7, -2, 200)
    x = torch.cat([-x, x])
    weight = implicit_weights(x, iql_critic.Args(critic_loss="exponential", expectile=0.7))
    torch.testing.assert_close(weight, 1 + x / 2 + x**2 / 6, rtol=1e-5, atol=0)


# Losses and the order of a step


def hand_v_loss(critic, batch, tau):
    x = torch.cat([batch.obs, batch.action], -1)
    q = torch.minimum(*(head(x) for head in heads(critic.target_q))).squeeze(-1)
    u = q.detach() - critic.v.net(batch.obs).squeeze(-1)
    return ((tau - (u < 0).double()).abs() * u**2).mean()


def hand_q_loss(critic, batch, discount):
    x = torch.cat([batch.obs, batch.action], -1)
    v = critic.v.net(batch.next_obs).squeeze(-1).detach()
    y = torch.where(batch.done == 1, batch.reward, batch.reward + discount * v)
    return sum(((head(x).squeeze(-1) - y) ** 2).mean() for head in heads(critic.q))


def hand_descend(loss, parameters, lr):
    parameters = list(parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter -= lr * gradient


def hand_target(critic, rate):
    with torch.no_grad():
        for old, new in zip(critic.target_q.parameters(), critic.q.parameters()):
            old.copy_((1 - rate) * old + rate * new)


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_v_loss_takes_the_smaller_target_q(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    loss, metrics = algorithm.v_loss(critic, batch, args_of(algorithm, expectile=0.8))
    torch.testing.assert_close(loss, hand_v_loss(critic, batch, 0.8))
    loss.backward()
    assert gradients(critic.v) and not gradients(critic.q) and not gradients(critic.target_q)
    assert set(metrics) == {"critic/v_loss", "critic/v"} and not any(m.requires_grad for m in metrics.values())


def test_q_loss_sums_the_heads_and_bootstraps_where_not_done(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    loss, metrics = algorithm.q_loss(critic, batch, args_of(algorithm, discount=0.9))
    torch.testing.assert_close(loss, hand_q_loss(critic, batch, 0.9))
    loss.backward()
    assert gradients(critic.q) and not gradients(critic.v) and not gradients(critic.target_q)
    assert set(metrics) == {"critic/q_loss", "critic/q"} and not any(m.requires_grad for m in metrics.values())


def test_the_target_moves_by_target_rate_in_place(algorithm):
    critic = make_critic(algorithm)
    before = copy.deepcopy(critic)
    storage = [p.data_ptr() for p in critic.target_q.parameters()]
    algorithm.update_target(list(critic.target_q.parameters()), list(critic.q.parameters()), 0.25)
    assert storage == [p.data_ptr() for p in critic.target_q.parameters()]
    moved = zip(critic.target_q.parameters(), before.target_q.parameters(), before.q.parameters())
    for now, old, new in moved:
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
    for now, new in zip(critic.q.parameters(), before.q.parameters()):
        assert torch.equal(now, new)


def replayed(critic, batch, args, lr, order):
    critic = copy.deepcopy(critic)
    steps = {
        "v": lambda: hand_descend(hand_v_loss(critic, batch, args.expectile), critic.v.parameters(), lr),
        "q": lambda: hand_descend(hand_q_loss(critic, batch, args.discount), critic.q.parameters(), lr),
        "target": lambda: hand_target(critic, args.target_rate),
    }
    for name in order:
        steps[name]()
    return torch.cat([p.flatten() for p in critic.parameters()])


class Descent:
    """Plain gradient descent in the place of Adam."""

    def __init__(self, module, lr):
        self.parameters, self.lr = list(module.parameters()), lr

    def step(self, gradients):
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter -= self.lr * gradient


def take_critic_steps(algorithm, critic, batch, args, lr, count=1):
    """The steps, in place; every weight of the critic after them."""
    seeds = Seeds(lambda seed: {"critic": critic}, args)
    optimizers = {f"{name}_optimizer": Descent(getattr(critic, name), lr) for name in "vq"}
    for _ in range(count):
        metrics = algorithm.critic_step(seeds, optimizers, batch, args)
    assert set(metrics) == {"critic/v_loss", "critic/v", "critic/q_loss", "critic/q"}
    return torch.cat([p.flatten() for p in critic.parameters()])


def test_a_critic_step_is_v_then_q_then_target(algorithm):
    critic, batch, args, lr = make_critic(algorithm), make_batch(), args_of(algorithm, target_rate=0.3), 0.05
    expected = {
        order: replayed(critic, batch, args, lr, order) for order in itertools.permutations(["v", "q", "target"])
    }
    result = take_critic_steps(algorithm, critic, batch, args, lr)
    equal = [order for order, other in expected.items() if torch.allclose(result, other, rtol=1e-6, atol=1e-7)]
    assert equal == [("v", "q", "target")]


def test_a_second_critic_step_starts_from_fresh_gradients(algorithm):
    critic, batch, args, lr = make_critic(algorithm), make_batch(), args_of(algorithm), 0.05
    expected = replayed(critic, batch, args, lr, ["v", "q", "target"] * 2)
    torch.testing.assert_close(take_critic_steps(algorithm, critic, batch, args, lr, count=2), expected)


def test_the_target_starts_as_a_frozen_copy(algorithm):
    critic = algorithm.Critic(algorithm.Normalize(OBS), OBS, ACT)
    pairs = list(zip(critic.q.parameters(), critic.target_q.parameters()))
    assert all(torch.equal(q, t) and q.data_ptr() != t.data_ptr() and not t.requires_grad for q, t in pairs)


@pytest.mark.parametrize("name", [name for name in sync.files() if "advantages" in sync.definitions(name)])
def test_advantages_are_the_smaller_online_q_minus_v(name):
    algorithm = importlib.import_module(name.removesuffix(".py"))
    critic, batch = make_critic(algorithm).float(), datasets.Batch(*(x.float() for x in make_batch()))
    data = datasets.Dataset(*batch)
    x = torch.cat([data.obs, data.action], -1)
    q = torch.minimum(*(head(x).squeeze(-1) for head in heads(critic.q)))
    torch.testing.assert_close(algorithm.advantages(critic, data), (q - critic.v.net(data.obs).squeeze(-1)).detach())


# Networks


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_critic_sizes_are_the_references(algorithm):
    critic = algorithm.Critic(algorithm.Normalize(17), 17, 6)
    assert (count(critic.q), count(critic.target_q), count(critic.v)) == (144_386, 144_386, 70_657)


def test_the_networks_are_iqls(algorithm):
    critic = algorithm.Critic(algorithm.Normalize(OBS), OBS, ACT)
    assert [type(layer).__name__ for layer in critic.v.net] == ["Linear", "ReLU", "Linear", "ReLU", "Output"]
    assert isinstance(critic.v.net[-1], torch.nn.Linear)
    assert [tuple(w.shape) for w in critic.q.weights] == [(2, 256, OBS + ACT), (2, 256, 256), (2, 1, 256)]
    for w in [*(layer.weight for layer in critic.v.net[::2]), *(w for both in critic.q.weights for w in both)]:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert not any(bias.any() for bias in [*(layer.bias for layer in critic.v.net[::2]), *critic.q.biases])
    assert not torch.equal(*critic.q.weights[0])


def test_the_twins_are_two_separate_networks(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    x = torch.cat([batch.obs, batch.action], -1)
    q = critic.q(batch.obs, batch.action)
    torch.testing.assert_close(q, torch.stack([head(x).squeeze(-1) for head in heads(critic.q)]))
    gradients = torch.autograd.grad(q[0].exp().sum(), critic.q.parameters())
    assert all(gradient[0].any() and not gradient[1].any() for gradient in gradients)


def test_the_last_layer_keeps_its_type_under_autocast(algorithm):
    layer, x = algorithm.Output(8, 1), torch.randn(5, 8)
    expected = x @ layer.weight.T + layer.bias + 50
    with torch.no_grad():
        layer.bias += 50
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected)
        assert layer(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(layer.double()(x.double()), x.double() @ layer.weight.T + layer.bias)


def test_dropout_follows_every_hidden_layer_but_not_the_last(algorithm):
    kinds = [type(layer).__name__ for layer in algorithm.mlp(OBS, 8, 8, ACT, dropout=0.1)]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Output"]


def test_normalize_is_the_identity_until_it_is_fitted(algorithm):
    obs = torch.randn(5, OBS)
    assert torch.equal(algorithm.Normalize(OBS)(obs), obs)


def test_normalize_makes_mean_0_and_std_1_and_survives_constant_columns(algorithm):
    normalize, obs = algorithm.Normalize(OBS), torch.randn(100, OBS) * 5 + 2
    obs[:, 1] = 7.0
    normalize.fit(obs)
    out = normalize(obs)
    torch.testing.assert_close(out.mean(0), torch.zeros(OBS), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    assert normalize(obs + 1).isfinite().all()


def test_one_normalize_serves_all_networks(algorithm):
    models = algorithm.build(
        OBS, ACT, args_of(algorithm, **({"dropout": 0.0} if hasattr(algorithm.Args, "dropout") else {}))
    )
    found = {id(m) for model in models.values() for m in model.modules() if isinstance(m, algorithm.Normalize)}
    assert len(found) == 1


def test_the_critic_sees_normalised_observations(algorithm):
    critic, batch = make_critic(algorithm), make_batch()
    plain = critic.v(batch.obs), critic.q(batch.obs, batch.action), critic.target_q(batch.obs, batch.action)
    critic.v.normalize.fit(batch.obs * 3 + 1)
    raw = critic.v.normalize.std * batch.obs + critic.v.normalize.mean
    again = critic.v(raw), critic.q(raw, batch.action), critic.target_q(raw, batch.action)
    for one, other in zip(plain, again):
        torch.testing.assert_close(one, other)


# IQL's actor


def make_actor(dropout=0.0):
    torch.manual_seed(2)
    actor = iql_critic.GaussianActor(iql_critic.Normalize(OBS), OBS, ACT, dropout).double()
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return actor


def test_actor_size_is_iqls():
    assert count(iql_critic.GaussianActor(iql_critic.Normalize(17), 17, 6, 0.0)) == 71_942 + 6  # network, log_std


def test_the_actor_is_a_gaussian_with_a_tanh_inside_its_mean():
    actor, obs = make_actor(), make_batch().obs * 3
    normal = actor(obs)
    torch.testing.assert_close(normal.mean, torch.tanh(actor.net(obs)))
    torch.testing.assert_close(normal.stddev, torch.tensor([-0.5, 0.3]).double().exp().expand(BATCH, ACT))
    assert (normal.sample((50,)).abs() > 1).any()


def test_the_actors_log_std_is_clipped_and_starts_at_0():
    assert not iql_critic.GaussianActor(iql_critic.Normalize(OBS), OBS, ACT, 0.0).log_std.any()
    actor = make_actor()
    actor.log_std.data.copy_(torch.tensor([-9.0, 9.0]))
    torch.testing.assert_close(actor(make_batch().obs).stddev[0], torch.tensor([-5.0, 2.0]).double().exp())


def test_policy_loss_is_weighted_regression_by_hand():
    actor, critic, batch = make_actor(), make_critic(iql_critic), make_batch()
    args = args_of(iql_critic, beta=2.0, weight_max=1.2)
    loss, metrics = iql_critic.policy_loss(actor, critic, batch, args)
    x = torch.cat([batch.obs, batch.action], -1)
    q = torch.minimum(*(head(x).squeeze(-1) for head in heads(critic.target_q)))
    w = torch.exp(2 * (q - critic.v.net(batch.obs).squeeze(-1))).clamp(max=1.2)
    z = (batch.action - torch.tanh(actor.net(batch.obs))) / actor.log_std.exp()
    log_n = -(0.5 * z**2 + actor.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(loss, -(w * log_n).mean())
    assert 0 < metrics["policy/clipped"] < 1
    torch.testing.assert_close(metrics["policy/clipped"], (w == 1.2).float().mean())
    torch.testing.assert_close(metrics["policy/weight"], w.mean())
    loss.backward()
    assert gradients(actor) and not gradients(critic)


def test_dropout_is_on_in_training_and_off_in_acting():
    actor, critic, batch = make_actor(dropout=0.5), make_critic(iql_critic), make_batch()
    args, models = args_of(iql_critic), {"policy": actor, "critic": critic}
    noise = iql_critic.acting_noise(BATCH, ACT, args, torch.Generator())
    first, second = (iql_critic.act(models, batch.obs, noise, args) for _ in range(2))
    assert torch.equal(first, second) and (first.abs() <= 1).all()
    losses = {iql_critic.policy_loss(actor, critic, batch, args)[0].item() for _ in range(3)}
    assert len(losses) == 3
    assert torch.equal(first, iql_critic.act(models, batch.obs, noise, args))


# Weights


@pytest.mark.parametrize("name", [name for name in sync.files() if "weights" in sync.definitions(name)])
def test_weights_are_capped_exponentials_of_the_advantage(name):
    algorithm = importlib.import_module(name.removesuffix(".py"))
    args = args_of(algorithm, beta=2.0, weight_max=50.0)
    advantage = torch.tensor([-1e6, -1.0, 0.0, 1.0, 3.0, 1e6])
    expected = torch.tensor([0.0, math.exp(-2), 1.0, math.exp(2), 50.0, 50.0])
    torch.testing.assert_close(algorithm.weights(advantage, args), expected)


@pytest.mark.parametrize("name", [name for name in sync.files() if "effective_share" in sync.definitions(name)])
def test_effective_share_counts_the_samples_that_matter(name):
    share = importlib.import_module(name.removesuffix(".py")).effective_share
    assert share(torch.full((8, 3), 0.3)).item() == pytest.approx(1)
    assert share(torch.eye(8)[2]).item() == pytest.approx(1 / 8)
    assert share(torch.tensor([2.0, 2.0, 0.0, 0.0])).item() == pytest.approx(1 / 2)
