"""IQL: a critic learnt from the data's own actions, and a Gaussian actor fitted by its advantages, in one file.

    python iql_critic.py                                         halfcheetah-demo, made on the spot, minutes on a laptop
    python iql_critic.py --env bandit                            a problem with a known answer, seconds
    python iql_critic.py --env halfcheetah-medium-expert-v2      D4RL's data, physics and score

Papers: IQL, Kostrikov et al., arXiv:2110.06169 (the defaults); IDQL, Hansen-Estruch et al., arXiv:2304.10573 (other f).

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. A critic that is asked what an action outside the data is worth invents an answer. IQL never asks: V is
fitted to Q at the data's actions, by an asymmetric loss, so that it becomes the value of a policy better than mu.

  critic
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f(u) = |tau - 1[u < 0]| u^2 punishes a low V more
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  policy
    (7)  w(s, a) = min(exp(beta (min_i Q_i(s, a) - V(s))), weight_max)       with Q' for Q in this file, as in IQL
    (10) L = -E_D[ w(s, a) log N(a; tanh(m(s)), std) ]       IQL's actor: advantage-weighted regression of a Gaussian
  implied: the policy whose value is V (IDQL); no network holds it, only the bandit's evaluation draws from it
    (11) pi(a|s) = mu(a|s) |f'(u)| / |u| / Z(s), u = min_i Q_i(s, a) - V(s)

B is the batch, O the size of an observation, A of an action. Equations have the same number in every file.
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
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common import arguments, bandit, datasets, runs, trained
from common.arguments import Amount, Count, Inside, RunArgs, Share, Steps

NAME = "iql_critic"

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
    critic_loss: Literal["expectile", "quantile", "exponential"] = "expectile"
    """f of Eq. (1); quantile takes --expectile for its tau too, and 0.5 is then the median"""
    expectile: Inside | None = None
    """tau of Eq. (1): 0.5 is the mean over the data's actions, towards 1 it becomes the best of them"""
    linex_alpha: arguments.Positive = 1.0
    """alpha of the exponential loss, f(u) = exp(alpha u) - alpha u"""
    linex_max: arguments.AtLeast2 = 6
    """where exp(alpha u) reaches this value, a straight line takes its place, so that no outlier rules the gradient"""
    discount: Share = 0.99
    """gamma"""
    target_rate: Share = 0.005
    """share of the new weights in Eq. (3)"""

    policy_steps: Steps | None = None
    """gradient steps of the policy, trained beside the critic from the first step on, or alone with --critic"""
    policy_lr: Amount | None = None
    """Adam's learning rate for the policy"""
    lr_decay: bool | None = None
    """let that learning rate fall to 0 along a cosine"""
    dropout: Share | None = None
    """of the policy's hidden layers"""
    beta: Amount | None = None
    """inverse temperature of Eq. (7): 0 is behaviour cloning, large is greedy"""
    weight_max: Amount = 100.0
    """the largest weight in Eq. (7)"""
    batch_size: Count = 256
    """transitions a gradient step"""


OURS = dict(normalize_obs=True, layer_norm=True, eval_every=20_000)  # shared by the last three entries of SETTINGS
# An argument that is None takes its value from the dataset's entry, or from "*" if that has none. The entry is that of
# its name, else of x-y-remade "x-remade" or "remade", else of x-y "x"; for a file or minari:NAME it is "own data".
SETTINGS = {
    "*": dict(  # IQL's own
        critic_lr=3e-4, critic_steps=1_000_000, policy_steps=1_000_000, policy_lr=3e-4, lr_decay=True,
        expectile=0.7, beta=3.0, dropout=0.0, normalize_obs=False, layer_norm=False, eval_every=50_000,
    ),
    "antmaze": dict(expectile=0.9, beta=10.0),
    **{family: dict(beta=0.5, dropout=0.1) for family in ("kitchen", "pen", "hammer", "door", "relocate")},
    # Ours: budgets of minutes, chosen by trying. "-remade": data made here by D4RL's recipe.
    "halfcheetah-demo": dict(critic_steps=15_000, policy_steps=15_000, beta=1.0, normalize_obs=True, eval_every=5_000),
    "bandit": dict(critic_lr=1e-3, critic_steps=1_500, policy_steps=1_500, policy_lr=1e-3, beta=2.0, eval_every=500),
    "maze2d-remade": OURS | dict(critic_steps=100_000, policy_steps=100_000, expectile=0.9),
    "remade": OURS | dict(critic_steps=200_000, policy_steps=200_000),
    "own data": OURS | dict(critic_steps=100_000, policy_steps=100_000),
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


class GaussianPolicy(nn.Module):
    """The mean tanh(m(s)) and a standard deviation that does not depend on the state: (B, O) -> N of (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int, dropout: float):
        super().__init__()
        self.normalize, self.log_std = Normalize(obs_dim), nn.Parameter(torch.zeros(action_dim))
        first, relu, second, _, last = mlp(obs_dim, 256, 256, action_dim)
        self.net = nn.Sequential(first, relu, nn.Dropout(dropout), second, relu, nn.Dropout(dropout), last)

    def forward(self, obs: Tensor) -> torch.distributions.Normal:
        # not a squashed Gaussian: tanh is inside the mean, samples may leave [-1, 1]; validating makes a GPU wait
        mean = torch.tanh(self.net(self.normalize(obs)))
        return torch.distributions.Normal(mean, self.log_std.clamp(-5, 2).exp(), validate_args=False)


# ------------------------------------------------------------------------------------------------------------------
# 4. The critic (section 3 of the other files is their generative model)


class Critic(nn.Module):
    """Q, its slow copy Q', and V."""

    def __init__(self, obs_dim: int, action_dim: int, layer_norm: bool = False):
        super().__init__()
        self.q, self.v = TwinQ(obs_dim, action_dim, layer_norm), Value(obs_dim, layer_norm)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)


def f(u: Tensor, args: Args) -> Tensor:
    """The asymmetric loss of Eq. (1), elementwise, at u = Q - V."""
    if args.critic_loss == "exponential":  # exp(alpha u) - alpha u, its exponential continued linearly above linex_max
        x, knee = args.linex_alpha * u, math.log(args.linex_max)
        return torch.exp(x.clamp(max=knee)) + args.linex_max * (x - knee).clamp(min=0) - x
    share = torch.where(u > 0, args.expectile, 1 - args.expectile)
    return share * u.square() if args.critic_loss == "expectile" else share * u.abs()


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


def implicit_weights(u: Tensor, args: Args, floor: float = 1e-3) -> Tensor:
    """Eq. (11), elementwise at u = Q - V, up to a factor: the closed forms of |f'(u)| / |u|, finite at u = 0."""
    share = torch.where(u > 0, args.expectile, 1 - args.expectile)
    if args.critic_loss == "expectile":
        return share
    # differs from a bug in IDQL's code: there quantile's weight is negative where Q < V, exponential's is a constant
    if args.critic_loss == "quantile":
        return share / u.abs().clamp(min=floor)  # singular at u = 0
    x = args.linex_alpha * u  # |f'| / |u| is alpha^2 times (min(e^x, linex_max) - 1) / x, which is 1 at x = 0
    return torch.where(x.abs() < 1e-6, 1.0, torch.expm1(x.clamp(max=math.log(args.linex_max))) / x)


def implicit_target(args: Args) -> Tensor:
    """Eq. (11) in closed form on the bandit: eight actions, equally frequent, with rewards in [0, 1]: (8,)."""
    values = torch.linspace(0, 1, 100_001)
    optimal_v = values[f(bandit.REWARDS[:, None] - values, args).mean(0).argmin()]  # Eq. (1) at its minimum
    weight = implicit_weights(bandit.REWARDS - optimal_v, args)
    return weight / weight.sum()


# ------------------------------------------------------------------------------------------------------------------
# 5. The policy


def weights(advantage: Tensor, args: Args) -> Tensor:
    """Eq. (7), elementwise."""
    return torch.exp(args.beta * advantage).clamp(max=args.weight_max)


def effective_share(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): the share of the samples that count, 1 if all weigh the same."""
    return weight.sum().square() / (weight.numel() * weight.square().sum())


def policy_loss(policy: GaussianPolicy, critic: Critic, batch: datasets.Batch, args: Args) -> tuple[Tensor, dict]:
    """Eq. (10)."""
    with torch.no_grad():
        advantage = critic.target_q(batch.obs, batch.action).amin(0) - critic.v(batch.obs)  # Q' for Q, as in IQL
        weight = weights(advantage, args)  # (B,)
    loss = -(weight * policy(batch.obs).log_prob(batch.action).sum(-1)).mean()
    metrics = {"policy/weight": weight.mean(), "policy/clipped": (weight >= args.weight_max).float().mean()}
    return loss, {"policy/loss": loss.detach(), "policy/ess": effective_share(weight), **metrics}


def act(policy: GaussianPolicy, obs: Tensor) -> Tensor:
    """The mean action, as IQL is evaluated: (B, O) -> (B, A) in [-1, 1]."""
    return policy.eval()(obs).mean


def load_policy(path: str | Path, device: str = "cpu") -> Callable:
    """A run's policy as a function, (B, O) or (O,) -> actions in [-1, 1], numpy or torch, which answers in kind.

    Raises UserError if the run (its folder, or checkpoint.pt) can't be read.
    """
    checkpoint = trained.load_checkpoint(path, NAME)
    args, sizes = trained.saved_args(checkpoint, Args), checkpoint["sizes"]  # obs_dim, action_dim
    policy = GaussianPolicy(*sizes, args.dropout).to(device).eval()
    policy.load_state_dict(checkpoint["policy"])
    return trained.numpy_or_torch(lambda obs: act(policy, obs), sizes[0], device)


# ------------------------------------------------------------------------------------------------------------------
# 6. Training


@torch.no_grad()
def evaluate(actor: Callable, critic: Critic, policy: GaussianPolicy, run: runs.Run, args: Args) -> dict:
    """The scores of `actor`, `act` of this policy, over args.eval_episodes episodes. The bandit's two best actions lie
    opposite, so a Gaussian must fail: it is only plotted, and the data's actions, resampled by Eq. (11), are scored."""
    with torch.random.fork_rng():  # training goes on as if there had been no evaluation
        torch.manual_seed(args.seed + run.step)  # the step that `train` is at
        if args.env != "bandit":
            return run.scores(actor) if args.eval_env else {}  # else there is nothing to play in
        weight = implicit_weights(advantages(critic, run.data), args)
        implicit = run.data.action[torch.multinomial(weight, 4096, replacement=True)]
        gaussian = policy.eval()(run.data.obs[:4096]).sample()
        metrics, figure = bandit.report(implicit, implicit_target(args), Gaussian=gaussian)
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
    policy = GaussianPolicy(data.obs_dim, data.action_dim, args.dropout).to(args.device)
    if args.normalize_obs:
        fit_normalizers(data.obs, critic, policy)
    if args.critic:
        trained.load_critic(critic, args, data.facts)  # refused if its f, gamma or data differ; critic_steps is 0

    adam = dict(fused=True, capturable=args.cudagraph)
    critic_optimizer = torch.optim.Adam([*critic.q.parameters(), *critic.v.parameters()], lr=args.critic_lr, **adam)
    policy_lr = torch.tensor(args.policy_lr, device=args.device)  # a tensor: a CUDA graph would freeze a number
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=policy_lr, **adam)
    policy_schedule = LambdaLR(policy_optimizer, partial(cosine, steps=args.policy_steps))
    critic_loss_fn, policy_loss_fn = (torch.compile(fn) if args.compile else fn for fn in (critic_loss, policy_loss))

    def critic_update() -> dict:
        loss, metrics = critic_loss_fn(critic, data.sample(args.batch_size), args)  # Eqs. (1), (2)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        update_target(critic.target_q, critic.q, args.target_rate)  # Eq. (3)
        return metrics

    def policy_update() -> dict:  # with a batch of its own; IQL's code has one batch for all
        loss, metrics = policy_loss_fn(policy.train(), critic, data.sample(args.batch_size), args)  # Eq. (10)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()
        return metrics

    if args.cudagraph:  # recorded in the loop, not here: run.restore() below still replaces the optimizers' tensors
        critic_update, policy_update = runs.captured(critic_update), runs.captured(policy_update)
    total = max(args.critic_steps, args.policy_steps)  # the two are trained side by side, in one phase
    run = runs.Run(  # saves and restores what it is given by name, besides args and the data's sizes
        args, NAME, data, {"policy" if args.critic else "critic and policy": total}, critic=critic, policy=policy,
        critic_optimizer=critic_optimizer, policy_optimizer=policy_optimizer, policy_schedule=policy_schedule,
    )  # fmt: skip
    start = run.restore()  # loads the checkpoint if there is one; returns how many steps are done
    actor = partial(act, policy)  # (B, O) -> (B, A)
    if args.eval_only:  # print the scores, write eval.json, with --video play once more
        return run.show(evaluate(actor, critic, policy, run, args), actor)

    for step, _ in run.steps(start):  # step counts from 1, start is the last one done, _ the name of the one phase
        metrics = {}
        if step <= args.critic_steps:
            metrics |= critic_update()
        if step <= args.policy_steps:
            metrics |= policy_update()
            if args.lr_decay:
                policy_schedule.step()
        if step % args.eval_every == 0 or step == run.total:
            metrics |= evaluate(actor, critic, policy, run, args)
        run.log(step, metrics)  # every log_every steps and with a score; stops the run at NaN
        run.save(step)  # every save_every steps
    return run.finish(actor)  # which plays once more with --video


if __name__ == "__main__":
    arguments.main(NAME, train, Args, SETTINGS)
