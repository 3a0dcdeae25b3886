"""--compile and --cudagraph end at the weights of the plain run, and these have moved."""

import importlib

import helpers
import pytest
import running
import torch
from helpers import flat

from common import UserError, arguments

NETWORKS = {"iql_critic": ("critic", "policy"), "gmpo": ("critic", "policy")}
NETWORKS |= {"gmpg": ("critic", "behaviour", "policy"), "idql": ("critic", "policy", "ema")}
STEPS = 20  # of each phase
each_file = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture
def weights_after(tmp_path):
    """Train a file: the weights of each network afterwards."""
    data = str(running.write_data(tmp_path / "data.hdf5", action_dim=2, rows=60))

    def run(name, steps=STEPS, **changes):
        algorithm = importlib.import_module(name)
        args = helpers.args_of(
            algorithm, env=data, network="mlp", batch_size=16, policy_batch_size=16, sampler_steps=2,
            critic_steps=steps, behaviour_steps=steps, policy_steps=steps, lr_decay=False, expectile=0.7, beta=1.0,
            critic_lr=1e-4, behaviour_lr=1e-4, policy_lr=1e-4, ema_rate=0.5, log_every=1, **changes,
        )  # fmt: skip
        args.run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        algorithm.train(args)
        checkpoint = torch.load(args.run_dir / "checkpoint.pt", map_location="cpu")
        return {key: flat(checkpoint[key].values()) for key in NETWORKS[name]}

    return run


def check(found, plain, first):
    for key, weights in plain.items():
        assert (found[key] - weights).abs().max() < 1e-4, key
        assert (weights - first[key]).abs().max() > 3e-4, key  # neither has stood still
        assert (found[key] - first[key]).abs().max() > 3e-4, key


@pytest.fixture(scope="module")
def compiler():
    """With the random numbers of the plain run."""
    args = importlib.import_module("gmpo").Args(device="cpu", compile=True)
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        try:
            arguments.choose_device(args)
        except UserError as reason:
            pytest.skip(str(reason))
        yield


@each_file
def test_compiled_losses_end_at_the_plain_weights(compiler, name, weights_after):
    torch._dynamo.reset()
    plain, compiled = (weights_after(name, device="cpu", compile=on) for on in (False, True))
    check(compiled, plain, weights_after(name, steps=1, device="cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_file
def test_captured_updates_end_at_the_plain_weights(name, weights_after):
    plain, captured = (weights_after(name, device="cuda", cudagraph=on) for on in (False, True))
    check(captured, plain, weights_after(name, steps=1, device="cuda"))
