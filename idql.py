"""IDQL: a diffusion model of the behaviour, re-sampled at acting time by weights that the critic implies, in one file.

    python idql.py                                               halfcheetah-demo, made on the spot, minutes on a laptop
    python idql.py --env bandit                                  a problem with a known answer
    python idql.py --env halfcheetah-medium-expert-v2            D4RL's data, physics and score
    python idql.py --extraction implicit --candidates 32         draw by the weights, of 32 candidates
    python idql.py --critic runs/halfcheetah-demo/iql_critic/seed0   with a critic that is there already

Paper: Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies",
arXiv:2304.10573.

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. IQL's V is the value of a policy that its critic never writes down, the behaviour re-weighted. IDQL writes it
down when it acts: sample N actions of a model of mu, then choose among them by the critic. In order:

  critic
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f(u) = |tau - 1[u < 0]| u^2 punishes a low V more
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  generative model of the behaviour, in T steps of discrete time; t = -1 is the action, t = T - 1 almost noise
    (15) x_t = sqrt(ab_t) a + sqrt(1 - ab_t) eps, ab_t = prod_{i <= t} (1 - beta_i)
    (16) L = E_D[ |net(x_t, t, s) - eps|^2 ]                 t uniform; summed over action dimensions
    (17) x_{t-1} = (x_t - beta_t / sqrt(1 - ab_t) net(x_t, t, s)) / sqrt(1 - beta_t) + sqrt(beta_t) z, clipped
  policy: a_1 .. a_N ~ mu(.|s), then one of them
    (11) pi(a|s) = mu(a|s) |f'(u)| / |u| / Z(s), u = min_i Q_i(s, a) - V(s)    with Q' for Q in this file
    (18) the one with the largest min_i Q'_i(s, a)           what the paper reports

B is the batch, O the size of an observation, A of an action, N the candidates. Equations have the same number in every
file. `diff gmpo.py idql.py` shows the critic's weights move from training to acting. GMPO: arXiv:2412.01245, gmpo.py.
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

NAME = "idql"

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

    diffusion_steps: Count | None = None
    """T"""
    dropout: Share = 0.1
    """share of the diffusion model's hidden units that are set to 0 in training, at random"""
    ema_rate: Share | None = None
    """share of the new weights in the averaged network, the one that is sampled"""
    extraction: Literal["argmax", "implicit", "softmax"] | None = None
    """of the candidates: argmax Eq. (18); implicit Eq. (11); softmax a draw by exp(beta Q)"""
    candidates: Count | None = None
    """N; part of the result, so it stands beside every score"""
    beta: Amount | None = None
    """inverse temperature of --extraction softmax"""

    policy_steps: Steps | None = None
    """gradient steps of the policy"""
    policy_lr: Amount | None = None
    """Adam's learning rate for the policy; it falls to 0 along a cosine"""
    batch_size: Count | None = None
    """transitions a gradient step"""
    policy_batch_size: Count | None = None
    """transitions a gradient step of the policy, which is the diffusion model"""


OURS = dict(policy_batch_size=256, normalize_obs=True, layer_norm=True, eval_every=10_000)  # for data not D4RL's

# An argument that is None takes its value from the dataset's entry, or from "*" if that has none. The entry is that of
# its name, else of x-y-remade "x-remade" or "remade", else of x-y "x"; for a file or minari:NAME it is "own data".
SETTINGS = {
    # The paper's text: two actor steps of 1024 for each critic step of 256. The authors' last code has other settings.
    "*": dict(
        critic_lr=3e-4, critic_steps=1_500_000, policy_steps=3_000_000, batch_size=256, policy_batch_size=1024,
        policy_lr=3e-4, ema_rate=0.001, diffusion_steps=5, expectile=0.7, extraction="argmax", candidates=64,
        beta=1.0, normalize_obs=False, layer_norm=False, eval_every=250_000,
    ),
    "antmaze": dict(expectile=0.9, critic_steps=1_000_000, policy_steps=2_000_000),
    # Ours: budgets of minutes, chosen by trying. "-remade": data made here by D4RL's recipe.
    "halfcheetah-demo": OURS | dict(
        critic_steps=15_000, layer_norm=False, policy_steps=10_000, candidates=32, eval_every=2_500),
    "bandit": OURS | dict(  # T = 20: 5 steps blur the bandit's narrow modes, even with an exact net
        critic_lr=1e-3, critic_steps=1_500, policy_steps=2_500, policy_lr=1e-3, ema_rate=0.01, diffusion_steps=20,
        layer_norm=False, extraction="implicit", candidates=16, normalize_obs=False, eval_every=5_000,
    ),
    "maze2d-remade": OURS | dict(
        critic_steps=100_000, expectile=0.9, policy_steps=30_000, candidates=32, ema_rate=0.005),
    "remade": OURS | dict(critic_steps=200_000, policy_steps=50_000, candidates=32, ema_rate=0.005),
    "own data": OURS | dict(critic_steps=100_000, policy_steps=50_000, candidates=32, ema_rate=0.005),
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


def dense(size_in: int, size_out: int, init: str = "xavier") -> nn.Linear:
    """A linear layer as Flax makes it: Xavier-uniform, or LeCun's truncated normal; zero bias."""
    linear = nn.Linear(size_in, size_out)
    if init == "xavier":
        nn.init.xavier_uniform_(linear.weight)
    else:
        std = math.sqrt(1 / size_in) / 0.87962566  # the cut at two standard deviations narrows the normal by this
        nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return linear


class Block(nn.Module):
    """x + Dense(Mish(Dense(LayerNorm(Dropout(x))))), with no activation after it: (B, W) -> (B, W)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        wide = [dense(width, 4 * width, "lecun"), nn.Mish(), dense(4 * width, width, "lecun")]
        self.net = nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(width, eps=1e-6), *wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class LNResNet(nn.Module):
    """net(x_t, t, s) of the paper, t unscaled, 0 to T - 1: (B, A), (B,), (B, O) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int, dropout: float):
        super().__init__()
        self.normalize, self.obs_dim, self.action_dim = Normalize(obs_dim), obs_dim, action_dim
        self.frequencies = nn.Parameter(0.2 * torch.randn(32))  # Fourier features, learned, as in the authors' code
        self.condition = nn.Sequential(dense(64, 128), nn.Mish(), dense(128, 128))
        blocks = [Block(256, dropout) for _ in range(3)]
        self.net = nn.Sequential(dense(action_dim + obs_dim + 128, 256), *blocks, nn.Mish(), dense(256, action_dim))

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None] * self.frequencies  # (B, 32)
        condition = self.condition(torch.cat([angle.cos(), angle.sin()], -1))  # (B, 128)
        return self.net(torch.cat([x, self.normalize(obs), condition], -1))


# ------------------------------------------------------------------------------------------------------------------
# 3. The generative model


def betas(args: Args, device: str | torch.device = "cpu") -> Tensor:
    """The (T,) beta_t of Eq. (15), the authors' "vp": 1 - exp(-(integral of 0.1 + 9.9 u from t / T to (t + 1) / T))."""
    u = torch.arange(args.diffusion_steps + 1, dtype=torch.float64, device=device) / args.diffusion_steps
    return (1 - torch.exp(-(0.1 * u + 9.9 / 2 * u**2).diff())).float()


def sample(net: nn.Module, obs: Tensor, args: Args) -> Tensor:
    """Eq. (17): noise to actions, (B, O) -> (B, A) in [-1, 1]."""
    beta = betas(args, obs.device)
    bar = (1 - beta).cumprod(0)
    x = torch.randn(len(obs), net.action_dim, device=obs.device, dtype=obs.dtype)
    for t in reversed(range(args.diffusion_steps)):
        eps = net(x, torch.full_like(x[:, 0], t), obs)
        x = (x - beta[t] / (1 - bar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t > 0:  # the last step adds no noise
            x = x + beta[t].sqrt() * torch.randn_like(x)
        x = x.clamp(-1, 1)  # as in the authors' code: x itself, noise included, after every step
    return x


# ------------------------------------------------------------------------------------------------------------------
# 4. The critic


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


def policy_loss(policy: nn.Module, batch: datasets.Batch, args: Args) -> tuple[Tensor, dict]:
    """Eq. (16): plain behaviour cloning, so that `policy` is a model of mu. The critic comes in when it acts."""
    t = torch.randint(args.diffusion_steps, batch.reward.shape, device=batch.obs.device)  # (B,)
    eps = torch.randn_like(batch.action)
    bar = (1 - betas(args, batch.obs.device)).cumprod(0)[t, None]  # (B, 1)
    x = bar.sqrt() * batch.action + (1 - bar).sqrt() * eps  # Eq. (15)
    loss = (policy(x, t.float(), batch.obs) - eps).square().sum(-1).mean()  # Eq. (16)
    return loss, {"behaviour/loss": loss.detach()}


def choose(q: Tensor, v: Tensor, args: Args) -> Tensor:
    """Which of the N candidates: (B, N), (B,) -> (B,)."""
    if args.extraction == "argmax":
        return q.argmax(-1)  # Eq. (18)
    if args.extraction == "softmax":
        weight = torch.softmax(args.beta * q, -1)
    else:
        weight = implicit_weights(q - v[:, None], args)
    return torch.multinomial(weight, 1).squeeze(-1)


def act(policy: nn.Module, critic: Critic, obs: Tensor, args: Args) -> Tensor:
    """N candidates of every state in one batch, then one of them for each state: (B, O) -> (B, A) in [-1, 1]."""
    repeated = obs.repeat_interleave(args.candidates, 0)  # (B N, O), the N rows of a state side by side
    action = sample(policy, repeated, args)
    q = critic.target_q(repeated, action).amin(0).view(-1, args.candidates)  # (B, N)
    chosen = choose(q, critic.v(obs), args)
    return action.view(len(obs), args.candidates, -1)[torch.arange(len(obs), device=obs.device), chosen]


def load_policy(path: str | Path, device: str = "cpu") -> Callable:
    """A run's policy as a function, (B, O) or (O,) -> actions in [-1, 1], numpy or torch, which answers in kind.

    Its noise comes from torch's default generator. Raises UserError if the run can't be read.
    """
    checkpoint = trained.load_checkpoint(path, NAME)
    args = trained.saved_args(checkpoint, Args)
    critic = Critic(*checkpoint["sizes"], args.layer_norm).to(device)  # sizes: obs_dim, action_dim
    policy = LNResNet(*checkpoint["sizes"], args.dropout).to(device).eval()
    critic.load_state_dict(checkpoint["critic"])
    policy.load_state_dict(checkpoint["ema"])
    return trained.numpy_or_torch(lambda obs: act(policy, critic, obs, args), policy.obs_dim, device)


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
    """How often each mode is taken, against the exact frequencies: argmax with N draws, the others as N -> inf."""
    target = torch.softmax(args.beta * bandit.REWARDS, -1) if args.extraction == "softmax" else implicit_target(args)
    if args.extraction == "argmax":
        rank = bandit.REWARDS.argsort().argsort()
        target = ((rank + 1) / 8) ** args.candidates - (rank / 8) ** args.candidates  # P(the best of N has this rank)
    action = torch.cat([actor(obs) for obs in torch.zeros(4096, 1, device=args.device).split(512)])
    metrics, figure = bandit.report(action, target)
    run.picture("bandit", figure)
    return metrics


def cosine(step: int, steps: int) -> float:
    """The factor of a learning rate that falls from 1 to 0 within `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def train(args: Args) -> dict:
    """The whole run; returns what result.json holds. Raises UserError for bad input, TrainingError at NaN or inf."""
    args, data = arguments.prepare(args, SETTINGS, NAME)  # rewards as in IQL: scaled in locomotion, less 1 in antmaze
    # differs from the authors' code: all of the data is trained on, not a random 95 %
    torch.manual_seed(args.seed)
    critic = Critic(data.obs_dim, data.action_dim, args.layer_norm).to(args.device)
    policy = LNResNet(data.obs_dim, data.action_dim, args.dropout).to(args.device)
    if args.normalize_obs:
        fit_normalizers(data.obs, critic, policy)
    if args.critic:
        trained.load_critic(critic, args, data.facts)  # refused if its f, gamma or data differ; critic_steps is 0
    ema = copy.deepcopy(policy).requires_grad_(False).eval()  # the average of the weights, the net that acts

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

    def policy_update() -> dict:
        loss, metrics = policy_loss_fn(policy, data.sample(args.policy_batch_size), args)  # Eq. (16)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()
        update_target(ema, policy, args.ema_rate)
        return metrics

    if args.cudagraph:  # recorded in the loop, not here: run.restore() below still replaces the optimizers' tensors
        critic_update, policy_update = runs.captured(critic_update), runs.captured(policy_update)
    run = runs.Run(  # saves and restores what it is given by name, besides args and the data's sizes
        args, NAME, data, {"critic": args.critic_steps, "policy": args.policy_steps}, critic=critic, policy=policy,
        ema=ema, critic_optimizer=critic_optimizer, policy_optimizer=policy_optimizer, policy_schedule=policy_schedule,
    )  # fmt: skip
    start = run.restore()  # loads the checkpoint if there is one; returns how many steps are done
    actor = partial(act_fn, ema, critic, args=args)  # (B, O) -> (B, A)
    if args.eval_only:  # print the scores, write eval.json, with --video play once more
        return run.show(evaluate(actor, run, args) | {"eval/candidates": args.candidates}, actor)

    # differs from the authors' code: first critic, then policy; theirs alternates
    for step, phase in run.steps(start):  # all steps of a phase, then those of the next; step counts on, from 1
        if phase == "critic":
            metrics = critic_update()
        else:
            metrics = policy_update()
            policy_schedule.step()
            if step % args.eval_every == 0 or step == run.total:
                metrics |= evaluate(actor, run, args) | {"eval/candidates": args.candidates}
        run.log(step, metrics)  # every log_every steps and with a score; stops the run at NaN
        run.save(step)  # every save_every steps
    return run.finish(actor)  # which plays once more with --video


if __name__ == "__main__":
    arguments.main(NAME, train, Args, SETTINGS)
