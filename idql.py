"""IDQL: a diffusion model of the behaviour, re-sampled at acting time by weights that the critic implies, in one file.

    python idql.py                                               halfcheetah-demo, made on the spot, minutes on a laptop
    python idql.py --env bandit                                  a problem with a known answer
    python idql.py --env halfcheetah-medium-expert-v2            D4RL's data, physics and score
    python idql.py --extraction implicit --candidates 32         draw by the weights, of 32 candidates
    python idql.py --preset head                                 the settings of the authors' last published code

Paper: Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies",
arXiv:2304.10573.

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. IQL's V is the value of a policy that its critic never writes down, the behaviour re-weighted. IDQL writes it
down when it acts: sample N actions of a model of mu, then choose among them by the critic. In order:

  critic
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f asymmetric: V is the value of a policy better than mu
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  generative model of the behaviour, in T steps of discrete time; t = -1 is the action, t = T - 1 almost noise
    (15) x_t = sqrt(ab_t) a + sqrt(1 - ab_t) eps, ab_t = prod_{i <= t} (1 - beta_i)
    (16) L = E_D[ |net(x_t, t, s) - eps|^2 ]                 t uniform; summed over action dimensions
    (17) x_{t-1} = (x_t - beta_t / sqrt(1 - ab_t) net(x_t, t, s)) / sqrt(1 - beta_t) + sqrt(beta_t) z, then clipped
  policy: a_1 .. a_N ~ mu(.|s), then one of them
    (11) pi(a|s) = mu(a|s) w(s, a) / Z(s), w = |f'(Q - V)| / |Q - V|
    (18) the one with the largest min_i Q'_i(s, a)           what the paper reports

B is the batch, O the size of an observation, A of an action, N the candidates. Equations have the same number in every
file. Read gmpo.py before this file: `diff gmpo.py idql.py` shows the weights move from the training to the acting.
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
    """the run's folder; None: runs/<env>/idql/seed<seed>; with several seeds, of their folders seed<seed>"""
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

    preset: Literal["paper", "head"] = "paper"
    """paper: as its text says; head: as the authors' last code has it, 2 to 4 points lower on walker2d by their word"""
    diffusion_steps: int | None = None
    """T; None: as PAPER says"""
    schedule: Literal["vp", "cosine", "linear"] | None = None
    """the betas of Eq. (15); linear is that of DDPM's 1000 steps, thinned out to T; None: as PAPER says"""
    dropout: float = 0.1
    """of the network's blocks, in training"""
    weight_decay: float | None = None
    """AdamW's, on all parameters; None: 0 in the paper, 1e-4 at head"""
    ema_rate: float | None = None
    """share of the new weights in the averaged network, the one that is sampled; None: as PAPER says"""
    extraction: Literal["argmax", "implicit", "softmax"] | None = None
    """of the candidates: argmax Eq. (18); implicit Eq. (11); softmax a draw by exp(beta Q); None: as PAPER says"""
    candidates: int | None = None
    """N; part of the result, so it stands beside every score; None: as PAPER says"""

    policy_steps: int | None = None
    """gradient steps of the policy; None: as PAPER says"""
    policy_lr: float | None = None
    """Adam's learning rate for the policy; None: as PAPER says"""
    lr_decay: bool | None = None
    """let the policy's learning rate fall to 0 along a cosine; None: as PAPER says"""
    beta: float | None = None
    """the temperature of --extraction softmax; None: as PAPER says"""
    batch_size: int | None = None
    """transitions a gradient step of the critic; None: as PAPER says"""
    policy_batch_size: int | None = None
    """transitions a gradient step of the diffusion model; None: as PAPER says"""

    eval_every: int | None = None
    """gradient steps between evaluations; None: as PAPER says"""
    eval_episodes: int = 10
    """episodes an evaluation, all in lock-step"""
    log_every: int = 1000
    """gradient steps between two lines of metrics"""
    save_every: int = 10_000
    """gradient steps between checkpoints"""


# The paper's settings, its actor as the text has it: two steps of 1024 for each of the critic's 256; "*" holds where a
# name says nothing. N = 64 is the paper's choice for all domains ("-1"); its "-A" columns chose N by looking at scores.
ANTMAZE = dict(expectile=0.9, critic_steps=1_000_000, policy_steps=2_000_000)
PAPER = {
    "*": dict(
        critic_lr=3e-4, critic_steps=1_500_000, policy_steps=3_000_000, batch_size=256, policy_batch_size=1024,
        policy_lr=3e-4, lr_decay=True, weight_decay=0.0, ema_rate=0.001, diffusion_steps=5, schedule="vp",
        expectile=0.7, extraction="argmax", candidates=64, beta=1.0, normalize_obs=False, eval_every=250_000,
    ),
    **{f"antmaze-{maze}-v0": ANTMAZE for maze in
       ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")},
    # Not from the paper: budgets of minutes, chosen by trying.
    "halfcheetah-demo": dict(
        critic_steps=15_000, policy_steps=10_000, policy_batch_size=256, normalize_obs=True, candidates=32,
        eval_every=2_500,
    ),
    "bandit": dict(  # 5 steps, clipped, blur narrow modes and are off by 0.046 in total variation even without error
        critic_lr=1e-3, critic_steps=1_500, policy_steps=2_500, policy_batch_size=256, policy_lr=1e-3, ema_rate=0.01,
        diffusion_steps=20, schedule="cosine", extraction="implicit", candidates=16, eval_every=5_000,
    ),
    "own file": dict(
        critic_steps=100_000, policy_steps=100_000, policy_batch_size=256, normalize_obs=True, eval_every=10_000,
        extraction="implicit", candidates=4,
    ),
}  # fmt: skip
# What the authors' last code changed.
HEAD = PAPER | {
    "*": PAPER["*"] | dict(critic_steps=3_000_000, batch_size=512, policy_batch_size=512, weight_decay=1e-4),
    **{f"antmaze-{maze}-v2": dict(expectile=0.9) for maze in
       ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")},
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
    """x + Dense(act(Dense(LayerNorm(Dropout(x))))), with no activation after it: (B, W) -> (B, W)."""

    def __init__(self, width: int, dropout: float, activation: nn.Module):
        super().__init__()
        wide = [dense(width, 4 * width, "lecun"), activation, dense(4 * width, width, "lecun")]
        self.net = nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(width, eps=1e-6), *wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class LNResNet(nn.Module):
    """net(x_t, t, s) of the paper, t a whole number as it is: (B, A), (B,), (B, O) -> (B, A)."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int, preset: str, dropout: float):
        super().__init__()
        self.normalize, self.action_dim = normalize, action_dim
        time_dim, condition_dim, activation = (64, 128, nn.Mish()) if preset == "paper" else (128, 256, nn.SiLU())
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))
        self.condition = nn.Sequential(dense(time_dim, condition_dim), activation, dense(condition_dim, condition_dim))
        blocks = [Block(256, dropout, activation) for _ in range(3)]
        self.net = nn.Sequential(
            dense(action_dim + obs_dim + condition_dim, 256), *blocks, activation, dense(256, action_dim)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        angle = 2 * math.pi * t[:, None] * self.frequencies  # (B, time_dim / 2)
        condition = self.condition(torch.cat([angle.cos(), angle.sin()], -1))
        return self.net(torch.cat([x, self.normalize(obs), condition], -1))


# ------------------------------------------------------------------------------------------------------------------
# 3. The generative model


def betas(args: Args, device: str | torch.device = "cpu") -> torch.Tensor:
    """The (T,) noise variances of Eq. (15)."""
    steps = args.diffusion_steps
    i = torch.arange(1, steps + 1, dtype=torch.float64, device=device)
    if args.schedule == "vp":
        return (1 - torch.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2)).float()
    if args.schedule == "cosine":
        bar = torch.cos((torch.cat([i[:1] - 1, i]) / steps + 0.008) / 1.008 * math.pi / 2).square()
    else:  # 5 of DDPM's 1000 betas would leave 95 % of the signal: take the product of 1000 / T at a time
        full = torch.cat(
            [i.new_ones(1), (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=i.dtype, device=i.device)).cumprod(0)]
        )
        bar = full[(torch.cat([i[:1] - 1, i]) * 1000 / steps).round().long()]
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999).float()


def diffusion_noise(shape: tuple[int, ...], action_dim: int, args: Args, generator: torch.Generator) -> dict:
    """What `noise_loss` draws for samples of any shape (...): t (...), eps (..., A)."""
    same = dict(device=generator.device, generator=generator)
    t = torch.randint(args.diffusion_steps, shape, **same)
    return {"t": t, "eps": torch.randn(*shape, action_dim, **same)}


def noise_loss(net: nn.Module, action: torch.Tensor, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """Eq. (16) of each sample: (B, A), (B, O) -> (B,). Noise: see `diffusion_noise`."""
    t, eps = noise["t"], noise["eps"]
    bar = (1 - betas(args, action.device)).cumprod(0)[t, None]  # (B, 1)
    x = bar.sqrt() * action + (1 - bar).sqrt() * eps  # Eq. (15)
    return (net(x, t.float(), obs) - eps).square().sum(-1)


def denoise(net: nn.Module, obs: torch.Tensor, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """Eq. (17): noise to actions, (B, O), (1 + T, B, A) -> (B, A) in [-1, 1]."""
    x, z = noise[0], noise[1:]
    return samplers.ddpm(lambda x, t: net(x, t.expand(len(x)), obs), betas(args, obs.device), x, z)


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


def implicit_weights(u: torch.Tensor, args: Args, floor: float = 1e-3) -> torch.Tensor:
    """Eq. (11), elementwise at u = Q - V, up to a factor: the closed forms of |f'(u)| / |u|, finite at u = 0."""
    share = torch.where(u > 0, args.expectile, 1 - args.expectile)
    if args.critic_loss == "expectile":
        return share
    # differs from the authors' code: its quantile weight is negative where Q < V, its exponential weight a constant
    if args.critic_loss == "quantile":
        return share / u.abs().clamp(min=floor)  # singular at u = 0
    x = args.linex_alpha * u
    small = x.abs() < 1e-6
    x = torch.where(small, 1.0, x)
    return torch.where(small, 1.0, torch.expm1(x.clamp(max=math.log(args.linex_max))) / x)


# ------------------------------------------------------------------------------------------------------------------
# 5. The policy


def policy_loss(policy: nn.Module, batch: datasets.Batch, noise: dict, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. (16): plain behaviour cloning, the critic has no part in it. Noise: see `diffusion_noise`."""
    loss = noise_loss(policy.train(), batch.action, batch.obs, noise, args).mean()
    return loss, {"behaviour/loss": loss.detach()}


def choose(q: torch.Tensor, v: torch.Tensor, u: torch.Tensor, args: Args) -> torch.Tensor:
    """Which candidate: (B, N), (B,), (B,) -> (B,). A draw is the place where u, uniform in [0, 1), falls."""
    if args.extraction == "argmax":
        return q.argmax(-1)  # Eq. (18)
    softmax = args.extraction == "softmax"
    weight = torch.softmax(args.beta * q, -1) if softmax else implicit_weights(q - v[:, None], args)  # Eq. (11)
    share = weight.cumsum(-1) / weight.sum(-1, keepdim=True)
    return (share <= u[:, None]).sum(-1).clamp(max=args.candidates - 1)


def acting_noise(batch: int, action_dim: int, args: Args, generator: torch.Generator) -> dict:
    """What `act` draws: noise x for the T steps of all candidates (1 + T, B N, A), and u (B,) to choose among them."""
    same, shape = dict(device=generator.device, generator=generator), (batch * args.candidates, action_dim)
    return {"x": torch.randn(1 + args.diffusion_steps, *shape, **same), "u": torch.rand(batch, **same)}


def act(models: dict, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """The N candidates of all states in one batch, then one a state: (B, O) -> (B, A). Noise: see `acting_noise`."""
    critic, repeated = models["critic"], obs.repeat_interleave(args.candidates, 0)  # (B N, O)
    action = denoise(models["ema"].eval(), repeated, noise["x"], args)
    q = critic.target_q(repeated, action).amin(0).view(-1, args.candidates)  # (B, N)
    chosen = choose(q, critic.v(obs), noise["u"], args)
    return action.view(len(obs), args.candidates, -1)[torch.arange(len(obs), device=obs.device), chosen]


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
    """Samples against the closed form of the extraction; argmax: the best of N draws of equally frequent modes."""
    values = torch.linspace(0, 1, 100_001)
    optimal_v = values[f(bandit.REWARDS[:, None] - values, args).mean(0).argmin()]  # Eq. (1) at its minimum
    rank = bandit.REWARDS.argsort().argsort()
    target = {
        "argmax": ((rank + 1) / 8) ** args.candidates - (rank / 8) ** args.candidates,
        "implicit": implicit_weights(bandit.REWARDS - optimal_v, args),
        "softmax": torch.softmax(args.beta * bandit.REWARDS, -1),
    }[args.extraction]
    action = torch.cat([play(models, obs, args, stream) for obs in data.obs[:4096].split(512)])
    return bandit.report(action, target / target.sum(), folder, step)


# ------------------------------------------------------------------------------------------------------------------
# 7. Training


def build(obs_dim: int, action_dim: int, args: Args) -> dict[str, nn.Module]:
    """The networks of a run, untrained."""
    normalize = Normalize(obs_dim)
    critic = Critic(normalize, obs_dim, action_dim)
    if args.preset == "head":
        critic.v.net = nn.Sequential(nn.LayerNorm(obs_dim, eps=1e-6), critic.v.net)
    policy = LNResNet(normalize, obs_dim, action_dim, args.preset, args.dropout)
    ema = copy.deepcopy(policy, {id(normalize): normalize}).requires_grad_(False)
    return {"critic": critic, "policy": policy, "ema": ema}


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
    # differs from the authors' code: all of the data is trained on, not a random 95 %
    shape = n, args.policy_batch_size if phase == "policy" else args.batch_size
    numbers = {"index": torch.randint(len(data), shape, device=args.device, generator=generator)}
    return numbers | (diffusion_noise(shape, data.action_dim, args, generator) if phase == "policy" else {})


def optimizers_of(seeds: Seeds, args: Args) -> dict[str, Adam]:
    """One for each part that is trained."""
    decay = args.policy_steps if args.lr_decay else None
    return {
        "v_optimizer": Adam(seeds, "critic.v", args.critic_lr),
        "q_optimizer": Adam(seeds, "critic.q", args.critic_lr),
        "policy_optimizer": Adam(seeds, "policy", args.policy_lr, decay, args.weight_decay),
    }


def updates(seeds: Seeds, optimizers: dict, data: datasets.Dataset, args: Args) -> dict[str, Callable]:
    """The gradient step of each phase, a function of its random numbers."""

    def loss(models: dict, batch: datasets.Batch, noise: dict) -> tuple[torch.Tensor, dict]:
        return policy_loss(models["policy"], batch, noise, args)

    def policy(index: torch.Tensor, **noise: torch.Tensor) -> dict:
        metrics = descend(seeds, optimizers["policy_optimizer"], loss, data[index], noise)
        update_target(seeds.parameters("ema"), seeds.parameters("policy"), args.ema_rate)
        return metrics

    critic = lambda index: critic_step(seeds, optimizers, data[index], args)  # noqa: E731
    return {"critic": critic, "policy": policy}


def train(args: Args) -> dict:
    """The whole run; returns what result.json holds. Raises UserError for bad input, TrainingError at NaN or inf."""
    args = runs.fill_in(args, PAPER if args.preset == "paper" else HEAD)
    run = runs.Run(args, "idql")
    data = datasets.load(args.env, args.device, args.eval_env, args.allow_unverified)
    sizes = data.obs_dim, data.action_dim
    seeds = Seeds(lambda seed: runs.prepare(build(*sizes, args), data, args, seed), args)
    optimizers = optimizers_of(seeds, args)
    start = run.restore(seeds, optimizers)
    steps = {phase: Update(update, args) for phase, update in updates(seeds, optimizers, data, args).items()}
    draws = {phase: Draws(seeds, partial(draw, phase=phase, data=data, args=args)) for phase in steps}
    candidates = {"eval/candidates": np.full(seeds.count, args.candidates)}
    actor = Update(lambda obs, **noise: {"action": seeds(partial(act, args=args), obs, noise)}, args)
    if args.eval_only:
        run.film(seeds, play)
        return run.show(evaluate(seeds, actor, data, run, args, start) | candidates)

    # differs from the authors' code: of its two actor steps beside each critic step, one had an empty batch
    total = args.critic_steps + args.policy_steps  # two phases, in this order; neither needs the other
    for step in run.steps(start, total):
        phase = "critic" if step <= args.critic_steps else "policy"
        metrics = steps[phase](**draws[phase](step))
        if phase == "policy" and (step % args.eval_every == 0 or step == total):
            metrics |= evaluate(seeds, actor, data, run, args, step) | candidates
        run.record(step, metrics, seeds, optimizers, sizes=sizes)
    run.film(seeds, play)
    return run.finish()


if __name__ == "__main__":
    runs.main(train, Args)
