"""A D4RL name, an HDF5 file or a Minari dataset -> transitions in one tensor on one device.

The rules are those of D4RL (arXiv:2004.07219) and its `qlearning_dataset`, the rewards those of IQL (arXiv:2110.06169);
the package `d4rl` is not needed. d4rl_tasks.tsv lists D4RL's tasks of continuous control that have a reference score,
with the size and sha256 of 38 of the files as published. Files lie in D4RL's own folder: nobody downloads twice.
"""

import csv
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pooch
import torch
from torch import Tensor

from common import UserError, bandit, demo
from common.environments import MINARI, minari_dataset, minari_download

# key -> number of dimensions; only timeouts may be missing
RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1}
ACTION_LIMIT = 1 - 1e-5  # atanh and log-densities at exactly 1 are infinite
UNSCALED = ("pen", "hammer", "door", "relocate", "adroit", "kitchen", "maze2d")
# the longest episode of D4RL's tasks, by the beginning of their names; 1000 for all others
STEP_LIMITS = {"maze2d-open": 150, "maze2d-umaze": 300, "maze2d-medium": 600, "maze2d-large": 800, "antmaze-umaze": 700}
STEP_LIMITS |= {"pen": 100, "hammer": 200, "door": 200, "relocate": 200, "kitchen": 280}
CHUNK = 16384  # rows copied at a time
MADE_HERE = {demo.NAME: lambda path: demo.generate(path)}  # name -> what writes the file at first use
WRITABLE = "make room there, or choose another folder by $D4RL_DATASET_DIR"


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

    def __init__(self, obs, action, reward, next_obs, done, device="cpu", keep=None, facts=None):
        """Arrays or tensors of M rows, shapes as in Batch, of any type; `keep` (M,) is True in the rows to take.

        `facts` is what a run stores: source, bytes and sha256 of its file, episodes, their unscaled returns (min, mean,
        max), reward_rule.
        """
        self.obs_dim, self.action_dim, self.facts = obs.shape[1], action.shape[1], facts or {}
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
        """The transitions at `index`, a LongTensor (B,) on the dataset's device."""
        return self._split(self.rows.index_select(0, index))

    def sample(self, batch_size: int) -> Batch:
        """`batch_size` transitions, drawn with replacement from the default generator of the dataset's device."""
        return self[torch.randint(len(self), (batch_size,), device=self.rows.device)]

    def describe(self) -> list[str]:
        """What a run begins with."""
        low, mean, high = self.facts["returns"]
        return [
            f"data: {self.facts['source']}, {len(self):,} transitions in {self.facts['episodes']:,} episodes, "
            f"observations of {self.obs_dim} numbers, actions of {self.action_dim}",
            f"returns of its episodes: {low:.5g} to {high:.5g}, mean {mean:.5g}; rewards {self.facts['reward_rule']}",
        ]


def load(
    name_or_path: str,
    device="cpu",
    eval_env: str | None = None,
    allow_unverified: bool = False,
    reward_scale: float | None = None,
) -> Dataset:
    """The transitions of bandit, halfcheetah-demo, a D4RL task, minari:NAME, or an HDF5 file with the keys of RANKS.

    The reward rule (see `transitions`) follows the task's name; for an own file it follows `eval_env` if that begins
    with a D4RL family such as antmaze or pen, else it is locomotion's: beta is a temperature on scaled rewards. For
    Minari it follows `eval_env`, else the dataset's name. Actions are clipped to +-ACTION_LIMIT; an own file with
    actions beyond +-1.01, which is more than rounding, is refused (D4RL's files are only clipped, as in the reference
    code, and so is Minari's data, in the bounds it states). Raises UserError for an unknown name, a failed download, a
    wrong checksum (`allow_unverified` takes a file already in place all the same), a damaged file, unusable data.
    `reward_scale` takes the place of the rule: rewards are multiplied by it; 1 leaves them as they are.
    """
    tasks = _tasks()
    if name_or_path == "bandit":
        data = bandit.make_data()
        return Dataset(*data, device, facts=_facts("bandit", data[2].numpy(), "as they are"))
    if name_or_path in MADE_HERE:
        path = _made(MADE_HERE[name_or_path], cache_folder() / f"{name_or_path}.hdf5")
        return transitions(read_hdf5(path), name_or_path, device, path, reward_scale)
    if name_or_path in tasks:
        path = _task_file(name_or_path, tasks[name_or_path], allow_unverified)
        return transitions(read_hdf5(path), name_or_path, device, path, reward_scale)
    if name_or_path.startswith(MINARI):
        task = _minari_task(eval_env or name_or_path)
        return transitions(read_minari(name_or_path), task, device, name_or_path, reward_scale)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise UserError(_unknown(name_or_path, tasks))
    raw = read_hdf5(path)
    highest = max(raw["actions"].max(), -raw["actions"].min())
    if highest > 1.01:
        raise UserError(f"{path}: actions reach {highest:.4g}; rescale them to [-1, 1] by the environment's bounds")
    return transitions(raw, _minari_task(eval_env or ""), device, path, reward_scale)


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
        raise UserError(f"{name} is damaged ({error}); get it again by: {minari_download(name)}") from None
    return raw


def _minari_task(name: str) -> str:
    """`minari:D4RL/pen/human-v2` -> `pen-human-v2`, D4RL's own way of naming it; other names as they are."""
    return name.removeprefix(MINARI).removeprefix("D4RL/").replace("/", "-") if name.startswith(MINARI) else name


def transitions(
    raw: dict[str, np.ndarray],
    name: str = "",
    device="cpu",
    source: str | Path = "the data",
    reward_scale: float | None = None,
) -> Dataset:
    """The rule of D4RL's `qlearning_dataset` on the arrays of `read_hdf5`.

    `name` is a task or family of D4RL's, `source` is for messages. next_obs is the next row's observation; a row with a
    timeout is dropped, and the last row; terminal rows stay, with done = 1. Without the key timeouts an episode ends
    STEP_LIMITS steps after the last terminal or timeout (after a terminal D4RL counts one too few: not copied).
    Rewards: antmaze r - 1; UNSCALED as they are; all others (locomotion) times 1000 / (max - min return), of the
    episodes as cut here, so that 1000 steps up to a timeout count 999; `reward_scale`, if given, is the factor instead.
    Raises UserError if no transition is left.
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
    reward = raw["rewards"][:-1]
    returns = _returns(reward, (terminals | timeouts)[:-1], keep)
    reward, rule = _scaled(reward, returns, name.split("-")[0], reward_scale)
    facts = _facts(source, returns, rule)
    dataset = Dataset(obs[:-1], raw["actions"][:-1], reward, obs[1:], terminals[:-1], device, keep, facts)
    dataset.action.clamp_(-ACTION_LIMIT, ACTION_LIMIT)  # in place: a clipped copy of the raw actions would cost memory
    return dataset


def _facts(source: str | Path, returns: np.ndarray, rule: str) -> dict:
    path = Path(source)
    facts = {"source": str(source), "bytes": None, "sha256": None}
    if path.is_file():
        facts |= {"bytes": path.stat().st_size, "sha256": pooch.file_hash(str(path))}
    spread = [float(f(returns)) for f in (np.min, np.mean, np.max)]
    return facts | {"episodes": len(returns), "returns": spread, "reward_rule": rule}


def _timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """(N,) -> (N,): True at every `limit`-th step since the last terminal."""
    row = np.arange(len(terminals))
    start = np.zeros_like(row)  # of the stretch between two terminals that the row lies in
    start[1:] = np.maximum.accumulate(np.where(terminals[:-1], row[1:], 0))
    return (row - start) % limit == limit - 1


def _returns(reward: np.ndarray, last: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Each episode's sum of kept rewards, float64; `last` (N,) marks their ends. One without a kept row has none."""
    episode = (np.cumsum(last) - last)[keep]
    return np.add.reduceat(reward[keep].astype(np.float64), np.flatnonzero(np.diff(episode, prepend=-1)))


def _scaled(reward: np.ndarray, returns: np.ndarray, family: str, scale: float | None) -> tuple[np.ndarray, str]:
    """The rewards by the rule of `family`, or times `scale`, and the rule in words."""
    if scale is not None:
        return reward * np.float32(scale), f"times {scale:g} (--reward-scale)"
    if family == "antmaze":
        return reward - 1, "minus 1 (antmaze's rule)"
    if family in UNSCALED:
        return reward, f"as they are ({family}'s rule)"
    spread = returns.max() - returns.min()
    if spread <= 1e-6 * np.abs(returns).max():  # float32's rounding is no spread
        return reward, "as they are (all returns are equal)"
    return reward * np.float32(1000 / spread), f"times 1000 / {spread:.6g}, the returns' spread (locomotion's rule)"


def _tasks() -> dict[str, Task]:
    with open(Path(__file__).with_name("d4rl_tasks.tsv")) as file:
        lines = csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t")
        return {line.pop("task"): Task(**line) for line in lines}


def _made(generate: Callable[[Path], None], path: Path) -> Path:
    """`path`, written by `generate` if it is not there."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two first runs at once make a file each
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()  # a folder that can't be written is found before the work
            generate(temporary)
            os.replace(temporary, path)  # a killed run never leaves half a file
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror or error}); {WRITABLE}") from None
        finally:
            if temporary.is_file():
                temporary.unlink()
    return path


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
