"""GMPO: a diffusion or flow policy fitted by advantage-weighted regression, in one file.

    python gmpo.py                                               halfcheetah-demo, made on the spot, minutes on a laptop
    python gmpo.py --env bandit --path vp                        a problem with a known answer, seconds
    python gmpo.py --env halfcheetah-medium-expert-v2            D4RL's data, physics and score
    python gmpo.py --env my.hdf5 --eval-env hopper               own data
    python gmpo.py --beta 0 --critic-steps 0                     every weight 1: behaviour cloning, the yardstick

Paper: Zhang et al., "Revisiting Generative Policies: A Simpler Reinforcement Learning Algorithmic Perspective",
arXiv:2412.01245; the reference code is its authors' GenerativeRL.

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. The policy that maximises E[Q(s, a)] - KL(pi || mu) / beta is the behaviour, re-weighted:
pi*(a|s) = mu(a|s) exp(beta (Q(s, a) - V(s))) / Z(s). GMPO fits a generative model to it, by weighting each action of
the data in the model's ordinary training loss; Z(s), the same for all actions of a state, is left out. In order:

  critic (IQL, arXiv:2110.06169)
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f(u) = |tau - 1[u < 0]| u^2 punishes a low V more
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
number in every file. This file can be read alone. After it, `diff gmpo.py gmpg.py` shows a policy gradient in the place
of section 5, and `diff gmpo.py idql.py` shows the critic's weights applied when acting, not in training.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common import arguments, bandit, datasets, runs, samplers, trained
from common.arguments import Amount, Count, Inside, RunArgs, Share, Steps

NAME = "gmpo"

# ------------------------------------------------------------------------------------------------------------------
# 1. Arguments beside RunArgs'; None: see SETTINGS. Amount, Steps: >= 0; Count: >= 1; Share: [0, 1]; Inside: (0, 1)


@dataclass
class Args(RunArgs):
    critic: Path | None = None
    """a finished run of any of the four files (its folder); its critic is taken as it is, instead of training one"""
    critic_steps: Steps | None = None
    """gradient steps of the critic"""
    critic_lr: Amount | None = None
    """Adam's learning rate for Q and V"""
    layer_norm: bool | None = None
    """LayerNorm in Q and V (arXiv:2302.02948), without which they may grow without bound away from the data"""
    expectile: Inside | None = None
    """tau of Eq. (1): 0.5 is the mean over the data's actions, towards 1 it becomes the best of them"""
    discount: Share = 0.99
    """gamma"""
    target_rate: Share = 0.005
    """share of the new weights in Eq. (3)"""

    path: Literal["vp", "gvp", "icfm"] = "gvp"
    """Eq. (4): vp variance-preserving diffusion, gvp trigonometric path, icfm straight line"""
    network: Literal["mlp", "paper"] | None = None
    """paper: the reference code's U-shaped net, the state squeezed into 32 numbers; mlp: the state beside the action"""
    solver: Literal["dpmpp", "ddim", "sde", "euler", "midpoint", "rk4"] = "dpmpp"
    """solver of Eq. (6); dpmpp is DPM-Solver++(2M), the others need more steps; sde adds noise in every step"""
    sampler_steps: Count | None = None
    """steps of the sampler"""
    act_noise: Amount | None = None
    """scale of the noise that actions start from: 1 samples the policy, 0 gives one action for each state"""

    behaviour: Path | None = None
    """a run with --beta 0 --critic-steps 0 (its folder), a model of mu: Eq. (9) takes the place of Eq. (8)"""
    candidates: Count = 16
    """K of Eq. (9)"""
    policy_steps: Steps | None = None
    """gradient steps of the policy"""
    policy_lr: Amount | None = None
    """Adam's learning rate for the policy"""
    lr_decay: bool | None = None
    """let that learning rate fall to 0 along a cosine"""
    beta: Amount | None = None
    """inverse temperature of Eq. (7): 0 is behaviour cloning, large is greedy"""
    weight_max: Amount | None = None
    """the largest weight in Eq. (7)"""
    batch_size: Count | None = None
    """transitions a gradient step"""


# differs from the paper: on other data than D4RL's the net is a small MLP; remade sets are acted on without noise
OURS = dict(batch_size=256, policy_lr=1e-3, lr_decay=True, normalize_obs=True, network="mlp", layer_norm=True)

# An argument that is None takes its value from the dataset's entry, or from "*" if that has none. The entry is that of
# its name, else of x-y-remade "x-remade" or "remade", else of x-y "x"; for a file or minari:NAME it is "own data".
SETTINGS = {
    # The reference code's, its epochs turned into steps at its batch of 4096; sampler_steps and eval_every are ours.
    "*": dict(
        critic_lr=3e-4, critic_steps=1_000_000, policy_steps=2_000_000, batch_size=4096,
        policy_lr=1e-4, lr_decay=False, expectile=0.7, beta=4.0, weight_max=100.0, normalize_obs=False,
        network="paper", sampler_steps=10, act_noise=1.0, layer_norm=False, eval_every=50_000,
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
    **{
        f"antmaze-{maze}-v0": dict(critic_steps=2_440_000, policy_steps=4_880_000, expectile=0.9, beta=beta)
        for maze, beta in (("umaze-diverse", 16.0), ("medium-play", 12.0), ("medium-diverse", 12.0),
                           ("large-play", 16.0), ("large-diverse", 4.0))
    },
    **{name: dict(beta=0.5) for name in ("kitchen", "pen", "hammer", "door", "relocate")},  # IQL's: the paper has none
    "antmaze": dict(expectile=0.9, beta=10.0),  # antmaze-eval-*; -v1, -v2 have their -v0's
    # Ours: budgets of minutes, chosen by trying. "-remade": data made here by D4RL's recipe.
    "halfcheetah-demo": OURS | dict(
        critic_steps=15_000, layer_norm=False, policy_steps=10_000, beta=1.0, eval_every=2_500),
    "bandit": OURS | dict(critic_lr=1e-3, critic_steps=1_500, policy_steps=8_000, batch_size=128, policy_lr=6e-3,
        layer_norm=False, beta=2.0, normalize_obs=False, sampler_steps=32, eval_every=2_000),
    "maze2d-remade": OURS | dict(
        critic_steps=100_000, expectile=0.9, policy_steps=50_000, beta=3.0, act_noise=0.0, eval_every=5_000),
    "remade": OURS | dict(critic_steps=200_000, policy_steps=100_000, beta=3.0, act_noise=0.0, eval_every=20_000),
    "own data": OURS | dict(critic_steps=100_000, policy_steps=100_000, policy_lr=3e-4, beta=3.0, eval_every=10_000),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# 2. Networks


class Normalize(nn.Module):
    """(obs - mean) / std, with buffers, so that a saved network takes raw observations: (B, O) -> (B, O)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) / self.std


def fit_normalizers(obs: Tensor, *networks: nn.Module) -> None:
    """Let every Normalize in these networks standardise by the mean and std of `obs`, all the data's."""
    for module in nn.ModuleList(networks).modules():
        if isinstance(module, Normalize):
            module.mean.copy_(obs.mean(0))
            module.std.copy_(obs.std(0, unbiased=False).clamp(min=1e-3))


def mlp(*sizes: int, layer_norm: bool = False) -> nn.Sequential:
    """Linear, (LayerNorm,) ReLU, ..., Linear, with IQL's orthogonal initialisation, of gain sqrt 2 on every layer."""
    # differs from the authors' code of GMPO and GMPG (there torch's default) and of IDQL (Xavier-uniform): the critic's
    # weights start orthogonal, as in IQL's code, so that one critic serves all four files
    layers = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(linear.weight, math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.LayerNorm(size_out), nn.ReLU()] if layer_norm else [linear, nn.ReLU()]
    return nn.Sequential(*layers[: -2 if layer_norm else -1])


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2: (B, O), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, layer_norm: bool = False):
        super().__init__()
        self.normalize = Normalize(obs_dim)
        self.q1, self.q2 = (mlp(obs_dim + action_dim, 256, 256, 1, layer_norm=layer_norm) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.normalize(obs), action], -1)
        return torch.stack([self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)])


class Value(nn.Module):
    """V: (B, O) -> (B,)."""

    def __init__(self, obs_dim: int, layer_norm: bool = False):
        super().__init__()
        self.normalize, self.net = Normalize(obs_dim), mlp(obs_dim, 256, 256, 1, layer_norm=layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(self.normalize(obs)).squeeze(-1)


class StateMLP(nn.Module):
    """net(x_t, t, s), the state beside the noisy action: (B, A), (B,), (B, O) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.normalize, self.obs_dim, self.action_dim = Normalize(obs_dim), obs_dim, action_dim
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9))
        first, last = nn.Linear(action_dim + 16 + obs_dim, 256), nn.Linear(256, action_dim)
        between = [nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
        self.net = nn.Sequential(first, *between, last)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies  # (B, 8)
        return self.net(torch.cat([x, angle.cos(), angle.sin(), self.normalize(obs)], -1))


class PaperBlock(nn.Module):
    """A residual block of PaperNet: (B, in), (B, 128) -> (B, out)."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.first, self.second = nn.Linear(size_in, size_out), nn.Linear(size_out, size_out)
        self.embedding = nn.Linear(128, size_out)
        self.skip = nn.Linear(size_in, size_out) if size_in != size_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.first(x)) + self.embedding(F.silu(embedding))
        return F.silu(self.second(h)) + self.skip(x)


class PaperNet(nn.Module):
    """The reference's net(x_t, t, s), U-shaped, the state in the embedding only: (B, A), (B,), (B, O) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.normalize, self.obs_dim, self.action_dim = Normalize(obs_dim), obs_dim, action_dim
        self.register_buffer("frequencies", 30 * 2 * math.pi * torch.randn(16))  # random Fourier features of t
        self.condition = nn.Linear(obs_dim, 32)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.down = nn.ModuleList([PaperBlock(action_dim, 512), PaperBlock(512, 256), PaperBlock(256, 128)])
        self.middle = PaperBlock(128, 128)
        self.up = nn.ModuleList([PaperBlock(256, 256), PaperBlock(512, 512)])  # in: half from below, half skipped
        self.head = nn.Linear(1024, action_dim)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies  # (B, 16)
        embedding = self.embed(torch.cat([angle.sin(), angle.cos(), F.silu(self.condition(self.normalize(obs)))], -1))
        skips = []
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], -1), embedding)
        return self.head(torch.cat([x, skips.pop()], -1))


def make_policy(obs_dim: int, action_dim: int, args: Args) -> nn.Module:
    """An untrained net(x_t, t, s)."""
    return PaperNet(obs_dim, action_dim) if args.network == "paper" else StateMLP(obs_dim, action_dim)


# ------------------------------------------------------------------------------------------------------------------
# 3. The generative model: t = 0 is the action, t = 1 the noise

PREDICTS = {"vp": "noise", "gvp": "velocity", "icfm": "velocity"}


def alpha_sigma(t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of Eq. (4), of t's shape."""
    if path == "vp":  # b_t = 0.1 + 19.9 t and alpha_t = exp(-1/2 int_0^t b)
        log_alpha = -19.9 / 4 * t**2 - 0.1 / 2 * t
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))  # 1 - alpha^2 would lose digits near t = 0
    if path == "gvp":
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return 1 - t, t


def d_alpha_sigma(t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Their derivatives by t; sigma'_t of vp is infinite at t = 0."""
    alpha, sigma = alpha_sigma(t, path)
    if path == "vp":
        # differs from a bug in the reference code: there the 0.1 in alpha' is missing, so that actions keep some noise
        d_alpha = -0.5 * (0.1 + 19.9 * t) * alpha
        return d_alpha, -alpha * d_alpha / sigma  # from alpha^2 + sigma^2 = 1
    if path == "gvp":
        return -math.pi / 2 * sigma, math.pi / 2 * alpha
    return -torch.ones_like(t), torch.ones_like(t)


def matching_loss(net: nn.Module, obs: Tensor, action: Tensor, args: Args) -> Tensor:
    """Eq. (5) of each sample, summed over action dimensions: (B, O), (B, A) -> (B,)."""
    # differs from the reference code: there icfm adds noise of 0.1 to x_t, which blurs the learnt actions by as much
    eps = torch.randn_like(action)
    t = 1e-5 + (1 - 1e-5) * torch.rand(len(action), device=action.device)  # (B,); from 1e-5, as in the reference code
    alpha, sigma = alpha_sigma(t[:, None], args.path)
    d_alpha, d_sigma = d_alpha_sigma(t[:, None], args.path)
    x = alpha * action + sigma * eps  # Eq. (4)
    target = eps if PREDICTS[args.path] == "noise" else d_alpha * action + d_sigma * eps
    return 0.5 * (net(x, t, obs) - target).square().sum(-1)  # Eq. (5)


def velocity(net: nn.Module, x: Tensor, t: Tensor, obs: Tensor, path: str) -> Tensor:
    """dx/dt of Eq. (6), towards the noise: (B, A), (), (B, O) -> (B, A)."""
    out = net(x, t.expand(len(x)), obs)
    if PREDICTS[path] == "velocity":
        return out
    t = t.clamp(min=1e-3)  # sigma'_t of vp is infinite at t = 0
    (alpha, sigma), (d_alpha, d_sigma) = alpha_sigma(t, path), d_alpha_sigma(t, path)
    return d_alpha * (x - sigma * out) / alpha + d_sigma * out  # alpha' a + sigma' eps


def noise_prediction(net: nn.Module, x: Tensor, t: Tensor, obs: Tensor, path: str) -> Tensor:
    """The eps that the net sees in x: (B, A), (), (B, O) -> (B, A)."""
    out = net(x, t.expand(len(x)), obs)
    if PREDICTS[path] == "noise":
        return out
    (alpha, sigma), (d_alpha, d_sigma) = alpha_sigma(t, path), d_alpha_sigma(t, path)
    # the solution, for eps, of  alpha a + sigma eps = x  and  alpha' a + sigma' eps = out
    return (alpha * out - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)


def sample(net: nn.Module, obs: Tensor, args: Args, noise_scale: float = 1.0) -> Tensor:
    """Eq. (6) by args.solver; euler, midpoint, rk4 use the velocity, the rest eps: (B, O) -> (B, A), not clipped."""
    # differs from the paper: DPM-Solver++(2M) with 10 steps, shorter near the action, not Euler with 31 equal ones
    x = noise_scale * torch.randn(len(obs), net.action_dim, device=obs.device)
    if args.solver in ("euler", "midpoint", "rk4"):
        return samplers.ode(lambda x, t: velocity(net, x, t, obs, args.path), x, args.sampler_steps, args.solver)
    solver = {"ddim": samplers.ddim, "dpmpp": samplers.dpm_solver_pp, "sde": samplers.sde}[args.solver]
    schedule = partial(alpha_sigma, path=args.path)  # t -> alpha_t, sigma_t
    return solver(lambda x, t: noise_prediction(net, x, t, obs, args.path), schedule, x, args.sampler_steps)


# ------------------------------------------------------------------------------------------------------------------
# 4. The critic


class Critic(nn.Module):
    """Q, its slow copy Q', and V."""

    def __init__(self, obs_dim: int, action_dim: int, layer_norm: bool = False):
        super().__init__()
        self.q, self.v = TwinQ(obs_dim, action_dim, layer_norm), Value(obs_dim, layer_norm)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)


def f(u: Tensor, args: Args) -> Tensor:
    """|tau - 1[u < 0]| u^2, the expectile loss of Eq. (1), elementwise at u = Q - V."""
    return torch.where(u > 0, args.expectile, 1 - args.expectile) * u.square()


def critic_loss(critic: Critic, batch: datasets.Batch, args: Args) -> tuple[Tensor, dict]:
    """Eq. (1) + Eq. (2): V and Q share no weights, so that one sum trains both. The batch's rewards are scaled already,
    and its done is 1 where the task ended, not where time ran out."""
    with torch.no_grad():
        q_prime = critic.target_q(batch.obs, batch.action).amin(0)  # (B,)
        # differs from IQL's and IDQL's code, which step V first: here one step serves both, as in GMPO's code
        td_target = batch.reward + args.discount * (1 - batch.done) * critic.v(batch.next_obs)  # (B,)
    v, q = critic.v(batch.obs), critic.q(batch.obs, batch.action)  # (B,), (2, B)
    v_loss = f(q_prime - v, args).mean()  # Eq. (1)
    q_loss = (td_target - q).square().mean(-1).sum()  # Eq. (2)
    means = {"critic/v": v.detach().mean(), "critic/q": q.detach().mean()}
    return v_loss + q_loss, {"critic/v_loss": v_loss.detach(), "critic/q_loss": q_loss.detach(), **means}


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, target_rate: float) -> None:
    """Eq. (3), in place: target_rate is the share of the NEW weights."""
    for old, new in zip(target.parameters(), online.parameters()):
        old.lerp_(new, target_rate)


@torch.no_grad()
def advantages(critic: Critic, data: datasets.Dataset) -> Tensor:
    """min_i Q_i(s, a) - V(s) of every transition, (N,), as in GMPO's code; IQL's and IDQL's own have Q' - V."""
    chunks = zip(data.obs.split(65_536), data.action.split(65_536))  # to spare memory
    return torch.cat([critic.q(obs, action).amin(0) - critic.v(obs) for obs, action in chunks])


# ------------------------------------------------------------------------------------------------------------------
# 5. The policy


def weights(advantage: Tensor, args: Args) -> Tensor:
    """Eq. (7), elementwise."""
    return torch.exp(args.beta * advantage).clamp(max=args.weight_max)


def effective_share(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): the share of the samples that count, 1 if all weigh the same."""
    return weight.sum().square() / (weight.numel() * weight.square().sum())


def policy_loss(policy: nn.Module, batch: datasets.Batch, weight: Tensor, args: Args) -> tuple[Tensor, dict]:
    """Eq. (8). `weight` is that of the batch's actions, (B,)."""
    loss = (weight * matching_loss(policy, batch.obs, batch.action, args)).mean()
    clipped = (weight >= args.weight_max).float().mean()
    metrics = {"policy/weight": weight.mean(), "policy/clipped": clipped, "policy/ess": effective_share(weight)}
    return loss, {"policy/loss": loss.detach(), **metrics}


def sampled_policy_loss(
    policy: nn.Module, behaviour: nn.Module, behaviour_args: Args, critic: Critic, obs: Tensor, args: Args
) -> tuple[Tensor, dict]:
    """Eq. (9). `behaviour` is a model of mu, with arguments of its own, from `load_net`."""
    # differs from a bug in the reference code: there Eq. (9) crashes; once mended, it mixes samples of several states
    with torch.no_grad():
        repeated = obs.repeat_interleave(args.candidates, 0)  # (B K, O), the K rows of a state side by side
        action = sample(behaviour, repeated, behaviour_args).clamp(-1, 1)  # (B K, A)
        q = critic.q(repeated, action).amin(0).view(-1, args.candidates)  # (B, K)
        weight = torch.softmax(args.beta * q, -1).flatten()  # (B K,)
    loss = (weight * matching_loss(policy, repeated, action, args)).sum() / len(obs)
    return loss, {"policy/loss": loss.detach(), "policy/ess": effective_share(weight)}


def act(policy: nn.Module, obs: Tensor, args: Args) -> Tensor:
    """(B, O) -> (B, A) in [-1, 1]."""
    return sample(policy, obs, args, args.act_noise).clamp(-1, 1)


def load_net(path: str | Path, device: str = "cpu") -> tuple[nn.Module, Args]:
    """The trained net of a run (its folder or checkpoint), and its arguments. Raises UserError if it can't be read."""
    checkpoint = trained.load_checkpoint(path, NAME)
    args = trained.saved_args(checkpoint, Args)
    net = make_policy(*checkpoint["sizes"], args).to(device)  # sizes: obs_dim, action_dim
    net.load_state_dict(checkpoint["policy"])
    return net, args


def load_policy(path: str | Path, device: str = "cpu") -> Callable:
    """A run's policy as a function, (B, O) or (O,) -> actions in [-1, 1], numpy or torch, which answers in kind.

    Its noise comes from torch's default generator. Raises UserError if the run can't be read.
    """
    policy, args = load_net(path, device)
    return trained.numpy_or_torch(lambda obs: act(policy, obs, args), policy.obs_dim, device)


# ------------------------------------------------------------------------------------------------------------------
# 6. Training


@torch.no_grad()
def evaluate(actor: Callable, run: runs.Run, args: Args) -> dict:
    """The scores of `actor`, (B, O) -> (B, A), over args.eval_episodes episodes."""
    with torch.random.fork_rng():  # training goes on as if there had been no evaluation
        torch.manual_seed(args.seed + run.step)  # the step that `train` is at
        if args.env == "bandit":
            return evaluate_bandit(actor, run, args)
        return run.scores(actor) if args.eval_env else {}  # else there is nothing to play in


def evaluate_bandit(actor: Callable, run: runs.Run, args: Args) -> dict:
    """How often the policy takes each of the bandit's modes, against mu exp(beta Q) / Z: mu uniform, Q the reward."""
    target = torch.softmax(args.beta * bandit.REWARDS, -1)
    metrics, figure = bandit.report(actor(torch.zeros(4096, 1, device=args.device)), target)
    run.picture("bandit", figure)
    return metrics


def cosine(step: int, steps: int) -> float:
    """The factor of a learning rate that falls from 1 to 0 within `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def train(args: Args) -> dict:
    """The whole run; returns what result.json holds. Raises UserError for bad input, TrainingError at NaN or inf."""
    args, data = arguments.prepare(args, SETTINGS, NAME)  # rewards as in IQL: scaled in locomotion, less 1 in antmaze
    torch.manual_seed(args.seed)
    critic = Critic(data.obs_dim, data.action_dim, args.layer_norm).to(args.device)
    policy = make_policy(data.obs_dim, data.action_dim, args).to(args.device)
    if args.normalize_obs:
        fit_normalizers(data.obs, critic, policy)
    if args.critic:
        trained.load_critic(critic, args, data.facts)  # refused if its tau, gamma or data differ; critic_steps is 0
    behaviour = load_net(args.behaviour, args.device) if args.behaviour else None  # Eq. (9)'s net of mu, its arguments

    adam = dict(fused=True, capturable=args.cudagraph)
    critic_optimizer = torch.optim.Adam([*critic.q.parameters(), *critic.v.parameters()], lr=args.critic_lr, **adam)
    policy_lr = torch.tensor(args.policy_lr, device=args.device)  # a tensor: a CUDA graph would freeze a number
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=policy_lr, **adam)
    policy_schedule = LambdaLR(policy_optimizer, partial(cosine, steps=args.policy_steps))
    compiled = torch.compile if args.compile else (lambda fn: fn)
    critic_loss_fn, policy_loss_fn, act_fn = compiled(critic_loss), compiled(policy_loss), compiled(act)

    def critic_update() -> dict:
        loss, metrics = critic_loss_fn(critic, data.sample(args.batch_size), args)  # Eqs. (1), (2)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        update_target(critic.target_q, critic.q, args.target_rate)  # Eq. (3)
        return metrics

    weight = None  # of every transition, (N,): the loop below sets it, when the critic is trained

    def policy_update() -> dict:
        index = torch.randint(len(data), (args.batch_size,), device=args.device)
        if behaviour is None:
            loss, metrics = policy_loss_fn(policy, data[index], weight[index], args)  # Eq. (8)
        else:
            loss, metrics = sampled_policy_loss(policy, *behaviour, critic, data.obs[index], args)  # Eq. (9)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()
        return metrics

    if args.cudagraph:  # recorded in the loop, not here: run.restore() below still replaces the optimizers' tensors
        critic_update, policy_update = runs.captured(critic_update), runs.captured(policy_update)
    run = runs.Run(  # saves and restores what it is given by name, besides args and the data's sizes
        args, NAME, data, {"critic": args.critic_steps, "policy": args.policy_steps}, critic=critic, policy=policy,
        critic_optimizer=critic_optimizer, policy_optimizer=policy_optimizer, policy_schedule=policy_schedule,
    )  # fmt: skip
    start = run.restore()  # loads the checkpoint if there is one; returns how many steps are done
    actor = partial(act_fn, policy, args=args)  # (B, O) -> (B, A)
    if args.eval_only:  # print the scores, write eval.json, with --video play once more
        return run.show(evaluate(actor, run, args), actor)

    for step, phase in run.steps(start):  # all steps of a phase, then those of the next; step counts on, from 1
        if phase == "critic":
            metrics = critic_update()
        else:
            if weight is None and behaviour is None:
                weight = weights(advantages(critic, data), args)
            metrics = policy_update()
            if args.lr_decay:
                policy_schedule.step()
            if step % args.eval_every == 0 or step == run.total:
                metrics |= evaluate(actor, run, args)
        run.log(step, metrics)  # every log_every steps and with a score; stops the run at NaN
        run.save(step)  # every save_every steps
    return run.finish(actor)  # which plays once more with --video


if __name__ == "__main__":
    arguments.main(NAME, train, Args, SETTINGS)
