"""A bandit whose best policy is known in closed form: the yardstick of correctness, and a first contact of seconds.

One state; a two-dimensional action; eight narrow Gaussian modes on a circle, equally frequent in the data, each with
its own reward. The two best modes lie opposite each other, so that the mean of the good actions is a bad action: a
Gaussian policy must fail here. Every policy that re-weights the behaviour by the action's value, pi(a) = mu(a) w(Q(a))
/ Z, keeps the modes and changes how frequent they are.
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from common.datasets import Dataset
from common.runs import Folder

REWARDS = torch.tensor([1.0, 0.2, 0.7, 0.0, 0.9, 0.3, 0.5, 0.1])  # (8,) of the modes, counter-clockwise from the right
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = 0.8 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1)  # (8, 2)
STD = 0.06  # of each mode, in both directions


def load(device: str = "cpu", size: int = 20_000) -> Dataset:
    """`size` transitions of one step, always the same: obs 0, an action (A = 2) near a random mode, its reward."""
    generator = torch.Generator().manual_seed(0)
    mode = torch.randint(8, (size,), generator=generator)
    action = MODES[mode] + STD * torch.randn(size, 2, generator=generator)
    obs = torch.zeros(size, 1)
    return Dataset(obs, action, REWARDS[mode], obs, torch.ones(size), device)


def frequencies(action: torch.Tensor) -> torch.Tensor:
    """(B, 2) -> (8,): the share of actions nearest to each mode."""
    nearest = torch.cdist(action.cpu(), MODES).argmin(-1)
    return nearest.bincount(minlength=8) / len(action)


def report(action: torch.Tensor, target: torch.Tensor, folder: Folder, step: int, **others: torch.Tensor) -> dict:
    """Compare actions (B, 2) with the closed-form mode frequencies `target` (8,): metrics, and a picture.

    While training the picture goes into the run's folder and TensorBoard; `others` are further sets of actions to draw,
    by name. The score is 100 (1 - total variation).
    """
    distance = 0.5 * (frequencies(action) - target).abs().sum().item()
    if folder.writer:
        figure = picture({"data": load().action[:4096], "policy": action, **others}, target)
        figure.savefig(folder.path / "bandit.png", dpi=120)
        folder.writer.add_figure("bandit", figure, step)
    return {
        "eval/score": 100 * (1 - distance),
        "eval/total_variation": distance,
        "eval/off_modes": (torch.cdist(action.cpu(), MODES).amin(-1) > 4 * STD).float().mean().item(),
        "eval/return": (frequencies(action) * REWARDS).sum().item(),
    }


def picture(panels: dict[str, torch.Tensor], target: torch.Tensor) -> Figure:
    """One scatter a set of actions (B, 2), then the mode frequencies of all beside the closed form `target` (8,)."""
    figure = Figure(figsize=(3 * (len(panels) + 1), 3), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1)
    width = 0.8 / (len(panels) + 1)
    for k, (name, action) in enumerate(panels.items()):
        axes[k].scatter(*action.cpu().T, s=1, alpha=0.3, c=f"C{k}")
        axes[k].set(title=name, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        axes[-1].bar(np.arange(8) + k * width, frequencies(action).numpy(), width, label=name)
    axes[-1].bar(np.arange(8) + len(panels) * width, target.numpy(), width, label="closed form", color="black")
    axes[-1].set(
        title="share of each mode",
        xticks=np.arange(8) + 0.4,
        xticklabels=[f"{r:.1f}" for r in REWARDS],
        xlabel="its reward",
    )
    axes[-1].legend(fontsize=6)
    return figure
