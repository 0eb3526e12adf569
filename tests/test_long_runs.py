import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
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


def test_transform_from_four_threads_at_once(digits):
    X, _ = digits
    dim = clone(small()).fit(X)
    expected = dim.transform(X)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dim.transform, [X] * 16))
    assert all(np.array_equal(Z, expected) for Z in found)
