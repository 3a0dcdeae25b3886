"""GMPO against closed forms: the paths, the matching loss, the sampled Gaussian, Eqs. (8) and (9) written by hand."""

import dataclasses
import math

import helpers
import pytest
import torch
from helpers import Net, files_with, seeded, smaller_q

import gmpo
from common import datasets, samplers

PATHS = ["vp", "gvp", "icfm"]
SOLVERS = ["ddim", "dpmpp", "euler", "midpoint", "rk4", "sde"]
MEAN = torch.tensor([0.4, -0.2])
COV = torch.tensor([[0.30, 0.12], [0.12, 0.20]])
each_path = pytest.mark.parametrize("path", PATHS)
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_file = pytest.mark.parametrize("algorithm", files_with("alpha_sigma"), ids=lambda module: module.__name__)


def args_of(algorithm=gmpo, **changes):
    defaults = dict(
        path="gvp", network="mlp", sampler_steps=10, expectile=0.7, beta=2.0, weight_max=100.0, act_noise=1.0
    )
    return helpers.args_of(algorithm, **defaults | changes)


def predicts(algorithm, path):
    return algorithm.PREDICTS[path] if algorithm is gmpo else "velocity"


def drawn(n, seed, action_dim=2):
    """The noise and the times of `matching_loss`, drawn again: the seed is set to be used again, too."""
    torch.manual_seed(seed)
    eps, t = torch.randn(n, action_dim), 1e-5 + (1 - 1e-5) * torch.rand(n)
    torch.manual_seed(seed)
    return eps, t


def hand_path(t, path):
    """alpha, sigma and their derivatives, in float64, written by hand."""
    t = t.double()
    if path == "vp":
        alpha = torch.exp(-0.5 * (0.1 * t + 19.9 * t**2 / 2))
        sigma = (1 - alpha**2).sqrt()
        rate = (0.1 + 19.9 * t) / 2
        return alpha, sigma, -rate * alpha, rate * alpha**2 / sigma
    if path == "gvp":
        c, s = torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
        return c, s, -math.pi / 2 * s, math.pi / 2 * c
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def exact_prediction(x, t, path, predicts):
    """E[target | x_t = x] for actions from N(MEAN, COV): Gaussian conditioning, (B, 2), (B,) -> (B, 2)."""
    alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in hand_path(t.clamp(min=1e-4), path))
    (variances, axes), mean = torch.linalg.eigh(COV.double()), MEAN.double()
    centred = (x.double() - alpha * mean) @ axes
    solved = centred / (alpha**2 * variances + sigma**2)  # the inverse of x_t's covariance times centred, by its axes
    action, eps = mean + (alpha * variances * solved) @ axes.T, sigma * solved @ axes.T
    return (eps if predicts == "noise" else d_alpha * action + d_sigma * eps).to(x.dtype)


def exact_net(path):
    return Net(lambda x, t, obs: exact_prediction(x, t, path, gmpo.PREDICTS[path]))


# The paths


@each_file
@each_path
def test_derivatives_of_the_path_are_autograd_and_differences(algorithm, path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    h = 1e-6
    ahead, behind = (algorithm.alpha_sigma(t.detach() + s * h, path) for s in (1, -1))
    for k, derivative in enumerate(algorithm.d_alpha_sigma(t, path)):
        exact = torch.autograd.grad(algorithm.alpha_sigma(t, path)[k].sum(), t)[0]
        torch.testing.assert_close(derivative, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(derivative.detach(), (ahead[k] - behind[k]) / (2 * h), rtol=1e-7, atol=1e-7)


@each_file
@each_path
def test_the_path_is_the_hand_written_one(algorithm, path):
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    functions = (*algorithm.alpha_sigma(t, path), *algorithm.d_alpha_sigma(t, path))
    for function, expected in zip(functions, hand_path(t, path)):
        torch.testing.assert_close(function, expected, rtol=1e-10, atol=1e-12)


@each_file
def test_vp_decays_at_half_of_beta_with_its_constant_term(algorithm):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[1:]
    rate = algorithm.d_alpha_sigma(t, "vp")[0] / algorithm.alpha_sigma(t, "vp")[0]
    torch.testing.assert_close(rate, -(0.1 + 19.9 * t) / 2)


@each_file
@pytest.mark.parametrize("path", ["vp", "gvp"])
def test_variance_is_preserved(algorithm, path):
    alpha, sigma = algorithm.alpha_sigma(torch.linspace(0, 1, 50, dtype=torch.float64), path)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(50, dtype=torch.float64))


@each_file
@each_path
def test_the_path_begins_at_the_action_and_ends_at_the_noise(algorithm, path):
    alpha, sigma = algorithm.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    left = math.exp(-5.025) if path == "vp" else 0.0
    torch.testing.assert_close(alpha, torch.tensor([1.0, left]).double(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(sigma, torch.tensor([0.0, math.sqrt(1 - left**2)]).double(), atol=1e-9, rtol=1e-6)


@each_file
def test_sigma_of_vp_is_accurate_near_0_in_float32(algorithm):
    t = torch.logspace(-6, 0, 200)
    sigma, exact = algorithm.alpha_sigma(t, "vp")[1], torch.sqrt(-torch.expm1(-(0.1 * t + 9.95 * t**2).double()))
    torch.testing.assert_close(sigma.double(), exact, rtol=1e-5, atol=0)


# The matching loss


@each_file
@each_path
def test_matching_loss_is_half_the_sum_over_dimensions_by_hand(algorithm, path):
    seen = []
    net = Net(lambda x, t, obs: seen.append(t) or x * t[:, None] + obs.sum(-1, keepdim=True))
    action, obs = torch.randn(7, 2, generator=seeded()), torch.randn(7, 3, generator=seeded(1))
    eps, t = drawn(7, seed=5)
    loss = algorithm.matching_loss(net, obs, action, args_of(algorithm, path=path))
    alpha, sigma, d_alpha, d_sigma = (c[:, None].float() for c in hand_path(t, path))
    target = eps if predicts(algorithm, path) == "noise" else d_alpha * action + d_sigma * eps
    out = (alpha * action + sigma * eps) * t[:, None] + obs.sum(-1, keepdim=True)
    torch.testing.assert_close(loss, ((out - target) ** 2)[:, 0] / 2 + ((out - target) ** 2)[:, 1] / 2)
    assert torch.equal(seen[0], t)
    loss.mean().backward()
    assert net.scale.grad != 0


@each_file
def test_times_are_uniform_and_never_0(algorithm, monkeypatch):
    seen, args = [], args_of(algorithm, path="vp")
    net = Net(lambda x, t, obs: seen.append(t) or torch.zeros_like(x))
    algorithm.matching_loss(net, torch.zeros(60_000, 1), torch.zeros(60_000, 2), args)
    torch.testing.assert_close(seen[0].sort()[0], (torch.arange(60_000) + 0.5) / 60_000, rtol=0, atol=0.01)
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.zeros(n))
    assert algorithm.matching_loss(net, torch.zeros(5, 1), torch.zeros(5, 2), args).isfinite().all()
    assert (seen[1] > 0).all()


@each_file
@each_path
def test_matching_loss_is_smallest_at_the_conditional_expectation(algorithm, path):
    action = MEAN + torch.randn(100_000, 2, generator=seeded()) @ torch.linalg.cholesky(COV).T

    def loss(scale, shift):
        net = Net(lambda x, t, obs: scale * exact_prediction(x, t, path, predicts(algorithm, path)) + shift * x)
        torch.manual_seed(1)
        each = algorithm.matching_loss(net, torch.zeros(100_000, 1), action, args_of(algorithm, path=path)).detach()
        return each.clamp(max=each.quantile(0.9999)).mean().item()

    best = loss(1.0, 0.0)
    assert best < min(loss(0.9, 0.0), loss(1.1, 0.0), loss(1.0, 0.1), loss(1.0, -0.1))


# From the network to the sample


@each_path
def test_velocity_and_noise_are_read_from_the_same_prediction(path):
    x, t, obs = torch.randn(6, 2, generator=seeded()), torch.tensor(0.37), torch.zeros(6, 1)
    net, times = exact_net(path), t.expand(6)
    for name in ("velocity", "noise"):
        read = {"velocity": gmpo.velocity, "noise": gmpo.noise_prediction}[name](net, x, t, obs, path)
        torch.testing.assert_close(read, exact_prediction(x, times, path, name), rtol=1e-4, atol=1e-5)


def test_velocity_of_vp_moves_action_and_noise():
    action, eps, t = torch.randn(5, 2), torch.randn(5, 2), torch.tensor(0.4)
    alpha, sigma, d_alpha, d_sigma = (c.float() for c in hand_path(t, "vp"))
    found = gmpo.velocity(Net(lambda x, t, obs: eps), alpha * action + sigma * eps, t, torch.zeros(5, 1), "vp")
    torch.testing.assert_close(found, d_alpha * action + d_sigma * eps, rtol=1e-4, atol=1e-4)


@each_path
@each_solver
@torch.no_grad()
def test_every_solver_recovers_a_gaussian_on_every_path(path, solver):
    steps = 200 if solver in ("dpmpp", "midpoint", "rk4") else 400
    torch.manual_seed(0)
    args = args_of(path=path, solver=solver, sampler_steps=steps)
    action = gmpo.sample(exact_net(path), torch.zeros(10_000, 1), args)
    torch.testing.assert_close(action.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(action.T.cov(), COV, atol=0.015, rtol=0)


@each_path
@each_solver
@torch.no_grad()
def test_a_solvers_name_means_that_solver(path, solver):
    net, obs = exact_net(path), torch.zeros(9, 1)
    velocity = lambda x, t: gmpo.velocity(net, x, t, obs, path)  # noqa: E731
    eps, schedule = lambda x, t: gmpo.noise_prediction(net, x, t, obs, path), lambda t: gmpo.alpha_sigma(t, path)
    torch.manual_seed(0)
    found = gmpo.sample(net, obs, args_of(path=path, solver=solver, sampler_steps=5), noise_scale=0.5)
    torch.manual_seed(0)
    x = torch.randn(9, 2) / 2
    expected = {
        "ddim": lambda: samplers.ddim(eps, schedule, x, 5),
        "dpmpp": lambda: samplers.dpm_solver_pp(eps, schedule, x, 5),
        "sde": lambda: samplers.sde(eps, schedule, x, 5),
    }
    torch.testing.assert_close(found, expected.get(solver, lambda: samplers.ode(velocity, x, 5, solver))())


@each_path
@each_solver
def test_no_solver_meets_nan_at_the_ends(path, solver):
    args = args_of(path=path, solver=solver, sampler_steps=3)
    assert gmpo.sample(Net(lambda x, t, obs: torch.tanh(x)), torch.zeros(50, 1), args).isfinite().all()


@each_file
@pytest.mark.parametrize("network", ["mlp", "paper"])
@torch.no_grad()
def test_act_is_in_bounds_and_act_noise_scales_where_it_starts(algorithm, network):
    args, obs = args_of(algorithm, network=network, sampler_steps=4), torch.randn(64, 3, generator=seeded())
    torch.manual_seed(0)
    policy = algorithm.make_policy(3, 2, args)

    def act(seed, scale):
        torch.manual_seed(seed)
        return algorithm.act(policy, obs, dataclasses.replace(args, act_noise=scale))

    first = act(1, 1.0)
    assert first.shape == (64, 2) and (first.abs() <= 1).all() and (first.abs() == 1).any()
    assert torch.equal(first, act(1, 1.0)) and not torch.equal(first, act(2, 1.0))
    assert torch.equal(act(1, 0.0), act(2, 0.0))
    assert not torch.equal(act(1, 0.5), first) and not torch.equal(act(1, 0.5), act(1, 0.0))


# Section 5: weights, candidates, losses


def dataset(n=40):
    g = seeded(3)
    obs, action = torch.randint(-9, 10, (n, 3), generator=g).float() / 10, torch.rand(n, 2, generator=g) * 2 - 1
    return datasets.Dataset(obs, action, torch.randn(n, generator=g), obs, torch.zeros(n))


def make_critic():
    """Each of its networks is the smaller one about as often."""
    torch.manual_seed(0)
    critic, data = gmpo.Critic(3, 2), dataset()
    with torch.no_grad():
        for q, mean in zip((critic.q.q1, critic.q.q2), critic.q(data.obs, data.action).mean(-1)):
            q[-1].bias -= mean
    return critic


def policy_of(x_weight=1.0):
    return Net(lambda x, t, obs: x_weight * x + obs[:, :2] * t[:, None])


def test_policy_loss_is_eq_8_by_hand():
    args, data, weight, policy = args_of(weight_max=0.8), dataset(), torch.rand(40, generator=seeded(2)), policy_of()
    torch.manual_seed(9)
    loss, metrics = gmpo.policy_loss(policy, data[torch.arange(40)], weight, args)
    torch.manual_seed(9)
    each = gmpo.matching_loss(policy, data.obs, data.action, args)
    torch.testing.assert_close(loss, sum(w * x for w, x in zip(weight, each)) / 40)
    torch.testing.assert_close(metrics["policy/weight"], weight.mean())
    torch.testing.assert_close(metrics["policy/clipped"], (weight >= 0.8).float().mean())
    loss.backward()
    assert policy.scale.grad != 0


def test_beta_0_is_behaviour_cloning():
    args, data, policy = args_of(beta=0.0), dataset(), policy_of()
    weight = gmpo.weights(gmpo.advantages(make_critic(), data), args)
    assert torch.equal(weight, torch.ones(40))
    torch.manual_seed(4)
    loss, metrics = gmpo.policy_loss(policy, data[torch.arange(40)], weight, args)
    torch.manual_seed(4)
    torch.testing.assert_close(loss, gmpo.matching_loss(policy, data.obs, data.action, args).mean())
    assert metrics["policy/ess"].item() == pytest.approx(1)


def test_sampled_policy_loss_is_eq_9_by_hand_with_the_critic_and_the_model_of_mu_left_alone():
    args, obs, critic, policy = args_of(candidates=4, beta=3.0), dataset().obs, make_critic(), policy_of()
    own = args_of(solver="ddim", sampler_steps=3)  # of the model of mu
    behaviour = gmpo.make_policy(3, 2, own)
    torch.manual_seed(6)
    loss, metrics = gmpo.sampled_policy_loss(policy, behaviour, own, critic, obs, args)
    torch.manual_seed(6)
    repeated = torch.stack([s for s in obs for _ in range(4)])
    action = gmpo.sample(behaviour, repeated, own).clamp(-1, 1).detach()
    each, by_hand = gmpo.matching_loss(policy, repeated, action, args).view(40, 4), 0
    assert action.view(40, 4, 2).std(1).min() > 0
    for b in range(40):
        q = smaller_q(critic.q, obs[b].expand(4, 3), action.view(40, 4, 2)[b]).detach()
        by_hand = by_hand + (torch.exp(3 * q) / torch.exp(3 * q).sum() * each[b]).sum() / 40
    torch.testing.assert_close(loss, by_hand)
    assert 1 / 4 < metrics["policy/ess"] < 1
    loss.backward()
    assert policy.scale.grad != 0 and all(p.grad is None for net in (critic, behaviour) for p in net.parameters())


def test_candidates_belong_to_their_state():
    """A model of mu on the straight path whose every sample is the action obs[:2]: dx/dt = (x - a) / t."""
    at_the_state, seen = Net(lambda x, t, s: (x - s[:, :2]) / t[:, None]), []
    policy, obs = Net(lambda x, t, s: seen.append((x, t[:, None], s)) or torch.zeros_like(x)), dataset().obs
    args, critic = args_of(path="icfm", solver="euler", sampler_steps=4, candidates=5), make_critic()
    torch.manual_seed(2)
    gmpo.sampled_policy_loss(policy, at_the_state, args, critic, obs, args)
    torch.manual_seed(2)
    _, eps, (x, t, s) = torch.randn(200, 2), torch.randn(200, 2), seen[0]
    assert torch.equal(s, torch.stack([row for row in obs for _ in range(5)]))
    torch.testing.assert_close(x, (1 - t) * s[:, :2] + t * eps)


# Networks


@each_file
def test_paper_net_has_the_references_size(algorithm):
    net = algorithm.PaperNet(17, 6)
    assert sum(p.numel() for p in net.parameters()) == 1_633_222
    assert net.frequencies.shape == (16,) and not net.frequencies.requires_grad


@each_file
@pytest.mark.parametrize("network", ["mlp", "paper"])
def test_networks_see_action_time_and_normalised_state(algorithm, network):
    torch.manual_seed(0)
    net = algorithm.make_policy(3, 2, args_of(algorithm, network=network))
    assert type(net).__name__ == {"mlp": "StateMLP", "paper": "PaperNet"}[network]
    x, t, obs = torch.randn(5, 2), torch.rand(5), torch.randn(5, 3)
    out = net(x, t, obs)
    assert out.shape == (5, 2)
    for changed in (net(x + 1, t, obs), net(x, t + 0.1, obs), net(x, t, obs + 1)):
        assert not torch.allclose(out, changed, atol=1e-4)
    rows = torch.cat([net(x[i : i + 1], t[i : i + 1], obs[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(out, rows)
    algorithm.fit_normalizers(obs * 3 + 1, net)
    torch.testing.assert_close(net(x, t, obs * net.normalize.std + net.normalize.mean), out, rtol=1e-4, atol=1e-5)
