"""Train in a process of its own and print by how much its memory grew: ``python footprint.py array | mapped X out``."""

import sys
from pathlib import Path

import numpy as np
from torch import nn

import skdim.sources
from skdim import DIMTransformer


class Pooled(nn.Module):
    """An encoder that takes next to no memory, so that the images' own shows."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        side = image_shape[1] // 4
        self.conv, self.linear = nn.Conv2d(image_shape[0], 4, side, side), nn.Linear(64, n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(features.flatten(1)), features


SMALL = {"encoder": Pooled, "n_components": 4, "mi_units": 4}


def resident(field):
    """Read megabytes from the system's account of this process: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3


def fit(X, **params):
    return DIMTransformer(**{"max_epochs": 1, "random_state": 0} | params).fit(X)


def array():
    """Print the size of the images, the growth by rows and images, and that by some images at the defaults."""
    rows = np.random.default_rng(0).integers(0, 256, (20_000, 3072), dtype=np.uint8)
    images = rows.reshape(-1, 32, 32, 3)
    fit(rows[:1000], image_shape=(3, 32, 32), **SMALL)
    start = resident("VmRSS")
    fit(rows, image_shape=(3, 32, 32), **SMALL)
    fit(images, **SMALL)
    with_all = resident("VmHWM") - start
    fit(images[:256])
    print(rows.nbytes / 1e6, with_all, resident("VmHWM") - start)


def mapped(X_path, out_path):
    """Print the size of a mapped file, the growth by training and embedding, and how many embeddings differ."""
    skdim.sources.RESIDENT_BYTES = 1 << 24
    X = np.memmap(X_path, np.uint8, "w+", shape=(12_000, 128, 128))
    X[::2000] = np.arange(128)
    X.flush()
    out = np.memmap(out_path, np.float32, "w+", shape=(12_000, 4))
    params = SMALL | {"precision": "float32"}
    fit(np.array(X[::100]), **params).transform(np.array(X[::100]))
    start = resident("VmRSS")
    fit(X, **params).transform(X, out=out)
    print(X.nbytes / 1e6, resident("VmHWM") - start, len(np.unique(out[::1000], axis=0)))


if __name__ == "__main__":
    {"array": array, "mapped": mapped}[sys.argv[1]](*sys.argv[2:])
