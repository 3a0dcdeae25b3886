"""Every sampler against a closed form: Gaussian data makes velocity and noise prediction known, every step affine."""

import itertools
import math
from functools import partial

import pytest
import torch
import torchdiffeq
from helpers import seeded
from torch import nn
from torch.func import functional_call

from common import samplers

DTYPE = torch.float64
MEAN = torch.tensor([0.5, -0.3], dtype=DTYPE)
COV = torch.tensor([[0.30, 0.12], [0.12, 0.20]], dtype=DTYPE)
EYE = torch.eye(2, dtype=DTYPE)


def vp(t):
    alpha = torch.exp(-19.9 * t**2 / 4 - 0.1 * t / 2)
    return alpha, (1 - alpha**2).sqrt()


def gvp(t):
    return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)


def linear(t):
    return 1 - t, t


SCHEDULES = {"vp": vp, "gvp": gvp, "linear": linear}


def precision(schedule, t):
    """(x - alpha m) C^-1 with C = alpha^2 S + sigma^2 I, the covariance of x_t."""
    alpha, sigma = schedule(t)
    return lambda x: (x - alpha * MEAN) @ torch.linalg.inv(alpha**2 * COV + sigma**2 * EYE)


def gaussian_noise(schedule):
    """E[eps | x_t] for data N(MEAN, COV)."""
    return lambda x, t: schedule(t)[1] * precision(schedule, t)(x)


def gaussian_velocity(schedule):
    """alpha' E[a | x_t] + sigma' E[eps | x_t]; sigma' sigma = (sigma^2)' / 2 keeps it finite at t = 0."""

    def velocity(x, t):
        alpha, d_alpha = torch.func.jvp(lambda u: schedule(u)[0], (t,), (torch.ones_like(t),))
        squared = {"vp": lambda u: 1 - vp(u)[0] ** 2}.get(schedule.__name__, lambda u: schedule(u)[1] ** 2)
        d_variance = torch.func.jvp(squared, (t,), (torch.ones_like(t),))[1]
        whitened = precision(schedule, t)(x)
        return d_alpha * (MEAN + alpha * whitened @ COV) + d_variance / 2 * whitened

    return velocity


def affine(sampler):
    """Offset and matrix of a sampler that is affine in its noise: sampler(x) = offset + matrix x."""
    y = sampler(torch.cat([torch.zeros(1, 2, dtype=DTYPE), EYE]))
    return y[0], (y[1:] - y[0]).T


def gaussian_flow(schedule, start):
    """The same for the exact flow from t = start to 0: x -> m + S^1/2 C^-1/2 (x - alpha m), if S and C commute."""
    alpha, sigma = schedule(torch.tensor(start, dtype=DTYPE))
    values, vectors = torch.linalg.eigh(COV)
    matrix = vectors @ torch.diag((values / (alpha**2 * values + sigma**2)).sqrt()) @ vectors.T
    return MEAN - alpha * matrix @ MEAN, matrix


class Network(nn.Module):
    """A small velocity of an observation. LayerNorm is in it because its forward-mode second derivative is wrong."""

    def __init__(self, act_dim, obs=None, hidden=16, scale=1.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.obs, self.scale = obs, scale
        obs_dim = 0 if obs is None else obs.shape[-1]
        self.inward = nn.Linear(act_dim + obs_dim + 2, hidden)
        self.block = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU())
        self.outward = nn.Linear(hidden, act_dim)
        self.to(DTYPE)

    def forward(self, x, t):
        t = t.expand(x.shape[:-1]).unsqueeze(-1)
        x = torch.cat([x, t, torch.cos(3 * t)] + ([] if self.obs is None else [self.obs]), -1)
        hidden = torch.nn.functional.silu(self.inward(x))
        return self.scale * self.outward(hidden + self.block(hidden))


# ---- ode


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_ode_is_torchdiffeq_on_the_same_grid(method):
    network, x = Network(3), torch.randn(8, 3, dtype=DTYPE, generator=seeded())
    grid = torch.linspace(1, 0, 13, dtype=DTYPE)
    with torch.no_grad():
        expected = torchdiffeq.odeint(lambda t, x: network(x, t), x, grid, method=method)[-1]
        torch.testing.assert_close(samplers.ode(network, x, 12, method), expected, rtol=0, atol=1e-13)


def test_rk4_is_the_classical_one():
    """torchdiffeq's "rk4" is the 3/8 rule: equal on linear problems only, elsewhere of the same order."""
    x = torch.randn(8, 3, dtype=DTYPE, generator=seeded())
    z = -0.25 * 1.7
    growth = (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) ** 4
    torch.testing.assert_close(samplers.ode(lambda x, t: 1.7 * x, x, 4, "rk4"), growth * x, rtol=0, atol=1e-13)
    # without x it is Simpson's rule
    f = lambda t: torch.exp(2 * t)  # noqa: E731
    simpson = sum((f(t) + 4 * f(t - 0.125) + f(t - 0.25)) / 6 * 0.25 for t in torch.linspace(1, 0.25, 4, dtype=DTYPE))
    torch.testing.assert_close(samplers.ode(lambda x, t: f(t) + 0 * x, x, 4, "rk4"), x - simpson, rtol=0, atol=1e-13)
    network, grid = Network(3), torch.linspace(1, 0, 33, dtype=DTYPE)
    with torch.no_grad():
        other = torchdiffeq.odeint(lambda t, x: network(x, t), x, grid, method="rk4")[-1]
        torch.testing.assert_close(samplers.ode(network, x, 32, "rk4"), other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_ode_order(method, order):
    network, x = Network(3, scale=3.0), torch.randn(8, 3, dtype=DTYPE, generator=seeded())
    with torch.no_grad():
        ends = torch.tensor([1.0, 0.0], dtype=DTYPE)
        # not by dopri8: torchdiffeq interpolates its last step, which can be off by 1e-8, as much as rk4 is
        exact = torchdiffeq.odeint(lambda t, x: network(x, t), x, ends, method="dopri5", rtol=1e-12, atol=1e-12)[-1]
        errors = [(samplers.ode(network, x, n, method) - exact).norm() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_ode_order_on_a_linear_problem():
    x = torch.ones(1, 1, dtype=DTYPE)  # dx/dt = 2 t x: x(0) = x(1) / e
    for method, order in [("euler", 1), ("midpoint", 2), ("rk4", 4)]:
        errors = [(samplers.ode(lambda x, t: 2 * t * x, x, n, method) - math.exp(-1)).abs().item() for n in (40, 80)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_unknown_method_names_the_choices():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'heun'.*euler, midpoint, rk4"):
        samplers.ode(lambda x, t: x, x, 4, method="heun")


# ---- Gaussian data


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ode_recovers_a_gaussian(name, method):
    schedule, steps = SCHEDULES[name], {"euler": 500, "midpoint": 100, "rk4": 50}[method]
    offset, matrix = affine(lambda x: samplers.ode(gaussian_velocity(schedule), x, steps, method))
    flow_offset, flow_matrix = gaussian_flow(schedule, 1.0)
    tolerance = {"euler": 8e-3, "midpoint": 2e-3, "rk4": 1e-4}[method]
    torch.testing.assert_close(offset, flow_offset, rtol=0, atol=tolerance)
    torch.testing.assert_close(matrix, flow_matrix, rtol=0, atol=tolerance)
    # N(0, I) is not quite VP's marginal at t = 1: alpha is 0.0066 there
    torch.testing.assert_close(offset, MEAN, rtol=0, atol=1e-2)
    torch.testing.assert_close(matrix @ matrix.T, COV, rtol=0, atol=8e-3)


@pytest.mark.parametrize("sampler, steps, tolerance", [("ddim", 1000, 4e-3), ("dpm_solver_pp", 100, 1e-3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_samplers_recover_a_gaussian(name, sampler, steps, tolerance):
    schedule, sample = SCHEDULES[name], getattr(samplers, sampler)
    offset, matrix = affine(lambda x: sample(gaussian_noise(schedule), schedule, x, steps))
    flow_offset, flow_matrix = gaussian_flow(schedule, samplers.NOISE_START)
    torch.testing.assert_close(offset, flow_offset, rtol=0, atol=tolerance)
    torch.testing.assert_close(matrix, flow_matrix, rtol=0, atol=tolerance)
    torch.testing.assert_close(offset, MEAN, rtol=0, atol=1e-2)
    torch.testing.assert_close(matrix @ matrix.T, COV, rtol=0, atol=8e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sde_recovers_a_gaussian(name):
    schedule = SCHEDULES[name]
    x = torch.randn(20_000, 2, dtype=DTYPE, generator=seeded(1))
    torch.manual_seed(2)
    y = samplers.sde(gaussian_noise(schedule), schedule, x, 600)
    torch.testing.assert_close(y.mean(0), MEAN, rtol=0, atol=0.015)
    torch.testing.assert_close(y.T.cov(), COV, rtol=0, atol=0.01)
    # unlike the ODE's, its samples forget where they started
    assert torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1].abs() < 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_sde_redraws_the_share_of_noise_that_the_transition_has(name):
    """With one data point the noise in x_t is known at every node, and that of neighbours correlates like the SNR."""
    schedule, seen = SCHEDULES[name], []

    def noise(x, t):
        alpha, sigma = schedule(t)
        seen.append((x[:, 0] - alpha * MEAN[0]) / sigma)
        return (x - alpha * MEAN) / sigma

    x = schedule(torch.tensor(samplers.NOISE_START, dtype=DTYPE))[0] * MEAN
    x = x + torch.randn(40_000, 2, dtype=DTYPE, generator=seeded(1))
    torch.manual_seed(2)
    torch.testing.assert_close(samplers.sde(noise, schedule, x, 8), MEAN.expand_as(x))
    alpha, sigma = schedule(samplers.NOISE_START * torch.linspace(1, 0, 9, dtype=DTYPE) ** 2)
    expected = ((alpha[:-1] / sigma[:-1]) / (alpha[1:] / sigma[1:]))[:7]
    measured = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in itertools.pairwise(seen)])
    torch.testing.assert_close(measured, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.stack(seen[1:]).std(1), torch.ones(7, dtype=DTYPE), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp"])
def test_deterministic_samplers_are_exact_for_one_data_point(name, sampler):
    """x_t = alpha_t a + sigma_t eps with the same eps at every node, in however few steps."""
    schedule, seen = SCHEDULES[name], []

    def noise(x, t):
        alpha, sigma = schedule(t)
        seen.append((x - alpha * MEAN) / sigma)
        return seen[-1]

    x = torch.randn(5, 2, dtype=DTYPE, generator=seeded())
    for steps in (1, 2, 5):
        seen.clear()
        y = getattr(samplers, sampler)(noise, schedule, x, steps)
        torch.testing.assert_close(y, MEAN.expand_as(x), rtol=0, atol=1e-10)
        for eps in seen:
            torch.testing.assert_close(eps, seen[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm_solver_pp", 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_order_of_noise_samplers(name, sampler, order):
    schedule, sample = SCHEDULES[name], getattr(samplers, sampler)
    exact = gaussian_flow(schedule, samplers.NOISE_START)[1]
    errors = [
        (affine(lambda x, n=n: sample(gaussian_noise(schedule), schedule, x, n))[1] - exact).norm() for n in (160, 320)
    ]
    # at the action a step is long in lambda however short it is in t, and the second order comes with a logarithm
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ten_steps_keep_the_width_of_a_narrow_mode(name):
    """Data N(m, 0.1^2), whose flow is a scaling: on even nodes the samples would be 35 % to 72 % too narrow."""
    schedule, std = SCHEDULES[name], 0.1

    def noise(x, t):
        alpha, sigma = schedule(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)

    alpha, sigma = schedule(torch.tensor(samplers.NOISE_START, dtype=DTYPE))
    exact = std / (alpha**2 * std**2 + sigma**2).sqrt()
    matrix = affine(lambda x: samplers.dpm_solver_pp(noise, schedule, x, 10))[1]
    torch.testing.assert_close(matrix / exact, EYE, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_dpm_solver_pp_is_algorithm_2(name):
    """Written out as in the paper, with lambda, h and r, for a model that is not linear."""
    schedule, network, steps = SCHEDULES[name], Network(3), 6
    x = torch.randn(4, 3, dtype=DTYPE, generator=seeded())
    t = samplers.NOISE_START * torch.linspace(1, 0, steps + 1, dtype=DTYPE) ** 2
    alpha, sigma = schedule(t)
    lam = torch.log(alpha / sigma)
    y, data = x, []
    with torch.no_grad():
        for i in range(1, steps + 1):
            data.append((y - sigma[i - 1] * network(y, t[i - 1])) / alpha[i - 1])
            h = lam[i] - lam[i - 1]
            r = (lam[i - 1] - lam[i - 2]) / h
            second_order = 1 < i < steps
            d = (1 + 1 / (2 * r)) * data[-1] - 1 / (2 * r) * data[-2] if second_order else data[-1]
            y = sigma[i] / sigma[i - 1] * y - alpha[i] * (torch.exp(-h) - 1) * d
        torch.testing.assert_close(samplers.dpm_solver_pp(network, schedule, x, steps), y, rtol=1e-10, atol=1e-10)


def test_ddim_is_euler_on_the_linear_path():
    x = torch.randn(5, 2, dtype=DTYPE, generator=seeded())
    alpha, sigma = linear(torch.tensor(samplers.NOISE_START, dtype=DTYPE))
    velocity = lambda x, t: (gaussian_noise(linear)(x, t) - x) / (1 - t)  # noqa: E731
    expected = x
    for t, s in itertools.pairwise(samplers.NOISE_START * torch.linspace(1, 0, 11, dtype=DTYPE) ** 2):
        expected = samplers.euler(velocity, expected, t, s)
    torch.testing.assert_close(samplers.ddim(gaussian_noise(linear), linear, x, 10), expected, rtol=0, atol=1e-12)


# ---- noise


def test_each_step_of_the_sde_has_noise_of_its_own_and_the_last_has_none(monkeypatch):
    x, model, given = torch.ones(5, 2, dtype=DTYPE), lambda x, t: 0.1 * x, []
    monkeypatch.setattr(torch, "randn_like", lambda x: given.pop(0))
    z, changed = torch.randn(5, 5, 2, dtype=DTYPE, generator=seeded()), []
    for step in [None, *range(5)]:
        given[:] = z.clone()
        if step is not None:
            given[step] += 1
        changed.append(samplers.sde(model, gvp, x, 5))
    assert not given
    assert [not torch.equal(y, changed[0]) for y in changed[1:]] == [True] * 4 + [False]


# ---- derivative and inverse of a step


def euler_step(network):
    return lambda x: x - 0.125 * network(x, torch.tensor(0.5, dtype=DTYPE))


def test_the_jacobian_of_a_step_is_autograds():
    step, x = euler_step(Network(4, scale=8.0)), torch.randn(32, 4, dtype=DTYPE, generator=seeded(1))
    y, jacobian = samplers.with_jacobian(step, x)
    torch.testing.assert_close(y, step(x))
    for row in (0, 31):
        torch.testing.assert_close(jacobian[row], torch.autograd.functional.jacobian(step, x[row]))


def test_invert_undoes_a_step_and_one_iteration_is_not_enough():
    step, x = euler_step(Network(4, scale=8.0)), torch.randn(32, 4, dtype=DTYPE, generator=seeded(1))
    y = step(x)
    misses = [(step(samplers.invert(step, y, n)) - y).abs().max().item() for n in (1, 3, 8)]
    assert misses[0] > 1e-2 > misses[1] > 1e-10 > misses[2]
    torch.testing.assert_close(samplers.invert(step, y, 8), x)


def test_gradients_of_an_inverse_are_finite_differences():
    network, y = Network(2, hidden=3, scale=3.0), torch.randn(2, 2, dtype=DTYPE, generator=seeded(1)).requires_grad_()
    names, values = zip(*network.named_parameters())

    def inverted(y, *parameters):
        velocity = lambda x, t: functional_call(network, dict(zip(names, parameters)), (x, t))  # noqa: E731
        x = samplers.invert(euler_step(velocity), y, 8)
        return x, samplers.with_jacobian(euler_step(velocity), x)[1]

    assert torch.autograd.gradcheck(inverted, (y, *(v.detach().requires_grad_() for v in values)), atol=1e-7)


# ---- all of them


def every_sampler(model, x, steps=4):
    """Name -> a function without arguments that draws (B, A)."""
    calls = {method: partial(samplers.ode, model, x, steps, method) for method in samplers.METHODS}
    for name, schedule in SCHEDULES.items():
        calls[f"ddim {name}"] = partial(samplers.ddim, model, schedule, x, steps)
        calls[f"sde {name}"] = partial(samplers.sde, model, schedule, x, steps)
        calls[f"dpm_solver_pp {name}"] = partial(samplers.dpm_solver_pp, model, schedule, x, steps)
    return calls


def test_models_are_called_inside_the_interval():
    """From the noise down, on the sampler's nodes, and at t = 0 only in rk4's last stage."""
    times = []

    def model(x, t):
        assert t.shape == () and t.dtype == x.dtype
        times.append(t.item())
        return 0.1 * x

    for name, sample in every_sampler(model, torch.ones(2, 3, dtype=DTYPE)).items():
        times.clear()
        sample()
        if name == "midpoint":
            expected = [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
        elif name == "rk4":
            expected = [1, 0.875, 0.875, 0.75, 0.75, 0.625, 0.625, 0.5, 0.5, 0.375, 0.375, 0.25, 0.25, 0.125, 0.125, 0]
        else:
            top, power = (samplers.NOISE_START, 2) if " " in name else (1, 1)
            expected = [top * node**power for node in (1, 0.75, 0.5, 0.25)]
        assert times == pytest.approx(expected), name


def test_no_sampler_waits_for_the_device():
    """On the meta device there are no values: reading one (.item(), if tensor:, ...) raises."""
    x = torch.empty(2, 3, device="meta", dtype=torch.float32)
    for _, sample in every_sampler(lambda x, t: torch.tanh(x) * t, x).items():
        result = sample()
        result = result if isinstance(result, tuple) else (result,)
        assert all(y.device.type == "meta" and y.dtype == torch.float32 for y in result)
        assert {tuple(y.shape) for y in result} <= {(2, 3), (2,)}


def test_samplers_are_differentiable_and_keep_leading_dimensions():
    network = Network(3)
    x = torch.randn(2, 5, 3, dtype=DTYPE, generator=seeded()).requires_grad_()
    for sample in every_sampler(network, x).values():
        result = sample()
        result = result[0] if isinstance(result, tuple) else result
        assert result.shape[:2] == (2, 5)
        gradients = torch.autograd.grad(result.sum(), [x, *network.parameters()], allow_unused=True)
        for gradient in gradients[:-1]:
            assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0
