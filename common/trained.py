"""What a run left behind: its configuration, its curves, its checkpoint, its critic, its policy as a function."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from common import UserError

FORMAT = 3  # of config.json and checkpoint.pt
# what a critic's values mean, besides its data
CRITIC = ("critic_loss", "expectile", "linex_alpha", "linex_max", "discount", "layer_norm", "rescale_actions")

ACTING = {"extraction", "candidates", "solver", "sampler_steps", "act_noise"}  # how a policy acts


def read_config(folder: Path) -> dict | None:
    """A run's config.json; None if there is none. Raises UserError if it is damaged or of another version."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        if config["format"] == FORMAT and config["args"].keys() and {"algorithm", "data", "command"} <= config.keys():
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not to be read, not JSON, not a run's
        pass
    raise UserError(f"{path} is damaged, not that of a run, or of another version; choose another --run-dir")


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, but for the half line that a killed run leaves. UserError if it is damaged."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if row["step"] > 0]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; mend or delete it, the run itself does not need it") from None


def curves(folder: Path) -> Figure:
    """Every scalar of metrics.jsonl over the steps."""
    rows = read_metrics(folder)
    names = sorted({key for row in rows for key in row} - {"step"})
    height = max(1, math.ceil(len(names) / 4))
    figure = Figure(figsize=(12, 2.4 * height), layout="constrained")
    for k, name in enumerate(names, 1):
        axes = figure.add_subplot(height, 4, k, title=name)
        axes.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), marker=".")
    return figure


def load_checkpoint(path: str | Path, algorithm: str | None = None, device: str = "cpu") -> dict:
    """The content of a run's checkpoint.pt, given it or its folder; its tensors on `device`.

    Raises UserError if it is missing, damaged, of another version, or of another algorithm than the one named.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a run writes it at its first checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}); use another one") from None
    found = state.get("format", "unknown") if isinstance(state, dict) else "unknown"
    if found != FORMAT or not {"algorithm", "args", "data", "sizes", "step", "critic", "policy"} <= state.keys():
        raise UserError(f"{path} is no whole checkpoint of this version: format {found}, {FORMAT} is read; use another")
    if algorithm and state["algorithm"] != algorithm:
        raise UserError(f"{path} is of {state['algorithm']}.py, not of {algorithm}.py; use that file, or another run")
    return state


def saved_args(state: dict, args_type: type):
    """The arguments in a checkpoint or config.json. Raises UserError if they are those of another version."""
    args, known = state["args"], {field.name for field in dataclasses.fields(args_type)}
    if unknown := args.keys() - known:
        raise UserError(f"{args['run_dir']} has an argument {unknown.pop()!r} that this version does not know; update")
    return args_type(**args | {key: Path(args[key]) for key in ("run_dir", "critic", "behaviour") if args.get(key)})


def check_data(state: dict, facts: dict, *kinds: str) -> None:
    """Raises UserError unless `state` is of the same data: by sha256, or by name if no file, and by `kinds`."""
    for kind in ("sha256" if facts["sha256"] else "source", *kinds):
        if (old := state["data"][kind]) != facts[kind]:
            run = f"the run in {state['args']['run_dir']} had {state['data']['source']}, this one has {facts['source']}"
            raise UserError(f"{run}: {kind} {old}, not {facts[kind]}; give the same data")


def load_critic(critic: torch.nn.Module, args, facts: dict) -> None:
    """Give `critic` the weights of the run args.critic. Raises UserError if they mean something else, or do not fit."""
    state = load_checkpoint(args.critic)
    check_data(state, facts, "reward_rule")
    for name in CRITIC:
        old, new = state["args"].get(name), getattr(args, name, None)
        if name in state["args"] and hasattr(args, name) and old != new:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"the critic in {args.critic} is one with {flag} {old}, not {new}; give the same")
    try:
        critic.load_state_dict(state["critic"])
    except RuntimeError:
        raise UserError(f"the critic in {args.critic} is another network or has other sizes; train one") from None


def numpy_or_torch(act: Callable, obs_dim: int, device: str | torch.device) -> Callable:
    """`act`, (B, O) -> (B, A) on tensors, for numpy or torch observations, (B, O) or (O,); it answers in kind.

    It raises ValueError for observations of another size, and for NaN or inf in them.
    """

    @torch.no_grad()
    def friendly(obs):
        batch = torch.as_tensor(obs if torch.is_tensor(obs) else np.array(obs, np.float32), device=device).float()
        if batch.ndim not in (1, 2) or batch.shape[-1] != obs_dim:
            raise ValueError(f"observations have shape {tuple(batch.shape)}; must be ({obs_dim},) or (B, {obs_dim})")
        if not batch.isfinite().all():
            raise ValueError("observations hold NaN or infinite numbers")
        rows = batch.reshape(-1, obs_dim)
        action = act(rows) if len(rows) else act(torch.zeros(1, obs_dim, device=device))[:0]
        action = action.reshape(*batch.shape[:-1], action.shape[-1])
        return action.to(obs.device) if torch.is_tensor(obs) else action.cpu().numpy()

    return friendly


def headline(evaluation: dict[str, float]) -> float:
    """The score, or the return where there is none."""
    return evaluation.get("eval/score", evaluation["eval/return"])


def headline_text(last: dict[str, float], best: float) -> str:
    if "eval/return" not in last:
        return "not evaluated"
    name = "score" if "eval/score" in last else "return"
    spread = f" +- {last[f'eval/{name}_std']:.1f} over episodes" if f"eval/{name}_std" in last else ""
    text = f"last {name} {headline(last):.1f}{spread}" + (f", best {best:.1f}" if math.isfinite(best) else "")
    return text + (f", {last['eval/candidates']:.0f} candidates" if "eval/candidates" in last else "")
