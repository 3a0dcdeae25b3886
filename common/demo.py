"""halfcheetah-demo: a dataset that needs no download, made at first use by a linear policy of our own.

The policy, action = clip(W (obs - mean) / std, -1, 1), runs well: its return is the 100 of the demo's score. In the
data it is disturbed: each action is a random one with a probability of 0.1, 0.3, 0.5 or 0.7, the same for an episode.
So cloning copies bad actions along with good ones, and the data allow better than their best episode.

halfcheetah_linear.npz holds W (6, 17), mean and std (17,), found by augmented random search (Mania et al., 2018,
arXiv:1803.07055, V2-t: 60 iterations of 32 directions, the best 8 kept, step 0.02, noise 0.03, episodes of 500 steps)
in `make("halfcheetah")`. Every tenth action of the search was reversed, to find a policy that stands disturbance.
"""

from pathlib import Path

import numpy as np
from tqdm import trange

from common import environments, remade

NAME = "halfcheetah-demo"
EPISODES = 60  # of 1000 steps
RANDOM_SHARES = (0.1, 0.3, 0.5, 0.7)  # the probability of a random action; every fourth episode has the same
NOISE = 0.05  # standard deviation, on every action
with np.load(Path(__file__).with_name("halfcheetah_linear.npz")) as file:
    W, MEAN, STD = file["W"], file["mean"], file["std"]


def linear_policy(obs: np.ndarray) -> np.ndarray:
    """(..., 17) -> (..., 6)."""
    return np.clip((obs - MEAN) / STD @ W.T, -1, 1)


def generate(path: Path, episodes: int = EPISODES, seed: int = 0) -> None:
    """Write `episodes` episodes to `path` in D4RL's layout; the same ones for one seed, versions and machine."""
    env, rng = environments.make("halfcheetah"), np.random.default_rng(seed)
    rows = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": []}
    for episode in trange(episodes, desc=f"making {NAME}", unit="episode"):
        random_share, timeout = RANDOM_SHARES[episode % len(RANDOM_SHARES)], False
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        while not timeout:
            action = rng.uniform(-1, 1, 6) if rng.random() < random_share else linear_policy(obs)
            action = np.clip(action + NOISE * rng.normal(size=6), -1, 1)
            next_obs, reward, terminal, timeout, _ = env.step(action)
            for key, value in zip(rows, (obs, action, reward, terminal, timeout)):
                rows[key].append(value)
            obs = next_obs
    remade.write(path, {key: np.array(rows[key], bool if key[0] == "t" else np.float32) for key in rows})
