"""GMPG against closed forms: the densities of Eq. (13), every gradient of Eq. (14), and the optimum they lead to."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import heads
from torch import nn

import gmpg
from common import datasets, samplers
from common.training import Adam, Seeds

torch.set_num_threads(1)
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
    return gmpg.Args(**dict(device="cpu", expectile=0.7, beta=2.0, sampler_steps=8) | changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_of(n, args, seed=0, action_dim=2):
    return gmpg.policy_noise((n,), action_dim, args, seeded(seed))


def batch_of(action, obs=None):
    obs = torch.zeros(len(action), 1) if obs is None else obs
    return datasets.Batch(obs, action, obs[:, 0], obs, obs[:, 0])


class Net(nn.Module):
    """A function of (x, t, obs) in the place of a network."""

    def __init__(self, function, action_dim=2):
        super().__init__()
        self.function, self.action_dim = function, action_dim

    def forward(self, x, t, obs):
        return self.function(x, t, obs)


class ExactCritic(nn.Module):
    """A known Q in the place of a critic."""

    def __init__(self, reward):
        super().__init__()
        self.reward = reward

    def q(self, obs, action):
        return torch.stack([self.reward(action), self.reward(action) + 1])

    def v(self, obs):
        return torch.zeros(len(obs))


def small_models(path, seed=0, obs_dim=2, width=8, scale=2.0):
    """Untrained networks, the policy away from the behaviour."""
    torch.manual_seed(seed)
    normalize = gmpg.Normalize(obs_dim)
    behaviour = gmpg.StateMLP(normalize, obs_dim, 2, width)
    with torch.no_grad():
        for parameter in behaviour.parameters():
            parameter.mul_(scale)
    policy = copy.deepcopy(behaviour)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    critic = gmpg.Critic(normalize, obs_dim, 2)
    for model in (critic, behaviour):
        model.requires_grad_(False)
    return {"critic": critic, "behaviour": behaviour, "policy": policy}


# The densities


def linear_net(seed):
    """dx/dt = (1 + t) (x K + b), and the Gaussian that its steps make of N(0, I): mean and covariance."""
    g = torch.Generator().manual_seed(seed)
    matrix, shift = 0.8 * torch.randn(2, 2, generator=g), torch.randn(2, generator=g)
    mean, whole = torch.zeros(2), torch.eye(2)
    for t, s in pairwise((1 - k / 8) ** 2 for k in range(9)):
        step = torch.eye(2) - (t - s) * (1 + t) * matrix
        mean, whole = mean @ step - (t - s) * (1 + t) * shift, whole @ step
    net = Net(lambda x, t, obs: (1 + t[:, None]) * (x @ matrix + shift))
    return net, torch.distributions.MultivariateNormal(mean, whole.T @ whole)


def test_both_densities_of_linear_velocities_are_those_of_the_steps(float64):
    (policy, pi), (behaviour, mu) = linear_net(0), linear_net(1)
    noise = noise_of(5_000, args_of())
    action, log_pi, log_mu, error = gmpg.kl_terms(policy, behaviour, torch.zeros(5_000, 1), noise, args_of())
    torch.testing.assert_close(log_pi, pi.log_prob(action), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_mu, mu.log_prob(action), rtol=0, atol=1e-9)
    assert error.max() < 1e-9
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
        net, args = gaussian_velocity(path), args_of(path=path, sampler_steps=steps)
        action, log_pi, *_ = gmpg.kl_terms(net, net, torch.zeros(50, 1), noise_of(50, args), args)
        exact = torch.distributions.Normal(MEAN, STD).log_prob(action).sum(-1)
        errors.append((log_pi - exact).abs().mean().item())
    assert errors[1] < 0.05 and math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("network", ["mlp", "paper"])
def test_networks_of_the_files_have_densities_that_are_exact(float64, network):
    torch.manual_seed(0)
    args, obs = args_of(network=network), torch.randn(6, 3)
    models = gmpg.build(3, 2, args)
    noise = noise_of(6, args)
    _, log_pi, *_ = gmpg.kl_terms(models["policy"], models["behaviour"], obs, noise, args)
    x, sample = noise["x"], lambda x, s: samplers.ode(gmpg.drive(models["policy"], s, args), x, 8, **gmpg.NODES)
    for row in range(6):
        one = lambda x: sample(x[None], obs[row : row + 1])[0]  # noqa: B023, E731
        whole = torch.autograd.functional.jacobian(one, x[row])
        expected = -0.5 * x[row].square().sum() - math.log(2 * math.pi) - whole.det().abs().log()
        torch.testing.assert_close(log_pi[row], expected, rtol=0, atol=1e-9)


def train_behaviour(draw, args, steps, action_dim=2, width=64, size=256, lr=3e-3):
    """A small model of the actions that draw(B) makes."""
    torch.manual_seed(0)
    net = gmpg.StateMLP(gmpg.Normalize(1), 1, action_dim, width)
    seeds, generator = Seeds(lambda seed: {"behaviour": net}, args), seeded()
    optimizer = Adam(seeds, "behaviour", lr, steps)

    def loss(models, batch, noise):
        return gmpg.matching_loss(models["behaviour"], batch.action, batch.obs, noise, args).mean(), {}

    for _ in range(steps):
        noise = gmpg.matching_noise((size,), action_dim, args, generator)
        gmpg.descend(seeds, optimizer, loss, batch_of(draw(size)), noise)
    return net.requires_grad_(False)


def train_policy(behaviour, reward, draw, args, steps, lr=3e-3):
    """GMPG's third phase, from the warm start."""
    policy = copy.deepcopy(behaviour).requires_grad_(True)
    models = {"critic": ExactCritic(reward), "behaviour": behaviour, "policy": policy}
    seeds, generator = Seeds(lambda seed: models, args), seeded(1)
    optimizer = Adam(seeds, "policy", lr, steps)
    for _ in range(steps):
        batch = batch_of(draw(256))
        noise = gmpg.policy_noise((256,), batch.action.shape[-1], args, generator)
        gmpg.descend(seeds, optimizer, partial(gmpg.policy_loss, args=args), batch, noise)
        yield policy


def last(iterator):
    *_, found = iterator
    return found


def two_blobs(n):
    return torch.tensor([[-0.5, 0.3], [0.5, -0.2]])[torch.randint(2, (n,))] + 0.2 * torch.randn(n, 2)


def test_density_of_a_trained_flow_integrates_to_1():
    args = args_of(path="gvp")
    net = train_behaviour(two_blobs, args, 300)
    axis = torch.arange(-2, 2, 0.05)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_mu, error = samplers.log_density(gmpg.drive(net, grid[:, :1] * 0, args), grid, 8, **gmpg.NODES)
    assert log_mu.exp().sum().item() * 0.05**2 == pytest.approx(1, abs=0.01)
    assert log_mu.exp().max() > 0.5


def test_hutchinson_agrees_with_exact_on_average():
    policy, behaviour = (Net(lambda x, t, obs, k=k: torch.sin(k * x.roll(1, -1)) + 0.5 * x) for k in (1.0, 0.7))
    obs, found = torch.zeros(5_000, 1), {}
    for divergence in ("exact", "hutchinson"):
        args = args_of(divergence=divergence)
        found[divergence] = gmpg.kl_terms(policy, behaviour, obs, noise_of(5_000, args, seed=3), args)
    exact, estimate = found["exact"], found["hutchinson"]
    assert torch.equal(exact[0], estimate[0])
    for k in (1, 2):
        gap = estimate[k] - exact[k]
        assert gap.std() > 0.01 and gap.mean().abs() < 4 * gap.std() / math.sqrt(5_000) + 1e-3


def test_auto_is_exact_up_to_24_dimensions():
    for size in (24, 25):
        net, probes = Net(lambda x, t, obs: 0.5 * torch.sin(x.roll(1, -1)), size), []
        for divergence in ("auto", "exact", "hutchinson"):
            args = args_of(divergence=divergence)
            probes.append(gmpg.kl_terms(net, net, torch.zeros(4, 1), noise_of(4, args, action_dim=size), args)[1])
        assert torch.equal(probes[0], probes[1 if size == 24 else 2])
        assert not torch.equal(probes[1], probes[2])


def test_policy_noise_holds_what_args_ask_for_from_its_generator_alone():
    state = torch.get_rng_state()
    for changes, names in [
        ({}, {"x"}),
        (dict(divergence="hutchinson"), {"x", "probe", "score_probe"}),
        (dict(gradient="matching"), {"x", "t", "eps"}),
        (dict(gradient="matching", path="icfm"), {"x", "t", "eps", "blur"}),
    ]:
        args = args_of(**dict(path="gvp") | changes)
        one, same, other = (gmpg.policy_noise((3, 500), 2, args, seeded(seed)) for seed in (1, 1, 2))
        assert one.keys() == names
        for name, values in one.items():
            assert values.shape == ((3, 500) if name == "t" else (3, 500, 2))
            assert torch.equal(values, same[name]) and not torch.equal(values, other[name])
        if "probe" in names:
            assert set(one["probe"].unique().tolist()) == set(one["score_probe"].unique().tolist()) == {-1.0, 1.0}
            assert (one["probe"] * one["score_probe"]).mean().abs() < 0.1
    assert torch.equal(state, torch.get_rng_state())


# The gradient


def gradient(models, batch, args, seed=0):
    loss, _ = gmpg.policy_loss(models, batch, noise_of(len(batch.obs), args, seed), args)
    return torch.autograd.grad(loss, models["policy"].parameters())


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def differences(models, batch, args, directions, step=1e-6):
    """Central differences of the loss along directions of the policy's parameters, the noise the same every time."""
    found, start = [], nn.utils.parameters_to_vector(models["policy"].parameters()).detach()
    for direction in directions:
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * direction, models["policy"].parameters())
            values.append(gmpg.policy_loss(models, batch, noise_of(len(batch.obs), args), args)[0].item())
        found.append((values[0] - values[1]) / (2 * step))
    nn.utils.vector_to_parameters(start, models["policy"].parameters())
    return torch.tensor(found)


def gradient_problem(path):
    models, g = small_models(path), torch.Generator().manual_seed(4)
    obs, action = torch.randn(8, 2, generator=g), torch.rand(8, 2, generator=g) * 2 - 1
    count = sum(p.numel() for p in models["policy"].parameters())
    return models, batch_of(action, obs), torch.randn(12, count, generator=g)


@each_path
@pytest.mark.parametrize("mode", ["pathwise", "matching", "hutchinson"])
def test_the_gradient_is_that_of_differences(float64, path, mode):
    models, batch, directions = gradient_problem(path)
    args = args_of(path=path, sampler_steps=4, beta=0.5)
    args = {"pathwise": args, "matching": args_of(path=path, sampler_steps=4, gradient="matching")}.get(
        mode, args_of(path=path, sampler_steps=4, divergence="hutchinson")
    )
    exact = differences(models, batch, args, directions)
    found = directions @ flat(gradient(models, batch, args))
    assert (found - exact).norm() < 1e-5 * exact.norm()


def detached_log_density(net, action, obs, args):
    """log_density with the state detached in every step, as the reference code's adjoint has it."""
    drift, x, log_dets = gmpg.drive(net, obs, args), action, 0
    for s, t in pairwise(samplers.time_grid(args.sampler_steps, action, 2.0).flip(0)):
        step = lambda z, t=t, s=s: samplers.euler(drift, z, t, s)  # noqa: E731
        start = samplers.invert(step, x.detach(), 6).detach()
        log_dets = log_dets + samplers.with_log_det(step, start, None)[1]
        x = x + (t - s) * drift(start, t)
    return samplers.log_normal(x) - log_dets


def test_a_likelihood_with_its_state_detached_has_another_gradient(float64):
    torch.set_default_dtype(torch.float32)
    args = args_of(path="gvp", beta=0.0)
    behaviour = train_behaviour(two_blobs, args, 300, width=32).double()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    policy = copy.deepcopy(behaviour).requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models = {"critic": ExactCritic(lambda action: action.sum(-1)), "behaviour": behaviour, "policy": policy}
    batch = batch_of(torch.zeros(64, 2))
    directions = torch.randn(8, sum(p.numel() for p in policy.parameters()))
    right, exact = flat(gradient(models, batch, args)), differences(models, batch, args, directions)
    action, log_pi, log_mu, _ = gmpg.kl_terms(policy, behaviour, batch.obs, noise_of(64, args), args)
    detached = [detached_log_density(net, action, batch.obs, args) for net in (policy, behaviour)]
    torch.testing.assert_close(detached, [log_pi, log_mu])
    wrong = flat(torch.autograd.grad((detached[0] - detached[1]).mean(), policy.parameters()))
    assert (directions @ right - exact).norm() < 1e-5 * exact.norm()
    assert torch.cosine_similarity(right, wrong, 0) < 0.99


def test_reinforce_has_the_pathwise_gradient_on_average():
    models, means = small_models("gvp", scale=1.0), {}
    models["critic"] = ExactCritic(lambda action: torch.sin(3 * action).sum(-1))
    batch = batch_of(torch.zeros(8192, 2), torch.zeros(8192, 2))
    for name in ("pathwise", "reinforce"):
        args = args_of(gradient=name, sampler_steps=4)
        means[name] = torch.stack([flat(gradient(models, batch, args, seed)) for seed in range(8)])
    pathwise, reinforce = means["pathwise"].mean(0), means["reinforce"].mean(0)
    assert torch.cosine_similarity(pathwise, reinforce, 0) > 0.95
    assert reinforce.norm() / pathwise.norm() == pytest.approx(1, abs=0.1)


def test_reinforce_subtracts_v_and_reports_the_same_metrics():
    models, batch, found = small_models("gvp"), batch_of(torch.zeros(16, 2), torch.randn(16, 2)), {}
    noise = noise_of(16, args_of())
    for name in ("pathwise", "reinforce"):
        found[name] = gmpg.policy_loss(models, batch, noise, args_of(gradient=name))
    (_, metrics), (loss, same) = found["pathwise"], found["reinforce"]
    for key in ("policy/q", "policy/kl", "policy/undone"):
        torch.testing.assert_close(metrics[key], same[key])
    action, log_pi, log_mu, _ = gmpg.kl_terms(models["policy"], models["behaviour"], batch.obs, noise, args_of())
    q = models["critic"].q(batch.obs, action.clamp(-1, 1)).amin(0)
    each = -2 * (q - models["critic"].v(batch.obs)) + log_pi - log_mu
    torch.testing.assert_close(loss, (each * log_pi).mean(), rtol=1e-4, atol=1e-4)


def test_pathwise_loss_is_eq_14_with_the_smaller_online_q():
    models, batch = small_models("gvp"), batch_of(torch.zeros(64, 2), torch.randn(64, 2))
    with torch.no_grad():
        for parameter in models["critic"].target_q.parameters():
            parameter.add_(1)
    noise = noise_of(64, args_of())
    loss, metrics = gmpg.policy_loss(models, batch, noise, args_of(beta=3.0))
    action, log_pi, log_mu, _ = gmpg.kl_terms(models["policy"], models["behaviour"], batch.obs, noise, args_of())
    x = torch.cat([batch.obs, action.clamp(-1, 1)], -1)
    q = torch.minimum(*(head(x).squeeze(-1) for head in heads(models["critic"].q)))
    torch.testing.assert_close(loss, (-3 * q + log_pi - log_mu).mean())
    torch.testing.assert_close(metrics["policy/q"], q.mean())
    torch.testing.assert_close(metrics["policy/kl"], (log_pi - log_mu).mean())
    assert (action.abs() > 1).any() and not any(m.requires_grad for m in metrics.values())


@each_path
def test_matching_is_eq_5_minus_beta_q_of_the_action(path):
    models, args = small_models(path), args_of(path=path, gradient="matching", beta=3.0)
    batch = batch_of(torch.rand(64, 2), torch.randn(64, 2))
    noise = noise_of(64, args)
    (loss, _), x = gmpg.policy_loss(models, batch, noise, args), noise["x"]
    for t, s in pairwise((1 - k / 8) ** 2 for k in range(9)):
        x = x - (t - s) * models["policy"](x, torch.full((64,), t), batch.obs)
    q = models["critic"].q(batch.obs, x.clamp(-1, 1)).amin(0)
    matching = gmpg.matching_loss(models["policy"], batch.action, batch.obs, noise, args)
    torch.testing.assert_close(loss, matching.mean() - 3 * q.mean())


@pytest.mark.parametrize("mode", ["pathwise", "reinforce", "matching"])
def test_training_starts_at_the_behaviour_and_moves_the_policy_alone(tmp_path, monkeypatch, mode):
    args = gmpg.Args(
        env="bandit", device="cpu", run_dir=tmp_path / "run", critic_steps=2, behaviour_steps=2, policy_steps=2,
        sampler_steps=2, batch_size=8, policy_batch_size=8, eval_every=2, gradient=mode,
    )  # fmt: skip
    policy_loss, seen, before = gmpg.policy_loss, [], []

    def watched(models, batch, noise, args):
        frozen = [p for name in ("critic", "behaviour") for p in models[name].parameters()]
        if not seen:
            before.extend(p.clone() for p in frozen)
            assert torch.equal(flat(models["policy"].parameters()), flat(models["behaviour"].parameters()))
        seen.append(models)
        return policy_loss(models, batch, noise, args)

    monkeypatch.setattr(gmpg, "policy_loss", watched)
    gmpg.train(args)
    models = seen[1]
    frozen = [p for name in ("critic", "behaviour") for p in models[name].parameters()]
    assert len(seen) == 2 and all(map(torch.equal, frozen, before))
    assert not torch.equal(flat(models["policy"].parameters()), flat(models["behaviour"].parameters()))


# The divergence and the optimum


@each_path
def test_the_divergence_is_0_at_the_warm_start_and_never_negative_on_the_way(path):
    args = args_of(path=path, beta=20.0)
    behaviour = train_behaviour(two_blobs, args, 200)
    obs, noise = torch.zeros(1000, 1), noise_of(1000, args)
    _, log_pi, log_mu, error = gmpg.kl_terms(copy.deepcopy(behaviour), behaviour, obs, noise, args)
    torch.testing.assert_close(log_pi, log_mu, rtol=0, atol=1e-4)
    assert error.max() < 1e-5
    for step, policy in enumerate(train_policy(behaviour, lambda action: action.sum(-1), two_blobs, args, 30)):
        with torch.no_grad():
            noise = noise_of(256, args, seed=100 + step)
            _, log_pi, log_mu, _ = gmpg.kl_terms(policy, behaviour, torch.zeros(256, 1), noise, args)
        each = log_pi - log_mu
        assert each.mean() >= -3 * each.std() / math.sqrt(256)
    assert each.mean() > 0.1


def gaussian(n):
    return MEAN + STD * torch.randn(n, 2)


def samples(policy, args, n=20_000):
    with torch.no_grad():
        return gmpg.act({"policy": policy}, torch.zeros(n, 1), gmpg.acting_noise(n, 2, args, seeded(2)), args)


def test_act_is_in_bounds_and_its_noise_controls_it():
    args, obs = args_of(), torch.randn(64, 3, generator=seeded())
    models, state = gmpg.build(3, 2, args), torch.get_rng_state()
    noises = [gmpg.acting_noise(64, 2, args, seeded(seed)) for seed in (1, 1, 2)]
    with torch.no_grad():
        first, same, other = (gmpg.act(models, obs, noise, args) for noise in noises)
    assert first.shape == (64, 2) and (first.abs() <= 1).all() and (first.abs() == 1).any()
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# Euler's steps change the width of a Gaussian: on the straight path the most (-5 % of 32 steps, -18 % of 8).
STEPS = {"vp": 16, "gvp": 16, "icfm": 32}


@each_path
def test_a_gaussian_with_a_linear_reward_shifts_by_beta_variance_slope(path):
    slope, args = torch.tensor([1.2, -0.9]), args_of(path=path, sampler_steps=STEPS[path])
    behaviour = train_behaviour(gaussian, args, 800, size=512, lr=1e-2)
    policy = last(train_policy(behaviour, lambda action: action @ slope, gaussian, args, 40))
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
        log_pi, _ = samplers.log_density(
            gmpg.drive(policy, torch.zeros(801, 1), args), grid, args.sampler_steps, **gmpg.NODES
        )
    pi, target = log_pi.exp() * 0.005, target(grid[:, 0])
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
    policy = last(train_policy(behaviour, lambda action: action.sum(-1), mixture, args, 80, lr=1e-2))
    assert total_variation(policy, target, args) < 0.05


def test_beta_0_stays_at_the_behaviour():
    args = args_of(path="gvp", beta=0.0)
    behaviour = train_behaviour(mixture, args, 300, action_dim=1)
    policy = last(train_policy(behaviour, lambda action: 100 * action.sum(-1), mixture, args, 20, lr=1e-3))
    noise = noise_of(1000, args, action_dim=1)
    _, log_pi, log_mu, _ = gmpg.kl_terms(policy, behaviour, torch.zeros(1000, 1), noise, args)
    assert (log_pi - log_mu).mean().abs() < 0.01


# The table


def test_betas_are_the_references_times_a_ln_2():
    reference = dict.fromkeys((f"antmaze-{maze}-v0" for maze in MAZES), 1) | {
        "halfcheetah-medium-v2": 1, "halfcheetah-medium-expert-v2": 4, "halfcheetah-medium-replay-v2": 4,
        "hopper-medium-v2": 20, "hopper-medium-expert-v2": 4, "hopper-medium-replay-v2": 8,
        "walker2d-medium-v2": 1, "walker2d-medium-expert-v2": 4, "walker2d-medium-replay-v2": 8,
    }  # fmt: skip
    assert reference.keys() == gmpg.PAPER.keys() - {"*", "halfcheetah-demo", "bandit", "own file"}
    for name, beta in reference.items():
        size = {"halfcheetah": 6, "hopper": 3, "walker2d": 6, "antmaze": 8}[name.split("-")[0]]
        assert gmpg.PAPER[name]["beta"] == pytest.approx(beta * size * math.log(2), rel=3e-3), name
