"""A D4RL name, an HDF5 file or a Minari dataset -> transitions in one tensor on one device.

The rules are those of D4RL (arXiv:2004.07219) and its `qlearning_dataset`, the rewards those of IQL (arXiv:2110.06169);
the package `d4rl` is not needed. d4rl_tasks.tsv lists D4RL's tasks of continuous control that have a reference score,
with the size and sha256 of 38 of the files as published. Files lie in D4RL's own folder: nobody downloads twice.
"""

import csv
import difflib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pooch
import torch
from gymnasium.spaces import Box
from torch import Tensor

from common import UserError

# key -> number of dimensions; only timeouts may be missing
RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1}
ACTION_LIMIT = 1 - 1e-5  # atanh and log-densities at exactly 1 are infinite
UNSCALED = ("pen", "hammer", "door", "relocate", "adroit", "kitchen", "maze2d")
# the longest episode of D4RL's tasks, by the beginning of their names; 1000 for all others
STEP_LIMITS = {"maze2d-open": 150, "maze2d-umaze": 300, "maze2d-medium": 600, "maze2d-large": 800, "antmaze-umaze": 700}
STEP_LIMITS |= {"pen": 100, "hammer": 200, "door": 200, "relocate": 200, "kitchen": 280}
CHUNK = 16384  # rows copied at a time
MINARI = "minari:"  # before the name of a dataset of the optional package minari


class Task(NamedTuple):
    """A line of d4rl_tasks.tsv; bytes and sha256 are empty where unknown."""

    url: str
    bytes: str
    sha256: str


class Batch(NamedTuple):
    """B transitions, float32. done = 1: the episode ended in a terminal state, and next_obs means nothing there."""

    obs: Tensor  # (B, O)
    action: Tensor  # (B, A)
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, O)
    done: Tensor  # (B,)


class Dataset:
    """N transitions in one packed float32 tensor `rows` (N, 2 O + A + 2), so that a batch is one index_select.

    The attributes obs, action, reward, next_obs and done are views of `rows`, shapes as in Batch.
    """

    def __init__(self, obs, action, reward, next_obs, done, device="cpu", keep=None):
        """Arrays or tensors of M rows, shapes as in Batch, of any type; `keep` (M,) is True in the rows to take."""
        self.obs_dim, self.action_dim = obs.shape[1], action.shape[1]
        columns = [torch.as_tensor(x, device="cpu") for x in (obs, action, next_obs, reward[:, None], done[:, None])]
        index = torch.arange(len(obs)) if keep is None else torch.as_tensor(keep).nonzero()[:, 0]
        rows = torch.empty(len(index), 2 * self.obs_dim + self.action_dim + 2)
        # in chunks, because selecting whole columns would hold them twice
        for source, target in zip(index.split(CHUNK), rows.split(CHUNK)):
            torch.cat([x[source].float() for x in columns], dim=1, out=target)
        self.rows = rows.to(device)
        self.obs, self.action, self.reward, self.next_obs, self.done = self._split(self.rows)

    def _split(self, rows: Tensor) -> Batch:
        obs, action, next_obs, reward, done = rows.split((self.obs_dim, self.action_dim, self.obs_dim, 1, 1), dim=-1)
        return Batch(obs, action, reward[..., 0], next_obs, done[..., 0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Batch:
        """The transitions at `index` (B,) or (S, B), a LongTensor on the dataset's device: B, or S times B of them."""
        return self._split(self.rows.index_select(0, index.flatten()).view(*index.shape, -1))


def load(name_or_path: str, device="cpu", eval_env: str | None = None, allow_unverified: bool = False) -> Dataset:
    """The transitions of bandit, halfcheetah-demo, a D4RL task, minari:NAME, or an HDF5 file with the keys of RANKS.

    The reward rule (see `transitions`) follows the task's name; for an own file it follows `eval_env` if that begins
    with a D4RL family such as antmaze or pen, else it is locomotion's: beta is a temperature on scaled rewards. For
    Minari it follows `eval_env`, else the dataset's name. Actions are clipped to +-ACTION_LIMIT; an own file with
    actions beyond +-1.01, which is more than rounding, is refused (D4RL's files are only clipped, as in the reference
    code, and so is Minari's data, in the bounds it states). Raises UserError for an unknown name, a failed download, a
    wrong checksum (`allow_unverified` takes a file already in place all the same), a damaged file, unusable data.
    """
    if name_or_path in ("bandit", "halfcheetah-demo"):  # made here; both modules build on this one
        from common import bandit, demo

        return {"bandit": bandit, "halfcheetah-demo": demo}[name_or_path].load(device)
    tasks = _tasks()
    if name_or_path in tasks:
        path = _task_file(name_or_path, tasks[name_or_path], allow_unverified)
        return transitions(read_hdf5(path), name_or_path, device, path)
    if name_or_path.startswith(MINARI):
        return transitions(read_minari(name_or_path), _minari_task(eval_env or name_or_path), device, name_or_path)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise UserError(_unknown(name_or_path, tasks))
    raw = read_hdf5(path)
    highest = max(raw["actions"].max(), -raw["actions"].min())
    if highest > 1.01:
        raise UserError(f"{path}: actions reach {highest:.4g}; rescale them to [-1, 1] by the environment's bounds")
    return transitions(raw, _minari_task(eval_env or ""), device, path)


def check_sizes(dataset: Dataset, env) -> None:
    """Raises UserError unless observations and actions fit the spaces of `env`, a gymnasium Env or VectorEnv."""
    name = env.spec.id if getattr(env, "spec", None) else "the environment"
    for what, size in (("observation", dataset.obs_dim), ("action", dataset.action_dim)):
        space = getattr(env, f"single_{what}_space", None) or getattr(env, f"{what}_space")
        if space.shape != (size,):
            sizes = f"the dataset's {what}s have size {size}, but those of {name} are {space}"
            raise UserError(f"{sizes}; choose the dataset or the --eval-env that matches")


def cache_folder() -> Path:
    """D4RL's own folder for its files: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def read_hdf5(path: str | Path) -> dict[str, np.ndarray]:
    """The checked content of a file in D4RL's layout: key of RANKS -> array of N rows.

    Terminals and timeouts come as bool, the rest as float32. (N, 1) is taken for (N,), nonzero numbers for True.
    Nothing else is read: D4RL too ignores the stored next_observations. Raises UserError for a file that is not HDF5 or
    cut short, a missing key, a wrong shape or type, lengths that differ, NaN or inf.
    """
    try:
        with h5py.File(path, "r") as file:
            return {key: _read(path, key, data) for key, data in _checked_layout(path, file).items()}
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # h5py's, depending on where the damage lies
        raise UserError(f"{path} is damaged, cut short or not HDF5; get or write it again ({error})") from None


def _checked_layout(path: str | Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    found = {key: file[key] for key in RANKS if isinstance(file.get(key), h5py.Dataset)}
    missing = [key for key in RANKS if key not in found and key != "timeouts"]
    if missing:
        needed = f"a file needs {', '.join(RANKS)} (only timeouts may be missing)"
        raise UserError(f"{path} lacks {', '.join(missing)}; {needed}")
    for key, data in found.items():
        squeezable = RANKS[key] == 1 and data.ndim == 2 and data.shape[1] == 1
        if (data.ndim != RANKS[key] and not squeezable) or 0 in data.shape[1:]:
            wanted = "(N, size)" if RANKS[key] == 2 else "(N,) or (N, 1)"
            raise UserError(f"{path}: {key} has shape {data.shape}; it must be {wanted}")
        if data.dtype.kind not in "fiub":
            raise UserError(f"{path}: {key} holds {data.dtype}; it must hold numbers")
    if len({len(data) for data in found.values()}) > 1:
        lengths = ", ".join(f"{key} {len(data)}" for key, data in found.items())
        raise UserError(f"{path}: the keys differ in their number of rows ({lengths}); every row must be one step")
    if len(data) < 2:
        raise UserError(f"{path} has {len(data)} rows; a transition needs at least 2")
    return found


def _read(path: str | Path, key: str, data: h5py.Dataset) -> np.ndarray:
    # astype converts while reading, so that no float64 copy is ever held; HDF5 can't convert its booleans
    array = data[...].astype(np.float32) if data.dtype.kind == "b" else data.astype(np.float32)[...]
    array = array.reshape(len(array), -1) if RANKS[key] == 2 else array.reshape(-1)
    if not np.isfinite([array.min(), array.max()]).all():  # both are NaN if any entry is, and cost no memory
        row = np.argwhere(~np.isfinite(array))[0][0]
        raise UserError(f"{path}: {key} is NaN or infinite, first in row {row}; mend or remove that episode")
    return array != 0 if key in ("terminals", "timeouts") else array


def minari_dataset(name: str):
    """The minari.MinariDataset of `minari:NAME`, from Minari's folder ($MINARI_DATASETS_PATH, else ~/.minari/datasets).

    Only its metadata is read. Raises UserError if the package or the dataset is missing, if minari can't read it, and
    for observations or actions that are no vectors, or actions without bounds.
    """
    try:
        import minari
    except ImportError:
        raise UserError(f'{name} needs an optional package: pip install "minari[hf]==0.5.4"') from None
    try:
        dataset = minari.load_dataset(name.removeprefix(MINARI))
    except FileNotFoundError:
        raise UserError(f"{name} is not on this machine; get it by: {_minari_download(name)}") from None
    except Exception as error:  # whatever a damaged or foreign folder makes minari and gymnasium raise
        raise UserError(
            f"{name} can't be read ({error}); mend that or get it again by: {_minari_download(name)}"
        ) from None
    obs, action = dataset.observation_space, dataset.action_space
    flat = all(isinstance(space, Box) and len(space.shape) == 1 for space in (obs, action))
    if not (flat and action.is_bounded()):
        raise UserError(f"{name} has observations {obs} and actions {action}: both must be vectors, actions bounded")
    return dataset


def read_minari(name: str) -> dict[str, np.ndarray]:
    """The episodes of `minari:NAME` one after the other, in the layout of `read_hdf5`; actions rescaled to [-1, 1].

    Minari stores the observation after the last action too, which D4RL's files lack. An episode of T steps becomes
    T + 1 rows: the last one is that observation alone and is marked as the timeout. `transitions` drops it, and so no
    step is lost: a truncated one keeps its own next observation and done = 0, a terminal one done = 1. Raises UserError
    as `minari_dataset` does, and for episodes that are damaged or hold NaN or inf.
    """
    dataset = minari_dataset(name)
    obs, action = dataset.observation_space, dataset.action_space
    centre, half = (action.high + action.low) / 2, (action.high - action.low) / 2  # (A,) each
    sizes = {"observations": obs.shape, "actions": action.shape, "rewards": ()}
    n, end = dataset.total_steps + dataset.total_episodes, 0
    raw = {key: np.zeros((n, *shape), np.float32) for key, shape in sizes.items()}
    raw |= {key: np.zeros(n, bool) for key in ("terminals", "timeouts")}
    try:
        for episode in dataset:
            start, end = end, end + len(episode) + 1
            raw["observations"][start:end] = episode.observations
            raw["actions"][start : end - 1] = (episode.actions - centre) / half
            raw["rewards"][start : end - 1] = episode.rewards
            raw["terminals"][start : end - 1] = episode.terminations
            raw["timeouts"][end - 1] = True
            for key in sizes:
                if not np.isfinite(raw[key][start:end]).all():
                    raise UserError(f"{name}: {key} is NaN or infinite in episode {episode.id}; remove that episode")
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # h5py's and numpy's
        raise UserError(f"{name} is damaged ({error}); get it again by: {_minari_download(name)}") from None
    return raw


def _minari_download(name: str) -> str:
    return f"minari download {name.removeprefix(MINARI)}"


def _minari_task(name: str) -> str:
    """`minari:D4RL/pen/human-v2` -> `pen-human-v2`, D4RL's own way of naming it; other names as they are."""
    return name.removeprefix(MINARI).removeprefix("D4RL/").replace("/", "-") if name.startswith(MINARI) else name


def transitions(raw: dict[str, np.ndarray], name: str = "", device="cpu", source: str | Path = "the data") -> Dataset:
    """The rule of D4RL's `qlearning_dataset` on the arrays of `read_hdf5`.

    `name` is a task or family of D4RL's, `source` is for messages. next_obs is the next row's observation; a row with a
    timeout is dropped, and the last row; terminal rows stay, with done = 1. Without the key timeouts an episode ends
    STEP_LIMITS steps after the last terminal or timeout (after a terminal D4RL counts one too few: not copied).
    Rewards: antmaze r - 1; UNSCALED as they are; all others (locomotion) times 1000 / (max - min return), of the
    episodes as cut here, so that 1000 steps up to a timeout count 999. Raises UserError if no transition is left.
    """
    obs, terminals = raw["observations"], raw["terminals"]
    timeouts = raw.get("timeouts")
    if timeouts is None:
        limit = next((n for task, n in STEP_LIMITS.items() if f"{name}-".startswith(f"{task}-")), 1000)
        print(f"{source} has no timeouts: an episode is taken to end after {limit} steps or at a terminal")
        timeouts = _timeouts_by_limit(terminals, limit)
    keep = ~timeouts[:-1]
    if not keep.any():
        raise UserError(f"{source}: every row is a timeout, so that no transition is left; mend its timeouts")
    reward, family = raw["rewards"][:-1], name.split("-")[0]
    if family == "antmaze":
        reward = reward - 1
    elif family not in UNSCALED:
        reward = reward * _reward_scale(reward, (terminals | timeouts)[:-1], keep)
    dataset = Dataset(obs[:-1], raw["actions"][:-1], reward, obs[1:], terminals[:-1], device, keep)
    dataset.action.clamp_(-ACTION_LIMIT, ACTION_LIMIT)  # in place: a clipped copy of the raw actions would cost memory
    return dataset


def _timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """(N,) -> (N,): True at every `limit`-th step since the last terminal."""
    row = np.arange(len(terminals))
    start = np.zeros_like(row)  # of the stretch between two terminals that the row lies in
    start[1:] = np.maximum.accumulate(np.where(terminals[:-1], row[1:], 0))
    return (row - start) % limit == limit - 1


def _reward_scale(reward: np.ndarray, last: np.ndarray, keep: np.ndarray) -> np.float32:
    """1000 / (max - min) of the episodes' sums of kept rewards, 1 if all are equal; `last` (N,) marks their ends."""
    episode = (np.cumsum(last) - last)[keep]
    first = np.flatnonzero(np.diff(episode, prepend=-1))  # row of each episode; one without a kept row has no return
    returns = np.add.reduceat(reward[keep].astype(np.float64), first)
    spread = returns.max() - returns.min()
    equal = spread <= 1e-6 * np.abs(returns).max()  # float32's rounding is no spread
    return np.float32(1 if equal else 1000 / spread)


def _tasks() -> dict[str, Task]:
    with open(Path(__file__).with_name("d4rl_tasks.tsv")) as file:
        lines = csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t")
        return {line.pop("task"): Task(**line) for line in lines}


def _unknown(name: str, tasks: dict) -> str:
    if Path(name).suffix in (".hdf5", ".h5") or os.sep in name:
        return f"{name} does not exist; give the path of an HDF5 file, the name of a D4RL task or minari:NAME"
    close = difflib.get_close_matches(name, tasks, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "D4RL's names look like hopper-medium-v2."
    return f"{name} is neither a D4RL task nor an HDF5 file; {hint}"


def _task_file(name: str, task: Task, allow_unverified: bool) -> Path:
    """The path of a task's file, downloaded if need be, and checked."""
    path = cache_folder() / task.url.rsplit("/", 1)[1]
    if not task.sha256:
        print(f"no checksum is known for {name}: {path} can't be verified")
    if not path.exists():
        _download(task, path)
    elif task.sha256 and (found := pooch.file_hash(str(path))) != task.sha256:
        problem = f"{path} is not the file that D4RL published: sha256 {found}, published {task.sha256}"
        if not allow_unverified:
            raise UserError(f"{problem}; delete it to download it again, or add --allow-unverified to use it as it is")
        print(f"{problem}; used all the same (--allow-unverified)")
    return path


def _download(task: Task, path: Path) -> None:
    """pooch writes to a temporary name, and renames what is whole and matches the checksum."""
    size = f"{int(task.bytes) / 1e6:.1f} MB" if task.bytes else "size unknown"
    file = f"{task.url} ({size}, sha256 {task.sha256 or 'unknown'})"
    by_hand = f"try again later, or get the file elsewhere and put it there by hand: {file} belongs at {path}"
    print(f"downloading {task.url} ({size}) to {path}")
    pooch.get_logger().setLevel("WARNING")
    # the timeout is in seconds of silence, not of the whole download; pooch's own chunks of 1 kB are slow
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**20, timeout=20)
    known_hash = f"sha256:{task.sha256}" if task.sha256 else None
    try:
        pooch.retrieve(task.url, known_hash, fname=path.name, path=path.parent, downloader=downloader)
    except ValueError:  # so pooch reports a wrong checksum
        raise UserError(f"the download is not the published file (wrong sha256) and was not kept; {by_hand}") from None
    except OSError as error:  # requests' exceptions are among them; their own text runs over many lines
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else error.strerror or type(error).__name__
        raise UserError(f"the download failed ({reason}); {by_hand}") from None
