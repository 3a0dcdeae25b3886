"""Samplers: from noise to actions, and the log-density of the actions.

Time t runs over [0, 1], 0 = action (data), 1 = noise, and every sampler goes from 1 to 0. `x` is (..., A), usually
(B, A). `velocity` and `noise_prediction` are callables (x, t) -> (..., A) that act on every row by itself and get t as
a 0-dim tensor; a `schedule` is an elementwise callable t -> (alpha, sigma) with x_t = alpha_t a + sigma_t eps.

Everything is differentiable and never makes the host wait for the device. `sde` draws noise from torch's default
generator.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.functional import pad

Model = Callable[[Tensor, Tensor], Tensor]  # (..., A), () -> (..., A)
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]  # t -> alpha, sigma
Step = Callable[[Tensor], Tensor]  # one step of a sampler, (..., A) -> (..., A)

# A noise prediction says nothing about the action where alpha = 0, as at t = 1 of the cosine and the linear path: its
# samplers begin here. They take N(0, I) for the marginal: wrong by alpha (1.6e-3, 1e-3) of the data's mean and scale.
NOISE_START = 1.0 - 1e-3


# 1. From a velocity. One step of dx/dt = v(x, t), from time t to time s


def euler(velocity: Model, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x + (s - t) * velocity(x, t)


def midpoint(velocity: Model, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    half = (s - t) / 2
    return x + (s - t) * velocity(x + half * velocity(x, t), t + half)


def rk4(velocity: Model, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    half = (s - t) / 2
    k1 = velocity(x, t)
    k2 = velocity(x + half * k1, t + half)
    k3 = velocity(x + half * k2, t + half)
    k4 = velocity(x + (s - t) * k3, s)
    return x + (s - t) / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


METHODS = {"euler": euler, "midpoint": midpoint, "rk4": rk4}


def ode(velocity: Model, x: Tensor, steps: int, method: str = "euler") -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 1 to actions at t = 0: (..., A) -> (..., A).

    The probability-flow ODE (Song et al. 2021, arXiv 2011.13456, Eq. (13)) or a flow (Lipman et al. 2023, 2210.02747).
    `method` is "euler" (order 1, one evaluation a step), "midpoint" (2, two) or "rk4" (the classical Runge-Kutta, 4,
    four); any other raises ValueError. Euler and midpoint never evaluate at t = 0. rk4 does, in its very last stage: a
    velocity that is singular there (sigma' of the VP path) must guard itself.
    """
    if method not in METHODS:
        raise ValueError(f"unknown ODE method {method!r}: choose from {', '.join(METHODS)}")
    for t, s in pairwise(torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype)):
        x = METHODS[method](velocity, x, t, s)
    return x


# 2. From a noise prediction eps(x, t), which estimates the action as (x - sigma eps) / alpha


def noise_nodes(schedule: Schedule, steps: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, alpha and sigma at t = NOISE_START (k / steps)^2, dense at the action: three of (steps + 1,).

    A step in t is the longer for x the nearer it is to the action: ten even ones make a narrow mode half as wide.
    """
    t = NOISE_START * torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype) ** 2
    return t, *schedule(t)


def ddim(noise_prediction: Model, schedule: Schedule, x: Tensor, steps: int, redraw: bool = False) -> Tensor:
    """DDIM: Song et al. 2021 (arXiv 2010.02502), Eq. (12): (..., A) -> (..., A); with `redraw` it is `sde`."""
    grid, alphas, sigmas = noise_nodes(schedule, steps, x)
    for t, (alpha, alpha_next), (sigma, sigma_next) in zip(grid, pairwise(alphas), pairwise(sigmas)):
        eps = noise_prediction(x, t)
        action = (x - sigma * eps) / alpha
        if redraw:
            kept = (alpha * sigma_next) / (alpha_next * sigma)  # in [0, 1): the ratio of alpha / sigma before and after
            eps = kept * eps + (1 - kept**2).sqrt() * torch.randn_like(x)
        x = alpha_next * action + sigma_next * eps
    return x


def sde(noise_prediction: Model, schedule: Schedule, x: Tensor, steps: int) -> Tensor:
    """The reverse-time SDE of Song et al. 2021 (arXiv 2011.13456), Eq. (6): (..., A) -> (..., A).

    Each step draws from q(x_s | x_t, a) at the estimated action a: ancestral sampling, eta = 1 in DDIM's Eq. (12). To
    first order in the step this is Euler-Maruyama, but needs neither the drift and diffusion, infinite where alpha = 0,
    nor 1 / sigma at t = 0.
    """
    return ddim(noise_prediction, schedule, x, steps, redraw=True)


def dpm_solver_pp(noise_prediction: Model, schedule: Schedule, x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), Algorithm 2, on the nodes above: (..., A) -> (..., A).

    DDIM with the action estimate extrapolated along lambda = log(alpha / sigma), which makes it second order. The first
    step has nothing to extrapolate from and the last one goes to lambda = infinity: these two are plain DDIM steps.
    """
    grid, alphas, sigmas = noise_nodes(schedule, steps, x)
    gaps = (alphas / sigmas)[:-1].log().diff()
    weights = pad(gaps[1:] / (2 * gaps[:-1]), (1, 1))  # 1 / (2 r) in the paper; 0 at both ends
    previous = torch.zeros_like(x)
    for t, weight, (alpha, alpha_next), (sigma, sigma_next) in zip(grid, weights, pairwise(alphas), pairwise(sigmas)):
        action = (x - sigma * noise_prediction(x, t)) / alpha
        ahead = action + weight * (action - previous)
        x = alpha_next * ahead + sigma_next * (x - alpha * ahead) / sigma
        previous = action
    return x


# 3. Derivative and inverse of a step, for the density of the actions that it makes


def with_jacobian(step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = step(x) and dy_i/dx_j, its rows from one batch of A backward passes: (..., A) -> (..., A), (..., A, A).

    Not by forward-mode `jvp`: a second derivative through LayerNorm's is silently wrong (pytorch issue 196700).
    """
    y, pullback = vjp(step, x)
    basis = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    return y, vmap(lambda e: pullback(e.expand_as(x))[0], out_dims=-2)(basis)


def invert(step: Step, y: Tensor, iterations: int = 4) -> Tensor:
    """The x with step(x) = y, by Newton's method from x = y + (y - step(y)): (..., A) -> (..., A).

    Autograd records only the last iteration: at the solution its first derivatives, with respect to y and to what step
    depends on, are those of the implicit function. Second derivatives are not.
    """
    x = 2 * y - step(y)
    for _ in range(iterations):
        x = x.detach()
        reached, jacobian = with_jacobian(step, x)
        x = x + torch.linalg.solve_ex(jacobian.detach(), (y - reached).unsqueeze(-1)).result.squeeze(-1)
    return x
