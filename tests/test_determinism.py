import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from skorch.callbacks import Callback
from torch import nn

from skdim import DIMTransformer

# Too large for the one thread that images of up to 256 values are computed on.
X = np.random.default_rng(0).integers(0, 256, (60, 3, 12, 10), dtype=np.uint8)


class Dropping(nn.Module):
    """Draws from torch's global generator, when it is built and in training."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.linear = nn.Linear(6 * 6 * 5, n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        return self.linear(self.drop(features.flatten(1))), features


def small(**params):
    return DIMTransformer(
        **{"n_components": 8, "max_epochs": 2, "batch_size": 20, "mi_units": 8, "random_state": 0} | params
    )


def embed(dim, X):
    return dim.fit(X).transform(X)


def embed_on_one_thread(dim, X):
    torch.set_num_threads(1)
    return embed(dim, X)


# Trainings that differ, one after another.
MIXED = [small(), small(random_state=1), small(encoder=Dropping), small(negatives="shuffle", prior="normal")]


@pytest.fixture(scope="module")
def expected():
    return [embed(clone(dim), X) for dim in MIXED]


def test_order_of_fits(expected):
    for i in (2, 0, 3, 1, 1):
        assert np.array_equal(embed(clone(MIXED[i]), X), expected[i])
    again = clone(MIXED[0])
    embed(again, X)
    assert np.array_equal(embed(again, X), expected[0])


def test_another_process(tmp_path, expected):
    np.save(tmp_path / "X.npy", X)
    script = (
        "import numpy, sys, torch; from skdim import DIMTransformer; folder = sys.argv[1];"
        "torch.set_num_threads(int(sys.argv[2])); X = numpy.load(folder + '/X.npy');"
        "dim = DIMTransformer(n_components=8, max_epochs=2, batch_size=20, mi_units=8, random_state=0);"
        "numpy.save(folder + '/Z.npy', dim.fit(X).transform(X))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())],
        env=os.environ | {"PYTHONHASHSEED": "4321"},
        check=True,
    )
    assert np.array_equal(np.load(tmp_path / "Z.npy"), expected[0])


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_n_jobs(backend):
    def run(n_jobs):
        jobs = (delayed(embed_on_one_thread)(clone(dim), X) for dim in (MIXED[0], MIXED[1], MIXED[3]) * 2)
        return Parallel(n_jobs, backend=backend)(jobs)

    threads = torch.get_num_threads()
    try:
        one, two = run(1), run(2)
    finally:
        torch.set_num_threads(threads)
    assert all(map(np.array_equal, one, two))


def test_trainings_in_threads_at_once(expected):
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(embed, map(clone, MIXED), [X] * len(MIXED)))
            assert all(map(np.array_equal, found, expected))


def test_the_one_thread_of_small_images_is_their_own_affair(digits):
    found = []

    class Ask(Callback):
        def on_epoch_end(self, net, **kwargs):
            with ThreadPoolExecutor(1) as fresh:
                found.append((torch.get_num_threads(), fresh.submit(torch.get_num_threads).result()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small(callbacks=[Ask()]).fit(digits[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [(1, 2)] * 2


def global_state():
    flags = {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "mkldnn": torch.backends.mkldnn.enabled,
        "anomaly": torch.is_anomaly_enabled(),
        "flush": torch.tensor(1e-40).mul(1.0).item() == 0,
        "numpy": np.geterr(),
    }
    generators = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002
    return flags, generators


class Failing(Dropping):
    def forward(self, images):
        torch.rand(3)
        if self.training:
            raise RuntimeError("mine")
        return super().forward(images)


def test_nothing_global_changes():
    before = global_state()
    for dim in MIXED[:3]:
        clone(dim).fit(X).partial_fit(X).transform(X)
        assert global_state() == before
    for error, params in (
        (RuntimeError, {"encoder": Failing}),
        (FloatingPointError, {"lr": 1e30, "lr_schedule": "constant"}),
        (ValueError, {"output_layer": "hidden", "encoder": Dropping}),
    ):
        with pytest.raises(error):
            small(**params).fit(X)
        assert global_state() == before
    dim = clone(MIXED[2]).fit(X)
    dim.encoder_.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        dim.transform(X)
    assert global_state() == before
