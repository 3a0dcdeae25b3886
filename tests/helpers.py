"""What several tests need."""

import dataclasses
import importlib
from types import ModuleType

import sync
import torch
from torch import nn


def files_with(name: str) -> list[ModuleType]:
    """The algorithm files that define a top-level name."""
    files = [file for file in sync.FILES if name in sync.definitions(file)]
    return [importlib.import_module(file.removesuffix(".py")) for file in files]


def args_of(algorithm: ModuleType, **values):
    """Its arguments, from those of the values that it knows."""
    known = {field.name for field in dataclasses.fields(algorithm.Args)}
    return algorithm.Args(**{key: value for key, value in values.items() if key in known})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def smaller_q(twin: nn.Module, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """min_i Q_i(s, a) of a TwinQ, one network after the other: (B, O), (B, A) -> (B,)."""
    x = torch.cat([twin.normalize(obs), action], -1)
    return torch.minimum(twin.q1(x)[:, 0], twin.q2(x)[:, 0])


class Net(nn.Module):
    """A function of (x, t, obs), times a weight that is 1, in the place of a network."""

    def __init__(self, function, action_dim: int = 2):
        super().__init__()
        self.function, self.action_dim, self.scale = function, action_dim, nn.Parameter(torch.ones(()))

    def forward(self, x, t, obs):
        return self.scale * self.function(x, t, obs)
