"""A bandit whose best policy is known in closed form: the yardstick of correctness, and a first contact of seconds.

One state; a two-dimensional action; eight narrow Gaussian modes on a circle, equally frequent in the data, each with
its own reward. The two best lie opposite each other, so that the mean of the good actions is a bad one: a Gaussian
policy must fail. A policy pi(a) = mu(a) w(Q(a)) / Z keeps the behaviour's modes and changes how frequent they are.
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

REWARDS = torch.tensor([1.0, 0.2, 0.7, 0.0, 0.9, 0.3, 0.5, 0.1])  # (8,) of the modes, counter-clockwise from the right
ANGLES = torch.arange(8) * math.pi / 4
MODES = 0.8 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1)  # (8, 2)
STD = 0.06  # of each mode, in both directions


def make_data(size: int = 20_000) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """obs (0, always), action (near a random mode), its reward, next_obs, done of `size` episodes, always the same."""
    generator = torch.Generator().manual_seed(0)
    mode = torch.randint(8, (size,), generator=generator)
    action = MODES[mode] + STD * torch.randn(size, 2, generator=generator)
    return torch.zeros(size, 1), action, REWARDS[mode], torch.zeros(size, 1), torch.ones(size)


def frequencies(action: Tensor) -> Tensor:
    """(B, 2) -> (8,): the share of actions nearest to each mode."""
    nearest = torch.cdist(action.cpu(), MODES).argmin(-1)
    return nearest.bincount(minlength=8) / len(action)


def report(action: Tensor, target: Tensor, **others: Tensor) -> tuple[dict[str, float], Figure]:
    """Compare actions (B, 2) with the closed-form mode frequencies `target` (8,): metrics, and a picture.

    The score is 100 (1 - total variation). `others` are further sets of actions to draw, by name.
    """
    distance = 0.5 * (frequencies(action) - target).abs().sum().item()
    metrics = {
        "eval/score": 100 * (1 - distance),
        "eval/total_variation": distance,
        "eval/off_modes": (torch.cdist(action.cpu(), MODES).amin(-1) > 4 * STD).float().mean().item(),
        "eval/return": (frequencies(action) * REWARDS).sum().item(),
    }
    panels = {"data": make_data()[1][:4096], "policy": action, **others}
    figure, width = Figure(figsize=(3 * (len(panels) + 1), 3), layout="constrained"), 0.8 / (len(panels) + 1)
    *scatters, bars = figure.subplots(1, len(panels) + 1)
    for k, (name, points) in enumerate(panels.items()):
        scatters[k].scatter(*points.cpu().T, s=1, alpha=0.3, c=f"C{k}")
        scatters[k].set(title=name, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        bars.bar(np.arange(8) + k * width, frequencies(points).numpy(), width, label=name)
    bars.bar(np.arange(8) + len(panels) * width, target.numpy(), width, label="closed form", color="black")
    bars.set(title="share of each mode", xlabel="its reward")
    bars.set_xticks(np.arange(8) + 0.4, [f"{reward:.1f}" for reward in REWARDS])
    bars.legend(fontsize=6)
    return metrics, figure
