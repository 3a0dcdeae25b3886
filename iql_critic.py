"""IQL: a critic learnt from the data's own actions, and a Gaussian actor fitted by its advantages, in one file.

    python iql_critic.py                                         halfcheetah-demo, made on the spot, minutes on a laptop
    python iql_critic.py --env bandit                            a problem with a known answer, seconds
    python iql_critic.py --env halfcheetah-medium-expert-v2      D4RL's data, physics and score
    python iql_critic.py --critic-loss exponential               another f in Eq. (1)
    python gmpo.py --critic runs/halfcheetah-demo/iql_critic/seed0   the other files take this critic

Papers: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", arXiv:2110.06169 (IQL: this file,
by default); Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies",
arXiv:2304.10573 (any convex f).

Offline RL: D holds transitions (s, a, r, s', d) of an unknown behaviour policy mu(a|s), and nothing more is ever
collected. A critic that is asked what an action outside the data is worth invents an answer. IQL never asks: V is
fitted to Q at the data's actions, by an asymmetric loss, so that it becomes the value of a policy better than mu. In
order:

  critic
    (1)  L_V = E_D[ f(min_i Q'_i(s, a) - V(s)) ]             f asymmetric: V is the value of a policy better than mu
    (2)  L_Q = E_D[ sum_i (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]
    (3)  Q' <- (1 - target_rate) Q' + target_rate Q          the target critic follows slowly
  policy
    (7)  w(s, a) = min(exp(beta (min_i Q_i(s, a) - V(s))), weight_max)       IQL takes Q' for Q here
    (10) L = -E_D[ w(s, a) log N(a; tanh(m(s)), std) ]       IQL's actor: advantage-weighted regression of a Gaussian
  and the policy whose value V is, never written down by the critic (IDQL)
    (11) pi(a|s) = mu(a|s) w(s, a) / Z(s), w = |f'(Q - V)| / |Q - V|

B is the batch, O the size of an observation, A of an action. Equations have the same number in every file. A Gaussian
is the yardstick: on `--env bandit` it fails, and the picture shows why. Read gmpo.py next: `diff iql_critic.py
gmpo.py` puts a generative model in its place.
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

from common import bandit, datasets, environments, runs, training
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
    """the run's folder; None: runs/<env>/iql_critic/seed<seed>; with several seeds, of their folders seed<seed>"""
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
    """another run (its folder) whose critic is taken as it is, instead of training one"""
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


# IQL's own settings; "*" holds where a name says nothing.
ANTMAZE, DEXTEROUS = dict(expectile=0.9, beta=10.0), dict(beta=0.5, dropout=0.1)
PAPER = {
    "*": dict(
        critic_lr=3e-4, critic_steps=1_000_000, policy_steps=1_000_000, policy_lr=3e-4, lr_decay=True,
        expectile=0.7, beta=3.0, dropout=0.0, normalize_obs=False, eval_every=50_000,
    ),
    **{f"antmaze-{maze}-v{k}": ANTMAZE for k in (0, 2) for maze in
       ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")},
    **{f"kitchen-{kind}-v0": DEXTEROUS for kind in ("complete", "partial", "mixed")},
    **{f"{task}-{kind}-v{k}": DEXTEROUS for k in (0, 1) for task in ("pen", "hammer", "door", "relocate")
       for kind in ("human", "cloned", "expert")},
    # Not from the paper: budgets of minutes, chosen by trying.
    "halfcheetah-demo": dict(critic_steps=15_000, policy_steps=15_000, beta=1.0, normalize_obs=True, eval_every=5_000),
    "bandit": dict(critic_lr=1e-3, critic_steps=1_500, policy_steps=1_500, policy_lr=1e-3, beta=2.0, eval_every=500),
    "own file": dict(
        critic_steps=100_000, policy_steps=100_000, beta=0.3, normalize_obs=True, eval_every=10_000,
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


class GaussianActor(nn.Module):
    """The mean tanh(m(s)) and a standard deviation that does not depend on the state: (B, O) -> N of (B, A)."""

    def __init__(self, normalize: Normalize, obs_dim: int, action_dim: int, dropout: float):
        super().__init__()
        self.normalize, self.action_dim = normalize, action_dim
        self.net = mlp(obs_dim, 256, 256, action_dim, dropout=dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> torch.distributions.Normal:
        # not a squashed Gaussian: tanh is inside the mean, samples may leave [-1, 1]
        mean = torch.tanh(self.net(self.normalize(obs)))
        return torch.distributions.Normal(mean, self.log_std.clamp(-5, 2).exp(), validate_args=False)


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


def weights(advantage: torch.Tensor, args: Args) -> torch.Tensor:
    """Eq. (7), elementwise."""
    return torch.exp(args.beta * advantage).clamp(max=args.weight_max)


def effective_share(weight: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / (n sum w^2): the share of the samples that count, 1 if all weigh the same."""
    return weight.sum().square() / (weight.numel() * weight.square().sum())


def policy_loss(actor: GaussianActor, critic: Critic, batch: datasets.Batch, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. (10)."""
    with torch.no_grad():
        advantage = critic.target_q(batch.obs, batch.action).amin(0) - critic.v(batch.obs)
        weight = weights(advantage, args)  # (B,)
    loss = -(weight * actor.train()(batch.obs).log_prob(batch.action).sum(-1)).mean()
    clipped = (weight >= args.weight_max).float().mean()
    metrics = {"policy/weight": weight.mean(), "policy/clipped": clipped, "policy/ess": effective_share(weight)}
    return loss, {"policy/loss": loss.detach(), **metrics}


def acting_noise(batch: int, action_dim: int, args: Args, generator: torch.Generator) -> dict:
    """What `act` draws: nothing."""
    return {}


def act(models: dict, obs: torch.Tensor, noise: dict, args: Args) -> torch.Tensor:
    """The mean action, as IQL is evaluated: (B, O) -> (B, A) in [-1, 1]."""
    return models["policy"].eval()(obs).mean


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
    """The data's actions, drawn again by the weights of Eq. (11), against the closed form; beside them the Gaussian."""
    values = torch.linspace(0, 1, 100_001)  # Eq. (1) at its minimum, modes equally frequent:
    optimal_v = values[f(bandit.REWARDS[:, None] - values, args).mean(0).argmin()]
    target = implicit_weights(bandit.REWARDS - optimal_v, args)
    weight = implicit_weights(advantages(models["critic"], data), args)
    implicit = data.action[torch.multinomial(weight, 4096, replacement=True, generator=stream)]
    normal = models["policy"].eval()(data.obs[:4096])
    gaussian = normal.mean + normal.stddev * torch.randn(normal.mean.shape, generator=stream, device=stream.device)
    return bandit.report(implicit, target / target.sum(), folder, step, **{"IQL's Gaussian": gaussian})


# ------------------------------------------------------------------------------------------------------------------
# 7. Training


def build(obs_dim: int, action_dim: int, args: Args) -> dict[str, nn.Module]:
    """The networks of a run, untrained."""
    normalize = Normalize(obs_dim)
    actor = GaussianActor(normalize, obs_dim, action_dim, args.dropout)
    return {"critic": Critic(normalize, obs_dim, action_dim), "policy": actor}


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


def draw(n: int, generator: torch.Generator, data: datasets.Dataset, args: Args) -> dict:
    """The random numbers of n steps: name -> (n, ...)."""
    return {"index": torch.randint(len(data), (n, args.batch_size), device=args.device, generator=generator)}


def optimizers_of(seeds: Seeds, args: Args) -> dict[str, Adam]:
    """One for each part that is trained."""
    return {
        "v_optimizer": Adam(seeds, "critic.v", args.critic_lr),
        "q_optimizer": Adam(seeds, "critic.q", args.critic_lr),
        "policy_optimizer": Adam(seeds, "policy", args.policy_lr, args.policy_steps if args.lr_decay else None),
    }


def updates(seeds: Seeds, optimizers: dict, data: datasets.Dataset, args: Args) -> dict[str, Callable]:
    """The gradient step of each phase, a function of its random numbers."""

    def loss(models: dict, batch: datasets.Batch) -> tuple[torch.Tensor, dict]:
        return policy_loss(models["policy"], models["critic"], batch, args)

    def policy(index: torch.Tensor) -> dict:
        return descend(seeds, optimizers["policy_optimizer"], loss, data[index])

    critic = lambda index: critic_step(seeds, optimizers, data[index], args)  # noqa: E731
    return {"critic": critic, "policy": policy}


def train(args: Args) -> dict:
    """The whole run; returns what result.json holds. Raises UserError for bad input, TrainingError at NaN or inf."""
    args = runs.fill_in(args, PAPER)
    run = runs.Run(args, "iql_critic")
    data = datasets.load(args.env, args.device, args.eval_env, args.allow_unverified)
    sizes = data.obs_dim, data.action_dim
    seeds = Seeds(lambda seed: runs.prepare(build(*sizes, args), data, args, seed), args)
    optimizers = optimizers_of(seeds, args)
    start = run.restore(seeds, optimizers)
    steps = {phase: Update(update, args) for phase, update in updates(seeds, optimizers, data, args).items()}
    draws = Draws(seeds, partial(draw, data=data, args=args))
    actor = Update(lambda obs, **noise: {"action": seeds(partial(act, args=args), obs, noise)}, args)
    if args.eval_only:
        run.film(seeds, play)
        return run.show(evaluate(seeds, actor, data, run, args, start))

    total = max(args.critic_steps, args.policy_steps)
    for step in run.steps(start, total):
        numbers, metrics = draws(step), {}
        if step <= args.critic_steps:
            metrics |= steps["critic"](**numbers)
        if step <= args.policy_steps:
            metrics |= steps["policy"](**numbers)
        if step % args.eval_every == 0 or step == total:
            metrics |= evaluate(seeds, actor, data, run, args, step)
        run.record(step, metrics, seeds, optimizers, sizes=sizes)
    run.film(seeds, play)
    return run.finish()


if __name__ == "__main__":
    runs.main(train, Args)
