"""GMPO against closed forms: the paths, the matching loss, the sampled Gaussian, Eqs. (8) and (9) written by hand."""

import dataclasses
import importlib
import math

import pytest
import sync
import torch
from helpers import heads
from torch import nn

import gmpo
from common import datasets, samplers
from common.training import Adam, Seeds

torch.set_num_threads(1)
PATHS = ["vp", "gvp", "icfm"]
SOLVERS = ["ddim", "dpmpp", "euler", "midpoint", "rk4", "sde"]
MEAN = torch.tensor([0.4, -0.2])
COV = torch.tensor([[0.30, 0.12], [0.12, 0.20]])
each_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(params=[name for name in sync.files() if "alpha_sigma" in sync.definitions(name)])
def algorithm(request):
    return importlib.import_module(request.param.removesuffix(".py"))


def args_of(**changes):
    return gmpo.Args(**dict(device="cpu", expectile=0.7, beta=2.0, weight_max=100.0) | changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def acting(n, args, seed=0, action_dim=2):
    return gmpo.acting_noise(n, action_dim, args, seeded(seed))


def matching(n, args, seed=0, action_dim=2):
    return gmpo.matching_noise((n,), action_dim, args, seeded(seed))


class Net(nn.Module):
    """A function of (x, t, obs) in the place of a network."""

    def __init__(self, function, action_dim=2):
        super().__init__()
        self.function, self.action_dim, self.scale = function, action_dim, nn.Parameter(torch.ones(()))

    def forward(self, x, t, obs):
        return self.scale * self.function(x, t, obs)


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


@each_path
def test_derivatives_of_the_path_are_autograd_and_differences(algorithm, path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    h = 1e-6
    ahead, behind = (algorithm.alpha_sigma(t.detach() + s * h, path) for s in (1, -1))
    for k, derivative in enumerate(algorithm.d_alpha_sigma(t, path)):
        exact = torch.autograd.grad(algorithm.alpha_sigma(t, path)[k].sum(), t)[0]
        torch.testing.assert_close(derivative, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(derivative.detach(), (ahead[k] - behind[k]) / (2 * h), rtol=1e-7, atol=1e-7)


@each_path
def test_the_path_is_the_hand_written_one(algorithm, path):
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    functions = (*algorithm.alpha_sigma(t, path), *algorithm.d_alpha_sigma(t, path))
    for function, expected in zip(functions, hand_path(t, path)):
        torch.testing.assert_close(function, expected, rtol=1e-10, atol=1e-12)


def test_vp_decays_at_half_of_beta_with_its_constant_term(algorithm):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[1:]
    rate = algorithm.d_alpha_sigma(t, "vp")[0] / algorithm.alpha_sigma(t, "vp")[0]
    torch.testing.assert_close(rate, -(0.1 + 19.9 * t) / 2)


@pytest.mark.parametrize("path", ["vp", "gvp"])
def test_variance_is_preserved(algorithm, path):
    alpha, sigma = algorithm.alpha_sigma(torch.linspace(0, 1, 50, dtype=torch.float64), path)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(50, dtype=torch.float64))


@each_path
def test_the_path_begins_at_the_action_and_ends_at_the_noise(algorithm, path):
    alpha, sigma = algorithm.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    left = math.exp(-5.025) if path == "vp" else 0.0
    torch.testing.assert_close(alpha, torch.tensor([1.0, left]).double(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(sigma, torch.tensor([0.0, math.sqrt(1 - left**2)]).double(), atol=1e-9, rtol=1e-6)


def test_sigma_of_vp_is_accurate_near_0_in_float32(algorithm):
    t = torch.logspace(-6, 0, 200)
    sigma, exact = algorithm.alpha_sigma(t, "vp")[1], torch.sqrt(-torch.expm1(-(0.1 * t + 9.95 * t**2).double()))
    torch.testing.assert_close(sigma.double(), exact, rtol=1e-5, atol=0)


# The matching loss


@each_path
def test_matching_loss_is_half_the_sum_over_dimensions_by_hand(algorithm, path):
    net = Net(lambda x, t, obs: x * t[:, None] + obs.sum(-1, keepdim=True))
    action, obs = torch.randn(7, 2, generator=seeded()), torch.randn(7, 3, generator=seeded(1))
    args = algorithm.Args(path=path)
    noise = algorithm.matching_noise((7,), 2, args, seeded(5))
    loss, t, eps = algorithm.matching_loss(net, action, obs, noise, args), noise["t"], noise["eps"]
    alpha, sigma, d_alpha, d_sigma = (c[:, None].float() for c in hand_path(t, path))
    target = eps if algorithm.PREDICTS[path] == "noise" else d_alpha * action + d_sigma * eps
    out = (alpha * action + sigma * eps) * t[:, None] + obs.sum(-1, keepdim=True)
    torch.testing.assert_close(loss, ((out - target) ** 2)[:, 0] / 2 + ((out - target) ** 2)[:, 1] / 2)
    loss.mean().backward()
    assert net.scale.grad != 0


@each_path
def test_matching_noise_is_a_uniform_time_and_normal_noise_of_any_shape(algorithm, path):
    state, args = torch.get_rng_state(), algorithm.Args(path=path)
    noise, same = (algorithm.matching_noise((3, 20_000), 2, args, seeded(5)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert noise.keys() == {"t", "eps"} | ({"blur"} if path == "icfm" else set())
    assert all(torch.equal(noise[name], same[name]) for name in noise)
    t, *normals = noise.values()
    assert t.shape == (3, 20_000) and (t >= 0).all() and (t < 1).all()
    torch.testing.assert_close(t.flatten().sort()[0], (torch.arange(60_000) + 0.5) / 60_000, rtol=0, atol=0.01)
    columns = torch.cat([x.flatten(0, 1) for x in normals], -1).T  # eps and blur, independent of each other
    assert all(x.shape == (3, 20_000, 2) for x in normals)
    torch.testing.assert_close(columns.mean(1), torch.zeros(len(columns)), rtol=0, atol=0.02)
    torch.testing.assert_close(columns.cov(), torch.eye(len(columns)), rtol=0, atol=0.03)


def test_icfm_sigma_is_extra_noise_in_x_and_not_in_the_target(algorithm):
    seen = []
    net = Net(lambda x, t, obs: seen.append((x, t)) or torch.zeros_like(x))
    action, obs = torch.full((20_000, 2), 0.5), torch.zeros(20_000, 1)
    losses, noise = [], algorithm.matching_noise((20_000,), 2, algorithm.Args(path="icfm"), seeded())
    for sigma in (0.0, 0.1):
        losses.append(algorithm.matching_loss(net, action, obs, noise, algorithm.Args(path="icfm", icfm_sigma=sigma)))
    assert torch.equal(*losses)
    extra = seen[1][0] - seen[0][0]
    assert extra.std().item() == pytest.approx(0.1, rel=0.02) and abs(extra.mean().item()) < 2e-3
    assert torch.equal(seen[0][1], seen[1][1])


@each_path
def test_matching_loss_is_smallest_at_the_conditional_expectation(algorithm, path):
    action = MEAN + torch.randn(100_000, 2, generator=seeded()) @ torch.linalg.cholesky(COV).T
    obs, args, predicts = torch.zeros(100_000, 1), algorithm.Args(path=path), algorithm.PREDICTS[path]
    noise = algorithm.matching_noise((100_000,), 2, args, seeded(1))

    def loss(scale, shift):
        net = Net(lambda x, t, obs: scale * exact_prediction(x, t, path, predicts) + shift * x)
        each = algorithm.matching_loss(net, action, obs, noise, args)
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


def test_velocity_of_vp_moves_action_and_noise(algorithm, monkeypatch):
    monkeypatch.setitem(algorithm.PREDICTS, "vp", "noise")
    action, eps, t = torch.randn(5, 2), torch.randn(5, 2), torch.tensor(0.4)
    alpha, sigma, d_alpha, d_sigma = (c.float() for c in hand_path(t, "vp"))
    found = algorithm.velocity(Net(lambda x, t, obs: eps), alpha * action + sigma * eps, t, torch.zeros(5, 1), "vp")
    torch.testing.assert_close(found, d_alpha * action + d_sigma * eps, rtol=1e-4, atol=1e-4)


@each_path
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_recovers_a_gaussian_on_every_path(path, solver):
    n, steps = 10_000, 200 if solver in ("dpmpp", "midpoint", "rk4") else 400
    args = args_of(path=path, solver=solver, sampler_steps=steps)
    with torch.no_grad():
        action = gmpo.sample(exact_net(path), torch.zeros(n, 1), acting(n, args), args)
    torch.testing.assert_close(action.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(action.T.cov(), COV, atol=0.015, rtol=0)


@each_path
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solvers_name_means_that_solver(path, solver):
    net, obs = exact_net(path), torch.zeros(9, 1)
    args = args_of(path=path, solver=solver, sampler_steps=5)
    noise = acting(9, args)
    found, (x, *z) = gmpo.sample(net, obs, noise, args), noise["x"]
    assert len(z) == (5 if solver == "sde" else 0)
    velocity = lambda x, t: gmpo.velocity(net, x, t, obs, path)  # noqa: E731
    eps, schedule = lambda x, t: gmpo.noise_prediction(net, x, t, obs, path), lambda t: gmpo.alpha_sigma(t, path)
    expected = {
        "ddim": lambda: samplers.ddim(eps, schedule, x, 5),
        "dpmpp": lambda: samplers.dpm_solver_pp(eps, schedule, x, 5),
        "sde": lambda: samplers.sde(eps, schedule, x, torch.stack(z)),
    }
    torch.testing.assert_close(found, expected.get(solver, lambda: samplers.ode(velocity, x, 5, solver))())


@each_path
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_meets_nan_at_the_ends(path, solver):
    args = args_of(path=path, solver=solver, sampler_steps=3)
    net = Net(lambda x, t, obs: torch.tanh(x))
    assert gmpo.sample(net, torch.zeros(50, 1), acting(50, args), args).isfinite().all()


@pytest.mark.parametrize("network", ["mlp", "paper"])
@pytest.mark.parametrize("solver", ["ddim", "sde", "euler"])
def test_act_is_in_bounds_and_its_noise_controls_it(network, solver):
    args, obs = args_of(network=network, solver=solver, sampler_steps=4), torch.randn(64, 3, generator=seeded())
    models = gmpo.build(3, 2, args)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, same, other = (gmpo.act(models, obs, acting(64, args, seed), args) for seed in (1, 1, 2))
    assert first.shape == (64, 2) and (first.abs() <= 1).all() and (first.abs() == 1).any()
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# Sections 5 and 7: weights, candidates, losses


def build(args):
    """Networks of which each head of the critic is the smaller one about as often."""
    torch.manual_seed(0)
    models, data = gmpo.build(3, 2, args), dataset()
    with torch.no_grad():
        values = models["critic"].q(data.obs, data.action)
        models["critic"].q.biases[-1] -= values.mean(-1)[:, None, None]
    return models


def dataset(n=40):
    g = seeded(3)
    obs = torch.randint(-9, 10, (n, 3), generator=g).float() / 10
    action = torch.rand(n, 2, generator=g) * 2 - 1
    return datasets.Dataset(obs, action, torch.randn(n, generator=g), obs, torch.zeros(n))


def at_the_state():
    """A net of the straight path whose every sample is the action obs[:2]: dx/dt = (x - a) / t."""
    return Net(lambda x, t, s: (x - s[:, :2]) / t[:, None])


def test_candidates_belong_to_their_state():
    args = args_of(path="icfm", solver="euler", sampler_steps=4, candidates=5)
    critic, obs = build(args)["critic"], dataset().obs
    action, weight = gmpo.candidates(critic, at_the_state(), obs, acting(40 * 5, args), args)
    assert action.shape == (40, 5, 2) and weight.shape == (40, 5)
    torch.testing.assert_close(action, obs[:, None, :2].expand(40, 5, 2), atol=1e-5, rtol=0)


def test_candidates_are_weighted_by_a_softmax_over_the_k_of_a_state():
    args = args_of(sampler_steps=3, candidates=4, beta=3.0, actions="static")
    models, obs = build(args), dataset().obs
    action, weight = gmpo.candidates(models["critic"], models["behaviour"], obs, acting(40 * 4, args), args)
    assert (action.abs() <= 1).all() and action.std(1).min() > 0
    for b in range(3):
        x = torch.cat([obs[b].expand(4, 3), action[b]], -1)
        q = torch.minimum(*(head(x).squeeze(-1) for head in heads(models["critic"].q)))
        expected = torch.exp(3 * q) / torch.exp(3 * q).sum()
        torch.testing.assert_close(weight[b], expected.detach())


def test_weighted_actions_of_data_are_the_batchs_own_with_eq_7():
    args, data = args_of(actions="data", weight_max=0.9), dataset()
    models = build(args)
    table = gmpo.weighted_actions(models, 0, data, args)
    assert table.keys() == {"weight"}  # the actions are in the batch; see the policy step below
    q, weight = models["critic"].q(data.obs, data.action).amin(0), table["weight"]
    expected = torch.exp(2 * (q - models["critic"].v(data.obs))).clamp(max=0.9)
    torch.testing.assert_close(weight, expected[:, None].detach())
    assert (weight == 0.9).any() and (weight < 0.9).any()


def test_static_actions_are_drawn_once_from_a_stream_of_their_own():
    args, data = args_of(actions="static", sampler_steps=2, candidates=3), dataset()
    models = build(args)
    state = torch.get_rng_state()
    first = gmpo.weighted_actions(models, 7, data, args)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again, other = (gmpo.weighted_actions(models, seed, data, args) for seed in (7, 8))
    assert first.keys() == {"action", "weight"}
    assert first["action"].shape == (40, 3, 2) and first["weight"].shape == (40, 3)
    assert torch.equal(first["action"], again["action"]) and torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["action"], other["action"])


@pytest.mark.parametrize("actions", ["data", "static", "resampled"])
def test_a_policy_step_takes_the_actions_and_weights_that_args_name(monkeypatch, actions):
    args, data, index = args_of(actions=actions, sampler_steps=2, candidates=3), dataset(), torch.tensor([5, 0, 31, 5])
    models, policy_loss, seen = build(args), gmpo.policy_loss, []
    table = {} if actions == "resampled" else gmpo.weighted_actions(models, 0, data, args)
    noise = matching(4 * (1 if actions == "data" else 3), args)
    if actions == "resampled":
        noise |= acting(4 * 3, args, seed=1)
        expected = gmpo.candidates(models["critic"], models["behaviour"], data.obs[index], noise, args)
    else:
        expected = table.get("action", data.action[:, None])[index], table["weight"][index]

    def watched(policy, obs, action, weight, noise, args):
        seen.append((action, weight))
        return policy_loss(policy, obs, action, weight, noise, args)

    monkeypatch.setattr(gmpo, "policy_loss", watched)
    seeds = Seeds(lambda seed: models, args)
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    optimizers = {"policy_optimizer": Adam(seeds, "policy", 1e-3)}
    gmpo.updates(seeds, optimizers, data, table, args)["policy"](index, **noise)
    assert len(seen) == 1 and all(map(torch.equal, seen[0], expected))
    for name, model in models.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], model.parameters())]
        assert all(moved) if name == "policy" else not any(moved)


@pytest.mark.parametrize("k", [1, 4])
def test_policy_loss_is_eq_8_for_one_action_and_eq_9_for_k(k):
    args, n = args_of(weight_max=0.8), 6
    net = Net(lambda x, t, obs: x + obs[:, :2] * t[:, None])
    obs, action = torch.randn(n, 3, generator=seeded()), torch.rand(n, k, 2, generator=seeded(1))
    weight = torch.rand(n, k, generator=seeded(2))
    noise = matching(n * k, args, seed=9)
    loss, metrics = gmpo.policy_loss(net, obs, action, weight, noise, args)
    flat = torch.stack([obs[b] for b in range(n) for _ in range(k)])
    each = gmpo.matching_loss(net, action.reshape(n * k, 2), flat, noise, args)
    by_hand = sum(weight[b, j] * each[b * k + j] for b in range(n) for j in range(k)) / n
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(metrics["policy/weight"], weight.mean())
    torch.testing.assert_close(metrics["policy/clipped"], (weight >= 0.8).float().mean())
    loss.backward()
    assert net.scale.grad != 0


def test_beta_0_is_behaviour_cloning():
    args, data = args_of(beta=0.0), dataset()
    models = build(args)
    weight, noise = gmpo.weighted_actions(models, 0, data, args)["weight"], matching(40, args, seed=4)
    assert torch.equal(weight, torch.ones(40, 1))
    loss, metrics = gmpo.policy_loss(models["policy"], data.obs, data.action[:, None], weight, noise, args)
    torch.testing.assert_close(loss, gmpo.matching_loss(models["policy"], data.action, data.obs, noise, args).mean())
    assert metrics["policy/ess"].item() == pytest.approx(1)


def test_the_policy_needs_no_gradient_of_the_critic():
    args, data = args_of(actions="static", sampler_steps=2, candidates=2), dataset()
    models = build(args)
    table = gmpo.weighted_actions(models, 0, data, args)
    loss, _ = gmpo.policy_loss(models["policy"], data.obs, **table, noise=matching(40 * 2, args), args=args)
    loss.backward()
    assert all(p.grad is None for name in ("critic", "behaviour") for p in models[name].parameters())
    assert all(p.grad is not None for p in models["policy"].parameters())


def test_a_model_of_the_behaviour_is_built_only_where_it_is_sampled():
    assert "behaviour" not in gmpo.build(3, 2, args_of(actions="data"))
    assert "behaviour" in gmpo.build(3, 2, args_of(actions="static"))


# Networks


def test_paper_net_has_the_references_size(algorithm):
    net = algorithm.PaperNet(algorithm.Normalize(17), 17, 6)
    assert sum(p.numel() for p in net.parameters()) == 1_633_222
    assert net.frequencies.shape == (16,) and not net.frequencies.requires_grad


@pytest.mark.parametrize("sizes", [(6, 4), (4, 4)])
def test_a_block_of_paper_net_is_the_references(algorithm, sizes):
    block, x, e = algorithm.PaperBlock(*sizes), torch.randn(5, sizes[0]), torch.randn(5, 128)
    silu = lambda x: x * torch.sigmoid(x)  # noqa: E731
    first = silu(x @ block.first.weight.T + block.first.bias)
    first = first + silu(e) @ block.embedding.weight.T + block.embedding.bias
    second = silu(first @ block.second.weight.T + block.second.bias)
    skip = x if sizes[0] == sizes[1] else x @ block.skip.weight.T + block.skip.bias
    torch.testing.assert_close(block(x, e), second + skip)


@pytest.mark.parametrize("network", ["mlp", "paper"])
def test_networks_see_action_time_and_normalised_state(algorithm, network):
    torch.manual_seed(0)
    normalize = algorithm.Normalize(3)
    net = algorithm.NETWORKS[network](normalize, 3, 2)
    x, t, obs = torch.randn(5, 2), torch.rand(5), torch.randn(5, 3)
    out = net(x, t, obs)
    assert out.shape == (5, 2)
    for changed in (net(x + 1, t, obs), net(x, t + 0.1, obs), net(x, t, obs + 1)):
        assert not torch.allclose(out, changed, atol=1e-4)
    rows = torch.cat([net(x[i : i + 1], t[i : i + 1], obs[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(out, rows)
    normalize.fit(obs * 3 + 1)
    torch.testing.assert_close(net(x, t, obs * normalize.std + normalize.mean), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gmpo", "gmpg"])
def test_act_noise_scales_where_acting_starts_and_nothing_in_training(name):
    algorithm, obs = importlib.import_module(name), torch.randn(64, 3, generator=seeded())
    args = algorithm.Args(device="cpu", beta=1.0, sampler_steps=4)
    models = algorithm.build(3, 2, args)
    noise = algorithm.acting_noise(64, 2, args, seeded(1))
    half, none = (dataclasses.replace(args, act_noise=scale) for scale in (0.5, 0.0))
    with torch.no_grad():
        assert torch.equal(
            algorithm.act(models, obs, noise, half), algorithm.act(models, obs, {"x": noise["x"] / 2}, args)
        )
        other = algorithm.acting_noise(64, 2, args, seeded(2))
        assert torch.equal(*(algorithm.act(models, obs, n, none) for n in (noise, other)))
        assert not torch.equal(*(algorithm.act(models, obs, n, args) for n in (noise, other)))
    if name == "gmpo":
        critic, behaviour = models["critic"], models["policy"]
        assert torch.equal(*(gmpo.candidates(critic, behaviour, obs, gmpo.acting_noise(1024, 2, a, seeded()), a)[0]
                             for a in (args, none)))  # fmt: skip
    else:
        batch = datasets.Batch(obs, torch.zeros(64, 2), torch.zeros(64), obs, torch.zeros(64))
        noise = algorithm.policy_noise((64,), 2, dataclasses.replace(args, gradient="matching"), seeded())
        losses = [algorithm.policy_loss(models, batch, noise, dataclasses.replace(a, gradient="matching"))[0]
                  for a in (args, none)]  # fmt: skip
        assert torch.equal(*losses)
