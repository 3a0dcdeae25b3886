"""How fast the updates are, against the usual way of writing them, and the same update in JAX.

    python benchmarks/speed.py                                           GMPO's whole update, critic and policy
    python benchmarks/speed.py --what host                               the same with a tiny network: cost of the host
    python benchmarks/speed.py --what phases                             every phase of every file
    python benchmarks/speed.py --what acting --policy runs/halfcheetah-demo/gmpo/seed0
    python benchmarks/speed.py --batch-size 4096 --num-seeds 8

The usual way (`usual`): five numpy arrays indexed at every step, three torch optimizers, weights computed in the loop,
a Python loop for the target network, `.item()` for the log: so do most public implementations. Ways alternate round by
round in one process; medians of the rounds, and the median of the paired ratios to the first way. `jax` is measured if
it is installed. `the products alone` is what no float32 way can go below: the update's multiplications at the rate of
one large product. The sizes are HalfCheetah's (17, 6), the data random. Nothing here was measured on a GPU yet.
"""

import dataclasses
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import scipy.stats
import torch
import tyro
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import gmpo
from common import datasets, environments
from common.training import Draws, Seeds, Update

OBS, ACTION, ROWS = 17, 6, 200_000


@dataclass
class Args:
    what: Literal["update", "host", "phases", "acting"] = "update"
    """update: GMPO's critic and policy step; host: the same, width 8, batch 2; phases: all files; acting: evaluation"""
    batch_size: int = 256
    """transitions an update, where `what` does not say"""
    num_seeds: int = 8
    """seeds in one process, for the ways that have several"""
    rounds: int = 9
    """how often every way gets its turn"""
    seconds: float = 0.5
    """of each turn"""
    policy: Path | None = None
    """a run of gmpo.py, for `--what acting`"""
    sampler_steps: tuple[int, ...] = (10,)
    """of the sampler, for `--what acting`, against 31"""
    device: str = "cpu"
    """where"""
    output: Path | None = None
    """a JSON file for the figures"""


def random_data(device: str) -> datasets.Dataset:
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, ROWS, OBS, generator=g)
    action, reward = torch.rand(ROWS, ACTION, generator=g) * 2 - 1, torch.randn(ROWS, generator=g)
    return datasets.Dataset(obs, action, reward, next_obs, torch.zeros(ROWS), device)


def args_of(module, **changes):
    """A file's arguments for an own file, with nothing left to look up."""
    values = module.PAPER["*"] | module.PAPER["own file"] | changes
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{key: value for key, value in values.items() if key in known})


@contextmanager
def narrow(width: int) -> Iterator[None]:
    """gmpo.py's networks of another width than 256, for which the files have no argument."""
    mlp, networks = gmpo.mlp, gmpo.NETWORKS
    gmpo.mlp = lambda *sizes, **k: mlp(*[width if size == 256 else size for size in sizes], **k)
    gmpo.NETWORKS = networks | {"mlp": partial(gmpo.StateMLP, width=width)}
    yield
    gmpo.mlp, gmpo.NETWORKS = mlp, networks


def phases_of(module, data: datasets.Dataset, width: int = 256, **changes) -> dict[str, Callable[[int], dict]]:
    """phase -> a function of the step, as in the file's `train`."""
    args = args_of(module, **changes)
    build = lambda seed: {k: m.to(args.device) for k, m in module.build(OBS, ACTION, args).items()}  # noqa: E731
    with narrow(width):
        seeds = Seeds(build, args)
    precision = torch.get_float32_matmul_precision()  # what --fast-matmul says, of this way alone
    optimizers = module.optimizers_of(seeds, args)
    table = seeds.join(seeds.each(partial(gmpo.weighted_actions, data=data, args=args))) if module is gmpo else None
    inputs = (data, table, args) if module is gmpo else (data, args)
    steps = {}
    for phase, update in module.updates(seeds, optimizers, *inputs).items():
        if f"{phase}_optimizer" in optimizers or phase == "critic":
            say = {} if module.__name__ == "iql_critic" else {"phase": phase}
            draws = Draws(seeds, partial(module.draw, data=data, args=args, **say))
            steps[phase] = partial(make_step, Update(update, args), draws, precision)
    return steps


def make_step(update: Update, draws: Draws, precision: str, step: int) -> dict:
    torch.set_float32_matmul_precision(precision)
    return update(**draws(step))


def both(steps: dict[str, Callable]) -> Callable[[int], None]:
    """GMPO's critic step, then its policy step."""

    def run(step: int) -> None:
        steps["critic"](step)
        steps["policy"](step)

    return run


def usual(data: datasets.Dataset, batch_size: int, width: int = 256) -> Callable[[int], None]:
    """GMPO's update as it is usually written; the losses are this project's."""
    args = args_of(gmpo, batch_size=batch_size, device="cpu")
    arrays, rng = [column.cpu().numpy() for column in data._split(data.rows)], np.random.default_rng(0)
    device = data.rows.device
    normalize = gmpo.Normalize(OBS)
    with narrow(width):
        critic, policy = gmpo.Critic(normalize, OBS, ACTION), gmpo.StateMLP(normalize, OBS, ACTION, width)
    critic.to(device), policy.to(device)
    v_optimizer, q_optimizer, policy_optimizer = (
        torch.optim.Adam(part.parameters(), 3e-4) for part in (critic.v, critic.q, policy)
    )
    g, log = torch.Generator(device).manual_seed(0), {}

    def run(step: int) -> None:
        index = rng.integers(ROWS, size=batch_size)
        batch = datasets.Batch(*(torch.as_tensor(array[index], device=device) for array in arrays))
        for optimizer, loss in ((v_optimizer, gmpo.v_loss), (q_optimizer, gmpo.q_loss)):
            value, metrics = loss(critic, batch, args)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            log.update({name: metric.item() for name, metric in metrics.items()})
        for old, new in zip(critic.target_q.parameters(), critic.q.parameters()):
            old.data.copy_(args.target_rate * new.data + (1 - args.target_rate) * old.data)
        with torch.no_grad():
            advantage = critic.q(batch.obs, batch.action).amin(0) - critic.v(batch.obs)
            weight = gmpo.weights(advantage, args)
        noise = gmpo.matching_noise((batch_size,), ACTION, args, g)
        value, metrics = gmpo.policy_loss(policy, batch.obs, batch.action[:, None], weight[:, None], noise, args)
        policy_optimizer.zero_grad()
        value.backward()
        policy_optimizer.step()
        log.update({name: metric.item() for name, metric in metrics.items()})

    return run


def products(update: Callable[[int], None], device: str, size: int = 1024) -> tuple[Callable[[int], None], float]:
    """The floor of `update`: the arithmetic of its products as one large product does it, and how many updates' worth
    one is."""
    with FlopCounterMode(display=False) as counter:
        update(0)
    x, out = torch.randn(size, size, device=device), torch.empty(size, size, device=device)
    return lambda step: torch.mm(x, x, out=out), 2 * size**3 / counter.get_total_flops()


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def alternate(ways: dict[str, tuple[Callable[[int], None], float]], args: Args) -> dict[str, dict]:
    """Every way's milliseconds an update and seed, and how many times as fast as the first way it is."""
    counts, steps, times = {}, dict.fromkeys(ways, 0), {name: [] for name in ways}

    def turn(name: str, count: int) -> float:
        clock = time.process_time if args.what == "host" else time.perf_counter  # the host's work, whoever else runs
        run, start = ways[name][0], clock()
        for _ in range(count):
            steps[name] += 1
            run(steps[name])
        wait(args.device)
        return (clock() - start) / count * 1000 / ways[name][1]

    for name in ways:
        print(f"  warming up {name} ...", end="\r", file=sys.stderr)
        turn(name, 5)  # the first compiles, the fourth captures
        counts[name] = max(1, int(args.seconds * 1000 / (turn(name, 2) * ways[name][1])))
    for _ in range(args.rounds):
        for name in ways:
            times[name].append(turn(name, counts[name]))
    first = times[next(iter(ways))]
    return {
        name: {"ms": statistics.median(values), "ratio": statistics.median(a / b for a, b in zip(first, values))}
        for name, values in times.items()
    }


def table(title: str, rows: dict[str, dict]) -> None:
    print(f"\n{title}\n| | ms | times as fast |\n| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {row['ms']:.3f} | {row['ratio']:.2f} |")
    sys.stdout.flush()


def update_ways(args: Args, batch_size: int, width: int) -> dict:
    """GMPO's whole update, in every way there is."""
    data, s = random_data(args.device), args.num_seeds
    ours = lambda **k: both(phases_of(gmpo, data, width, batch_size=batch_size, device=args.device, **k))  # noqa: E731
    ways = {
        "usual": (usual(data, batch_size, width), 1),
        "eager": (ours(), 1),
        "--compile": (ours(compile=True), 1),
        "--compile --fast-matmul": (ours(compile=True, fast_matmul=True), 1),
        "--compile --bf16": (ours(compile=True, bf16=True), 1),
        f"--num-seeds {s}": (ours(num_seeds=s), s),
        f"--num-seeds {s} --compile": (ours(num_seeds=s, compile=True), s),
        f"--num-seeds {s} --compile --bf16": (ours(num_seeds=s, compile=True, bf16=True), s),
    }
    if torch.device(args.device).type == "cuda":
        for name, k in {"": {}, "--compile ": {"compile": True}}.items():
            ways[f"{name}--cudagraph"] = (ours(cudagraph=True, **k), 1)
            ways[f"--num-seeds {s} {name}--cudagraph"] = (ours(cudagraph=True, num_seeds=s, **k), s)
    if args.what == "update":
        ways["the products alone, as one large one"] = products(ours(), args.device)
    try:
        import speed_jax
    except ImportError:
        print("jax is not installed: not measured")
    else:
        ways |= {"JAX, lax.scan of 20": (speed_jax.scan(data, batch_size, width, 20), 20)}
    return ways


def phase_ways(args: Args) -> dict[str, dict]:
    """Every phase of every file, in the ways that matter most."""
    data, tables, n = random_data(args.device), {}, args.num_seeds
    for name in ("iql_critic", "gmpo", "gmpg", "idql"):
        module = importlib.import_module(name)
        sizes = dict(batch_size=args.batch_size, policy_batch_size=args.batch_size, device=args.device)
        ways = {
            "eager": (phases_of(module, data, **sizes), 1),
            "--compile": (phases_of(module, data, **sizes, compile=True), 1),
            "--compile --bf16": (phases_of(module, data, **sizes, compile=True, bf16=True), 1),
            f"--num-seeds {n} --compile": (phases_of(module, data, **sizes, compile=True, num_seeds=n), n),
        }
        for phase in ways["eager"][0]:
            if phase != "critic" or name == "iql_critic":  # the critic is the same text in all files
                tables[f"{name}.py, {phase}"] = {way: (steps[phase], k) for way, (steps, k) in ways.items()}
    return tables


def player(models: dict, args: gmpo.Args, count: int) -> Callable[[int], tuple]:
    """A function that plays one step of `count` environments in lock-step, and returns reward and end of each."""
    envs = gymnasium.vector.SyncVectorEnv([partial(environments.make, args.eval_env)] * count)
    state, g = {"obs": envs.reset(seed=0)[0]}, torch.Generator(args.device).manual_seed(0)
    actor = Update(lambda obs, **noise: {"action": gmpo.act(models, obs, noise, args)}, args)

    @torch.no_grad()
    def step(_: int) -> tuple[np.ndarray, np.ndarray]:
        obs = torch.as_tensor(state["obs"], dtype=torch.float32, device=args.device)
        noise = gmpo.acting_noise(count, models["policy"].action_dim, args, g)
        state["obs"], reward, terminated, truncated, _ = envs.step(actor(obs=obs, **noise)["action"].cpu().numpy())
        return reward, terminated | truncated

    return step


def policies_of(args: Args) -> tuple[dict, dict[int, gmpo.Args]]:
    """The policy of --policy, and its arguments with 31 and with --sampler-steps steps."""
    models, of_run = gmpo.load_models(args.policy, args.device)
    return models, {n: dataclasses.replace(of_run, sampler_steps=n) for n in (31, *args.sampler_steps)}


def acting(args: Args) -> dict[str, tuple[Callable, int]]:
    """One environment at a time with 31 steps, as is usual, against 10 in lock-step with fewer."""
    models, found = policies_of(args)
    ways = {"one at a time, 31 steps": (player(models, found[31], 1), 1)}
    for n, changed in found.items():
        ways[f"10 in lock-step, {n} steps"] = (player(models, changed, 10), 10)
        compiled = dataclasses.replace(changed, compile=True)
        ways[f"10 in lock-step, {n} steps, --compile"] = (player(models, compiled, 10), 10)
    return ways


def compare_scores(args: Args, episodes: int = 100) -> None:
    """Does the number of steps change the score? Welch's test on the mean scores of `episodes` episodes of each."""
    models, found = policies_of(args)
    scores = {}
    for n, changed in found.items():
        step, total, over = player(models, changed, episodes), np.zeros(episodes), np.zeros(episodes, bool)
        while not over.all():
            reward, done = step(0)
            total += reward * ~over
            over |= done
        scores[n] = environments.normalized_score(total, changed.eval_env)
        p = scipy.stats.ttest_ind(scores[31], scores[n], equal_var=False).pvalue
        print(f"{n} steps: score {scores[n].mean():.1f} +- {scores[n].std():.1f}, p = {p:.3f}")


def main(args: Args) -> None:
    versions = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    if torch.device(args.device).type == "cuda":
        versions += f", {torch.cuda.get_device_name(args.device)}"
    print(f"{versions}, {args.rounds} rounds")
    found = {}

    def measure(title: str, ways: dict) -> None:
        found[title] = alternate(ways, args)
        table(title, found[title])

    if args.what in ("update", "host"):
        batch_size, width = (2, 8) if args.what == "host" else (args.batch_size, 256)
        title = f"GMPO's critic and policy update, a seed, batch {batch_size}, width {width}"
        measure(title, update_ways(args, batch_size, width))
    elif args.what == "phases":
        for name, ways in phase_ways(args).items():
            measure(f"{name}, batch {args.batch_size}", ways)
    else:
        if args.policy is None:
            raise SystemExit("error: --what acting needs --policy, a run of gmpo.py")
        measure("a step of one episode", acting(args))
        compare_scores(args)
    compiled = counters["frames"]
    assert compiled["total"] == compiled["ok"] and not counters["graph_break"], "a compiled way was not compiled"
    if args.output:
        args.output.write_text(json.dumps({"versions": versions, "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
