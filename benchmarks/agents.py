"""Train and choose the agents behind the remade sets: SAC (Haarnoja et al., arXiv:1812.05905) in D4RL's physics.

    pip install sbx-rl==0.28.0                                        only this script needs it
    python benchmarks/agents.py --env hopper --run-dir runs/agents/hopper
    python benchmarks/agents.py --env hopper --run-dir runs/agents/hopper --export

Training keeps a snapshot of the actor every 5,000 steps and saves everything every 25,000; the same command goes on
from there after a kill. `--export` chooses among the snapshots as `choose` says, measures the chosen ones on 50
episodes, prints the table of benchmarks/README.md and puts them into common/agents.npz.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Small networks run fastest on one thread. jax is imported where it is needed, after this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environments, remade

ROLES = ("replay1", "replay2", "replay3", "replay4", "medium", "expert")


@dataclass
class Args:
    run_dir: Path
    """the folder of the snapshots, returns.jsonl and the state of training"""
    env: Literal["hopper", "walker2d", "halfcheetah"] = "hopper"
    """the task"""
    steps: int = 500_000
    """of the environment; after each one the critics are updated, after every second one the actor too"""
    snapshot_every: int = 5_000
    """steps from one snapshot of the actor to the next"""
    save_every: int = 25_000
    """steps from one save of the whole state, with the replay buffer, to the next"""
    episodes: int = 10
    """by which the return of a snapshot is measured while training"""
    seed: int = 0
    """of the networks, the exploration and the batches"""
    export: bool = False
    """choose among the snapshots of --run-dir, instead of training"""
    medium: int | None = None
    """with --export: the step of the medium agent, where the rule does not choose well"""


def new_model(args: Args, env):
    """SAC as in the paper, but for smaller actors and an actor that is updated every second time, as in TD3."""
    from sbx import SAC

    return SAC(
        "MlpPolicy", env, seed=args.seed, buffer_size=args.steps, learning_starts=5_000, batch_size=256, gamma=0.99,
        learning_rate=3e-4, tau=0.005, train_freq=40, gradient_steps=40, policy_delay=2, ent_coef="auto",
        policy_kwargs={"net_arch": {"pi": [128, 128], "qf": [256, 256]}},
    )  # fmt: skip


def weights(model) -> dict[str, np.ndarray]:
    """The actor as `remade.act` takes it."""
    layers = model.policy.actor_state.params["params"]
    layers = [layers[f"Dense_{i}"] for i in range(4)]  # two hidden ones, the mean, the logarithm of the deviation
    kernel, bias = [np.asarray(x["kernel"]) for x in layers], [np.asarray(x["bias"]) for x in layers]
    last = {"w2": np.concatenate(kernel[2:], 1), "b2": np.concatenate(bias[2:])}
    return {"w0": kernel[0], "b0": bias[0], "w1": kernel[1], "b1": bias[1]} | last


def measure(env, agent: dict[str, np.ndarray], episodes: int, sampled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Undiscounted returns and lengths of episodes (episodes,) each, of other seeds than those of the sets."""
    found = [remade.play(env, agent, 2**30 + k, sampled)["rewards"] for k in range(episodes)]
    return np.array([rewards.sum(dtype=np.float64) for rewards in found]), np.array([len(x) for x in found])


def save(model, folder: Path) -> None:
    """Both files are renamed into place; a kill between the two costs some transitions of the buffer, no more."""
    model.save_replay_buffer(folder / "buffer.tmp.pkl")
    model.save(folder / "model.tmp.zip")
    os.replace(folder / "buffer.tmp.pkl", folder / "buffer.pkl")
    os.replace(folder / "model.tmp.zip", folder / "model.zip")


def train(args: Args) -> None:
    from sbx import SAC

    env, test_env, folder = environments.make(args.env), environments.make(args.env), args.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.zip").exists():
        model = SAC.load(folder / "model.zip", env=env)
        model.load_replay_buffer(folder / "buffer.pkl")
    else:
        model = new_model(args, env)
    first, start = model.num_timesteps, time.time()
    print(f"SAC on {args.env}, from step {first} to {args.steps}, about 6 ms a step on one core; into {folder}")
    while model.num_timesteps < args.steps:
        step = (model.num_timesteps // args.snapshot_every + 1) * args.snapshot_every
        model.learn(step - model.num_timesteps, reset_num_timesteps=model.num_timesteps == 0)
        agent = weights(model)
        returns, lengths = measure(test_env, agent, args.episodes)
        np.savez(folder / f"step{step:07}.npz", **agent)
        row = {"step": step, "return": returns.mean(), "std": returns.std(), "length": lengths.mean()}
        with open(folder / "returns.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        left = (time.time() - start) / (model.num_timesteps - first) * (args.steps - model.num_timesteps) / 60
        result = f"return {row['return']:.0f} +- {row['std']:.0f} in {row['length']:.0f} steps"
        print(f"step {step}: {result}; {left:.0f} minutes left", flush=True)
        if step % args.save_every == 0 or step >= args.steps:
            save(model, folder)


def choose(args: Args, returns: dict[int, float]) -> dict[str, int]:
    """Steps of the snapshots by their roles, from the mean returns by steps.

    The expert is the best one of the last tenth of training, the medium one the first with a third of its score, the
    replay ones the nearest to 1/5, ..., 4/5 of the way to the medium one.
    """
    steps = sorted(returns)
    scores = {step: environments.normalized_score(returns[step], args.env) for step in steps}
    expert = max((step for step in steps if step > 0.9 * steps[-1]), key=scores.get)
    medium = args.medium or next(step for step in steps if scores[step] >= scores[expert] / 3)
    replay = [min(steps, key=lambda step: abs(step - medium * k / 5)) for k in (1, 2, 3, 4)]
    return dict(zip(ROLES, [*replay, medium, expert]))


def export(args: Args) -> None:
    lines = [json.loads(line) for line in (args.run_dir / "returns.jsonl").read_text().splitlines()]
    chosen = choose(args, {line["step"]: line["return"] for line in lines})  # a step measured twice: the last one
    env, found = environments.make(args.env), {}
    print("| agent | step | return, sampled actions | steps an episode | score | return, mean actions | score |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for role, step in chosen.items():
        with np.load(args.run_dir / f"step{step:07}.npz") as file:
            half = {key: file[key].astype(np.float16) for key in file.files}
        found |= {f"{args.env}/{role}/{key}": array for key, array in half.items()}
        agent = {key: array.astype(np.float32) for key, array in half.items()}
        cells = []
        for sampled in (True, False):
            returns, lengths = measure(env, agent, 50, sampled)
            score = environments.normalized_score(returns.mean(), args.env)
            cells += [f"{returns.mean():.0f} ± {returns.std():.0f}", f"{lengths.mean():.0f}", f"{score:.1f}"]
        print("|", " | ".join([f"{args.env} {role}", f"{step:,}", *cells[:4], cells[5]]), "|", flush=True)
    if remade.AGENTS.exists():
        with np.load(remade.AGENTS) as file:
            found = {key: file[key] for key in file.files} | found
    temporary = remade.AGENTS.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **found)
    os.replace(temporary, remade.AGENTS)
    print(f"{len(found) // 6} agents are in {remade.AGENTS}, {remade.AGENTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    (export if arguments.export else train)(arguments)
