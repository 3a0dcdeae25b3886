"""The same numbers in, the same numbers out as the authors' own code: GenerativeRL (commit 77ed957) for GMPO, IDQL's of
May 2023 (6b071e7) for IDQL. tests/data/authors_*.npz hold what that code returned; its weights are made by a rule."""

import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import args_of, files_with, flat

import gmpo
import idql

GMPO, IDQL = 1e-6, 1e-5  # the largest errors
each_file = pytest.mark.parametrize("algorithm", files_with("PaperNet"), ids=lambda module: module.__name__)


def recorded(name):
    with np.load(Path(__file__).parent / "data" / f"authors_{name}.npz") as file:
        return {key: file[key].tolist() if key == "names" else torch.from_numpy(file[key]) for key in file}


def fill(tensors, names, rule):
    """Give `tensors`, named as the authors do, the recorded run's weights; `rule` says a name's offset and scale."""
    assert sorted(tensors) == sorted(name.split()[0] for name in names)
    for name, shape in map(str.split, names):
        draw = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(map(int, shape.split("x"))))
        offset, scale = rule(name)
        weight = torch.tensor(offset + scale * draw, dtype=torch.float32)
        weight = weight.view_as(tensors[name]) if name.startswith("FourierFeatures") else weight
        weight = weight.T if name.endswith("Dense_0/kernel") or name.endswith("Dense_1/kernel") else weight
        assert weight.shape == tensors[name].shape, name
        tensors[name].data.copy_(weight)


def gmpo_net(algorithm):
    net = algorithm.PaperNet(4, 2)
    blocks = ["first_block", "down_block.0", "down_block.1", "middle_block", "up_block.0", "up_block.1"]
    layers = {"pre_sort_condition.0": net.condition, "sort_t.0": net.embed[0], "sort_t.2": net.embed[2]}
    layers |= {"last_block": net.head}
    for name, block in zip(blocks, [*net.down, net.middle, *net.up]):
        parts = {"dense1.0": block.first, "dense2.0": block.second, "time_mlp.1": block.embedding}
        parts |= {"modify_x": block.skip} if isinstance(block.skip, torch.nn.Linear) else {}
        layers |= {f"{name}.{part}": layer for part, layer in parts.items()}
    tensors = {f"model.backbone.{name}.weight": layer.weight for name, layer in layers.items()}
    tensors |= {f"model.backbone.{name}.bias": layer.bias for name, layer in layers.items()}
    tensors["model.t_encoder.W"] = net.frequencies
    fill(tensors, recorded("gmpo")["names"], lambda name: (0, 30 if name == "model.t_encoder.W" else 0.05))
    return net


def idql_net():
    net = idql.LNResNet(4, 2, dropout=0.1).eval()
    layers = {"MLP_0/Dense_0": net.condition[0], "MLP_0/Dense_1": net.condition[2]}
    layers |= {"MLPResNet_0/Dense_0": net.net[0], "MLPResNet_0/Dense_1": net.net[-1]}
    tensors = {"FourierFeatures_0/kernel": net.frequencies}
    for k, block in enumerate(net.net[1:4]):
        name = f"MLPResNet_0/MLPResNetBlock_{k}"
        layers |= {f"{name}/Dense_0": block.net[2], f"{name}/Dense_1": block.net[4]}
        tensors |= {f"{name}/LayerNorm_0/scale": block.net[1].weight, f"{name}/LayerNorm_0/bias": block.net[1].bias}
    tensors |= {f"{name}/kernel": layer.weight for name, layer in layers.items()}
    tensors |= {f"{name}/bias": layer.bias for name, layer in layers.items()}
    rule = lambda name: (1, 0.1) if name.endswith("scale") else (0, 0.2 if name.startswith("Fourier") else 0.05)  # noqa: E731
    fill(tensors, recorded("idql")["names"], rule)
    return net


def give(monkeypatch, **draws):
    """Let torch's random functions return these tensors, one a call."""
    for name, tensors in draws.items():
        monkeypatch.setattr(torch, name, partial(lambda given, *_, **__: next(given), iter(tensors)))


def close(found, expected, error):
    """Within `error`, relative to the largest of the expected numbers where these are above 1."""
    miss = (found.double() - expected.double()).abs().max() / expected.abs().max().double().clamp(min=1)
    assert miss < error


@each_file
def test_gmpos_network_loss_and_gradient_are_the_authors(algorithm, monkeypatch):
    net, they = gmpo_net(algorithm), recorded("gmpo")
    out = net(they["x"], they["t_raw"], they["obs"])
    close(out, they["net_output_at_x_t_raw"], GMPO)
    give(monkeypatch, randn_like=[they["eps"]], rand=[they["t_raw"]])
    loss = algorithm.matching_loss(net, they["obs"], they["action"], args_of(algorithm, path="gvp"))
    close(loss, they["loss_each"], GMPO)
    loss.mean().backward()
    close(flat(p.grad.double() for p in net.parameters()).norm(), they["grad_norm"], GMPO)


@torch.no_grad()
def test_gmpos_sample_is_the_authors(monkeypatch):
    net, they = gmpo_net(gmpo), recorded("gmpo")
    give(monkeypatch, randn=[they["start"]])
    found = gmpo.sample(net, they["obs"], args_of(gmpo, path="gvp", solver="euler", sampler_steps=31))
    close(found, they["sampled_euler31"], GMPO)


def test_idqls_schedule_network_loss_and_gradient_are_the_authors(monkeypatch):
    net, they, args = idql_net(), recorded("idql"), args_of(idql, diffusion_steps=5)
    close(idql.betas(args), they["betas"], IDQL)
    close(net(they["x_t"], they["t"].float(), they["obs"]), they["net_output"], IDQL)
    give(monkeypatch, randn_like=[they["eps"]], randint=[they["t"]])
    loss = idql.noise_loss(net, they["obs"], they["action"], args).mean()
    close(loss, they["loss"], IDQL)
    loss.backward()
    close(flat(p.grad.double() for p in net.parameters()).norm(), they["grad_norm"], IDQL)


@torch.no_grad()
def test_idqls_sample_is_the_authors(monkeypatch):
    net, they = idql_net(), recorded("idql")
    give(monkeypatch, randn=[they["noise"][0]], randn_like=they["noise"][1:])
    found = idql.sample(net, they["obs"], args_of(idql, diffusion_steps=5))
    close(found, they["sampled"], IDQL)
