"""torch's global generators, which the whole process draws from: lent to a block, and put back."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from skdim.devices import usual_torch

__all__ = ["lent_rng", "private_rng", "seeded_generators", "undisturbed"]

# Keeps threads from seeing each other's seeds. Reentrant, because a user's module may load or copy an estimator when it
# is built.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # In a forked process the thread that holds the lock is not there to release it.
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def undisturbed() -> Iterator[bool]:
    """Keep other threads from torch's global generators for a block, unless one has them; tell whether none has."""
    lock = _lock
    is_free = lock.acquire(blocking=False)
    try:
        yield is_free
    finally:
        if is_free:
            lock.release()


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a block, and leave them as they were.

    Module initialisation and dropout know no other generator. Nothing else that the caller has set in torch counts in
    the block either.
    """
    cuda = [device] if device.type == "cuda" else []
    with _lock, torch.random.fork_rng(devices=cuda), usual_torch(device):
        # Not torch.manual_seed, which seeds every device, also those that are not forked here.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[each.index] for each in cuda)):
            generator.manual_seed(seed)
        yield


def seeded_generators(seed: int, device: torch.device) -> list[torch.Generator]:
    """Make generators to lend: one for the CPU, and on CUDA one for the device."""
    return [torch.Generator(each).manual_seed(seed) for each in sorted({torch.device("cpu"), device}, key=str)]


@contextmanager
def lent_rng(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Draw from these in a block, where it draws from torch's global generators of their devices.

    For a block that is short, a step of a training or the loading of a batch: others wait for it who load, copy or
    train what draws from them.
    """
    if not generators:
        yield
        return
    with _lock:
        theirs = [
            torch.default_generator if each.device.type == "cpu" else torch.cuda.default_generators[each.device.index]
            for each in generators
        ]
        before = [each.get_state() for each in theirs]
        try:
            for each, mine in zip(theirs, generators, strict=True):
                each.set_state(mine.get_state())
            yield
            for each, mine in zip(theirs, generators, strict=True):
                mine.set_state(each.get_state())
        finally:
            for each, state in zip(theirs, before, strict=True):
                each.set_state(state)
