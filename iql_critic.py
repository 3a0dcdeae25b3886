"""IQL: a critic learnt from the data's own actions, and a Gaussian actor fitted by its advantages, in one file.

    python iql_critic.py                                              hopper-demo, made on the spot, minutes on a laptop
    python iql_critic.py --env bandit                                 a problem with a known answer, seconds
    python iql_critic.py --env halfcheetah-medium-expert-v2           D4RL's data, physics and score
    python iql_critic.py --critic-loss exponential                    another f in Eq. (1)
    python gmpo.py --critic runs/hopper-demo/iql_critic/seed0         the other files take this critic

Papers: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", arXiv:2110.06169 (IQL: this file is it, by default);
Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies", arXiv:2304.10573 (any convex f).

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever collected. A critic that asks
what an action outside the data is worth gets an invented answer. IQL never asks: V is fitted to Q at the data's actions, but by an asymmetric
loss, so that it becomes the value of a policy better than mu. Each step does, in order:

  critic
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]                     f asymmetric: V becomes the value of a policy better than mu
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q                  the target critic follows slowly
  policy
    (7)  w(s, a) = min(exp(beta (min_i Q'_i(s, a) - V(s))), weight_max)
    (10) L = -E_D[ w(s, a) log N(a; tanh(m(s)), std) ]               IQL's actor: advantage-weighted regression of a Gaussian
  whose value V is (IDQL)
    (11) pi(a|s) = mu(a|s) w(s, a) / Z(s),  w = |f'(Q - V)| / |Q - V|  the policy that the critic has never written down

B is the batch, O the size of an observation, A of an action. Equations have the same number in every file. A Gaussian is the yardstick: on
`--env bandit` it fails, and the picture shows why. Read gmpo.py next: `diff iql_critic.py gmpo.py` puts a generative model in its place.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn as nn

from common import bandit, datasets, environments, runs

# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Arguments


@dataclass
class Args:
    env: str = "hopper-demo"
    """the data: hopper-demo, bandit, a D4RL name such as halfcheetah-medium-expert-v2, or the path of an HDF5 file"""
    eval_env: str | None = None
    """where an own HDF5 file's policy is scored: a D4RL family such as hopper (normalised score), or a Gymnasium id (raw return)"""
    seed: int = 0
    """of networks, batches and noise; the evaluation has a stream of its own"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    run_dir: Path | None = None
    """the run's folder; None: runs/<env>/iql_critic/seed<seed>"""
    resume: bool = False
    """go on from the run folder's checkpoint, if there is one"""
    eval_only: bool = False
    """score the run folder's checkpoint and stop"""
    allow_unverified: bool = False
    """accept a D4RL file whose checksum is not the published one"""
    normalize_obs: bool | None = None
    """let the networks see (obs - mean) / std; None: as PAPER says"""

    critic: Path | None = None
    """another run (its folder) whose critic is taken as it is, instead of training one"""
    critic_steps: int | None = None
    """gradient steps of the critic; None: as PAPER says"""
    critic_lr: float = 3e-4
    """Adam's learning rate for Q and V"""
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

    policy_steps: int | None = None
    """gradient steps of the actor, trained beside the critic from the first step on; None: as PAPER says"""
    policy_lr: float | None = None
    """Adam's learning rate for the actor; None: as PAPER says"""
    lr_decay: bool | None = None
    """let the actor's learning rate fall to 0 along a cosine; None: as PAPER says"""
    dropout: float | None = None
    """of the actor's hidden layers; None: as PAPER says"""
    beta: float | None = None
    """the temperature in Eq. (7): 0 is behaviour cloning, large is greedy; None: as PAPER says"""
    weight_max: float = 100.0
    """the largest weight in Eq. (7)"""
    batch_size: int = 256
    """transitions a gradient step"""

    eval_every: int | None = None
    """gradient steps between evaluations; None: as PAPER says"""
    eval_episodes: int = 10
    """episodes an evaluation, all in lock-step"""
    log_every: int = 1000
    """gradient steps between two lines of metrics"""
    save_every: int = 10_000
    """gradient steps between checkpoints"""


# IQL's own settings (its table 1 and its launchers). "*" holds where a name says nothing.
PAPER = {
    "*": dict(
        critic_steps=1_000_000, policy_steps=1_000_000, expectile=0.7, beta=3.0, policy_lr=3e-4, lr_decay=True, dropout=0.0,
        normalize_obs=False, eval_every=50_000,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Networks


class Normalize(nn.Module):
    pass


def mlp():
    pass


class TwinQ(nn.Module):
    pass


class Value(nn.Module):
    pass


class GaussianActor(nn.Module):
    """The mean tanh(m(s)) and a standard deviation that does not depend on the state: (B, O) -> N of (B, A)."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int, dropout: float):
        super().__init__()
        self.normalize, self.net = normalize, mlp(obs_dim, 256, 256, action_dim, dropout=dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> torch.distributions.Normal:
        mean = torch.tanh(self.net(self.normalize(obs)))  # not a squashed Gaussian: tanh is inside the mean, samples may leave [-1, 1]
        return torch.distributions.Normal(mean, self.log_std.clamp(-5, 2).exp())


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. The critic


class Critic(nn.Module):
    pass


def f():
    pass


def v_loss():
    pass


def q_loss():
    pass


def update_target():
    pass


def implicit_weights(u: torch.Tensor, args: Args, floor: float = 1e-3) -> torch.Tensor:
    """Eq. (11), elementwise at u = Q - V, up to a factor: the closed forms of |f'(u)| / |u|, finite at u = 0."""
    share = torch.where(u > 0, args.expectile, 1 - args.expectile)
    if args.critic_loss == "expectile":
        return share
    if args.critic_loss == "quantile":
        return share / u.abs().clamp(min=floor)  # singular at u = 0
    x = args.linex_alpha * u
    small = x.abs() < 1e-6
    x = torch.where(small, 1.0, x)
    return torch.where(small, 1.0, (torch.exp(x.clamp(max=math.log(args.linex_max))) - 1) / x)


# ---------------------------------------------------------------------------------------------------------------------------------
# 5. The policy


def weights():
    pass


def policy_loss(actor: GaussianActor, critic: Critic, batch: datasets.Batch, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. (10)."""
    with torch.no_grad():
        advantage = critic.target_q(batch.obs, batch.action).amin(0) - critic.v(batch.obs)
        weight = weights(advantage, args)  # (B,)
    loss = -(weight * actor(batch.obs).log_prob(batch.action).sum(-1)).mean()
    return loss, {"policy/loss": loss.detach(), **weight_metrics(weight, args)}
