"""The optimizer against torch's own, its cosine against closed forms, for one seed and for several."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.training import Adam, Seeds, clip

torch.set_num_threads(1)
each_count = pytest.mark.parametrize("count", [1, 3])


def seeds_of(count=1, dtype=torch.float32):
    """Networks of two parts, each seed's with weights of its own."""
    args = SimpleNamespace(seed=5, num_seeds=count, device="cpu", bf16=False, fast_matmul=False)
    return Seeds(lambda seed: {"net": nn.Linear(4, 3).to(dtype), "other": nn.Linear(4, 3).to(dtype)}, args)


def gradients_of(seeds, step):
    g = torch.Generator().manual_seed(step)
    scale = 0.1 + math.sin(step) ** 2
    return tuple(scale * torch.randn(p.shape, dtype=p.dtype, generator=g) for p in seeds.parameters("net"))


def of_seed(tensors, k, count):
    return [x[k] if count > 1 else x for x in tensors]


@each_count
@pytest.mark.parametrize("decay_steps", [None, 60])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_60_steps_are_torchs(count, decay_steps, weight_decay, dtype):
    seeds, lr = seeds_of(count, dtype), 0.01
    frozen = [p.detach().clone() for p in seeds.parameters("other")]
    own = Adam(seeds, "net", lr, decay_steps, weight_decay)
    copies = [[p.detach().clone() for p in of_seed(own.parameters, k, count)] for k in range(count)]
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    theirs = [kind(copy, lr, weight_decay=weight_decay, foreach=False) for copy in copies]
    for step in range(1, 61):
        gradients = gradients_of(seeds, step)
        own.step(gradients)
        for k, (optimizer, copy) in enumerate(zip(theirs, copies)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * step / 60)) if decay_steps else 1)
            for parameter, gradient in zip(copy, of_seed(gradients, k, count)):
                parameter.grad = gradient
            optimizer.step()
    for k, copy in enumerate(copies):
        torch.testing.assert_close(of_seed(own.parameters, k, count), copy, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, seeds.parameters("other"), frozen))


@pytest.mark.parametrize("decay_steps, rates", [
    (None, [0.2, 0.2, 0.2, 0.2]),
    (4, [0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5)), 0.0]),
])  # fmt: skip
def test_the_rate_is_constant_or_a_cosine_to_0(decay_steps, rates):
    """Under gradients that stay the same, each step of Adam is as long as the learning rate."""
    seeds = seeds_of()
    optimizer = Adam(seeds, "net", 0.2, decay_steps)
    for rate in rates:
        before = [p.detach().clone() for p in optimizer.parameters]
        optimizer.step(tuple(torch.full_like(p, 3.0) for p in optimizer.parameters))
        for old, new in zip(before, optimizer.parameters):
            torch.testing.assert_close(old - new, torch.full_like(old, rate), rtol=1e-5, atol=1e-6)


def test_the_rate_at_the_first_step_of_many_is_nearly_the_whole():
    optimizer = Adam(seeds_of(), "net", 0.2, decay_steps=10_000)
    before = optimizer.parameters[0].detach().clone()
    optimizer.step(tuple(map(torch.ones_like, optimizer.parameters)))
    torch.testing.assert_close(before - optimizer.parameters[0], torch.full_like(before, 0.2), rtol=1e-5, atol=1e-6)


@each_count
def test_gradients_in_other_memory_layouts_count_as_their_values(count):
    found = []
    for transposed in (False, True):
        seeds = seeds_of(count)
        optimizer = Adam(seeds, "net", 0.01)
        for step in range(3):
            gradients = gradients_of(seeds, step)
            if transposed:
                gradients = tuple(g.mT.contiguous().mT if g.ndim > 1 else g for g in gradients)
                assert not gradients[0].is_contiguous()
            optimizer.step(gradients)
        found.append(optimizer.parameters)
    assert all(map(torch.equal, *found))


@each_count
def test_a_state_carries_on_where_it_was_taken(count):
    seeds, again = seeds_of(count), seeds_of(count)
    one, other = (Adam(s, "net", 0.01, decay_steps=10, weight_decay=0.1) for s in (seeds, again))
    for step in range(10):
        if step == 4:
            states = one.state_dicts()
            assert len(states) == count and all(state["mean"][0].shape == (3, 4) for state in states)
            with torch.no_grad():
                for new, old in zip(other.parameters, one.parameters):
                    new.copy_(old)
            other.load_state_dicts(states)
        for optimizer in (one, other)[: 1 if step < 4 else 2]:
            optimizer.step(gradients_of(seeds, step))
    assert all(map(torch.equal, one.parameters, other.parameters))
    assert all(map(torch.equal, one.mean + one.square + one.steps, other.mean + other.square + other.steps))


@each_count
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clip_is_torchs_for_each_seed_alone(count, max_norm):
    seeds = seeds_of(count)
    gradients = tuple(
        g * torch.tensor([0.01, 1.0, 9.0])[:count].view(-1, *[1] * (g.ndim - 1)) if count > 1 else g
        for g in gradients_of(seeds, 2)
    )
    clipped = clip(gradients, max_norm, seeds)
    for k in range(count):
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in of_seed(gradients, k, count)]
        for parameter, gradient in zip(parameters, of_seed(gradients, k, count)):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        torch.testing.assert_close(of_seed(clipped, k, count), [p.grad for p in parameters])
