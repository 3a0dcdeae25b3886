"""How long one GMPG update takes, beside the same loss in the way of the reference code.

    python benchmarks/gmpg_update.py

Ours: one pass of the sampler with its log-density, one back through mu's sampler, 16 steps, exact determinants. The
reference's way: three separate solves of 999 Euler steps (the action, log pi, log mu) with a continuous adjoint and
Hutchinson's trace. Its time is linear in the steps, so that it is measured at 4 and 8 and extrapolated. The rounds
alternate on the same machine; medians. HalfCheetah's sizes, batch 256, the same networks.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torchdiffeq import odeint_adjoint

sys.path.insert(0, str(Path(__file__).parents[1]))
import gmpg
from common.datasets import Batch

ROUNDS, STEPS, OBS, ACTION, BATCH = 5, 999, 17, 6, 256


class Drift(torch.nn.Module):
    """The velocity of the net, and with a probe the change of the log-density beside it, for torchdiffeq."""

    def __init__(self, net, obs, args, probe=None):
        super().__init__()
        self.net, self.obs, self.args, self.probe = net, obs, args, probe

    def forward(self, t, state):
        if self.probe is None:
            return gmpg.velocity(self.net, state, t, self.obs, self.args.path)
        with torch.enable_grad():
            x = state[0].requires_grad_()
            v = gmpg.velocity(self.net, x, t, self.obs, self.args.path)
            (row,) = torch.autograd.grad((v * self.probe).sum(), x, create_graph=True)
        return v, (row * self.probe).sum(-1)


def reference_loss(models, obs, args, steps):
    """Three solves, one after the other."""
    grid, zero = torch.linspace(0.999, 0.001, steps + 1), torch.zeros(len(obs))
    probe = torch.randn(len(obs), ACTION)
    sampler = Drift(models["policy"], obs, args)
    action = odeint_adjoint(sampler, torch.randn(len(obs), ACTION), grid, method="euler")[-1]
    logs = []
    for name in ("policy", "behaviour"):
        drift = Drift(models[name], obs, args, probe)
        noise, change = odeint_adjoint(drift, (action, zero), grid.flip(0), method="euler")
        logs.append(torch.distributions.Normal(0, 1).log_prob(noise[-1]).sum(-1) + change[-1])
    q = models["critic"].q(obs, action).amin(0)
    return (-args.beta * q + logs[0] - logs[1]).mean()


def seconds(loss, policy):
    start = time.perf_counter()
    policy.zero_grad()
    loss().backward()
    return time.perf_counter() - start


def main():
    args = gmpg.Args(beta=1.0, path="icfm")
    models = gmpg.build(OBS, ACTION, args)
    models["critic"].requires_grad_(False)
    models["behaviour"].requires_grad_(False)
    obs = torch.randn(BATCH, OBS)
    batch = Batch(obs, torch.rand(BATCH, ACTION), torch.zeros(BATCH), obs, torch.zeros(BATCH))
    noise = partial(gmpg.policy_noise, (BATCH,), ACTION, args, torch.Generator())
    ways = {
        "ours": lambda: gmpg.policy_loss(models, batch, noise(), args)[0],
        "reference at 4": lambda: reference_loss(models, obs, args, 4),
        "reference at 8": lambda: reference_loss(models, obs, args, 8),
    }
    times = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, loss in ways.items():
            times[name].append(seconds(loss, models["policy"]))
    ours, at_4, at_8 = (statistics.median(values[1:]) for values in times.values())  # the first round warms up
    whole = at_4 + (at_8 - at_4) / 4 * (STEPS - 4)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}")
    print(
        f"ours, {args.sampler_steps} steps: {ours:.2f} s; the reference's way, 4 and 8 steps: {at_4:.2f}, {at_8:.2f} s"
    )
    print(f"extrapolated to {STEPS} steps: {whole:.1f} s, {whole / ours:.0f} times ours")


if __name__ == "__main__":
    main()
