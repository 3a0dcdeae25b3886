"""A D4RL name, a file or a Minari dataset -> transitions in one tensor on one device.

The rules are those of D4RL (arXiv:2004.07219) and its `qlearning_dataset`, the rewards those of IQL (arXiv:2110.06169);
the package `d4rl` is not needed. d4rl_tasks.tsv lists D4RL's tasks of continuous control that have a reference score,
with the size and sha256 of 38 of the files as published. Files lie in D4RL's own folder: nobody downloads twice.
"""

import contextlib
import csv
import difflib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pooch
import requests
import torch
from gymnasium.spaces import flatdim, flatten
from gymnasium.vector.utils import batch_space, iterate
from torch import Tensor

from common import UserError, bandit, demo, environments, mazes, remade, robotics
from common.environments import MINARI, minari_dataset

# key -> number of dimensions; only timeouts may be missing
RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1}
NEXT = "next_observations"  # read in own files only: D4RL's rule ignores those of its files
ACTION_LIMIT = 1 - 1e-5  # atanh and log-densities at exactly 1 are infinite
UNSCALED = (*robotics.ADROIT, "kitchen", "maze2d", "pointmaze")  # pointmaze: Minari's name of maze2d
# the longest episode of a D4RL task, by the beginning of its name; 1000 for all others
STEP_LIMITS = robotics.ADROIT | {"kitchen": 280} | {name: task.max_steps for name, task in mazes.TASKS.items()}
# name of a dataset that is made at first use -> what writes its file, given the name and a path
MADE_HERE = dict.fromkeys(mazes.REMADE, mazes.generate) | dict.fromkeys(remade.NAMES, remade.generate)
MADE_HERE[demo.NAME] = lambda _, path: demo.generate(path)
# asked for D4RL's files, under their own names, when D4RL's one host fails; the checksum makes that safe
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
with open(Path(__file__).with_name("d4rl_tasks.tsv")) as table:
    lines = csv.DictReader((line for line in table if not line.startswith("#")), delimiter="\t")
    TASKS = {line.pop("task"): line for line in lines}  # name -> url, bytes, sha256, the latter two "" where unknown


class Batch(NamedTuple):
    """B transitions, float32. done = 1: the episode ended in a terminal state, and next_obs means nothing there."""

    obs: Tensor  # (B, O)
    action: Tensor  # (B, A)
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, O)
    done: Tensor  # (B,)


class Dataset:
    """N transitions in one packed float32 tensor `rows` (N, 2 O + A + 2), so that a batch is one index_select.

    The attributes obs, action, reward, next_obs and done are views of `rows`, shapes as in Batch. `facts` is what a run
    stores: source, bytes and sha256 of its file, episodes, their unscaled returns (min, mean, max), reward_rule.
    """

    def __init__(self, obs, action, reward, next_obs, done, device="cpu", keep=None, facts=None):
        """Arrays or tensors of M rows, shapes as in Batch, of any type; `keep` is an index (N,) of the rows to take.

        A next_obs of None is the observation of the following row.
        """
        self.obs_dim, self.action_dim, self.facts = obs.shape[1], action.shape[1], facts or {}
        here = torch.arange(len(obs)) if keep is None else torch.as_tensor(keep)
        after, next_obs = ((here + 1).clamp(max=len(obs) - 1), obs) if next_obs is None else (here, next_obs)
        rows = torch.empty(len(here), 2 * self.obs_dim + self.action_dim + 2)
        columns = [torch.as_tensor(x, device="cpu") for x in (obs, action, next_obs, reward[:, None], done[:, None])]
        for i, j, target in zip(*(x.split(2**14) for x in (here, after, rows))):  # whole columns would be held twice
            torch.cat([x[k].float() for x, k in zip(columns, (i, i, j, i, i))], dim=1, out=target)
        self.rows = rows.to(device)
        self.obs, self.action, self.reward, self.next_obs, self.done = self._split(self.rows)

    def _split(self, rows: Tensor) -> Batch:
        obs, action, next_obs, reward, done = rows.split((self.obs_dim, self.action_dim, self.obs_dim, 1, 1), dim=-1)
        return Batch(obs, action, reward[..., 0], next_obs, done[..., 0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Batch:
        """The transitions at `index`, a LongTensor (B,) on the dataset's device."""
        return self._split(self.rows.index_select(0, index))

    def sample(self, batch_size: int) -> Batch:
        """`batch_size` transitions, drawn with replacement from the default generator of the dataset's device."""
        return self[torch.randint(len(self), (batch_size,), device=self.rows.device)]

    def describe(self) -> list[str]:
        """What a run begins with."""
        facts, order = self.facts, "rows in no order"
        if facts["returns"]:
            low, mean, high = facts["returns"]
            order = f"{facts['episodes']:,} episodes of returns {low:.5g} to {high:.5g}, mean {mean:.5g}"
        return [
            f"data: {facts['source']}, {len(self):,} transitions, {order}",
            f"observations of size {self.obs_dim}, actions of size {self.action_dim}; rewards {facts['reward_rule']}",
        ]


def load(name_or_path, device="cpu", eval_env=None, allow_unverified=False, reward_scale=None, rescale_actions=False):
    """The Dataset of bandit, a D4RL task, a key of MADE_HERE, minari:NAME, or an HDF5 or .npz file with RANKS' keys.

    The reward rule (see `transitions`) follows the task's name; for Minari and own files it follows any `eval_env`,
    else Minari's name; an own file without has locomotion's. A number `reward_scale` multiplies the rewards instead.

    Actions are clipped to +-ACTION_LIMIT. D4RL's are only that, as in the reference code; Minari's are rescaled from
    the bounds it states; an own file's must be in [-1, 1], or in the bounds of `eval_env` with `rescale_actions`.

    Raises UserError for an unknown name, a failed download, a wrong checksum (`allow_unverified` takes a file already
    in place all the same), a folder that can't be written, a damaged or locked file, unusable data.
    """
    if name_or_path == "bandit":
        data = bandit.make_data()
        return Dataset(*data, device, facts=_facts("bandit", data[2].numpy(), "as they are"))
    source, task, own = Path(os.path.expanduser(name_or_path)), name_or_path, False
    if task in TASKS or task in MADE_HERE:
        source = _task_file(task, allow_unverified) if task in TASKS else cache_folder() / f"{task}.hdf5"
        if not source.exists():
            _write(source, partial(MADE_HERE[task], task))
        raw = read_file(source)
    elif task.startswith(MINARI):
        raw, source, task = read_minari(task), task, eval_env or task
    elif os.path.exists(source):  # unlike Path.exists, False for a name that is too long
        raw, task, own = read_file(source, RANKS | {NEXT: 2}), eval_env or "", True
        _check_actions(raw["actions"], source, eval_env, rescale_actions)
    else:
        close = " or ".join(difflib.get_close_matches(task, [*TASKS, *MADE_HERE])) or "hopper-medium-v2 or minari:NAME"
        raise UserError(f"{task} is neither a file that exists nor the name of a dataset, such as {close}")
    if task.startswith(MINARI):  # minari:D4RL/pen/human-v2 -> pen-human-v2, D4RL's own way of naming it
        task = task.removeprefix(MINARI).removeprefix("D4RL/").replace("/", "-")
    return transitions(raw, task, device, source, reward_scale, own)


def check_sizes(dataset: Dataset, name: str) -> None:
    """Raises UserError unless observations and actions have the sizes of those in environments.make(name)."""
    env = environments.make(name)
    for what, size in (("observation", dataset.obs_dim), ("action", dataset.action_dim)):
        if (space := getattr(env, f"{what}_space")).shape != (size,):
            sizes = f"the dataset's {what}s have size {size}, but those of {name} are {space}"
            raise UserError(f"{sizes}; choose the dataset or the --eval-env that matches")


def cache_folder() -> Path:
    """D4RL's own folder for its files: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def read_file(path: str | Path, ranks: dict[str, int] = RANKS) -> dict[str, np.ndarray]:
    """The checked content of an HDF5 or .npz file in D4RL's layout: key of `ranks` -> array of N rows.

    Terminals and timeouts come as bool, the rest as float32. (N, 1) is taken for (N,), nonzero numbers for True.
    Raises UserError for a file of another kind, cut short or locked, a missing key, a wrong shape or type, lengths that
    differ, NaN or inf.
    """
    try:
        with open(path, "rb") as start:
            zipped = start.read(2) == b"PK"
        with np.errstate(over="ignore"), np.load(path) if zipped else h5py.File(path, "r") as file:
            return {key: _read(path, key, column) for key, column in _columns(path, file, ranks).items()}
    except UserError:
        raise
    except Exception as error:  # h5py's and numpy's, depending on where the damage lies
        wanted = "it must be a whole HDF5 or .npz file, which no other program is writing"
        raise UserError(f"{path} can't be read ({error}); {wanted}") from None


def _columns(path: str | Path, file, ranks: dict[str, int]) -> dict:
    found = {key: data for key in ranks if hasattr(data := file.get(key), "shape")}
    missing = [key for key in ranks if key not in found and key not in ("timeouts", NEXT)]
    if missing:
        has = ", ".join(f"{key}/" if isinstance(file[key], h5py.Group) else key for key in [*file][:9]) or "nothing"
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {has}; README shows how to write such a file")
    for key, data in found.items():
        fits = data.ndim == ranks[key] or (ranks[key] == 1 and data.ndim == 2 and data.shape[1] == 1)
        same = key != NEXT or data.shape == found["observations"].shape
        if not fits or not same or 0 in data.shape[1:] or data.dtype.kind not in "fiub":
            wanted = "(N,) or (N, 1)" if ranks[key] == 1 else "(N, size)" if same else "that of observations"
            raise UserError(f"{path}: {key} holds {data.dtype} of shape {data.shape}, but needs numbers of {wanted}")
    if len({len(data) for data in found.values()}) > 1:
        lengths = ", ".join(f"{key} {len(data)}" for key, data in found.items())
        raise UserError(f"{path}: the keys differ in their number of rows ({lengths}); every row must be one step")
    if len(data) < 2:
        raise UserError(f"{path} has {len(data)} rows; a transition needs at least 2")
    return found


def _read(path: str | Path, key: str, column) -> np.ndarray:
    array = column[...].astype(np.float32)
    array = array.ravel() if RANKS.get(key) == 1 else array
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise UserError(f"{path}: {key} is NaN or infinite, first in row {bad[0, 0]}; mend or remove that episode")
    return array != 0 if key in ("terminals", "timeouts") else array


def _check_actions(action: np.ndarray, path: Path, eval_env: str | None, rescale: bool) -> None:
    """Maps an own file's actions (N, A) from the bounds of `eval_env` to [-1, 1], in place, if `rescale`.

    Raises UserError for actions in other units than [-1, 1]: they leave it, or hardly any leaves narrower bounds.
    """
    space = None
    with contextlib.suppress(UserError):  # a name of D4RL's may be given for its reward rule alone
        space = environments.make(eval_env, own_units=True).action_space if eval_env else None
    known, one = space is not None and space.shape == action.shape[1:], np.ones(action.shape[1], np.float32)
    if rescale and not known:
        raise UserError(f"--rescale-actions needs the bounds of an --eval-env with {len(one)} actions, as {path} has")
    low, high = (space.low, space.high) if known else (-one, one)
    bounds = f"the bounds of {eval_env}, {low.min():.4g} to {high.max():.4g}"
    advice = f"--rescale-actions maps {bounds}, to that" if known else "rescale them, or see --rescale-actions"
    if rescale:
        action -= (high + low) / 2
        action /= (high - low) / 2
        low, high, advice = -one, one, f"clip them to {bounds}, first"
    reach, narrow = np.abs(action).max(), (low > -1) | (high < 1)
    inside = narrow.any() and np.mean((action < low)[:, narrow] | (action > high)[:, narrow]) < 0.05
    if reach > 1.01 or inside:  # 0.01 is rounding
        raise UserError(f"{path}: actions reach {reach:.4g} and seem to have other units than [-1, 1]; {advice}")
    if np.any(low != -1) or np.any(high != 1):
        print(f"{path}: actions reach {reach:.4g}: taken as rescaled already, from {bounds}, to [-1, 1]")


def read_minari(name: str) -> dict[str, np.ndarray]:
    """The episodes of `minari:NAME` one after the other, in the layout of `read_file`; actions rescaled to [-1, 1].

    Minari stores the observation after the last action too: a row of its own here, marked as a timeout, which
    `transitions` drops, so that no step is lost. Raises UserError as `minari_dataset` does, and for damaged episodes.
    """
    dataset = minari_dataset(name)
    obs_space, action = dataset.observation_space, dataset.action_space
    centre, half = (action.high + action.low) / 2, (action.high - action.low) / 2  # (A,) each
    sizes = {"observations": (flatdim(obs_space),), "actions": action.shape, "rewards": ()}
    n, end = dataset.total_steps + dataset.total_episodes, 0
    raw = {key: np.zeros((n, *shape), np.float32) for key, shape in sizes.items()}
    raw |= {key: np.zeros(n, bool) for key in ("terminals", "timeouts")}
    try:
        for episode in dataset:
            start, end = end, end + len(episode) + 1
            stacked = iterate(batch_space(obs_space, end - start), episode.observations)
            raw["observations"][start:end] = [flatten(obs_space, obs) for obs in stacked]
            raw["actions"][start : end - 1] = (episode.actions - centre) / half
            raw["rewards"][start : end - 1] = episode.rewards
            raw["terminals"][start : end - 1] = episode.terminations
            raw["timeouts"][end - 1] = True
            if bad := [key for key in sizes if not np.isfinite(raw[key][start:end]).all()]:
                raise UserError(f"{name}: {bad[0]} is NaN or infinite in episode {episode.id}; remove that episode")
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # h5py's and numpy's
        command = f"minari download {name.removeprefix(MINARI)}"
        raise UserError(f"{name} is damaged ({error}); get it again by: {command}") from None
    return raw


def transitions(raw, name="", device="cpu", source="the data", reward_scale=None, own=False) -> Dataset:
    """The rule of D4RL's `qlearning_dataset` on the arrays `raw` of `read_file`.

    `name` is a task or family of D4RL's. next_obs is the next row's observation; a row with a timeout is dropped, and
    the last row; terminal rows stay, with done = 1. Without the key timeouts an episode ends STEP_LIMITS steps after
    the last terminal or timeout (after a terminal D4RL counts one too few: not copied). In `own` data a terminal row
    always stays; and where next_observations contradict an unmarked row's next one, they are used: an episode ends.

    Rewards: antmaze r - 1; UNSCALED as they are; all others (locomotion) times 1000 / (max - min return), of the
    episodes as cut here, so that 1000 steps up to a timeout count 999; `reward_scale`, if given, is the factor instead.
    Raises UserError if no transition is left.
    """
    obs, reward, terminals, timeouts = raw["observations"], raw["rewards"], raw["terminals"], raw.get("timeouts")
    jumps = np.zeros(len(obs), bool)
    if NEXT in raw:
        jumps[:-1] = ~np.isclose(raw[NEXT][:-1], obs[1:]).all(1)
    if timeouts is None and jumps.any():
        timeouts = np.zeros_like(jumps)
    elif timeouts is None and own:
        how = "mark each episode's last step there, or write zeros if every episode ends in a terminal"
        raise UserError(f"{source} has no timeouts, so that episodes would run into each other; {how}")
    elif timeouts is None:
        limit = next((n for task, n in STEP_LIMITS.items() if f"{name}-".startswith(f"{task}-")), 1000)
        print(f"{source} has no timeouts: an episode is taken to end after {limit} steps or at a terminal")
        timeouts = _timeouts_by_limit(terminals, limit)
    jumps &= ~terminals & ~timeouts
    if jumps.any():
        rows = f"{source}: in {jumps.sum():,} of {len(obs):,} rows {NEXT} is not the next row's observation"
        print(f"{rows}, and no terminal or timeout says why: those rows are taken as transitions of their own")
    keep = ~timeouts | (terminals & own)
    keep[-1:] = own and terminals[-1:]
    if not keep.any():
        raise UserError(f"{source}: every row is a timeout or the last one, so that no transition is left; mend them")
    returns = None
    if jumps.mean() < 0.05:  # more may be rows in no order. Each episode's sum of kept rewards; none without a kept row
        last = terminals | timeouts | jumps
        episode = (np.cumsum(last) - last)[keep]
        returns = np.add.reduceat(reward[keep].astype(np.float64), np.flatnonzero(np.diff(episode, prepend=-1)))
    reward, rule = _scaled(reward, returns, name.split("-")[0], reward_scale)
    facts, next_obs = _facts(source, returns, rule), raw[NEXT] if jumps.any() else None
    dataset = Dataset(obs, raw["actions"], reward, next_obs, terminals, device, np.flatnonzero(keep), facts)
    dataset.action.clamp_(-ACTION_LIMIT, ACTION_LIMIT)  # in place: a clipped copy of the raw actions would cost memory
    return dataset


def _timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """(N,) -> (N,): True at every `limit`-th step since the last terminal."""
    row = np.arange(len(terminals))
    start = np.maximum.accumulate(row * np.append(True, terminals[:-1]))  # of the stretch between two terminals
    return (row - start) % limit == limit - 1


def _scaled(reward: np.ndarray, returns: np.ndarray | None, family: str, scale: float | None) -> tuple[np.ndarray, str]:
    """The rewards by the rule of `family`, or times `scale`, and the rule in words."""
    if scale is not None:
        return reward * np.float32(scale), f"times {scale:g} (--reward-scale)"
    if family == "antmaze":
        return reward - 1, "minus 1 (antmaze's rule)"
    if family in UNSCALED:
        return reward, f"as they are ({family}'s rule)"
    if returns is None:
        return reward, "as they are (no episodes, no returns to scale by: --reward-scale gives a factor)"
    spread = np.ptp(returns)
    if spread <= 1e-6 * np.abs(returns).max():  # float32's rounding is no spread
        return reward, "as they are (all returns are equal)"
    return reward * np.float32(1000 / spread), f"times 1000 / {spread:.6g}, the returns' spread (locomotion's rule)"


def _facts(source: str | Path, returns: np.ndarray | None, rule: str) -> dict:
    path, facts = Path(source), {"source": str(source), "bytes": None, "sha256": None, "reward_rule": rule}
    if path.is_file():
        facts |= {"bytes": path.stat().st_size, "sha256": pooch.file_hash(str(path))}
    spread = None if returns is None else [float(f(returns)) for f in (np.min, np.mean, np.max)]
    return facts | {"episodes": spread and len(returns), "returns": spread}


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a file in a temporary folder, then move it to `path`: a killed run never leaves half of it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # if it can't, no work is lost
            write(Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        advice = "make room, or choose another folder by $D4RL_DATASET_DIR"
        raise UserError(f"{path} can't be written ({error.strerror or error}); {advice}") from None


def _task_file(name: str, allow_unverified: bool) -> Path:
    """The path of a task's file, downloaded if need be, and checked."""
    path, published = cache_folder() / TASKS[name]["url"].rsplit("/", 1)[1], TASKS[name]["sha256"]
    if not published:
        print(f"no checksum is known for {name}: {path} can't be verified")
    if not path.exists():
        _write(path, lambda temporary: _download(TASKS[name], path, temporary))
    elif published and (found := pooch.file_hash(str(path))) != published:
        problem = f"{path} is not the file that D4RL published: sha256 {found}, published {published}"
        if not allow_unverified:
            raise UserError(f"{problem}; delete it to download it again, or add --allow-unverified to use it as it is")
        print(f"{problem}; used all the same (--allow-unverified)")
    return path


def _download(task: dict[str, str], path: Path, temporary: Path) -> None:
    """What belongs at `path`, to `temporary`: from D4RL's host, else from $D4RL_MIRROR, else, checked, from MIRROR."""
    size, sha256 = f"{int(task['bytes']) / 1e6:.1f} MB" if task["bytes"] else "size unknown", task["sha256"]
    mirror = os.environ.get("D4RL_MIRROR") or (MIRROR if sha256 else "")
    pooch.get_logger().setLevel("WARNING")
    # the timeout is in seconds of silence, not of the whole download; pooch's own chunks of 1 kB are slow
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**20, timeout=20)
    known_hash, failures = f"sha256:{sha256}" if sha256 else None, []
    for url in [task["url"]] + [f"{mirror.rstrip('/')}/{path.name}"] * bool(mirror):
        print(f"downloading {url} ({size}) to {path}")
        try:
            pooch.retrieve(url, known_hash, fname=temporary.name, path=temporary.parent, downloader=downloader)
            return
        except requests.RequestException as error:  # its own text runs over many lines
            status = getattr(error.response, "status_code", None)
            failures.append(f"{url}: {f'HTTP {status}' if status else type(error).__name__}")
        except ValueError:  # so pooch reports a wrong checksum
            failures.append(f"{url}: wrong sha256, not the published file, not kept")
        print(f"the download failed ({failures[-1]})")
    by_hand = f"get the file elsewhere ({size}, sha256 {sha256 or 'unknown'}) and put it at {path} by hand"
    raise UserError(f"the download failed ({'; '.join(failures)}); try again later, or {by_hand}")
