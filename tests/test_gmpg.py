"""GMPG against closed forms: the densities of Eq. (13), every gradient of Eq. (14), and the optimum they lead to."""

import copy
import math
from itertools import pairwise

import helpers
import pytest
import torch
from helpers import Net, flat, seeded, smaller_q
from torch import nn

import gmpg
from common import samplers

each_path = pytest.mark.parametrize("path", ["vp", "gvp", "icfm"])
MEAN, STD = torch.tensor([-0.2, 0.1]), 0.25
MAZES = ["umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"]
MIXTURE = dict(mean=torch.tensor([-0.3, 0.35]), std=torch.tensor([0.25, 0.3]), share=torch.tensor([0.6, 0.4]))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def args_of(**changes):
    return helpers.args_of(
        gmpg, **dict(path="gvp", network="mlp", expectile=0.7, beta=2.0, sampler_steps=8, act_noise=1.0) | changes
    )


class ExactCritic(nn.Module):
    """A known Q in the place of a critic."""

    def __init__(self, reward):
        super().__init__()
        self.reward = reward

    def q(self, obs, action):
        return torch.stack([self.reward(action), self.reward(action) + 1])


class SmallMLP(gmpg.StateMLP):
    """StateMLP of another width."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__(obs_dim, action_dim)
        sizes = [action_dim + 16 + obs_dim, width, width, width]
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, action_dim))


def small_models(scale=2.0):
    """Untrained: the policy, away from the behaviour, the behaviour, and the critic."""
    torch.manual_seed(0)
    behaviour, critic = SmallMLP(2, 2, width=8), gmpg.Critic(2, 2)
    with torch.no_grad():
        for parameter in behaviour.parameters():
            parameter.mul_(scale)
        policy = copy.deepcopy(behaviour)
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy, behaviour.requires_grad_(False), critic.requires_grad_(False)


def kl_terms(policy, behaviour, n=None, obs=None, seed=0, **changes):
    """An action of the policy, its log pi and log mu, and the error of the latter."""
    obs, args = torch.zeros(n, 1) if obs is None else obs, args_of(**changes)
    torch.manual_seed(seed)
    action, log_pi = gmpg.sample_with_log_density(policy, obs, args)
    return action, log_pi, *gmpg.log_density(behaviour, obs, action, args)


# The densities


def linear_net(seed):
    """dx/dt = (1 + t) (x K + b), and the Gaussian that its steps make of N(0, I): mean and covariance."""
    g = seeded(seed)
    matrix, shift = 0.8 * torch.randn(2, 2, generator=g), torch.randn(2, generator=g)
    mean, whole = torch.zeros(2), torch.eye(2)
    for t, s in pairwise((1 - k / 8) ** 2 for k in range(9)):
        step = torch.eye(2) - (t - s) * (1 + t) * matrix
        mean, whole = mean @ step - (t - s) * (1 + t) * shift, whole @ step
    net = Net(lambda x, t, obs: (1 + t[:, None]) * (x @ matrix + shift))
    return net, torch.distributions.MultivariateNormal(mean, whole.T @ whole)


def test_both_densities_of_linear_velocities_are_those_of_the_steps(float64):
    (policy, pi), (behaviour, mu) = linear_net(0), linear_net(1)
    action, log_pi, log_mu, error = kl_terms(policy, behaviour, 5_000)
    torch.testing.assert_close(log_pi, pi.log_prob(action), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_mu, mu.log_prob(action), rtol=0, atol=1e-9)
    assert error.max() < 1e-9
    other = torch.randn(50, 2)  # actions that the sampler did not make
    found, _ = gmpg.log_density(behaviour, torch.zeros(50, 1), other, args_of())
    torch.testing.assert_close(found, mu.log_prob(other), rtol=0, atol=1e-9)
    kl, each = torch.distributions.kl_divergence(pi, mu), log_pi - log_mu
    assert (each.mean() - kl).abs() < 4 * each.std() / math.sqrt(len(each))


def gaussian_velocity(path):
    """alpha' E[a | x] + sigma' E[eps | x] for actions from N(MEAN, STD^2 I)."""

    def velocity(x, t, obs):
        (alpha, sigma), (d_alpha, d_sigma) = (f(t[:, None], path) for f in (gmpg.alpha_sigma, gmpg.d_alpha_sigma))
        whitened = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return d_alpha * (MEAN + alpha * STD**2 * whitened) + d_sigma * sigma * whitened

    return Net(velocity)


@pytest.mark.parametrize("path", ["gvp", "icfm"])
def test_log_pi_converges_to_that_of_the_flow_at_order_1(float64, path):
    errors = []
    for steps in (100, 200):
        net = gaussian_velocity(path)
        action, log_pi, *_ = kl_terms(net, net, 50, path=path, sampler_steps=steps)
        exact = torch.distributions.Normal(MEAN, STD).log_prob(action).sum(-1)
        errors.append((log_pi - exact).abs().mean().item())
    assert errors[1] < 0.05 and math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


def test_log_density_tells_where_its_steps_could_not_be_undone():
    wild, obs = Net(lambda x, t, obs: 30 * torch.sin(9 * x)), torch.zeros(64, 1)
    _, error = gmpg.log_density(wild, obs, torch.randn(64, 2), args_of())
    assert error.shape == (64,) and error.max() > 1e-2


@pytest.mark.parametrize("network", ["mlp", "paper"])
def test_networks_of_the_files_have_densities_that_are_exact(float64, network):
    torch.manual_seed(0)
    obs, net = torch.randn(6, 3), gmpg.make_policy(3, 2, args_of(network=network))
    action, log_pi, *_ = kl_terms(net, net, obs=obs)
    torch.manual_seed(0)
    for x, s, a, found in zip(torch.randn(6, 2), obs, action, log_pi):
        velocity = lambda x, t, s=s: net(x, t.expand(len(x)), s[None])  # noqa: E731

        def sample(x, velocity=velocity):
            for t, t_next in pairwise(torch.linspace(1, 0, 9) ** 2):
                x = samplers.euler(velocity, x[None], t, t_next)[0]
            return x

        torch.testing.assert_close(sample(x), a)
        whole = torch.autograd.functional.jacobian(sample, x)
        expected = -0.5 * x.square().sum() - math.log(2 * math.pi) - whole.det().abs().log()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def train_behaviour(draw, args, steps, action_dim=2, width=64, size=256, lr=3e-3):
    """A small model of the actions that draw(B) makes."""
    torch.manual_seed(0)
    net = SmallMLP(1, action_dim, width)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * gmpg.cosine(step, steps)
        loss = gmpg.matching_loss(net, torch.zeros(size, 1), draw(size), args).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def train_policy(behaviour, reward, args, steps, lr=3e-3):
    """GMPG's third phase, from the warm start."""
    policy, critic = copy.deepcopy(behaviour).requires_grad_(True), ExactCritic(reward)
    optimizer = torch.optim.Adam(policy.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * gmpg.cosine(step, steps)
        loss, _ = gmpg.policy_loss(policy, behaviour, critic, torch.zeros(256, 1), args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield policy


def last(iterator):
    *_, found = iterator
    return found


def two_blobs(n):
    return torch.tensor([[-0.5, 0.3], [0.5, -0.2]])[torch.randint(2, (n,))] + 0.2 * torch.randn(n, 2)


def test_density_of_a_trained_flow_integrates_to_1():
    args, axis = args_of(), torch.arange(-2, 2, 0.05)
    net, grid = train_behaviour(two_blobs, args, 300), torch.cartesian_prod(axis, axis)
    density = gmpg.log_density(net, torch.zeros(len(grid), 1), grid, args)[0].exp()
    assert density.sum().item() * 0.05**2 == pytest.approx(1, abs=0.01)
    assert density.max() > 0.5


# The gradient


def loss_of(models, obs, args):
    """Eq. (14) with the same noise every time."""
    torch.manual_seed(0)
    return gmpg.policy_loss(*models, obs, args)[0]


def gradient(models, obs, args):
    return flat(torch.autograd.grad(loss_of(models, obs, args), models[0].parameters()))


def differences(models, obs, args, directions, step=1e-6):
    """Central differences of the loss along directions of the policy's parameters."""
    found, start = [], nn.utils.parameters_to_vector(models[0].parameters()).detach()
    for direction in directions:
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * direction, models[0].parameters())
            values.append(loss_of(models, obs, args).item())
        found.append((values[0] - values[1]) / (2 * step))
    nn.utils.vector_to_parameters(start, models[0].parameters())
    return torch.tensor(found)


@each_path
def test_the_gradient_is_that_of_differences(float64, path):
    models, g, args = small_models(), seeded(4), args_of(path=path, sampler_steps=4, beta=0.5)
    obs, directions = torch.randn(8, 2, generator=g), torch.randn(12, len(flat(models[0].parameters())), generator=g)
    exact = differences(models, obs, args, directions)
    assert (directions @ gradient(models, obs, args) - exact).norm() < 1e-5 * exact.norm()


def detached_log_density(net, action, args):
    """log_density with the state detached in every step, as the reference code's adjoint has it."""
    obs, x, log_dets = torch.zeros(len(action), 1), action, 0
    for t, t_next in reversed(gmpg.times(obs, args)):
        step = gmpg.euler_step(net, obs, t, t_next)
        start = samplers.invert(step, x.detach(), 6).detach()
        log_dets = log_dets + torch.linalg.slogdet(samplers.with_jacobian(step, start)[1]).logabsdet
        x = x + (t - t_next) * net(start, t.expand(len(start)), obs)
    return gmpg.log_normal(x) - log_dets


def test_a_likelihood_with_its_state_detached_has_another_gradient(float64):
    torch.set_default_dtype(torch.float32)
    args = args_of(beta=0.0)
    behaviour = train_behaviour(two_blobs, args, 300, width=32).double()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    policy = copy.deepcopy(behaviour).requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models, obs = (policy, behaviour, ExactCritic(lambda action: action.sum(-1))), torch.zeros(64, 1)
    directions = torch.randn(8, len(flat(policy.parameters())))
    right, exact = gradient(models, obs, args), differences(models, obs, args, directions)
    action, log_pi, log_mu, _ = kl_terms(policy, behaviour, 64, beta=0.0)
    detached = [detached_log_density(net, action, args) for net in (policy, behaviour)]
    torch.testing.assert_close(detached, [log_pi, log_mu])
    wrong = flat(torch.autograd.grad((detached[0] - detached[1]).mean(), policy.parameters()))
    assert (directions @ right - exact).norm() < 1e-5 * exact.norm()
    assert torch.cosine_similarity(right, wrong, 0) < 0.99


def test_policy_loss_is_eq_14_with_the_smaller_online_q():
    policy, behaviour, critic = small_models()
    with torch.no_grad():
        for parameter in critic.target_q.parameters():
            parameter.add_(1)
    obs = torch.randn(64, 2)
    torch.manual_seed(0)
    loss, metrics = gmpg.policy_loss(policy, behaviour, critic, obs, args_of(beta=3.0))
    action, log_pi, log_mu, error = kl_terms(policy, behaviour, obs=obs)
    q = smaller_q(critic.q, obs, action.clamp(-1, 1))
    torch.testing.assert_close(loss, (-3 * q + log_pi - log_mu).mean())
    torch.testing.assert_close(metrics["policy/q"], q.detach().mean())
    torch.testing.assert_close(metrics["policy/kl"], (log_pi - log_mu).detach().mean())
    assert metrics["policy/undo_error"] == error.max()
    assert (action.abs() > 1).any() and not any(m.requires_grad for m in metrics.values())


# The divergence and the optimum


def test_samples_whose_mu_is_not_known_have_no_say(monkeypatch):
    args, obs = args_of(), torch.zeros(64, 1)
    behaviour = SmallMLP(1, 2, width=8)
    policy, exact = copy.deepcopy(behaviour), gmpg.log_density
    models, lost = (policy, behaviour, ExactCritic(lambda action: action.sum(-1))), torch.arange(64) % 4 == 0

    def losing(net, obs, action, args):
        log_mu, error = exact(net, obs, action, args)
        return torch.where(lost, -1e10 * action.sum(-1), log_mu), torch.where(lost, 20.0, error)

    torch.manual_seed(0)
    action, log_pi = gmpg.sample_with_log_density(policy, obs, args)
    terms = -args.beta * action.clamp(-1, 1).sum(-1) + log_pi - exact(behaviour, obs, action, args)[0]
    monkeypatch.setattr(gmpg, "log_density", losing)
    torch.manual_seed(0)
    loss, metrics = gmpg.policy_loss(*models, obs, args)
    torch.testing.assert_close(loss, terms[~lost].sum() / 64)
    assert metrics["policy/undo_error"] == 20 and metrics["policy/kl"].abs() < 1
    wanted = torch.autograd.grad(terms[~lost].sum() / 64, policy.parameters())
    for found, grad in zip(torch.autograd.grad(loss, policy.parameters()), wanted):
        torch.testing.assert_close(found, grad)


@each_path
def test_the_divergence_is_0_at_the_warm_start_and_never_negative_on_the_way(path):
    args = args_of(path=path, beta=20.0)
    behaviour = train_behaviour(two_blobs, args, 200)
    _, log_pi, log_mu, error = kl_terms(copy.deepcopy(behaviour), behaviour, 1000, path=path)
    torch.testing.assert_close(log_pi, log_mu, rtol=0, atol=1e-4)
    assert error.max() < 1e-5
    for step, policy in enumerate(train_policy(behaviour, lambda action: action.sum(-1), args, 30)):
        with torch.no_grad():
            _, log_pi, log_mu, _ = kl_terms(policy, behaviour, 256, seed=100 + step, path=path)
        each = log_pi - log_mu
        assert each.mean() >= -3 * each.std() / math.sqrt(256)
    assert each.mean() > 0.1


def gaussian(n):
    return MEAN + STD * torch.randn(n, 2)


def samples(policy, args, n=20_000):
    torch.manual_seed(2)
    with torch.no_grad():
        return gmpg.act(policy, torch.zeros(n, 1), args)


# Euler's steps change the width of a Gaussian: on the straight path the most (-5 % of 32 steps, -18 % of 8).
STEPS = {"vp": 16, "gvp": 16, "icfm": 32}


@each_path
def test_a_gaussian_with_a_linear_reward_shifts_by_beta_variance_slope(path):
    slope, args = torch.tensor([1.2, -0.9]), args_of(path=path, sampler_steps=STEPS[path])
    behaviour = train_behaviour(gaussian, args, 800, size=512, lr=1e-2)
    policy = last(train_policy(behaviour, lambda action: action @ slope, args, 40))
    action = samples(policy, args)
    torch.testing.assert_close(action.mean(0), MEAN + 2 * STD**2 * slope, rtol=0, atol=0.03)
    torch.testing.assert_close(action.std(0), torch.full((2,), STD), rtol=0.1, atol=0)


def mixture(n):
    mode = torch.multinomial(MIXTURE["share"], n, replacement=True)
    return (MIXTURE["mean"][mode] + MIXTURE["std"][mode] * torch.randn(n))[:, None]


def total_variation(policy, target, args):
    """Of the policy's exact density and a density up to a factor, both over a line."""
    grid = torch.linspace(-2, 2, 801)[:, None]
    with torch.no_grad():
        pi = gmpg.log_density(policy, torch.zeros(801, 1), grid, args)[0].exp() * 0.005
    target = target(grid[:, 0])
    return 0.5 * (pi - target / target.sum()).abs().sum().item()


def mixture_density(a):
    each = torch.distributions.Normal(MIXTURE["mean"], MIXTURE["std"]).log_prob(a[:, None]).exp()
    return (MIXTURE["share"] * each).sum(-1)


@each_path
def test_overlapping_modes_are_reweighted_by_exp_beta_q(path):
    args = args_of(path=path, sampler_steps=16 if path == "gvp" else 32)
    target = lambda a: mixture_density(a) * torch.exp(2 * a.clamp(-1, 1))  # noqa: E731
    behaviour = train_behaviour(mixture, args, 1500, action_dim=1, size=1024, lr=1e-2)
    assert total_variation(behaviour, target, args) > 0.3
    policy = last(train_policy(behaviour, lambda action: action.sum(-1), args, 80, lr=1e-2))
    assert total_variation(policy, target, args) < 0.05


def test_beta_0_stays_at_the_behaviour():
    args = args_of(path="gvp", beta=0.0)
    behaviour = train_behaviour(mixture, args, 300, action_dim=1)
    policy = last(train_policy(behaviour, lambda action: 100 * action.sum(-1), args, 20, lr=1e-3))
    _, log_pi, log_mu, _ = kl_terms(policy, behaviour, 1000)
    assert (log_pi - log_mu).mean().abs() < 0.01


# The table


def test_betas_are_the_references_times_a_ln_2():
    reference = dict.fromkeys((f"antmaze-{maze}-v0" for maze in MAZES), 1) | {
        "halfcheetah-medium-v2": 1, "halfcheetah-medium-expert-v2": 4, "halfcheetah-medium-replay-v2": 4,
        "hopper-medium-v2": 20, "hopper-medium-expert-v2": 4, "hopper-medium-replay-v2": 8,
        "walker2d-medium-v2": 1, "walker2d-medium-expert-v2": 4, "walker2d-medium-replay-v2": 8,
    }  # fmt: skip
    assert reference.keys() == {name for name in gmpg.SETTINGS if name.endswith(("-v0", "-v2"))}
    for name, beta in reference.items():
        size = {"halfcheetah": 6, "hopper": 3, "walker2d": 6, "antmaze": 8}[name.split("-")[0]]
        assert gmpg.SETTINGS[name]["beta"] == pytest.approx(beta * size * math.log(2), rel=3e-3), name
