import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch.callbacks import Callback

from skdim import DIMTransformer


def small(**params):
    return DIMTransformer(**{"n_components": 8, "max_epochs": 1, "mi_units": 8, "random_state": 0} | params)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("n_fits", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_many_fits_take_no_more_memory_and_no_more_threads(digits, tmp_path, n_fits, counted):
    X = digits[0][:100]

    def fit(i):
        small(random_state=i, checkpoint_dir=tmp_path / str(i % 2)).fit(X).transform(X)
        for path in (tmp_path / str(i % 2)).iterdir():
            path.unlink()
        gc.collect()

    for i in range(3):
        fit(i)
    memory, threads = resident_bytes(), threading.active_count()
    n_tasks, n_descriptors = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for i in range(3, 3 + n_fits):
        fit(i)
    grown = resident_bytes() - memory
    # The encoder's weights alone are 8 MB a fit; once or twice as much the allocator keeps or gives back as it likes.
    assert grown < 16e6, f"{grown / 1e6:.1f} MB in {n_fits} fits"
    # There may be fewer, of what tests before had left to the garbage collector.
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/task")) <= n_tasks
    assert len(os.listdir("/proc/self/fd")) <= n_descriptors
    counted("fits in one process", n_fits)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_fit_makes_no_copy_of_the_images_in_memory():
    command = [sys.executable, Path(__file__).with_name("footprint.py"), "array"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    megabytes, more_with_all, more_with_the_defaults = map(float, output.split())
    # A copy as they are would be once as much, as float32 four times.
    assert more_with_all < 0.7 * megabytes
    # A gigabyte above the data is promised, whatever their number: what a batch takes is well below it.
    assert more_with_the_defaults < 500


def test_images_callbacks_and_nets_are_released(digits):
    class Watch(Callback):
        pass

    images = digits[0][:100].astype(np.float32)
    callback = Watch()
    dim = small(callbacks=[callback]).fit(images)
    net = weakref.ref(dim.net_)
    batches, kept = weakref.ref(images), weakref.ref(callback)
    del images
    gc.collect()
    assert batches() is None
    dim.partial_fit(digits[0][:50])
    dim.set_params(callbacks=None).fit(digits[0][:50])
    del callback
    gc.collect()
    assert net() is None
    assert kept() is None


def test_images_are_released_after_an_error(digits):
    images = digits[0][:100].astype(np.float32)
    kept = weakref.ref(images)
    dim = small(lr=1e30, max_epochs=3, lr_schedule="constant")
    with pytest.raises(FloatingPointError) as caught:
        dim.fit(images)
    del images, caught
    gc.collect()
    assert kept() is None


def test_history_does_not_grow_with_batches(digits):
    dim = small(max_epochs=2, batch_size=10).fit(digits[0])
    assert [len(epoch["batches"]) for epoch in dim.net_.history] == [1, 1]


@pytest.mark.parametrize(
    "params",
    [{}, {"global_weight": 0.5, "coordinate_weight": 1.0, "prior": "normal", "augmentation": "standard"}],
)
def test_no_batch_makes_the_host_wait_for_the_device(colour_images, monkeypatch, params):
    reads = []

    def counted(method):
        def call(*args, **kwargs):
            reads.append(method.__name__)
            return method(*args, **kwargs)

        return call

    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    n_reads = []
    for batch_size in (20, 5):
        reads.clear()
        small(max_epochs=2, batch_size=batch_size, device="cpu", **params).fit(colour_images[0])
        n_reads.append(dict(Counter(reads)))
    assert n_reads[0] == n_reads[1]


def test_transform_from_four_threads_at_once(digits):
    X, _ = digits
    dim = clone(small()).fit(X)
    expected = dim.transform(X)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dim.transform, [X] * 16))
    assert all(np.array_equal(Z, expected) for Z in found)
