"""Where and how to compute: device, training precision and threads."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from math import prod
from threading import Lock, Thread
from typing import Any

import torch
from torch import nn

from skdim.layouts import ImageShape

__all__ = [
    "available_device",
    "check_precision",
    "full_float32",
    "heed_fork",
    "is_out_of_memory",
    "limited_threads",
    "place",
    "resolve_device",
    "resolve_precision",
    "usual_torch",
]

# What libraries say that are out of memory without torch's own error for it.
OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "can't allocate memory",
)

# Images of up to this many values are computed on one thread. A second one would save less than a third of seconds.
SMALL_IMAGE = 256


def resolve_device(device: str) -> torch.device:
    """Turn the parameter `device` into a device that is there.

    Parameters
    ----------
    device : str
        "auto", "cpu", "cuda" or "cuda:N".

    Returns
    -------
    torch.device
        "auto" is CUDA where there is one.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda") or (resolved.type == "cpu" and resolved.index):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but CUDA is not available here. Use device='auto' or 'cpu'."
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} was asked for, but there are only {torch.cuda.device_count()} CUDA devices."
        )
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def available_device(device: str) -> torch.device:
    """Resolve `device`, or "auto" where it is not there: a model trained on a second GPU loads with one or none."""
    try:
        return resolve_device(device)
    except ValueError:
        return resolve_device("auto")


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device, its 2-D convolutions in the channels_last layout that they compute fastest in."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.shape[1] == 1:
            # Of one channel every layout is every other to torch, but by its strides, which choose the kernel.
            parameter.data = parameter.data.contiguous()[:, 0, :, :, None].permute(0, 3, 1, 2)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def resolve_precision(precision: str, device: torch.device, shape: ImageShape) -> torch.dtype | None:
    """Turn the parameter `precision` into the dtype of autocast.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16"}
        "auto" is bfloat16 where the hardware computes it natively.
    device : torch.device
        Where training runs.
    shape : tuple of int
        Channels, height and width of an image.

    Returns
    -------
    torch.dtype or None
        None is float32.
    """
    if precision == "auto":
        is_bfloat16 = _has_bfloat16(device) and not (device.type == "cpu" and _may_be_thin(shape))
        precision = "bfloat16" if is_bfloat16 else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse bfloat16 on a GPU that has no convolutions in it.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16"}
        The parameter.
    device : torch.device
        Where training runs.

    Raises
    ------
    ValueError
        If the device can't train in that precision.
    """
    if precision == "bfloat16" and device.type == "cuda" and not _has_bfloat16(device):
        raise ValueError(
            f"precision='bfloat16' needs a GPU of compute capability 8.0 at least, {device} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}: use 'auto' or 'float32'."
        )


def _may_be_thin(shape: ImageShape) -> bool:
    """Tell whether strided convolutions may shrink an image to a map of one pixel in width and more in height.

    torch's own bfloat16 convolution on the CPU, seen in 2.13, then returns NaN now and then. The convolutions here
    avoid it; those of a user's encoder may not.
    """
    short, long = sorted(shape[1:])
    return 1 < short < long and (short < 8 or long >= 2 * short)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch has no public question for this before 2.13; without it float32 is the safe answer.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device, or the CPU, is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


class _Switched:
    """Context in which switches of torch have other values.

    They are the process's own: the first thread that comes in sets them, the last that leaves puts them back, and other
    threads see the other values meanwhile.

    Parameters
    ----------
    switches : callable
        Returns, for each switch, what reads it, what sets it, and its value in here.
    """

    def __init__(self, switches: Callable[[], list[Switch]]) -> None:
        self._switches = switches
        self._lock = Lock()
        self._is_new = True
        self._n_inside = 0
        self._before: list[tuple[Callable[[Any], None], Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                with self._quiet_at_first():
                    self._switch()
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                for put, value in self._before:
                    put(value)

    @contextmanager
    def _quiet_at_first(self) -> Iterator[None]:
        """Keep back that some versions of torch call the older switches deprecated, which they say once.

        Once only, because filters of warnings are the process's own: another thread that puts its own back meanwhile
        would leave these in place for good.
        """
        if not self._is_new:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        self._is_new = False

    def _switch(self) -> None:
        settings = []
        for get, put, value in self._switches():
            # An older switch cannot be read where the user's newer ones contradict it; those then suffice.
            with suppress(RuntimeError):
                settings.append((put, get(), value))
        self._before = [(put, before) for put, before, value in settings if before != value]
        for put, _, value in settings:
            put(value)


def _full_precision() -> list[Switch]:
    """List what lets torch compute float32 in TF32 or bfloat16."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches: list[Switch] = [
        (lambda: cudnn.allow_tf32, partial(setattr, cudnn, "allow_tf32"), False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    ]
    if hasattr(cudnn, "conv"):
        # torch >= 2.9 has one for each kind of operation; the older two are kept in step, or reading them fails.
        mkldnn: Any = torch.backends.mkldnn
        for operation in (cudnn.conv, cudnn.rnn, matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul):
            name = "fp32_precision"
            switches.append((partial(getattr, operation, name), partial(setattr, operation, name), "ieee"))
    return switches


# float32 is computed as such, whatever torch's switches say.
full_float32 = _Switched(_full_precision)

_float32_by_default = _Switched(lambda: [(torch.get_default_dtype, torch.set_default_dtype, torch.float32)])

_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True
    for switched in (full_float32, _float32_by_default):
        # The thread that holds it is not there to release it. What it has switched stays so here.
        switched._lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def heed_fork() -> None:
    """Compute on one thread in a process that was forked, where OpenMP waits for ever for the threads it had before."""
    if _is_forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextmanager
def usual_torch(device: torch.device) -> Iterator[None]:
    """Compute as torch does unasked, whatever defaults, autocast and modes of gradients the caller has set.

    Parameters
    ----------
    device : torch.device
        Where it is computed.
    """
    heed_fork()
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    no_autocast = torch.autocast(device.type, enabled=False)
    with _float32_by_default, on_cpu, no_autocast, torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def limited_threads(shape: ImageShape, device: torch.device) -> Iterator[None]:
    """Compute small images on one thread, where more bring little.

    Sums are split over threads, so their last bits depend on the number of threads. Small images so give the same bits
    in a search with many workers of one thread each as in a single process with all threads.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    device : torch.device
        Where they are computed.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and prod(shape) <= SMALL_IMAGE and threads > 1:
        # The number is each thread's own, but threads that start later take the one that was set last, in any thread.
        elsewhere = Thread(target=torch.set_num_threads, args=(threads,))
        try:
            torch.set_num_threads(1)
            elsewhere.start()
            elsewhere.join()
            yield
        finally:
            torch.set_num_threads(threads)
    else:
        yield
