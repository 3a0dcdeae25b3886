"""Whole runs of a few steps against the same steps written by hand: losses, two Adams where the files have one for V
and Q, learning rates, target, averages, and what each phase begins with."""

import copy
import math

import helpers
import numpy as np
import pytest
import running
import torch
from helpers import flat, smaller_q

import gmpg
import gmpo
import idql
import iql_critic
from common import datasets

STEPS = 3  # of each phase
TINY = dict(
    device="cpu", network="mlp", reward_scale=1.0, normalize_obs=True, critic_steps=STEPS, behaviour_steps=STEPS,
    policy_steps=STEPS, batch_size=8, policy_batch_size=8, sampler_steps=2, candidates=2, lr_decay=True, dropout=0.1,
    critic_lr=1e-3, behaviour_lr=2e-3, policy_lr=3e-3, expectile=0.8, discount=0.9, target_rate=0.3, beta=2.0,
    weight_max=1.5, ema_rate=0.25, grad_norm=0.1, diffusion_steps=5, extraction="argmax",
)  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """Train a file for a few steps: its arguments and its checkpoint."""
    terminals = np.arange(60) % 20 == 19
    data = running.write_data(tmp_path / "data.hdf5", action_dim=2, rows=60, terminals=terminals)

    def run(algorithm, **changes):
        args = helpers.args_of(algorithm, **TINY | dict(env=str(data)) | changes)
        args.run_dir = tmp_path / f"{algorithm.__name__} {len(list(tmp_path.iterdir()))}"
        algorithm.train(args)
        return args, torch.load(args.run_dir / "checkpoint.pt")

    return run


def cosine(step):
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def start(algorithm, args, make_policies):
    """The data and the networks as a run begins with them, on the run's random numbers."""
    data = datasets.load(args.env, reward_scale=1.0)
    torch.manual_seed(args.seed)
    critic = algorithm.Critic(3, 2, layer_norm=True)
    policies = make_policies()
    algorithm.fit_normalizers(data.obs, critic, *policies)
    return data, critic, *policies


def descend(optimizer, loss, lr=None):
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def average(target, online, rate):
    with torch.no_grad():
        for old, new in zip(target.parameters(), online.parameters()):
            old.copy_((1 - rate) * old + rate * new)


def critic_stepper(critic, data, args):
    """Eqs. (1) to (3): V and Q each with an Adam of its own, both from the V before the step, then the target."""
    v_adam, q_adam = (torch.optim.Adam(net.parameters(), args.critic_lr) for net in (critic.v, critic.q))

    def step():
        batch = data[torch.randint(len(data), (args.batch_size,))]
        u = smaller_q(critic.target_q, batch.obs, batch.action).detach() - critic.v(batch.obs)
        y = batch.reward + torch.where(batch.done == 1, 0, args.discount * critic.v(batch.next_obs).detach())
        descend(v_adam, (torch.where(u > 0, args.expectile, 1 - args.expectile) * u**2).mean())
        descend(q_adam, sum(((q - y) ** 2).mean() for q in critic.q(batch.obs, batch.action)))
        average(critic.target_q, critic.q, args.target_rate)

    return step


def check(checkpoint, **networks):
    """In root mean square: Adam makes much of rounding where a gradient is nearly 0, in one weight of 100 000."""
    for name, network in networks.items():
        found, expected = checkpoint[name], network.state_dict()
        assert found.keys() == expected.keys()
        assert (flat(found.values()) - flat(expected.values())).square().mean().sqrt() < 1e-6, name


def test_iqls_run_is_its_steps(trained):
    args, checkpoint = trained(iql_critic)
    data, critic, actor = start(iql_critic, args, lambda: [iql_critic.GaussianPolicy(3, 2, args.dropout)])
    critic_step, adam = critic_stepper(critic, data, args), torch.optim.Adam(actor.parameters())
    for k in range(STEPS):
        critic_step()
        batch = data[torch.randint(len(data), (args.batch_size,))]
        advantage = smaller_q(critic.target_q, batch.obs, batch.action) - critic.v(batch.obs)
        weight = torch.exp(args.beta * advantage).clamp(max=args.weight_max).detach()
        loss = -(weight * actor(batch.obs).log_prob(batch.action).sum(-1)).mean()
        descend(adam, loss, args.policy_lr * cosine(k))
    check(checkpoint, critic=critic, policy=actor)


def test_gmpos_run_is_its_steps(trained):
    args, checkpoint = trained(gmpo)
    data, critic, policy = start(gmpo, args, lambda: [gmpo.StateMLP(3, 2)])
    critic_step, adam = critic_stepper(critic, data, args), torch.optim.Adam(policy.parameters())
    for _ in range(STEPS):
        critic_step()
    for k in range(STEPS):
        batch = data[torch.randint(len(data), (args.batch_size,))]
        advantage = smaller_q(critic.q, batch.obs, batch.action) - critic.v(batch.obs)
        weight = torch.exp(args.beta * advantage).clamp(max=args.weight_max).detach()
        loss = (weight * gmpo.matching_loss(policy, batch.obs, batch.action, args)).mean()
        descend(adam, loss, args.policy_lr * cosine(k))
    check(checkpoint, critic=critic, policy=policy)


def test_gmpos_run_on_sampled_actions_is_its_steps_from_anothers_critic_and_behaviour(trained):
    critics, _ = trained(iql_critic)
    clones, behaviour_checkpoint = trained(gmpo, beta=0.0, critic_steps=0)
    more = dict(critic=critics.run_dir, behaviour=clones.run_dir, lr_decay=False, solver="euler")
    args, checkpoint = trained(gmpo, **more)
    data, critic, policy = start(gmpo, args, lambda: [gmpo.StateMLP(3, 2)])
    critic.load_state_dict(torch.load(critics.run_dir / "checkpoint.pt")["critic"])
    behaviour = gmpo.StateMLP(3, 2)
    behaviour.load_state_dict(behaviour_checkpoint["policy"])
    adam = torch.optim.Adam(policy.parameters(), args.policy_lr)
    for _ in range(STEPS):
        obs = data.obs[torch.randint(len(data), (args.batch_size,))]
        descend(adam, gmpo.sampled_policy_loss(policy, behaviour, clones, critic, obs, args)[0])
    check(checkpoint, critic=critic, policy=policy)


def test_gmpgs_run_is_its_steps_from_the_warm_start_with_clipped_gradients(trained):
    args, checkpoint = trained(gmpg)
    data, critic, behaviour = start(gmpg, args, lambda: [gmpg.StateMLP(3, 2)])
    critic_step, adam = critic_stepper(critic, data, args), torch.optim.Adam(behaviour.parameters())
    for _ in range(STEPS):
        critic_step()
    for k in range(STEPS):
        batch = data[torch.randint(len(data), (args.batch_size,))]
        descend(
            adam, gmpg.matching_loss(behaviour, batch.obs, batch.action, args).mean(), args.behaviour_lr * cosine(k)
        )
    policy = copy.deepcopy(behaviour)
    adam, clipped = torch.optim.Adam(policy.parameters(), args.policy_lr), 0
    for _ in range(STEPS):
        obs = data.obs[torch.randint(len(data), (args.policy_batch_size,))]
        loss = gmpg.policy_loss(policy, behaviour, critic, obs, args)[0]
        gradient = torch.autograd.grad(loss, policy.parameters())
        norm = flat(gradient).norm()
        clipped += norm > args.grad_norm
        for parameter, g in zip(policy.parameters(), gradient):
            parameter.grad = g * (args.grad_norm / norm).clamp(max=1)
        adam.step()
    assert clipped > 0
    check(checkpoint, critic=critic, behaviour=behaviour, policy=policy)


def test_idqls_run_is_its_steps_with_the_average_that_acts(trained, monkeypatch):
    actors = []
    monkeypatch.setattr(idql, "evaluate", lambda actor, run, args: actors.append(actor) or {})
    args, checkpoint = trained(idql)
    data, critic, policy = start(idql, args, lambda: [idql.LNResNet(3, 2, args.dropout)])
    critic_step, adam = critic_stepper(critic, data, args), torch.optim.Adam(policy.parameters())
    ema = copy.deepcopy(policy)
    for _ in range(STEPS):
        critic_step()
    for k in range(STEPS):
        batch = data[torch.randint(len(data), (args.policy_batch_size,))]
        loss, _ = idql.policy_loss(policy, batch, args)
        descend(adam, loss, args.policy_lr * cosine(k))
        average(ema, policy, args.ema_rate)
    check(checkpoint, critic=critic, policy=policy, ema=ema)
    critic.load_state_dict(checkpoint["critic"])
    ema.load_state_dict(checkpoint["ema"])
    for act in (actors[-1], idql.load_policy(args.run_dir), lambda obs: idql.act(ema.eval(), critic, obs, args)):
        torch.manual_seed(1)
        actors.append(act(data.obs[:5]).detach())
    assert torch.equal(actors[-3], actors[-1]) and torch.equal(actors[-2], actors[-1])


@pytest.mark.parametrize("algorithm", helpers.files_with("cosine"), ids=lambda module: module.__name__)
def test_cosine_falls_from_1_to_0(algorithm):
    factors = [algorithm.cosine(step, 4) for step in range(5)]
    assert factors == pytest.approx([1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 0])
    assert algorithm.cosine(0, 0) == 1
