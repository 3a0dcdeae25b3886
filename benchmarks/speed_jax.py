"""GMPO's critic and policy update (path gvp) in JAX, many in one `lax.scan`: the yardstick of `speed.py`.

The same networks, losses, order and Adam as gmpo.py's; random numbers are JAX's own. Needs `jax`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from common.datasets import Dataset


def linear_layers(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [(jax.random.normal(k, (i, o)) / math.sqrt(i), jnp.zeros(o)) for k, i, o in zip(keys, sizes, sizes[1:])]


def mlp(layers, x, activation=jax.nn.relu):
    for w, b in layers[:-1]:
        x = activation(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def twin(q, obs, action):
    x = jnp.concatenate([obs, action], -1)
    return jnp.stack([mlp(head, x)[:, 0] for head in q])


def adam(params, gradients, state, lr):
    mean, square, count = state
    count = count + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, gradients)
    scale = lr / (1 - 0.9**count)
    move = lambda p, m, s: p - scale * m / (jnp.sqrt(s / (1 - 0.999**count)) + 1e-8)  # noqa: E731
    return jax.tree.map(move, params, mean, square), (mean, square, count)


def update(state, key, columns, batch_size):
    obs_all, action_all, next_obs_all, reward_all, done_all, weight_all = columns
    params, moments = state
    keys = jax.random.split(key, 4)
    index = jax.random.randint(keys[0], (batch_size,), 0, len(reward_all))
    obs, action, next_obs = obs_all[index], action_all[index], next_obs_all[index]

    def v_loss(v):
        u = twin(params["target"], obs, action).min(0) - mlp(v, obs)[:, 0]
        return (jnp.where(u > 0, 0.7, 0.3) * u**2).mean()

    loss_v, g = jax.value_and_grad(v_loss)(params["v"])
    v, v_moments = adam(params["v"], g, moments["v"], 3e-4)
    target = reward_all[index] + 0.99 * (1 - done_all[index]) * mlp(v, next_obs)[:, 0]
    loss_q, g = jax.value_and_grad(lambda q: ((twin(q, obs, action) - target) ** 2).mean(-1).sum())(params["q"])
    q, q_moments = adam(params["q"], g, moments["q"], 3e-4)
    slow = jax.tree.map(lambda old, new: old + 0.005 * (new - old), params["target"], q)

    index = jax.random.randint(keys[1], (batch_size,), 0, len(reward_all))
    obs, action, weight = obs_all[index], action_all[index], weight_all[index]
    t, eps = jax.random.uniform(keys[2], (batch_size, 1)), jax.random.normal(keys[3], action.shape)
    alpha, sigma = jnp.cos(math.pi / 2 * t), jnp.sin(math.pi / 2 * t)
    x, goal = alpha * action + sigma * eps, math.pi / 2 * (alpha * eps - sigma * action)
    angle = t * math.pi * jnp.arange(1, 9)

    def policy_loss(policy):
        out = mlp(policy, jnp.concatenate([x, jnp.cos(angle), jnp.sin(angle), obs], -1), jax.nn.silu)
        return (weight * 0.5 * ((out - goal) ** 2).sum(-1)).mean()

    loss_p, g = jax.value_and_grad(policy_loss)(params["policy"])
    policy, p_moments = adam(params["policy"], g, moments["policy"], 3e-4)
    params = {"v": v, "q": q, "target": slow, "policy": policy}
    return (params, {"v": v_moments, "q": q_moments, "policy": p_moments}), (loss_v, loss_q, loss_p)


def scan(data: Dataset, batch_size: int, width: int, count: int) -> Callable[[int], None]:
    """A function that makes `count` updates."""
    columns = [jnp.asarray(x.cpu().numpy()) for x in (data.obs, data.action, data.next_obs, data.reward, data.done)]
    columns.append(jnp.ones(len(data)))
    obs, action = data.obs_dim, data.action_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q = [linear_layers(k, obs + action, width, width, 1) for k in keys[:2]]
    params = {"v": linear_layers(keys[2], obs, width, width, 1), "q": q, "target": jax.tree.map(jnp.copy, q)}
    params["policy"] = linear_layers(keys[3], action + 16 + obs, width, width, width, action)
    zero = partial(jax.tree.map, jnp.zeros_like)
    moments = {name: (zero(params[name]), zero(params[name]), jnp.zeros(())) for name in ("v", "q", "policy")}

    @partial(jax.jit, donate_argnums=0)
    def many(state, key, columns):
        return jax.lax.scan(lambda s, k: update(s, k, columns, batch_size), state, jax.random.split(key, count))

    box = {"state": (params, moments)}

    def run(step: int) -> None:
        box["state"], losses = many(box["state"], jax.random.key(step), columns)
        np.asarray(losses[0])  # wait

    return run
