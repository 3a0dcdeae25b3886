"""D4RL's locomotion sets made anew, without a download: `hopper-medium-remade` and its like, by agents of our own.

D4RL's recipe (Fu et al., arXiv:2004.07219): SAC is trained, the expert is the end of training, the medium agent is an
early one with about a third of the expert's score, and the replay agents are those on the way to it. The sets hold
whole episodes of actions drawn from these agents, in `environments.make`, which has D4RL's physics. Scores on them use
D4RL's reference returns, but the data are other data: never compare them with scores on D4RL's own files.

agents.npz holds the weights, as float16. benchmarks/agents.py trained and chose them; benchmarks/README.md says how,
and what each of them returns.
"""

import sys
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from common import UserError, environments

FAMILIES = ("hopper", "walker2d", "halfcheetah")
MAKERS = {  # what comes between the family and -remade: the agents of the set, each for an equal share, in this order
    "medium": ("medium",),
    "medium-replay": ("replay1", "replay2", "replay3", "replay4", "medium"),
    "medium-expert": ("medium", "expert"),
}
NAMES = tuple(f"{family}-{kind}-remade" for family in FAMILIES for kind in MAKERS)
ROWS = 500_000
AGENTS = Path(__file__).with_name("agents.npz")
LOG_STD = -20, 2  # bounds of the logarithm of the standard deviation, those the agents were trained with


def load_agent(family: str, role: str) -> dict[str, np.ndarray]:
    """The weights of an agent, float32, as `act` takes them: load_agent("hopper", "expert")."""
    with np.load(AGENTS) as file:
        return {key: file[f"{family}/{role}/{key}"].astype(np.float32) for key in ("w0", "b0", "w1", "b1", "w2", "b2")}


def act(agent: dict[str, np.ndarray], obs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """(O,) -> (A,) in [-1, 1]: tanh of a draw from the agent's Gaussian, or of its mean if `rng` is None.

    The network has two hidden layers of W units, with ReLU: w0 (O, W), b0 (W,), w1 (W, W), b1 (W,), w2 (W, 2 A), b2
    (2 A,). It puts out the mean and the logarithm of the standard deviation.
    """
    h = np.maximum(obs.astype(np.float32) @ agent["w0"] + agent["b0"], 0)
    h = np.maximum(h @ agent["w1"] + agent["b1"], 0)
    mean, log_std = np.split(h @ agent["w2"] + agent["b2"], 2)
    if rng is None:
        return np.tanh(mean)
    return np.tanh(mean + np.exp(np.clip(log_std, *LOG_STD)) * rng.standard_normal(len(mean), np.float32))


def play(env, agent: dict[str, np.ndarray], seed: int, sampled: bool = True) -> dict[str, np.ndarray]:
    """One episode of T steps in D4RL's layout: observations (T, O), actions (T, A), rewards, terminals, timeouts (T,).

    `seed` decides the start and the draws of the actions. An episode ends in a terminal or a timeout, never in both.
    """
    rng = np.random.default_rng([seed, 1]) if sampled else None  # of `seed` alone, the environment draws the start
    rows = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": []}
    (obs, _), over = env.reset(seed=seed), False
    while not over:
        action = act(agent, obs, rng)
        next_obs, reward, terminal, truncated, _ = env.step(action)
        for column, value in zip(rows.values(), (obs, action, reward, terminal, truncated and not terminal)):
            column.append(value)
        obs, over = next_obs, terminal or truncated
    return {key: np.array(column, bool if key[0] == "t" else np.float32) for key, column in rows.items()}


def generate(name: str, path: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Write the set `name`, one of NAMES, to `path`: at least `rows` rows, the last episode being whole too.

    The same file for one seed, versions and machine. Raises UserError for another name.
    """
    if name not in NAMES:
        raise UserError(f"{name} is none of the remade sets, which are {', '.join(NAMES)}")
    family, kind = name.split("-", 1)
    makers, episodes, done = MAKERS[kind.removesuffix("-remade")], [], 0
    env = environments.make(family)
    print(f"making {name}: {rows:,} steps of our own agents in MuJoCo, a few minutes, only this once")
    with tqdm(desc=f"making {name}", total=rows, unit="step", mininterval=1 if sys.stderr.isatty() else 10) as bar:
        for number, role in enumerate(makers, 1):
            agent = load_agent(family, role)
            while done < rows * number // len(makers):
                episodes.append(play(env, agent, seed + len(episodes)))
                done += len(episodes[-1]["rewards"])
                bar.update(min(done, rows) - bar.n)
    write(path, {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]})


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write the columns, N rows each, to an HDF5 file."""
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
