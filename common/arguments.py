"""From the command line to a run's arguments: what is given, else what the dataset's settings say; and their checks."""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_type_hints

import torch
import tyro

from common import Interrupted, TrainingError, UserError, datasets, environments, trained


class Rule(NamedTuple):
    """What a number on the command line must fulfil."""

    holds: Callable[[float], bool]
    words: str


Count = Annotated[int, Rule(lambda n: n >= 1, "must be at least 1")]
AtLeast2 = Annotated[int, Rule(lambda n: n >= 2, "must be at least 2")]
Steps = Annotated[int, Rule(lambda n: 0 <= n < 2**63, "must not be negative, and be less than 2^63")]
Amount = Annotated[float, Rule(lambda x: 0 <= x < math.inf, "must be a finite number that is not negative")]
Positive = Annotated[float, Rule(lambda x: 0 < x < math.inf, "must be a finite number above 0")]
Share = Annotated[float, Rule(lambda x: 0 <= x <= 1, "must lie between 0 and 1")]
Inside = Annotated[float, Rule(lambda x: 0 < x < 1, "must lie between 0 and 1, and be neither")]


@dataclasses.dataclass
class RunArgs:
    """The arguments that are about the run and no paper. A field that is None takes the dataset's setting."""

    env: str = "halfcheetah-demo"
    """the data: halfcheetah-demo, bandit, maze2d-umaze-remade, a D4RL name, minari:NAME, or an HDF5 or .npz file"""
    eval_env: str | None = None
    """where own data's policy is scored: a D4RL name such as hopper (its score), or a Gymnasium id (raw return)"""
    seed: Steps = 0
    """of networks, batches and noise; an evaluation has random numbers of its own"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    compile: bool = False
    """torch.compile the losses and the policy: a minute's wait, then faster steps"""
    cudagraph: bool = False
    """capture each whole update as a CUDA graph; needs a GPU"""
    run_dir: Path | None = None
    """the run's folder; None: runs/<env>/<algorithm>/seed<seed>"""
    resume: bool = False
    """go on from the run folder's checkpoint, with the arguments that it was begun with"""
    eval_only: bool = False
    """score the run folder's checkpoint, write eval.json, and stop"""
    video: bool = False
    """play one episode into the run folder, as video.mp4, when the run is finished or with --eval-only"""
    allow_unverified: bool = False
    """accept a D4RL file whose checksum is not the published one"""
    reward_scale: Positive | None = None
    """multiply the data's rewards by this, 1: as they are; None: the rule of the dataset's task"""
    rescale_actions: bool = False
    """own data's actions are in the units of --eval-env: map its bounds to [-1, 1]"""
    normalize_obs: bool | None = None
    """let the networks see (obs - mean) / std"""
    eval_every: Count | None = None
    """gradient steps between two evaluations"""
    eval_episodes: Count | None = None
    """episodes an evaluation, all in lock-step; None: 100 in AntMaze, else 10"""
    log_every: Count = 1000
    """gradient steps between two lines of metrics"""
    save_every: Count = 10_000
    """gradient steps between two checkpoints"""


# What may change between a run and its --resume: what alters no gradient step, and how many there are of the policy.
FREE = {field.name for field in dataclasses.fields(RunArgs)} | {"policy_steps"}
FREE -= {"env", "eval_env", "seed", "reward_scale", "rescale_actions", "normalize_obs"}
# What a run without a config.json yet would overwrite in a folder of the user's.
FILES = ("metrics.jsonl", "checkpoint.pt", "result.json", "eval.json", "video.mp4")
FILES += ("curves.png", "bandit.png", "maze.png")


def main(algorithm: str, train: Callable, args_type: type, settings: dict) -> None:
    """Read the command line and train. Exit codes: 2 the user's mistake, 1 a failure, 130 Ctrl-C, 143 SIGTERM."""
    try:
        train(read_command_line(algorithm, args_type, settings))
        return
    except (UserError, TrainingError) as error:
        code, text = 2 if isinstance(error, UserError) else 1, f"error: {error}"
    except (OSError, MemoryError, RuntimeError) as error:  # a full disk or memory, nobody who reads the output
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        code, text = 1, f"error: {' '.join(str(error).split()) or repr(error):.250}; mend that, then --resume goes on"
    except Interrupted as stop:
        code, text = 128 + stop.args[0], stop.args[1]
    except KeyboardInterrupt:
        code, text = 130, "interrupted; with --resume it goes on from the last checkpoint, if there is one"
    print(text, file=sys.stderr)
    raise SystemExit(code)


def read_command_line(algorithm: str, args_type: type, settings: dict):
    """The arguments. Defaults, also those that --help shows, are the dataset's, or those of the run that is resumed."""
    given = tyro.cli(args_type, args=[word for word in sys.argv[1:] if word not in ("-h", "--help")])
    saved = trained.read_config(folder(given, algorithm)) if given.resume or given.eval_only else None
    if saved and saved["algorithm"] == algorithm:
        default, whose = trained.saved_args(saved, args_type), "the run in the folder"
        default = dataclasses.replace(default, resume=False, eval_only=False, video=False)
    else:
        whose, values = lookup(settings, given.env)
        default = dataclasses.replace(args_type(), env=given.env, **values)
    return tyro.cli(args_type, default=default, description=f"The defaults shown here are those of {whose}.")


def own_data(env: str) -> bool:
    return env.startswith(environments.MINARI) or Path(env).suffix != "" or os.path.isfile(os.path.expanduser(env))


def folder(args, algorithm: str) -> Path:
    """Where a run is: args.run_dir, or a name made of data, algorithm and seed."""
    name = re.sub("[:/]", "-", args.env) if args.env.startswith(environments.MINARI) else Path(args.env).stem
    return Path(os.path.expanduser(args.run_dir or f"runs/{name}/{algorithm}/seed{args.seed}"))


def lookup(settings: dict, env: str) -> tuple[str, dict]:
    """Whose settings a dataset has, and these settings: its own, else its family's, over those of "*"."""
    v0 = re.sub("^(antmaze-.*)-v[12]$", r"\1-v0", env)  # AntMaze's -v2 are its -v0 with mistakes corrected
    family = env.split("-")[0]
    kinds = [f"{family}-remade", "remade"] if env.endswith("-remade") else [family]
    names = ["own data"] if own_data(env) else [env, v0, *kinds]
    name = next((name for name in names if name in settings), "all datasets")
    return name, settings["*"] | settings.get(name, {})


def prepare(args, settings: dict, algorithm: str) -> tuple:
    """The arguments as filled in, and the data that they name; says what they are. Raises UserError as `fill_in` and
    datasets.load do, and if the environment's sizes are not those of the data."""
    args = fill_in(args, settings, algorithm)
    data = datasets.load(
        args.env, args.device, args.eval_env, args.allow_unverified, args.reward_scale, args.rescale_actions
    )
    if args.eval_env:
        datasets.check_sizes(data, args.eval_env)
    if model := getattr(args, "behaviour", None):
        trained.check_data(trained.load_checkpoint(model), data.facts)
    score = f"{args.eval_env}, {args.eval_episodes} episodes" if args.eval_env else "none, see --eval-env"
    score = "against the closed form" if args.env == "bandit" else score
    print("\n".join([*data.describe(), f"score: {score}; device: {args.device}"]))
    name, values = lookup(settings, args.env)
    default = vars(type(args)()) | values
    about_the_run = {field.name for field in dataclasses.fields(RunArgs)} - values.keys()
    given = {k: v for k, v in vars(args).items() if k not in about_the_run and v != default[k]}
    for text, chosen in ((f"settings of {name}", values), ("but for", given)):
        print(f"{text}: {', '.join(f'{key} {value}' for key, value in chosen.items()) or 'nothing'}")
    return args, data


def fill_in(args, settings: dict, algorithm: str):
    """A copy of `args` in which a field that is None has the setting of the dataset, or of the run that is resumed.

    Raises UserError for a number, a device or an environment that makes no sense, and for a folder of another run.
    """
    file = os.path.realpath(os.path.expanduser(args.env))  # the folder is named after a link, not what it leads to
    args = dataclasses.replace(args, run_dir=folder(args, algorithm), env=file if os.path.isfile(file) else args.env)
    for name in {"critic", "behaviour"} & vars(args).keys():
        setattr(args, name, getattr(args, name) and Path(os.path.expanduser(getattr(args, name))).resolve())
    agree_with_folder(args, algorithm)
    for field, value in lookup(settings, args.env)[1].items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    for field, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, field)
        for rule in (rule for part in (kind, *get_args(kind)) for rule in getattr(part, "__metadata__", ())):
            if value is not None and not (isinstance(value, int | float) and rule.holds(value)):
                raise UserError(f"--{field.replace('_', '-')} {value}: {rule.words}")
    if args.critic:
        args.critic_steps = 0
    choose_device(args)
    args.eval_env = environments.evaluation_env(args.env, args.eval_env)
    if args.eval_episodes is None:  # a return is 0 or 1 in AntMaze, so that everybody plays 100 episodes there
        args.eval_episodes = 100 if (args.eval_env or "").startswith("antmaze") else 10
    if args.video:
        environments.check_video(args.eval_env)
    return args


def choose_device(args) -> None:
    """Settle device, cudagraph and compile, in place. Raises UserError for what can't be had here."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not to be had here; use cpu, cuda or cuda:<number>") from None
    if torch.device(args.device).type == "cuda":
        torch.cuda.set_device(torch.device(args.device).index or 0)  # a CUDA graph is captured on the current device
    elif args.cudagraph:
        print(f"--cudagraph is left out: it needs a GPU, and this run is on {args.device}")
        args.cudagraph = False
    try:
        if args.compile:
            torch.compile(torch.sin)(torch.ones(2, device=args.device))
    except Exception as error:  # a compiler is missing, or one of a dozen other things
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile does not work here ({reason}); install a C++ compiler, or leave it out") from None


def agree_with_folder(args, algorithm: str) -> None:
    """Take what is not given from the run that is resumed, in place. Raises UserError if its folder holds another one,
    or something of the user's that a run would overwrite."""
    path, config = args.run_dir, trained.read_config(args.run_dir)
    if config is None:
        if found := [name for name in FILES if (path / name).exists()]:
            raise UserError(f"{path} holds {found[0]} but no run of these programs; choose another --run-dir")
        return
    if config["algorithm"] != algorithm:
        raise UserError(f"{path} holds a run of {config['algorithm']}.py; choose another --run-dir")
    if not args.resume and not args.eval_only:
        raise UserError(f"{path} holds a run already; add --resume to go on with it, or choose another --run-dir")
    acting = trained.ACTING if args.eval_only else set()
    free = FREE | acting | ({"env"} if os.path.isfile(args.env) else set())  # a file may have been moved
    for name, old in vars(trained.saved_args(config, type(args))).items():
        new, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if new is None:
            setattr(args, name, old)
        elif new != old and name not in free:
            raise UserError(f"{path} holds a run with {flag} {old}, not {new}; leave it out, or give a new --run-dir")
