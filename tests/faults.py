"""Trainings in forked children that are killed or starved: ``python faults.py FOLDER SCENARIO[=ARGUMENT] ...``.

test_faults.py runs this in a process of its own, which imports once and computes nothing, so that a fork is cheap and
safe. Prints a JSON object with what each scenario returned.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # which torch imports at the first step; here once for all children
from skorch.callbacks import Callback
from torch import nn

from skdim import DIMTransformer

X = np.random.default_rng(0).random((64, 1, 6, 6), dtype=np.float32)
FOLDER = Path(sys.argv[1])
REFERENCE = FOLDER / "reference.npz"


class Dropping(nn.Module):
    """An encoder that draws from torch's global generator and has buffers."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(image_shape[0], 8, 3, padding=1), nn.BatchNorm2d(8))
        self.drop = nn.Dropout(0.2)
        self.linear = nn.Linear(8 * image_shape[1] * image_shape[2], n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        return self.linear(self.drop(features.flatten(1))), features


def fit(checkpoint_dir, **params):
    params = {"max_epochs": 6, "batch_size": 32, "mi_units": 8, "random_state": 0} | params
    dim = DIMTransformer(8, encoder=Dropping, device="cpu", checkpoint_dir=checkpoint_dir, **params).fit(X)
    losses = [value for epoch in dim.history_ for name, value in epoch.items() if "second" not in name]
    return {"Z": dim.transform(X), "losses": losses}


def equals_reference(result):
    with np.load(REFERENCE) as reference:
        return all(np.array_equal(result[name], reference[name]) for name in reference)


def in_child(work):
    """Run in a fork; exit status 0 if it returns True. Returns the child's process id."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_event(countdown, delay):
    """Die at, or shortly after, one of the steps of writing: a file opened, renamed or removed."""

    def hook(event, args):
        nonlocal countdown
        opened = event == "open" and ".safetensors" in str(args[0]) and args[1] != "rb"
        if opened or event in ("os.rename", "os.remove"):
            countdown -= 1
            if countdown == 0 and delay:
                signal.setitimer(signal.ITIMER_REAL, delay)
            elif countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill(n_kills):
    """Kill trainings at random instants and in the steps of writing; each is taken up again until it is over."""
    rng = random.Random(0)
    counts = {"kills": 0, "trainings": 0, "resumed": 0, "left_overs": 0}
    start = time.perf_counter()
    assert wait(in_child(lambda: equals_reference(fit(FOLDER / "timed")))) == 0
    duration = time.perf_counter() - start
    checkpoints = FOLDER / "checkpoints"
    while counts["kills"] < int(n_kills):
        shutil.rmtree(checkpoints, ignore_errors=True)
        status = None
        while status in (None, -signal.SIGKILL, -signal.SIGALRM):
            counts["resumed"] += any(checkpoints.glob("epoch-*"))
            by_event, countdown = rng.random() < 0.6, rng.randint(1, 8)
            delay = rng.choice([0, rng.uniform(1e-4, 4e-3)])

            def train(by_event=by_event, countdown=countdown, delay=delay):
                # A checkpoint that is damaged is one too many.
                warnings.simplefilter("error")
                if by_event:
                    die_at_event(countdown, delay)
                return equals_reference(fit(checkpoints))

            child = in_child(train)
            if not by_event:
                time.sleep(rng.uniform(0, duration))
                os.kill(child, signal.SIGKILL)
            status = wait(child)
            counts["kills"] += status < 0
            counts["left_overs"] += len([*checkpoints.glob(".*.tmp")])
        assert status == 0, f"a training ended with status {status} after {counts}"
        assert len([*checkpoints.iterdir()]) == 2, [*checkpoints.iterdir()]
        counts["trainings"] += 1
    return counts


class AtEpoch(Callback):
    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == self.epoch:
            self.act()


def starved(checkpoints, starve, feed):
    """Leave no room for files after three epochs: training ends as ever, with warnings; the next goes on there."""

    def train():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fit(checkpoints, callbacks=[AtEpoch(4, starve)])
        messages = [str(w.message) for w in caught]
        assert sum("could not be written" in message for message in messages) == 4, messages
        return equals_reference(result)

    assert wait(in_child(train)) == 0
    names = sorted(path.name for path in checkpoints.iterdir())
    feed()

    def resume():
        warnings.simplefilter("error")
        epochs = []
        callbacks = [AtEpoch(epoch, lambda epoch=epoch: epochs.append(epoch)) for epoch in range(1, 7)]
        return equals_reference(fit(checkpoints, callbacks=callbacks)) and epochs == [4, 5, 6]

    return {"names": names, "resumed": wait(in_child(resume)) == 0}


def size_limit(_):
    def starve():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    return starved(FOLDER / "limited", starve, lambda: None)


def full_disk(mounted):
    """`mounted` is a file system that three checkpoints just fit in."""
    filler = Path(mounted) / "filler"

    def starve():
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return starved(Path(mounted) / "checkpoints", starve, filler.unlink)


def read_only(_):
    """A folder that may not be written to, seen by a user who is not root."""
    (FOLDER / "read_only").mkdir(mode=0o555)
    for folder in (FOLDER, *FOLDER.parents[:-1]):
        if folder.stat().st_uid == os.getuid():
            os.chmod(folder, folder.stat().st_mode | 0o055)

    def train():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        epochs = []
        for folder in (FOLDER / "read_only", FOLDER / "read_only" / "new"):
            with pytest.raises(PermissionError, match=f"checkpoint_dir='{folder}' cannot be used: Permission denied"):
                fit(folder, callbacks=[AtEpoch(1, lambda: epochs.append(1))])
        return epochs == []

    return {"refused": wait(in_child(train)) == 0}


class Poison(Callback):
    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            with torch.no_grad():
                next(net.module_.encoder.parameters()).view(-1)[0] = torch.nan


def interrupt():
    # What was started in the background is told to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("a callback's own")


def run_out_of_memory():
    def forward(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    Dropping.forward = forward


ERRORS = {
    "interrupt": (KeyboardInterrupt, "", {"callbacks": [AtEpoch(3, interrupt)]}),
    "callback": (RuntimeError, "a callback's own", {"callbacks": [AtEpoch(3, fail)]}),
    "memory": (torch.OutOfMemoryError, "lower batch_size .now 32.", {"callbacks": [AtEpoch(3, run_out_of_memory)]}),
    "weight": (FloatingPointError, "weight 'encoder.* is not finite after epoch 2", {"callbacks": [Poison()]}),
    "lr": (FloatingPointError, "(loss term|weight) .* (in|after) epoch 1", {"lr": 1e9, "precision": "float32"}),
}


def errors(_):
    """Break training off in its midst; the error comes out and the next fit ends as if nothing had happened."""
    survived = []
    for name, (error, message, params) in ERRORS.items():
        checkpoints = FOLDER / f"errors_{name}"

        def train(error=error, message=message, params=params, checkpoints=checkpoints):
            with pytest.raises(error, match=message):
                fit(checkpoints, **params)
            return True

        def go_on(checkpoints=checkpoints):
            return equals_reference(fit(checkpoints))

        if wait(in_child(train)) == 0 and wait(in_child(go_on)) == 0:
            survived.append(name)
    return survived


def main():
    def make_reference():
        np.savez(REFERENCE, **fit(None))
        return True

    assert wait(in_child(make_reference)) == 0
    results = {}
    for scenario in sys.argv[2:]:
        name, _, argument = scenario.partition("=")
        results[name] = globals()[name](argument)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
