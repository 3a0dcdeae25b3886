"""GMPG: a policy gradient through the sampler of a diffusion or flow policy, held near the behaviour by the exact KL.

    python gmpg.py                                               halfcheetah-demo, made on the spot
    python gmpg.py --env bandit                                  a problem with a known answer
    python gmpg.py --env halfcheetah-medium-expert-v2            D4RL's data, physics and score
    python gmpg.py --critic runs/halfcheetah-demo/iql_critic/seed0   with a critic that is there already

Paper: Zhang et al., "Revisiting Generative Policies: A Simpler Reinforcement Learning Algorithmic Perspective",
arXiv:2412.01245; the reference code is its authors' GenerativeRL.

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. GMPO (gmpo.py) re-weights the data's actions; GMPG climbs to the same optimum, mu exp(beta Q) / Z, by the
gradient of E[Q(s, a)] - KL(pi || mu) / beta, through every step of the sampler that made the action. In order:

  critic (IQL, arXiv:2110.06169)
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f(u) = |tau - 1[u < 0]| u^2 punishes a low V more
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  generative model of actions; time runs from t = 0, the action, to t = 1, the noise eps ~ N(0, I)
    (4)  x_t = alpha_t a + sigma_t eps                       the path
    (5)  l(s, a) = 1/2 |net(x_t, t, s) - target|^2           target: the velocity alpha'_t a + sigma'_t eps
    (6)  dx/dt = velocity(x, t, s), from t = 1 to t = 0      noise becomes an action
  policy, started as a copy of the model of mu
    (12) z_{k+1} = z_k - (t_k - t_{k+1}) velocity(z_k, t_k, s)  Euler's steps of Eq. (6): z_0 is noise, z_n the action
    (13) log pi(a|s) = log N(z_0; 0, I) - sum_k log |det dz_{k+1} / dz_k|    the change of variables, exact
    (14) L = E[ -beta min_i Q_i(s, a) + log pi(a|s) - log mu(a|s) ]          GMPG

log mu(a|s) is Eq. (13) for the model of mu, whose steps are undone one by one, from the policy's action to the noise.
B is the batch, O the size of an observation, A of an action. Equations have the same number in every file.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common import arguments, bandit, datasets, runs, samplers, trained
from common.arguments import Amount, Count, Inside, RunArgs, Share, Steps

NAME = "gmpg"

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
    sampler_steps: Count | None = None
    """steps of the sampler"""
    act_noise: Amount | None = None
    """scale of the noise that actions start from: 1 samples the policy, 0 gives one action for each state"""

    behaviour_steps: Steps | None = None
    """gradient steps of the model of mu"""
    behaviour_lr: Amount | None = None
    """Adam's learning rate for the model of mu; it falls to 0 along a cosine"""
    policy_steps: Steps | None = None
    """gradient steps of the policy"""
    policy_lr: Amount | None = None
    """Adam's learning rate for the policy"""
    beta: Amount | None = None
    """inverse temperature of Eq. (14), whose KL is in nats: 0 is behaviour cloning, large is greedy"""
    grad_norm: Amount = 10.0
    """the policy's gradient is clipped to this norm"""
    batch_size: Count | None = None
    """transitions a gradient step"""
    policy_batch_size: Count | None = None
    """states a gradient step of the policy"""


# differs from the paper: on other data than D4RL's the net is a small MLP; remade sets are acted on without noise
OURS = dict(
    behaviour_lr=1e-3, policy_lr=3e-4, batch_size=256, policy_batch_size=256, normalize_obs=True, network="mlp",
    layer_norm=True, eval_every=100,
)  # fmt: skip

# An argument that is None takes its value from the dataset's entry, or from "*" if that has none. The entry is that of
# its name, else of x-y-remade "x-remade" or "remade", else of x-y "x"; for a file or minari:NAME it is "own data".
SETTINGS = {
    # The reference code's, but policy_steps, policy_batch_size, sampler_steps are ours: its up to 24 500 updates of
    # 40 960 states and 999 steps take months. Its KL is in bits a dimension, so beta here is its beta times A ln 2.
    "*": dict(
        critic_lr=3e-4, critic_steps=1_000_000, behaviour_steps=500_000, behaviour_lr=1e-4, policy_steps=10_000,
        policy_lr=1e-5, batch_size=4096, policy_batch_size=1024, expectile=0.7, beta=16.6, normalize_obs=False,
        network="paper", sampler_steps=16, act_noise=1.0, layer_norm=False, eval_every=500,
    ),
    "halfcheetah-medium-v2": dict(critic_steps=1_220_000, policy_lr=1e-4, beta=4.16),
    "halfcheetah-medium-expert-v2": dict(critic_steps=976_000, policy_lr=1e-6, beta=16.6),
    "halfcheetah-medium-replay-v2": dict(critic_steps=600_000, policy_lr=1e-4, beta=16.6),
    "hopper-medium-v2": dict(critic_steps=1_220_000, policy_lr=3e-5, beta=41.6),
    "hopper-medium-expert-v2": dict(critic_steps=2_440_000, policy_lr=1e-6, beta=8.32),
    "hopper-medium-replay-v2": dict(critic_steps=495_000, policy_lr=3e-5, beta=16.6),
    "walker2d-medium-v2": dict(critic_steps=1_220_000, policy_lr=1e-4, beta=4.16),
    "walker2d-medium-expert-v2": dict(critic_steps=976_000, policy_lr=1e-6, beta=16.6),
    "walker2d-medium-replay-v2": dict(critic_steps=370_000, policy_lr=2e-5, beta=33.3),
    **{
        f"antmaze-{maze}-v0": dict(critic_lr=1e-4, policy_lr=policy_lr, expectile=0.9, beta=5.55)
        for maze, policy_lr in (("umaze", 2e-6), ("umaze-diverse", 5e-6), ("medium-play", 1e-6),
                                ("medium-diverse", 5e-6), ("large-play", 5e-6), ("large-diverse", 5e-6))
    },
    **{name: dict(beta=0.5) for name in ("kitchen", "pen", "hammer", "door", "relocate")},  # IQL's; the paper has none
    "antmaze": dict(critic_lr=1e-4, policy_lr=5e-6, expectile=0.9, beta=5.55),  # antmaze-eval; -v1, -v2 as their -v0
    # Ours: budgets of minutes, chosen by trying. "-remade": data made here by D4RL's recipe.
    "halfcheetah-demo": OURS | dict(critic_steps=15_000, behaviour_steps=10_000, policy_steps=400, policy_lr=1e-4,
                                    policy_batch_size=64, layer_norm=False, beta=2.0),
    "bandit": OURS | dict(critic_lr=1e-3, critic_steps=1_500, behaviour_steps=8_000, behaviour_lr=3e-3, batch_size=128,
                          layer_norm=False, policy_steps=200, beta=2.0, normalize_obs=False, eval_every=50),
    "maze2d-remade": OURS | dict(
        critic_steps=100_000, expectile=0.9, behaviour_steps=50_000, policy_steps=200, policy_batch_size=128, beta=3.0,
        act_noise=0.0),
    "remade": OURS | dict(
        critic_steps=200_000, behaviour_steps=100_000, policy_steps=400, policy_lr=1e-4, beta=3.0, act_noise=0.0),
    "own data": OURS | dict(
        critic_steps=100_000, behaviour_steps=100_000, behaviour_lr=3e-4, policy_steps=400, policy_lr=1e-4, beta=3.0),
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
    # differs from GMPO: on the vp path too the net is the velocity itself, as in the paper's GMPG, not the noise
    target = d_alpha * action + d_sigma * eps
    return 0.5 * (net(x, t, obs) - target).square().sum(-1)  # Eq. (5)


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


# ------------------------------------------------------------------------------------------------------------------
# 5. The policy


def times(obs: Tensor, args: Args) -> list[tuple[Tensor, Tensor]]:
    """(t_k, t_{k+1}) of Eq. (12), with t_k = (1 - k / n)^2. Steps are short near the action: there velocity is steep
    where data are narrow, and a long step would send two points to one, so that Eq. (13) fails."""
    return list(pairwise(torch.linspace(1, 0, args.sampler_steps + 1, device=obs.device, dtype=obs.dtype) ** 2))


def euler_step(net: nn.Module, obs: Tensor, t: Tensor, t_next: Tensor) -> Callable:
    """One step of Eq. (12), Euler's for Eq. (6), as a function z -> z_next, (B, A) -> (B, A)."""
    return lambda z: z - (t - t_next) * net(z, t.expand(len(z)), obs)


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I): (B, A) -> (B,)."""
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)


def sample_with_log_density(net: nn.Module, obs: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """An action and its log pi(a|s), Eqs. (12) and (13): (B, O) -> (B, A), (B,)."""
    # differs from the reference code: it solves three ODEs in 999 steps and estimates traces; here the Euler
    # steps themselves are the policy, so that its density is exact
    z = torch.randn(len(obs), net.action_dim, device=obs.device, dtype=obs.dtype)
    log_pi = log_normal(z)
    for t, t_next in times(obs, args):
        z, jacobian = samplers.with_jacobian(euler_step(net, obs, t, t_next), z)  # (B, A), (B, A, A)
        log_pi = log_pi - torch.linalg.slogdet(jacobian).logabsdet
    return z, log_pi


def log_density(net: nn.Module, obs: Tensor, action: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Eq. (13) of given actions, and the undo error: (B, O), (B, A) -> (B,), (B,). The sampler's steps are undone; the
    error is how far a step, done again, lands off: unless tiny, the density is wrong. Differentiable in action, net."""
    # differs from a bug in the reference code: there the likelihood detaches z, so that the KL has a wrong gradient
    z, log_dets, undo_error = action, 0.0, torch.zeros_like(action[:, 0])
    for t, t_next in reversed(times(obs, args)):
        z_next, step = z, euler_step(net, obs, t, t_next)
        z = samplers.invert(step, z_next)  # by Newton's method; its gradient is that of the inverse function
        redone, jacobian = samplers.with_jacobian(step, z)
        log_dets = log_dets + torch.linalg.slogdet(jacobian).logabsdet
        undo_error = torch.maximum(undo_error, (redone - z_next).detach().abs().amax(-1))
    return log_normal(z) - log_dets, undo_error


def policy_loss(
    policy: nn.Module, behaviour: nn.Module, critic: Critic, obs: Tensor, args: Args
) -> tuple[Tensor, dict]:
    """Eq. (14). Its gradient goes through every step of the sampler."""
    action, log_pi = sample_with_log_density(policy, obs, args)
    log_mu, undo_error = log_density(behaviour, obs, action, args)
    q = critic.q(obs, action.clamp(-1, 1)).amin(0)  # (B,); outside of [-1, 1] there is no Q, and the KL alone pulls
    undone = undo_error < 1e-3  # elsewhere log mu is wrong, and its gradient huge: such a sample counts 0
    loss = torch.where(undone, -args.beta * q + log_pi - log_mu, 0.0).mean()
    q, kl = q.detach().mean(), torch.where(undone, log_pi - log_mu, 0.0).detach().mean()  # for the log
    return loss, {"policy/loss": loss.detach(), "policy/q": q, "policy/kl": kl, "policy/undo_error": undo_error.max()}


def act(policy: nn.Module, obs: Tensor, args: Args) -> Tensor:
    """Eq. (12): noise to actions, (B, O) -> (B, A) in [-1, 1]."""
    z = args.act_noise * torch.randn(len(obs), policy.action_dim, device=obs.device)
    for t, t_next in times(obs, args):
        z = euler_step(policy, obs, t, t_next)(z)
    return z.clamp(-1, 1)


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
    behaviour = make_policy(data.obs_dim, data.action_dim, args).to(args.device)  # the model of mu
    if args.normalize_obs:
        fit_normalizers(data.obs, critic, behaviour)
    policy = copy.deepcopy(behaviour)  # it gets mu's weights again when mu is trained, in the loop
    if args.critic:
        trained.load_critic(critic, args, data.facts)  # refused if its tau, gamma or data differ; critic_steps is 0

    adam = dict(fused=True, capturable=args.cudagraph)
    critic_optimizer = torch.optim.Adam([*critic.q.parameters(), *critic.v.parameters()], lr=args.critic_lr, **adam)
    behaviour_lr = torch.tensor(args.behaviour_lr, device=args.device)  # a tensor: a CUDA graph would freeze a number
    behaviour_optimizer = torch.optim.Adam(behaviour.parameters(), lr=behaviour_lr, **adam)
    behaviour_schedule = LambdaLR(behaviour_optimizer, partial(cosine, steps=args.behaviour_steps))
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_lr, **adam)
    compiled = torch.compile if args.compile else (lambda fn: fn)
    critic_loss_fn, matching_loss_fn = compiled(critic_loss), compiled(matching_loss)
    policy_loss_fn, act_fn = compiled(policy_loss), compiled(act)

    def critic_update() -> dict:
        loss, metrics = critic_loss_fn(critic, data.sample(args.batch_size), args)  # Eqs. (1), (2)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        update_target(critic.target_q, critic.q, args.target_rate)  # Eq. (3)
        return metrics

    def behaviour_update() -> dict:
        batch = data.sample(args.batch_size)
        loss = matching_loss_fn(behaviour, batch.obs, batch.action, args).mean()  # Eq. (5)
        behaviour_optimizer.zero_grad()
        loss.backward()
        behaviour_optimizer.step()
        return {"behaviour/loss": loss.detach()}

    def policy_update() -> dict:
        obs = data.sample(args.policy_batch_size).obs
        loss, metrics = policy_loss_fn(policy, behaviour, critic, obs, args)  # Eq. (14)
        policy_optimizer.zero_grad()
        loss.backward(inputs=list(policy.parameters()))  # mu and Q are left as they are
        # differs from the reference code: gradients are clipped here; one sample with a huge one can ruin a run
        nn.utils.clip_grad_norm_(policy.parameters(), args.grad_norm)
        policy_optimizer.step()
        return metrics

    if args.cudagraph:  # recorded in the loop, not here: run.restore() below still replaces the optimizers' tensors
        critic_update, behaviour_update = runs.captured(critic_update), runs.captured(behaviour_update)
        policy_update = runs.captured(policy_update)
    run = runs.Run(  # saves and restores what it is given by name, besides args and the data's sizes
        args, NAME, data, {"critic": args.critic_steps, "behaviour": args.behaviour_steps, "policy": args.policy_steps},
        critic=critic, behaviour=behaviour, policy=policy, critic_optimizer=critic_optimizer,
        behaviour_optimizer=behaviour_optimizer, behaviour_schedule=behaviour_schedule,
        policy_optimizer=policy_optimizer,
    )  # fmt: skip
    start = run.restore()  # loads the checkpoint if there is one; returns how many steps are done
    actor = partial(act_fn, policy, args=args)  # (B, O) -> (B, A)
    if args.eval_only:  # print the scores, write eval.json, with --video play once more
        return run.show(evaluate(actor, run, args), actor)

    for step, phase in run.steps(start):  # all steps of a phase, then those of the next; step counts on, from 1
        if phase == "critic":
            metrics = critic_update()
        elif phase == "behaviour":
            metrics = behaviour_update()
            behaviour_schedule.step()
            if step == args.critic_steps + args.behaviour_steps:
                policy.load_state_dict(behaviour.state_dict())  # the policy starts as the model of mu
        else:
            metrics = policy_update()
            if step % args.eval_every == 0 or step == run.total:
                metrics |= evaluate(actor, run, args)
        run.log(step, metrics)  # every log_every steps and with a score; stops the run at NaN
        run.save(step)  # every save_every steps
    return run.finish(actor)  # which plays once more with --video


if __name__ == "__main__":
    arguments.main(NAME, train, Args, SETTINGS)
