"""A training step recorded as a CUDA graph: its kernels, each too short to hide its launch, go out as one."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.modules.module as all_modules
import torch.optim.optimizer as all_optimizers
from torch import Tensor, nn

from skdim.devices import is_out_of_memory
from skdim.randomness import undisturbed

__all__ = ["RecordedStep", "has_hooks", "held_fast"]

# Steps before the one that is recorded, in which optimizers, libraries and compilers set up what must be no part of it.
WARM_UP_STEPS = 3

# Where torch keeps the hooks of a module, a weight or an optimizer, and those of all modules and optimizers.
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"),
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
)
HOOKS_OF_ALL = (
    *((all_modules, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")),
    *((all_optimizers, f"_global_optimizer_{kind}_hooks") for kind in ("pre", "post")),
)

# What a module reads as it runs, beside tensors and what can change inside, such as lists.
PLAIN = (int, float, str, tuple)

_recording = threading.Lock()

Step = Callable[[Tensor], dict[str, Tensor]]


class RecordedStep:
    """A step on a batch that is recorded once and replayed from then on, on whatever the batch then is.

    The first steps run as they are, so none is run twice or lost, and random numbers are those of steps that are not
    recorded. A batch of another size than the first one's runs as it is too.

    Parameters
    ----------
    step : callable
        Trains on a batch, which is on a CUDA device, and returns tensors; it must neither wait for the device nor read
        what is on it.
    optimizers : sequence of torch.optim.Optimizer
        Those that it uses, fused ones. Their learning rates may change from step to step.
    generators : sequence of torch.Generator
        Those that it draws from.
    describe : callable
        Returns what a recording holds fast, to be compared.
    """

    def __init__(
        self,
        step: Step,
        optimizers: Sequence[torch.optim.Optimizer],
        generators: Sequence[torch.Generator],
        describe: Callable[[], Any],
    ) -> None:
        self.step = step
        self.optimizers = optimizers
        self.generators = generators
        self.describe = describe
        # A number would be recorded as it is: the step reads its rates where each call writes them.
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in _groups(self.optimizers)]
        self._n_warm = 0
        self._batch: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._results: dict[str, Tensor] = {}
        self._description: Any = None
        self._is_too_large = False

    @property
    def is_valid(self) -> bool:
        """Whether what has been recorded, or warmed up for it, is still what the step would do."""
        return self._description is None or self._description == self.describe()

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Run the step.

        Parameters
        ----------
        batch : Tensor
            The batch.

        Returns
        -------
        dict of str to Tensor
            What the step returns; the next call overwrites it.
        """
        for rate, group in zip(self._rates, _groups(self.optimizers), strict=True):
            rate.fill_(group["lr"])
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        is_ready = self._n_warm >= WARM_UP_STEPS and batch.shape == self._batch.shape
        if is_ready and self._replay is None and not self._is_too_large:
            # A recording takes hold of the device's global generator, from which then nobody can draw.
            with undisturbed() as is_free:
                if is_free:
                    self._record(self._batch)
        if not is_ready or self._replay is None:
            return self._warm_up(batch)
        self._batch.copy_(batch)
        self._replay()
        return self._results

    def _warm_up(self, batch: Tensor) -> dict[str, Tensor]:
        """Run the step as it is."""
        self._n_warm += 1
        with self._rates_in_place(), beside(batch.device):
            results = self.step(batch)
        if self._replay is None and not self._is_too_large:
            # After the step, because the first one makes the optimizers' state.
            self._description = self.describe()
        return results

    def _record(self, batch: Tensor) -> None:
        """Record the step on what is in `batch` at each replay, if there is memory for it."""

        def work() -> None:
            with self._rates_in_place():
                self._results = self.step(batch)

        # The recording has gradients of its own, beside which those of the last step need not stay.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            self._replay = record(work, self.generators, batch.device)
        except RuntimeError as error:
            # What then ends the recording may say no more than that it has failed.
            if not any(each is not None and is_out_of_memory(each) for each in (error, error.__context__)):
                raise
            # Nothing has run, so no step is lost: training goes on as it is.
            self._is_too_large = True

    @contextmanager
    def _rates_in_place(self) -> Iterator[None]:
        """Give the optimizers learning rates that live on the device, for as long as the block runs."""
        groups = _groups(self.optimizers)
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, lr in zip(groups, rates, strict=True):
                group.update(lr=lr, capturable=False)


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """List the optimizers' groups of parameters, which are others once a state has been loaded."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def held_fast(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    """List what a recorded step holds fast of a module and its optimizers, to be compared.

    Where tensors lie and which of them are trained, what the module is built of and the numbers and names in it, which
    optimizers there are, and their settings but for the learning rates.
    """
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [
        [(tensor.data_ptr(), tensor.requires_grad) for tensor in (*module.parameters(), *module.buffers(), *states)],
        [
            (type(part), {name: value for name, value in vars(part).items() if isinstance(value, PLAIN)})
            for part in module.modules()
        ],
        [id(optimizer) for optimizer in optimizers],
        [
            {name: group[name] for name in group if name not in ("params", "lr", "initial_lr")}
            for group in _groups(optimizers)
        ],
    ]


def has_hooks(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Tell whether someone watches from within a step, as loggers of gradients do, or anomaly detection."""
    watched = [*module.modules(), *module.parameters(), *optimizers]
    return (
        torch.is_anomaly_enabled()
        # Hooks that are not where they were may be elsewhere.
        or any(getattr(place, name, True) for place, name in HOOKS_OF_ALL)
        or any(getattr(each, name, None) for each in watched for name in HOOKS)
    )


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run a block on another stream, after all that has been launched and before all that will be."""
    stream, own = _stream(device, "warm-up"), torch.cuda.current_stream(device)
    stream.wait_stream(own)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        own.wait_stream(stream)


def record(work: Callable[[], None], generators: Sequence[torch.Generator], device: torch.device) -> Callable[[], None]:
    """Record what `work` would do on a device, without doing it, and return what does it."""
    # Other threads may allocate meanwhile, those that read images for one: only this one's calls are recorded.
    # torch leaves its stream in place where a recording fails: whatever happens, this one's comes back.
    with _recording, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=_stream(device, "recording"), capture_error_mode="thread_local"):
            work()
    return graph.replay


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    # Always the same one, because what is freed on a stream is kept for that stream.
    return torch.cuda.Stream(device)
