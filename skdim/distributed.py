"""Training together with other processes: the few exchanges that it takes, by torch.distributed."""

import importlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

__all__ = ["ALONE", "Group", "join", "local_device"]

# How long a process waits for another one, in an exchange and where they meet.
TIME_LIMIT = timedelta(minutes=10)

# Seconds in which those that are left find out who is not.
INQUIRY = 5.0

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """The processes that train one model together, in which each of them does the same on its own share of the images.

    A single process has nobody to exchange anything with: everything here is then nothing, and costs nothing.

    Parameters
    ----------
    rank : int, default=0
        Number of this process.
    size : int, default=1
        How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def draw(
        self,
        draw: Callable[..., Tensor],
        shape: Sequence[int],
        generator: torch.Generator,
        dim: int = 0,
        n_views: int = 1,
    ) -> Tensor:
        """Draw random numbers for the images of all processes, which know the same generator, and return one's own.

        Parameters
        ----------
        draw : callable
            `torch.rand` or `torch.randn`.
        shape : sequence of int
            Of what is returned.
        generator : torch.Generator
            Stands at the same state in all processes.
        dim : int, default=0
            Along which the processes share what is drawn.
        n_views : int, default=1
            How many views one after another, of each of which every process has its share.
        """
        of_all = [length * self.size if axis == dim else length for axis, length in enumerate(shape)]
        drawn = draw(of_all, generator=generator, device=generator.device)
        if self.size == 1:
            return drawn
        return drawn.unflatten(dim, (n_views, self.size, -1)).select(dim + 1, self.rank).flatten(dim, dim + 1)

    def stack(self, values: Tensor) -> Tensor:
        """Stack what all processes have, of shape (...) to (P, ...), without gradient."""
        stacked = values.new_empty((self.size, *values.shape))
        self._call(dist.all_gather, list(stacked), values.contiguous())
        return stacked

    def gather(self, values: Tensor, n_views: int = 1) -> Tensor:
        """Put the rows of all processes together: of shape (V * n, ...) to (V * N, ...), the views one after another.

        In the backward pass a row gets the sum of its gradients in all processes.
        """
        if self.size == 1:
            return values
        gathered = _apply(_Gather, self, values.unflatten(0, (n_views, -1)))
        return gathered.transpose(0, 1).flatten(0, 2)

    def exchange(self, values: Tensor) -> Tensor:
        """Send row i to process i, and return what came from each, of the same shape; differentiable."""
        return values if self.size == 1 else _apply(_Exchange, self, values)

    def mean(self, values: Tensor) -> Tensor:
        """Average over processes in place, without gradient; return the tensor."""
        if self.size > 1:
            self._call(dist.all_reduce, values)
            values /= self.size
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not parameters:
            return
        is_used = [parameter.grad is not None for parameter in parameters]
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        # One exchange of all, because each costs latency; with it, which weights a process has used in this step.
        used = torch.tensor(is_used, dtype=torch.float32, device=gradients[0].device)
        means = self.mean(torch.cat([used, *(gradient.flatten() for gradient in gradients)]))
        used, *means = means.split([len(used), *(each.numel() for each in gradients)])
        # Only where one is missing does the host need to know, and wait, whether another process has it.
        is_used_by_one = is_used if all(is_used) else (used > 0).tolist()
        for parameter, gradient, mean, exists in zip(parameters, gradients, means, is_used_by_one, strict=True):
            if exists:
                parameter.grad = gradient.copy_(mean.view(gradient.shape))

    def share(self, value: Any) -> list[Any]:
        """Return the values of all processes, which can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return process 0's value, which can be pickled."""
        values = [value]
        if self.size > 1:
            self._call(dist.broadcast_object_list, values)
        return values[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in process 0, in place and without gradient."""
        for tensor in tensors if self.size > 1 else ():
            # Of no other layout, because that is what travels.
            values = tensor.detach().contiguous()
            self._call(dist.broadcast, values, 0)
            tensor.detach().copy_(values)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Fail in all processes if the block, which exchanges nothing, fails in one.

        Raises
        ------
        RuntimeError
            In the others; it says what happened where.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self.share(_text(error))
            raise
        for rank, failure in enumerate(self.share(None)):
            if failure is not None:
                raise RuntimeError(f"{self} cannot train on: process {rank} has failed with {failure}")

    def check_same(self, values: dict[str, Any]) -> None:
        """Compare by name what all processes should have the same of.

        Raises
        ------
        ValueError
            In all processes, if one has something else than process 0.
        """
        first, *others = self.share(values)
        for rank, other in enumerate(others, start=1):
            names = [name for name in first if first[name] != other[name]]
            if names:
                differences = [f"{name}: {first[name]!r} in process 0, {other[name]!r} in {rank}" for name in names]
                raise ValueError(
                    "distributed=True needs the same parameters and images in all processes, got "
                    f"{'; '.join(differences)}."
                )

    def __str__(self) -> str:
        return f"Process {self.rank} of {self.size}"

    def __reduce__(self) -> tuple[type["Group"], tuple[()]]:
        # A copy of a model, an average of its weights say, is its process' own.
        return Group, ()

    def _call(self, exchange: Callable[..., Any], *args: Any) -> None:
        try:
            exchange(*args)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or _session is None:
                raise
            raise _session.explain(self, error) from error


ALONE = Group()


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return function.apply(*args)


class _Gather(torch.autograd.Function):
    """Tensors of all processes, stacked."""

    @staticmethod
    def forward(ctx: Any, group: Group, values: Tensor) -> Tensor:
        ctx.group = group
        return group.stack(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _exchange(ctx.group, gradient).sum(0)


class _Exchange(torch.autograd.Function):
    """Row i of process j for row j of process i."""

    @staticmethod
    def forward(ctx: Any, group: Group, values: Tensor) -> Tensor:
        ctx.group = group
        return _exchange(group, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _exchange(ctx.group, gradient)


def _exchange(group: Group, values: Tensor) -> Tensor:
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    group._call(dist.all_to_all_single, received, values.contiguous())
    return received


class _Session:
    """What a process knows of the others when exchanges fail: a store of theirs, of the launcher's or of process 0.

    Parameters
    ----------
    store : torch.distributed.Store
        Of this training alone.
    is_own : bool
        Whether the connections of torch.distributed were made here, and not by the user.
    """

    def __init__(self, store: Any, is_own: bool) -> None:
        self.store, self.is_own = store, is_own
        self.is_lost = False

    def close(self) -> None:
        """Let go of connections: those who wait for this process then learn that it is gone."""
        # NCCL waits for those that are lost.
        if self.is_own and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def leave(self, group: Group, error: BaseException) -> None:
        """Tell the others why they wait in vain."""
        if not self.is_lost:
            self._ask(lambda: self.store.set(str(group.rank), _text(error)))
        self.close()

    def explain(self, group: Group, error: RuntimeError) -> RuntimeError:
        """Find out who is lost, and say so."""
        # Frames of torch.distributed hold the connections.
        traceback.clear_frames(error.__traceback__)
        self.close()
        self.is_lost = True
        told: dict[int, str] = {}

        def inquire() -> None:
            self.store.set(str(group.rank), "")
            end = time.monotonic() + INQUIRY
            # Nobody but the one that is lost should be missing.
            while len(told) < group.size - 1 and not any(told.values()) and time.monotonic() < end:
                time.sleep(0.05)
                waiting = [rank for rank in range(group.size) if rank not in told and self.store.check([str(rank)])]
                told.update({rank: self.store.get(str(rank)).decode() for rank in waiting})
            if group.rank == 0:
                # The store may be this process' own, and others still ask it.
                time.sleep(0.5)

        answered = self._ask(inquire)
        failed = [f"process {rank} has failed with {text}" for rank, text in sorted(told.items()) if text]
        missing = [str(rank) for rank in range(group.size) if rank not in told]
        if failed:
            what = " and ".join(failed)
        elif not answered:
            what = "process 0, or the launcher, which knows of the others, cannot be reached"
        elif missing:
            what = f"process {' and '.join(missing)} was killed, has stalled or cannot be reached"
        else:
            what = "the processes have lost each other"
        return RuntimeError(f"{group} cannot train on: {what}.")

    def _ask(self, work: Callable[[], Any]) -> bool:
        """Use the store, which may be out of reach; return whether it was not."""
        done = threading.Event()

        def run() -> None:
            try:
                work()
            except RuntimeError:
                return
            done.set()

        # In a thread, because a store of a process that has stalled keeps whoever asks it waiting.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(2 * INQUIRY)
        return done.is_set()


# Of the training that runs; the store of the launcher, which takes a process once; how many trainings there were.
_session: _Session | None = None
_launched_store: Any = None
_n_trainings = 0


@contextmanager
def join(device: torch.device) -> Iterator[Group]:
    """Meet the other processes that train together with this one.

    Parameters
    ----------
    device : torch.device
        Where this process trains.

    Yields
    ------
    Group
        Of the default process group of torch.distributed, where there is one, else of all processes that torchrun, or
        what works like it, has started.

    Raises
    ------
    ValueError
        If there is no launcher, or torch.distributed does not serve the device.
    RuntimeError
        If not all processes come, or, in the block, one of them is lost.
    """
    global _session, _n_trainings
    is_own = not dist.is_initialized()
    _n_trainings += 1
    if is_own:
        store, rank, size = _meet_launched()
        store = PrefixStore(f"skdim {_n_trainings}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # What an optimizer imports keeps the process group of that moment as a default argument, and with it the
        # connections, at whose end the others learn that this process is gone.
        importlib.import_module("torch.distributed.nn")
        with _translated(size):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIME_LIMIT)
    else:
        served = dist.get_backend_config()
        if device.type not in served:
            raise ValueError(
                f"torch.distributed is initialized for {served}, which does not serve device={str(device)!r}."
            )
        rank, size = dist.get_rank(), dist.get_world_size()
        store = PrefixStore(f"skdim {_n_trainings}", dist.distributed_c10d._get_default_store())
    group = Group(rank, size)
    _session = _Session(PrefixStore("lost", store), is_own)
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            yield group
        if is_own:
            dist.destroy_process_group()
    except BaseException as error:
        if size > 1:
            _session.leave(group, error)
        elif is_own:
            dist.destroy_process_group()
        raise
    finally:
        _session = None


def _meet_launched() -> tuple[Any, int, int]:
    """Find the other processes by what their launcher has put into the environment."""
    global _launched_store
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise ValueError(
            "distributed=True needs several processes that a launcher has started, 'torchrun' or 'accelerate launch' "
            f"for instance, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in the "
            "environment, and torch.distributed is not initialized."
        )
    size = int(os.environ["WORLD_SIZE"])
    if _launched_store is None:
        with _translated(size):
            _launched_store, _, _ = next(rendezvous("env://", timeout=TIME_LIMIT))
    return _launched_store, int(os.environ["RANK"]), size


@contextmanager
def _translated(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"distributed=True waits for {size} processes, and not all of them have come to train within "
            f"{TIME_LIMIT.total_seconds():.0f} seconds."
        ) from error


def local_device(device: str) -> str:
    """Tell the processes of a host apart: make "auto" and "cuda" the GPU of this one's number."""
    n_gpus = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", n_gpus))
    # A launcher may let each process see its own GPU only, by the number 0.
    return f"cuda:{number}" if device in ("auto", "cuda") and number < n_gpus else device


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
