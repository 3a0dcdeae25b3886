"""GMPO: a diffusion or flow policy fitted by advantage-weighted regression, in one file.

    python gmpo.py                                               halfcheetah-demo, made on the spot, minutes on a laptop
    python gmpo.py --env bandit --path vp                        a problem with a known answer, seconds
    python gmpo.py --env halfcheetah-medium-expert-v2            D4RL's data, physics and score
    python gmpo.py --env my.hdf5 --eval-env hopper               own data
    python gmpo.py --beta 0 --critic-steps 0                     every weight 1: behaviour cloning, the yardstick

Paper: Zhang et al., "Revisiting Generative Policies: A Simpler Reinforcement Learning Algorithmic Perspective",
arXiv:2412.01245.

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. The policy that maximises E[Q(s, a)] - KL(pi || mu) / beta is the behaviour, re-weighted:
pi*(a|s) = mu(a|s) exp(beta (Q(s, a) - V(s))) / Z(s). GMPO fits a generative model to it, by weighting each action of
the data in the model's ordinary training loss. In order:

  critic (IQL, arXiv:2110.06169, in the general form of IDQL, arXiv:2304.10573)
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f asymmetric: V is the value of a policy better than mu
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  generative model of actions; time runs from t = 0, the action, to t = 1, the noise eps ~ N(0, I)
    (4)  x_t = alpha_t a + sigma_t eps                       the path
    (5)  l(s, a) = 1/2 |net(x_t, t, s) - target|^2           target: velocity alpha'_t a + sigma'_t eps, or noise eps
    (6)  dx/dt = velocity(x, t, s), from t = 1 to t = 0      noise becomes an action
  policy
    (7)  w(s, a) = min(exp(beta (min_i Q_i(s, a) - V(s))), weight_max)
    (8)  L = E_D[ w(s, a) l(s, a) ]                          GMPO
    (9)  L = E_D[ sum_k softmax_k(beta min_i Q_i(s, a_k)) l(s, a_k) ]    with K actions a_k sampled from a model of mu

B is the batch, O the size of an observation, A of an action, K the sampled actions of a state. Equations have the same
number in every file. Read iql_critic.py before this file; after it, `diff gmpo.py gmpg.py` shows a policy gradient in
the place of section 5, and `diff gmpo.py idql.py` the critic's weights at acting time.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import bandit, datasets, environments, runs, samplers, training
from common.training import Adam, Draws, Seeds, Update

# ------------------------------------------------------------------------------------------------------------------
# 1. Arguments


@dataclass
class Args:
    env: str = "halfcheetah-demo"
    """the data: halfcheetah-demo, bandit, a D4RL name (hopper-medium-v2), minari:NAME, or an HDF5 file's path"""
    eval_env: str | None = None
    """where own data's policy is scored: a D4RL family such as hopper (its score), or a Gymnasium id (raw return)"""
    seed: int = 0
    """of networks, batches and noise; the evaluation has a stream of its own"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    num_seeds: int = 1
    """seeds trained side by side in this process: seed, seed + 1, ..., each as if alone, each with its own folder"""
    compile: bool = False
    """compile the updates and the sampler: a minute's wait, then faster steps"""
    cudagraph: bool = False
    """replay each update as one CUDA graph; no effect without a GPU"""
    bf16: bool = False
    """products of the losses in bfloat16, but for critics' last layer; sums, Adam and acting stay in float32"""
    fast_matmul: bool = False
    """float32 products by TF32 on CUDA, by oneDNN on a CPU; whether that is faster depends on the machine"""
    run_dir: Path | None = None
    """the run's folder; None: runs/<env>/gmpo/seed<seed>; with several seeds, of their folders seed<seed>"""
    resume: bool = False
    """go on from the run folder's checkpoint, if there is one"""
    eval_only: bool = False
    """score the run folder's checkpoint and stop"""
    video: bool = False
    """when the run is finished, or with --eval-only: play one episode into the run folder, as video.mp4"""
    allow_unverified: bool = False
    """accept a D4RL file whose checksum is not the published one"""
    normalize_obs: bool | None = None
    """let the networks see (obs - mean) / std; None: as PAPER says"""

    critic: Path | None = None
    """a run of iql_critic.py (its folder) whose critic is taken as it is, instead of training one"""
    critic_steps: int | None = None
    """gradient steps of the critic; None: as PAPER says"""
    critic_lr: float | None = None
    """Adam's learning rate for Q and V; None: as PAPER says"""
    critic_loss: Literal["expectile", "quantile", "exponential"] = "expectile"
    """f of Eq. (1)"""
    expectile: float | None = None
    """tau of the expectile and of the quantile loss, in (0, 1); None: as PAPER says"""
    linex_alpha: float = 1.0
    """alpha of the exponential loss, on the scale of the scaled rewards"""
    linex_max: float = 6.0
    """exp(alpha u) grows linearly from this value on, in the exponential loss"""
    discount: float = 0.99
    """gamma"""
    target_rate: float = 0.005
    """share of the new weights in Eq. (3)"""

    path: Literal["vp", "gvp", "icfm"] = "gvp"
    """Eq. (4): vp variance-preserving diffusion (predicts noise); gvp trigonometric, icfm straight line (velocity)"""
    icfm_sigma: float = 0.0
    """extra noise along the straight path; the reference code has 0.1, which blurs the actions by as much"""
    network: Literal["mlp", "paper"] = "mlp"
    """mlp: the state beside the noisy action; paper: the reference's U-shaped net, the state through 32 numbers"""
    solver: Literal["ddim", "dpmpp", "euler", "midpoint", "rk4", "sde"] = "dpmpp"
    """how Eq. (6) is integrated; dpmpp is DPM-Solver++(2M), the others need more steps than its 10"""
    sampler_steps: int | None = None
    """steps of the solver; None: as PAPER says"""
    actions: Literal["data", "static", "resampled"] = "data"
    """data: Eq. (8); static: Eq. (9), K actions a state sampled once; resampled: Eq. (9), sampled afresh each step"""
    behaviour_steps: int | None = None
    """gradient steps of the model of mu that Eq. (9) samples from; None: as PAPER says, 0 with --actions data"""
    candidates: int = 16
    """K of Eq. (9)"""

    act_noise: float = 1.0
    """scale of the noise that actions start from when the policy acts: 1 samples it, 0 takes its most typical action"""

    policy_steps: int | None = None
    """gradient steps of the policy; None: as PAPER says"""
    policy_lr: float | None = None
    """Adam's learning rate for the policy; None: as PAPER says"""
    lr_decay: bool | None = None
    """let the policy's learning rate fall to 0 along a cosine; None: as PAPER says"""
    beta: float | None = None
    """the temperature in Eq. (7): 0 is behaviour cloning, large is greedy; None: as PAPER says"""
    weight_max: float | None = None
    """the largest weight in Eq. (7); None: as PAPER says"""
    batch_size: int | None = None
    """transitions a gradient step; None: as PAPER says"""

    eval_every: int | None = None
    """gradient steps between evaluations; None: as PAPER says"""
    eval_episodes: int = 10
    """episodes an evaluation, all in lock-step"""
    log_every: int = 1000
    """gradient steps between two lines of metrics"""
    save_every: int = 10_000
    """gradient steps between checkpoints"""


# The reference code's settings, its epochs turned into steps at its batch of 4096; "*" holds where a name says nothing.
PAPER = {
    "*": dict(
        critic_lr=3e-4, critic_steps=1_000_000, behaviour_steps=1_000_000, policy_steps=2_000_000, batch_size=4096,
        policy_lr=1e-4, lr_decay=False, expectile=0.7, beta=4.0, weight_max=100.0, normalize_obs=False,
        sampler_steps=10, eval_every=50_000,
    ),
    "halfcheetah-medium-v2": dict(critic_steps=1_220_000, policy_steps=2_440_000, beta=8.0),
    "halfcheetah-medium-expert-v2": dict(critic_steps=976_000, policy_steps=4_880_000, beta=1.0),
    "halfcheetah-medium-replay-v2": dict(critic_steps=600_000, policy_steps=500_000, beta=4.0, weight_max=400.0),
    "hopper-medium-v2": dict(critic_steps=1_220_000, policy_steps=2_440_000, beta=16.0, weight_max=1000.0),
    "hopper-medium-expert-v2": dict(critic_steps=2_440_000, policy_steps=4_880_000, beta=1.0),
    "hopper-medium-replay-v2": dict(critic_steps=495_000, policy_steps=990_000, beta=6.0),
    "walker2d-medium-v2": dict(critic_steps=1_220_000, policy_steps=2_440_000, beta=8.0),
    "walker2d-medium-expert-v2": dict(critic_steps=976_000, policy_steps=4_880_000, beta=1.0),
    "walker2d-medium-replay-v2": dict(critic_steps=370_000, policy_steps=740_000, beta=8.0, weight_max=10_000.0),
    "antmaze-umaze-v0": dict(critic_steps=2_440_000, policy_steps=2_440_000, expectile=0.9, beta=8.0),
    "antmaze-umaze-diverse-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=16.0),
    "antmaze-medium-play-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=12.0),
    "antmaze-medium-diverse-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=12.0),
    "antmaze-large-play-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=16.0),
    "antmaze-large-diverse-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=4.0),
    # Not from the paper: budgets of minutes, chosen by trying.
    "halfcheetah-demo": dict(
        critic_steps=15_000, behaviour_steps=10_000, policy_steps=10_000, batch_size=256,
        policy_lr=1e-3, lr_decay=True, beta=1.0, normalize_obs=True, eval_every=2_500,
    ),
    "bandit": dict(
        critic_lr=1e-3, critic_steps=1_500, behaviour_steps=8_000, policy_steps=8_000, batch_size=128,
        policy_lr=6e-3, lr_decay=True, beta=2.0, sampler_steps=32, eval_every=2_000,
    ),
    "own file": dict(
        critic_steps=100_000, behaviour_steps=100_000, policy_steps=100_000, batch_size=256,
        policy_lr=3e-4, lr_decay=True, beta=0.3, normalize_obs=True, eval_every=10_000,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# 2. Networks


class Normalize(nn.Module):
    """(obs - mean) / std, buffers of the networks, so that a saved one takes raw observations: (B, O) -> (B, O)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, obs: torch.Tensor) -> None:
        self.mean.copy_(obs.mean(0))
        self.std.copy_(obs.std(0).clamp(min=1e-3))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs - self.mean) / self.std


class Output(nn.Linear):
    """The last layer of a critic, in float32 whatever `--bf16` says: bfloat16 would round a V of 50 to quarters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU, ..., Linear, with IQL's orthogonal initialisation, of gain sqrt 2 on every layer, the last too."""
    # differs from GMPO's and IDQL's code: they have torch's default and Xavier-uniform; one critic serves all files
    layers = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        linear = (Output if i == len(sizes) - 2 else nn.Linear)(size_in, size_out)
        nn.init.orthogonal_(linear.weight, math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers[: -2 if dropout else -1])


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2, a layer of both in one batched product: (B, O), (B, A) -> (2, B)."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int):
        super().__init__()
        self.normalize = normalize
        pairs = list(zip(*(mlp(obs_dim + action_dim, 256, 256, 1)[::2] for _ in range(2))))  # the linear layers
        self.weights = nn.ParameterList(torch.stack([one.weight, two.weight]) for one, two in pairs)  # (2, out, in)
        self.biases = nn.ParameterList(torch.stack([one.bias, two.bias])[:, None] for one, two in pairs)  # (2, 1, out)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.normalize(obs), action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w.mT).relu()  # (2, B, 256)
        with torch.autocast(x.device.type, enabled=False):  # as in Output
            return torch.baddbmm(bias, x.to(weight.dtype), weight.mT).squeeze(-1)


class Value(nn.Module):
    """V: (B, O) -> (B,)."""

    def __init__(self, normalize: Normalize, obs_dim: int):
        super().__init__()
        self.normalize, self.net = normalize, mlp(obs_dim, 256, 256, 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalize(obs)).squeeze(-1)


class StateMLP(nn.Module):
    """net(x_t, t, s), the state beside the noisy action: (B, A), (B,), (B, O) -> (B, A)."""

    # differs from the paper: its net (`--network paper`) is 11 times as large and sees the state through 32 numbers

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int, width: int = 256):
        super().__init__()
        self.normalize, self.action_dim = normalize, action_dim
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9))
        sizes = [action_dim + 16 + obs_dim, width, width, width]
        hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, action_dim))

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * self.frequencies  # (B, 8)
        return self.net(torch.cat([x, angle.cos(), angle.sin(), self.normalize(obs)], -1))


class PaperBlock(nn.Module):
    """A residual block of PaperNet: (B, in), (B, 128) -> (B, out)."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.first, self.second = nn.Linear(size_in, size_out), nn.Linear(size_out, size_out)
        self.embedding = nn.Linear(128, size_out)
        self.skip = nn.Linear(size_in, size_out) if size_in != size_out else nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.first(x)) + self.embedding(F.silu(embedding))
        return F.silu(self.second(h)) + self.skip(x)


class PaperNet(nn.Module):
    """The reference's net(x_t, t, s), U-shaped, the state in the embedding only: (B, A), (B,), (B, O) -> (B, A)."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int):
        super().__init__()
        self.normalize, self.action_dim = normalize, action_dim
        self.register_buffer("frequencies", 30 * 2 * math.pi * torch.randn(16))
        self.condition = nn.Linear(obs_dim, 32)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.down = nn.ModuleList([PaperBlock(action_dim, 512), PaperBlock(512, 256), PaperBlock(256, 128)])
        self.middle = PaperBlock(128, 128)
        self.up = nn.ModuleList([PaperBlock(256, 256), PaperBlock(512, 512)])
        self.head = nn.Linear(1024, action_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * self.frequencies  # (B, 16)
        embedding = self.embed(torch.cat([angle.sin(), angle.cos(), F.silu(self.condition(self.normalize(obs)))], -1))
        skips = []
        for block in self.down:
            skips.append(x := block(x, embedding))
        x = self.middle(x, embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], -1), embedding)
        return self.head(torch.cat([x, skips.pop()], -1))


NETWORKS = {"mlp": StateMLP, "paper": PaperNet}


# ------------------------------------------------------------------------------------------------------------------
# 3. The generative model: t = 0 is the action, t = 1 the noise

PREDICTS = {"vp": "noise", "gvp": "velocity", "icfm": "velocity"}


def alpha_sigma(t: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t of Eq. (4), of t's shape."""
    if path == "vp":  # beta_t = 0.1 + 19.9 t and alpha_t = exp(-1/2 int_0^t beta)
        log_alpha = -19.9 / 4 * t**2 - 0.1 / 2 * t
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))  # 1 - alpha^2 would lose digits near t = 0
    if path == "gvp":
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return 1 - t, t


def d_alpha_sigma(t: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Their derivatives by t; sigma'_t of vp is infinite at t = 0."""
    alpha, sigma = alpha_sigma(t, path)
    if path == "vp":
        # differs from the reference code: there alpha' lacks beta_0 = 0.1, and velocities denoise too little near 0
        d_alpha = -0.5 * (0.1 + 19.9 * t) * alpha
        return d_alpha, -alpha * d_alpha / sigma  # from alpha^2 + sigma^2 = 1
    if path == "gvp":
        return -math.pi / 2 * sigma, math.pi / 2 * alpha
    return -torch.ones_like(t), torch.ones_like(t)


def matching_noise(shape: tuple[int, ...], action_dim: int, args: Args, generator: torch.Generator) -> dict:
    """What `matching_loss` draws for samples of any shape (...): t (...), eps (..., A), for icfm also blur (..., A)."""
    same = dict(device=generator.device, generator=generator)
    noise = {"t": torch.rand(shape, **same), "eps": torch.randn(*shape, action_dim, **same)}
    return noise | ({"blur": torch.randn(*shape, action_dim, **same)} if args.path == "icfm" else {})


def matching_loss(net: nn.Module, action: torch.Tensor, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """Eq. (5) of each sample, summed over action dimensions: (B, A), (B, O) -> (B,). Noise: see `matching_noise`."""
    t, eps = noise["t"].clamp(min=1e-5), noise["eps"]  # sigma'_t of vp is infinite at 0
    alpha, sigma = alpha_sigma(t[:, None], args.path)
    x = alpha * action + sigma * eps  # Eq. (4)
    d_alpha, d_sigma = d_alpha_sigma(t[:, None], args.path)
    target = eps if PREDICTS[args.path] == "noise" else d_alpha * action + d_sigma * eps
    if args.path == "icfm":
        # differs from the reference code: no such noise by default; its 0.1 adds that standard deviation to the actions
        x = x + args.icfm_sigma * noise["blur"]
    return 0.5 * (net(x, t, obs) - target).square().sum(-1)  # Eq. (5)


def velocity(net: nn.Module, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor, path: str) -> torch.Tensor:
    """dx/dt of Eq. (6), towards the noise: (B, A), (), (B, O) -> (B, A)."""
    out = net(x, t.expand(len(x)), obs)
    if PREDICTS[path] == "velocity":
        return out
    t = t.clamp(min=1e-3)  # 1 / sigma_t is infinite at t = 0
    alpha, sigma = alpha_sigma(t, path)
    d_alpha, _ = d_alpha_sigma(t, path)
    return d_alpha / alpha * (x - out / sigma)  # alpha' a + sigma' eps, with a = (x - sigma eps) / alpha


def noise_prediction(net: nn.Module, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor, path: str) -> torch.Tensor:
    """The eps that the net sees in x: (B, A), (), (B, O) -> (B, A)."""
    out = net(x, t.expand(len(x)), obs)
    if PREDICTS[path] == "noise":
        return out
    (alpha, sigma), (d_alpha, d_sigma) = alpha_sigma(t, path), d_alpha_sigma(t, path)
    determinant = alpha * d_sigma - d_alpha * sigma  # of x = alpha a + sigma eps, out = alpha' a + sigma' eps
    return (alpha * out - d_alpha * x) / determinant


def sample(net: nn.Module, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """Eq. (6): noise to actions, (B, O) -> (B, A), not clipped. Noise: see `acting_noise`."""
    # differs from the paper: DPM-Solver++(2M) with 10 steps, short near the action, for Euler with 31 even ones
    x, *z = noise["x"]
    if args.solver in ("euler", "midpoint", "rk4"):
        return samplers.ode(lambda x, t: velocity(net, x, t, obs, args.path), x, args.sampler_steps, args.solver)
    eps, schedule = lambda x, t: noise_prediction(net, x, t, obs, args.path), partial(alpha_sigma, path=args.path)
    if args.solver == "sde":
        return samplers.sde(eps, schedule, x, torch.stack(z))
    return {"ddim": samplers.ddim, "dpmpp": samplers.dpm_solver_pp}[args.solver](eps, schedule, x, args.sampler_steps)


# ------------------------------------------------------------------------------------------------------------------
# 4. The critic


class Critic(nn.Module):
    """Q, its slow copy Q', and V."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int):
        super().__init__()
        self.q, self.v = TwinQ(normalize, obs_dim, action_dim), Value(normalize, obs_dim)
        self.target_q = copy.deepcopy(self.q, {id(normalize): normalize}).requires_grad_(False)  # one Normalize for all


def f(u: torch.Tensor, args: Args) -> torch.Tensor:
    """The asymmetric loss of Eq. (1), elementwise, at u = Q - V."""
    if args.critic_loss == "exponential":  # exp(alpha u) - alpha u, its exponential continued linearly above linex_max
        x = args.linex_alpha * u
        knee = math.log(args.linex_max)
        return torch.exp(x.clamp(max=knee)) + args.linex_max * (x - knee).clamp(min=0) - x
    share = torch.where(u > 0, args.expectile, 1 - args.expectile)
    return share * u.square() if args.critic_loss == "expectile" else share * u.abs()


def v_loss(critic: Critic, batch: datasets.Batch, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. (1)."""
    with torch.no_grad():
        q = critic.target_q(batch.obs, batch.action).amin(0)  # (B,)
    v = critic.v(batch.obs)
    loss = f(q - v, args).mean()
    return loss, {"critic/v_loss": loss.detach(), "critic/v": v.detach().mean()}


def q_loss(critic: Critic, batch: datasets.Batch, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. (2), with V as Eq. (1) has just left it."""
    with torch.no_grad():
        # differs from GMPO's code: V as it is after its own step, as in IQL and IDQL; theirs is the V before it
        target = batch.reward + args.discount * (1 - batch.done) * critic.v(batch.next_obs)  # (B,)
    q = critic.q(batch.obs, batch.action)  # (2, B)
    loss = (q - target).square().mean(-1).sum()
    return loss, {"critic/q_loss": loss.detach(), "critic/q": q.detach().mean()}


@torch.no_grad()
def update_target(target: list[torch.Tensor], online: list[torch.Tensor], target_rate: float) -> None:
    """Eq. (3), in place: target_rate is the share of the NEW weights."""
    for old, new in zip(target, online):
        old.lerp_(new, target_rate)


@torch.no_grad()
def advantages(critic: Critic, data: datasets.Dataset) -> torch.Tensor:
    """min_i Q_i(s, a) - V(s) of every transition, (N,); in chunks, to spare memory."""
    chunks = zip(data.obs.split(65_536), data.action.split(65_536))
    return torch.cat([critic.q(obs, action).amin(0) - critic.v(obs) for obs, action in chunks])


# ------------------------------------------------------------------------------------------------------------------
# 5. The policy


def weights(advantage: torch.Tensor, args: Args) -> torch.Tensor:
    """Eq. (7), elementwise."""
    return torch.exp(args.beta * advantage).clamp(max=args.weight_max)


def effective_share(weight: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / (n sum w^2): the share of the samples that count, 1 if all weigh the same."""
    return weight.sum().square() / (weight.numel() * weight.square().sum())


@torch.no_grad()
def candidates(
    critic: Critic, behaviour: nn.Module, obs: torch.Tensor, noise: dict, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K sampled actions of each state in Eq. (9) and their weights: (B, O) -> (B, K, A), (B, K).

    Noise: see `acting_noise`, for B K samples.
    """
    # differs from the reference code: there the samples of different states are mixed up, and Eq. (9) crashes
    repeated = obs.repeat_interleave(args.candidates, 0)  # (B K, O), the K rows of a state side by side
    action = sample(behaviour, repeated, noise, args).clamp(-1, 1)
    q = critic.q(repeated, action).amin(0).view(-1, args.candidates)
    return action.view(len(obs), args.candidates, -1), torch.softmax(args.beta * q, -1)


@torch.no_grad()
def weighted_actions(models: dict, seed: int, data: datasets.Dataset, args: Args) -> dict[str, torch.Tensor]:
    """Weights (N, K) and sampled actions (N, K, A) of all states, once, as critic and behaviour are frozen by now."""
    if args.actions == "data":
        return {"weight": weights(advantages(models["critic"], data), args)[:, None]}  # the actions are in the batch
    generator, chunks = training.generator(args.device, seed, 0, 2), []
    for obs in data.obs.split(8192):
        noise = acting_noise(len(obs) * args.candidates, data.action_dim, args, generator)
        chunks.append(candidates(models["critic"], models["behaviour"], obs, noise, args))
    return {name: torch.cat(parts) for name, parts in zip(("action", "weight"), zip(*chunks))}


def policy_loss(
    policy: nn.Module, obs: torch.Tensor, action: torch.Tensor, weight: torch.Tensor, noise: dict, args: Args
) -> tuple[torch.Tensor, dict]:
    """Eq. (8) with the one action a state that the data has, Eq. (9) with K sampled ones: (B, O), (B, K, A), (B, K).

    Noise: see `matching_noise`, for samples of shape (B K,).
    """
    repeated = obs.repeat_interleave(action.shape[1], 0)  # (B K, O)
    matching = matching_loss(policy, action.flatten(0, 1), repeated, noise, args).view_as(weight)
    loss = (weight * matching).sum(-1).mean()
    clipped = (weight >= args.weight_max).float().mean()
    share = effective_share(weight.sum(-1))  # of the states: in Eq. (9) all have the same weight
    metrics = {"policy/weight": weight.mean(), "policy/clipped": clipped, "policy/ess": share}
    return loss, {"policy/loss": loss.detach(), **metrics}


def acting_noise(batch: int, action_dim: int, args: Args, generator: torch.Generator) -> dict:
    """What `sample` draws: (n, B, A), the start and, for the SDE, the noise of each step."""
    count = 1 + (args.sampler_steps if args.solver == "sde" else 0)
    return {"x": torch.randn(count, batch, action_dim, device=generator.device, generator=generator)}


def act(models: dict, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """(B, O) -> (B, A) in [-1, 1]. Noise: see `acting_noise`."""
    return sample(models["policy"], obs, {"x": args.act_noise * noise["x"]}, args).clamp(-1, 1)


def play(models: dict, obs: torch.Tensor, args: Args, generator: torch.Generator) -> torch.Tensor:
    """`act` with noise from `generator`: (B, O) -> (B, A)."""
    return act(models, obs, acting_noise(len(obs), models["policy"].action_dim, args, generator), args)


def load_models(path: str | Path, device: str = "cpu") -> tuple[dict[str, nn.Module], Args]:
    """The networks and arguments of a run: its folder or checkpoint.pt."""
    checkpoint = runs.load_checkpoint(path)
    args = Args(**checkpoint["args"] | {"device": device})
    models = build(*checkpoint["sizes"], args)
    for name, model in models.items():
        model.to(device).load_state_dict(checkpoint[name])
    return models, args


def load_policy(path: str | Path, device: str = "cpu", seed: int = 0) -> Callable:
    """A run's policy as act(obs): numpy or torch, (B, O) or (O,) -> actions in kind; its noise comes from `seed`."""
    (models, args), generator = load_models(path, device), torch.Generator(device).manual_seed(seed)
    return runs.numpy_or_torch(lambda obs: play(models, obs, args, generator), device)


# ------------------------------------------------------------------------------------------------------------------
# 6. Evaluation


@torch.no_grad()
def evaluate(
    seeds: Seeds, actor: Callable, data: datasets.Dataset, run: runs.Run, args: Args, step: int
) -> dict[str, np.ndarray]:
    """Scores of args.eval_episodes episodes a seed, all in lock-step, one batched policy call a step: each (S,).

    Every seed has a random stream of its own here, so that evaluating more often changes no weight.
    """
    streams = [training.generator(args.device, seed, step, 1) for seed in seeds.numbers]
    if args.env == "bandit":
        parts = zip(streams, run.folders)
        return training.gather(seeds.each(lambda models, _: evaluate_bandit(models, data, *next(parts), args, step)))
    if args.eval_env is None:
        return {}
    each = args.eval_episodes
    starts = [int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) for seed in seeds.numbers]
    envs = gymnasium.vector.SyncVectorEnv([partial(environments.make, args.eval_env)] * (seeds.count * each))
    obs, _ = envs.reset(seed=[start + k for start in starts for k in range(each)])
    total, over = np.zeros(len(obs)), np.zeros(len(obs), bool)
    while not over.all():
        batch = seeds.split(torch.as_tensor(obs, dtype=torch.float32, device=args.device))
        noise = seeds.join([acting_noise(each, data.action_dim, args, stream) for stream in streams])
        action = actor(obs=batch, **noise)["action"].flatten(0, -2)  # (S B, A)
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        total += reward * ~over  # a finished environment starts again; those rewards do not count
        over |= terminated | truncated
    envs.close()
    total = total.reshape(seeds.count, each)
    metrics = {"eval/return": total.mean(1), "eval/return_std": total.std(1)}
    score = environments.normalized_score(total, args.eval_env)
    return metrics if score is None else metrics | {"eval/score": score.mean(1), "eval/score_std": score.std(1)}


def evaluate_bandit(
    models: dict, data: datasets.Dataset, stream: torch.Generator, folder: runs.Folder, args: Args, step: int
) -> dict[str, float]:
    """Samples against the closed form mu exp(beta Q) / Z."""
    action = play(models, data.obs[:4096], args, stream)
    return bandit.report(action, torch.softmax(args.beta * bandit.REWARDS, -1), folder, step)


# ------------------------------------------------------------------------------------------------------------------
# 7. Training


def build(obs_dim: int, action_dim: int, args: Args) -> dict[str, nn.Module]:
    """The networks of a run, untrained."""
    normalize, net = Normalize(obs_dim), NETWORKS[args.network]
    models = {"critic": Critic(normalize, obs_dim, action_dim), "policy": net(normalize, obs_dim, action_dim)}
    if args.actions != "data":
        models["behaviour"] = net(normalize, obs_dim, action_dim)
    return models


def descend(seeds: Seeds, optimizer: Adam, loss: Callable, *inputs) -> dict:
    """One gradient step down `loss(models, *inputs) -> (loss, metrics)`; returns the metrics."""
    with seeds.autocast():
        value, metrics = seeds(loss, *inputs)
    optimizer.step(torch.autograd.grad(value.sum(), optimizer.parameters))  # the sum over seeds: each has its own
    return metrics


def critic_step(seeds: Seeds, optimizers: dict, batch: datasets.Batch, args: Args) -> dict:
    """Eqs. (1), (2), (3), in this order, and in place."""
    metrics = descend(seeds, optimizers["v_optimizer"], lambda m, batch: v_loss(m["critic"], batch, args), batch)
    metrics |= descend(seeds, optimizers["q_optimizer"], lambda m, batch: q_loss(m["critic"], batch, args), batch)
    update_target(seeds.parameters("critic.target_q"), seeds.parameters("critic.q"), args.target_rate)
    return metrics


def draw(n: int, generator: torch.Generator, phase: str, data: datasets.Dataset, args: Args) -> dict:
    """The random numbers of n steps of a phase: name -> (n, ...)."""
    numbers = {"index": torch.randint(len(data), (n, args.batch_size), device=args.device, generator=generator)}
    if phase == "critic":
        return numbers
    each = args.batch_size * (args.candidates if phase == "policy" and args.actions != "data" else 1)
    numbers |= matching_noise((n, each), data.action_dim, args, generator)
    if phase == "policy" and args.actions == "resampled":
        x = [acting_noise(each, data.action_dim, args, generator)["x"] for _ in range(n)]
        numbers["x"] = torch.stack(x)
    return numbers


def optimizers_of(seeds: Seeds, args: Args) -> dict[str, Adam]:
    """One for each part that is trained."""
    steps = {"policy": args.policy_steps} | ({"behaviour": args.behaviour_steps} if args.actions != "data" else {})
    decay = lambda part: steps[part] if args.lr_decay else None  # noqa: E731
    return {
        "v_optimizer": Adam(seeds, "critic.v", args.critic_lr),
        "q_optimizer": Adam(seeds, "critic.q", args.critic_lr),
        **{f"{part}_optimizer": Adam(seeds, part, args.policy_lr, decay(part)) for part in steps},
    }


def updates(seeds: Seeds, optimizers: dict, data: datasets.Dataset, table: dict, args: Args) -> dict[str, Callable]:
    """The gradient step of each phase, a function of its random numbers; `table` is that of `weighted_actions`."""

    def behaviour_loss(models: dict, batch: datasets.Batch, noise: dict) -> tuple[torch.Tensor, dict]:
        loss = matching_loss(models["behaviour"], batch.action, batch.obs, noise, args).mean()
        return loss, {"behaviour/loss": loss.detach()}

    def loss(models: dict, batch: datasets.Batch, rows: dict, noise: dict) -> tuple[torch.Tensor, dict]:
        if args.actions == "resampled":
            action, weight = candidates(models["critic"], models["behaviour"], batch.obs, noise, args)
        else:
            action, weight = rows.get("action", batch.action[:, None]), rows["weight"]
        return policy_loss(models["policy"], batch.obs, action, weight, noise, args)

    def behaviour(index: torch.Tensor, **noise: torch.Tensor) -> dict:
        return descend(seeds, optimizers["behaviour_optimizer"], behaviour_loss, data[index], noise)

    def policy(index: torch.Tensor, **noise: torch.Tensor) -> dict:
        return descend(seeds, optimizers["policy_optimizer"], loss, data[index], seeds.rows(table, index), noise)

    critic = lambda index: critic_step(seeds, optimizers, data[index], args)  # noqa: E731
    return {"critic": critic, "behaviour": behaviour, "policy": policy}


def train(args: Args) -> dict:
    """The whole run; returns what result.json holds. Raises UserError for bad input, TrainingError at NaN or inf."""
    args = runs.fill_in(args, PAPER)
    run = runs.Run(args, "gmpo")
    data = datasets.load(args.env, args.device, args.eval_env, args.allow_unverified)
    sizes = data.obs_dim, data.action_dim
    seeds = Seeds(lambda seed: runs.prepare(build(*sizes, args), data, args, seed), args)
    optimizers, table = optimizers_of(seeds, args), {}
    start = run.restore(seeds, optimizers)
    steps = {phase: Update(update, args) for phase, update in updates(seeds, optimizers, data, table, args).items()}
    draws = {phase: Draws(seeds, partial(draw, phase=phase, data=data, args=args)) for phase in steps}
    actor = Update(lambda obs, **noise: {"action": seeds(partial(act, args=args), obs, noise)}, args)
    if args.eval_only:
        run.film(seeds, play)
        return run.show(evaluate(seeds, actor, data, run, args, start))

    policy_start = args.critic_steps + (0 if args.actions == "data" else args.behaviour_steps)
    total = policy_start + args.policy_steps
    for step in run.steps(start, total):
        phase = "critic" if step <= args.critic_steps else "behaviour" if step <= policy_start else "policy"
        if phase == "policy" and args.actions != "resampled" and not table:
            table |= seeds.join(seeds.each(partial(weighted_actions, data=data, args=args)))
        metrics = steps[phase](**draws[phase](step))
        if phase == "policy" and (step % args.eval_every == 0 or step == total):
            metrics |= evaluate(seeds, actor, data, run, args, step)
        run.record(step, metrics, seeds, optimizers, sizes=sizes)
    run.film(seeds, play)
    return run.finish()


if __name__ == "__main__":
    runs.main(train, Args)
