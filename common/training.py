"""What makes training fast and is no part of any paper: several seeds in one process, random numbers, Adam, compiling.

Who only wants the algorithm may read `seeds(function, *inputs)` as `function(models, *inputs)`, `Adam` as torch's, and
`Update(function, args)` as `function`: with one seed, neither compiled nor captured, that is what they are.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim.adamw import adamw

BLOCK = 64  # gradient steps whose random numbers are drawn at once
WARM_UP = 3  # calls before a CUDA graph is captured
MATMUL_ERROR = 1e-5  # relative, that a CPU's fast products may have; float32's own is under 1e-6


# ---------------------------------------------------------------- several seeds


class Models(nn.ModuleDict):
    """The networks of one seed, by name; to call it is to call a function on them."""

    def forward(self, function: Callable, *inputs):
        return function(self, *inputs)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, each once, by its full name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())


class Seeds:
    """The networks of S = args.num_seeds seeds, args.seed and up, trained side by side.

    One seed: the modules as they are. Several: every weight has a leading axis (S, ...), and a function written for the
    networks of one seed runs for all of them at once, by vmap. Nothing is summed over seeds, so each is trained as if
    it were alone.
    """

    def __init__(self, build: Callable[[int], dict[str, nn.Module]], args):
        """`build(seed)` makes the networks of one seed, on their device."""
        self.numbers, self.count = range(args.seed, args.seed + args.num_seeds), args.num_seeds
        self.device, self.bf16, self.separate = args.device, args.bf16, []
        set_matmul(args)
        for seed in self.numbers:
            torch.manual_seed(seed)
            self.separate.append(Models(build(seed)))
        self.models = self.separate[0]
        self.tensors = self.models.tensors()
        if self.count > 1:
            every = [models.tensors() for models in self.separate]
            self.tensors = {
                name: torch.stack([one[name].detach() for one in every]).requires_grad_(tensor.requires_grad)
                for name, tensor in self.tensors.items()
            }

    def __call__(self, function: Callable, *inputs):
        """function(models, *inputs). Several seeds: all at once, inputs and results with a leading axis (S, ...)."""
        if self.count == 1:
            return function(self.models, *inputs)

        def one(tensors, *inputs):  # a shared module is in `tensors` once, so there is nothing to tie
            return functional_call(self.models, tensors, (function, *inputs), tie_weights=False)

        return vmap(one, randomness="different")(self.tensors, *inputs)

    def autocast(self) -> torch.autocast:
        """The precision of losses: `--bf16`."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)

    def each(self, function: Callable) -> list:
        """function(models, seed) for one seed after the other: for what is rare, or can't be batched."""
        self.write_back()
        return [function(models, seed) for models, seed in zip(self.separate, self.numbers)]

    def parameters(self, prefix: str) -> list[Tensor]:
        """The trained tensors of a part, such as "critic.v"."""
        return [self.tensors[name] for name, _ in self.models.named_parameters() if name.startswith(prefix + ".")]

    def join(self, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The inputs of every seed -> those of `__call__`: stacked, (S, ...), or with one seed as they are."""
        if self.count == 1:
            return inputs[0]
        return {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}

    def rows(self, table: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """The rows at `index` (B,), or (S, B), of tables (N, ...), or (S, N, ...)."""
        seed = torch.arange(self.count, device=index.device)[:, None]
        return {name: x[index] if self.count == 1 else x[seed, index] for name, x in table.items()}

    def split(self, x: Tensor) -> Tensor:
        """(S B, ...) -> (S, B, ...), with one seed (B, ...) as it is."""
        return x.unflatten(0, (self.count, -1)) if self.count > 1 else x

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Give the part `target` the weights of `source`."""
        for name, tensor in self.tensors.items():
            if name.startswith(target + "."):
                tensor.copy_(self.tensors[source + name.removeprefix(target)])

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the modules of each seed up to date."""
        for k, models in enumerate(self.separate if self.count > 1 else []):
            for name, tensor in models.tensors().items():
                tensor.copy_(self.tensors[name][k])

    @torch.no_grad()
    def take_over(self) -> None:
        """The opposite: what the modules of each seed hold is what is trained on."""
        for k, models in enumerate(self.separate if self.count > 1 else []):
            for name, tensor in models.tensors().items():
                self.tensors[name][k].copy_(tensor)


def gather(reports: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """One report a seed -> name -> (S,)."""
    return {name: np.array([one[name] for one in reports]) for name in reports[0]}


# ---------------------------------------------------------------- random numbers


def generator(device: str | torch.device, *key: int) -> torch.Generator:
    """A stream that depends on nothing but `key`."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


class Draws:
    """The random numbers of gradient step k, which depend on the seed and on k alone: a resumed run, or a seed among
    others, draws what it would have drawn uninterrupted and alone."""

    def __init__(self, seeds: Seeds, draw: Callable[[int, torch.Generator], dict[str, Tensor]]):
        """`draw(n, generator)` draws for n steps: name -> (n, ...)."""
        self.seeds, self.draw, self.block, self.drawn = seeds, draw, None, []

    def __call__(self, step: int) -> dict[str, Tensor]:
        """name -> (...), with several seeds (S, ...)."""
        block, k = divmod(step, BLOCK)
        if block != self.block:
            self.block = block
            self.drawn = [self.draw(BLOCK, generator(self.seeds.device, seed, block)) for seed in self.seeds.numbers]
        return self.seeds.join([{name: values[k] for name, values in one.items()} for one in self.drawn])


# ---------------------------------------------------------------- gradient steps


def set_matmul(args) -> None:
    """`--fast-matmul`: torch's float32 products by TF32 on CUDA, by oneDNN on a CPU.

    On CPUs with units for bfloat16, oneDNN rounds to that. One product is compared with float64's; if it is not as good
    as float32's, the run goes on without, and says so in a line.
    """
    fast = {"cuda": "high", "cpu": "medium"}.get(torch.device(args.device).type, "highest")
    torch.set_float32_matmul_precision(fast if args.fast_matmul else "highest")
    if fast == "medium" and args.fast_matmul:
        x = torch.randn(256, 256, generator=generator("cpu", 0))
        exact = x.double() @ x.double()
        error = ((x @ x - exact).norm() / exact.norm()).item()
        if error > MATMUL_ERROR:
            print(f"--fast-matmul is ignored: the relative error of such products is {error:.0e} here", flush=True)
            torch.set_float32_matmul_precision("highest")


class Adam:
    """Adam, with a weight decay AdamW, whose step count and learning rate are tensors, so that a step can be captured.

    With `decay_steps` the learning rate falls along a cosine from `lr` to 0 at that step.
    """

    def __init__(self, seeds: Seeds, part: str, lr: float, decay_steps: int | None = None, weight_decay: float = 0.0):
        self.parameters, self.count = seeds.parameters(part), seeds.count
        self.lr, self.decay_steps, self.weight_decay = lr, decay_steps, weight_decay
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]  # equal; torch wants one for each

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        lr = torch.full_like(self.steps[0], self.lr)
        if self.decay_steps is not None:
            lr = lr * 0.5 * (1 + torch.cos(math.pi * (self.steps[0] + 1) / self.decay_steps))
        gradients = [g.contiguous() for g in gradients]  # torch's fused kernel silently takes other strides for these
        compiling = torch.compiler.is_compiling()
        adamw(
            self.parameters, gradients, self.mean, self.square, [], self.steps,
            foreach=compiling, capturable=compiling, fused=not compiling, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.999, lr=lr, weight_decay=self.weight_decay, eps=1e-8,
        )  # fmt: skip

    def _of_seed(self, tensors: list[Tensor], k: int) -> list[Tensor]:
        return [x[k] for x in tensors] if self.count > 1 else tensors

    def state_dicts(self) -> list[dict]:
        """The moments and the step count of each seed: copies, because a saved view takes all seeds along."""
        states = [(self._of_seed(self.mean, k), self._of_seed(self.square, k)) for k in range(self.count)]
        return [
            {"mean": [x.clone() for x in mean], "square": [x.clone() for x in square], "steps": self.steps[0].clone()}
            for mean, square in states
        ]

    @torch.no_grad()
    def load_state_dicts(self, states: list[dict]) -> None:
        """Raises KeyError, ValueError or RuntimeError if they are those of other networks."""
        for k, state in enumerate(states):
            for own, name in ((self.mean, "mean"), (self.square, "square")):
                for old, new in zip(self._of_seed(own, k), state[name], strict=True):
                    old.copy_(new)
        for steps in self.steps:
            steps.copy_(states[0]["steps"])


def clip(gradients: tuple[Tensor, ...], max_norm: float, seeds: Seeds) -> list[Tensor]:
    """Scale the gradients down to a joint norm of `max_norm`, each seed's for itself."""
    axes = [tuple(range(1 if seeds.count > 1 else 0, g.ndim)) for g in gradients]
    norm = sum(g.square().sum(axis) for g, axis in zip(gradients, axes)).sqrt()  # (), or (S,)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return [g * scale.view(-1, *[1] * len(axis)) if seeds.count > 1 else g * scale for g, axis in zip(gradients, axes)]


class Update:
    """`function(**inputs) -> dict`, of tensors whose shapes never change: as it is, compiled, or as a CUDA graph.

    What can't be compiled here runs as it is, and says so in a line.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], args):
        self.function, self.eager, self.calls, self.graph = function, function, 0, None
        self.capture = args.cudagraph and torch.device(args.device).type == "cuda"
        if args.compile:
            self._compile()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.capture and self.calls > WARM_UP:
            return self._replay(inputs)
        if self.calls > 1 or self.function is self.eager:
            return self.function(**inputs)
        try:
            return self.function(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything is computed
            self._fall_back(str(error).strip().splitlines()[0])
            return self.function(**inputs)

    def _compile(self) -> None:
        if torch.__version__ < (2, 13):
            return self._fall_back(f"torch {torch.__version__} can't trace a whole update, 2.13 can")
        torch._dynamo.config.trace_autograd_ops = True
        # Nothing that a guard would look for changes, and looking costs as much as the rest of the host's work; each
        # Update has compiled code of its own, because without guards two of the same source are not told apart.
        options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self.function = torch.compile(self.eager, fullgraph=True, isolate_recompiles=True, options=options)

    def _fall_back(self, reason: str) -> None:
        print(f"not compiled, the run goes on without: {reason}", flush=True)
        self.function = self.eager

    def _replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), {name: x.clone() for name, x in inputs.items()}
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.outputs = self.function(**self.inputs)
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        return self.outputs  # overwritten by the next call
