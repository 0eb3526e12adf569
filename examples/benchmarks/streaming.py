"""Training from a file larger than memory, against training from an array in memory.

    python examples/benchmarks/streaming.py            # 20 GB
    python examples/benchmarks/streaming.py --gigabytes 2 --in-memory 1

Writes a sparse file of uint8 images 3 x 128 x 128, noise here and there and zeros elsewhere, and trains one epoch from
it as a read-only memory map; before and after that, one from an array in memory of its first images. Each runs in a
process of its own, so that its peak of resident memory is its own. The encoder is a single convolution of patches and a
linear layer, far cheaper than any that is of use: reading has to keep up with more than a real training asks of it. A
sparse file has no blocks on disk for its zeros, so the figures are those of the system's page cache and of skdim, not
of a disk; the time of reading the same rows in random order, and doing nothing with them, is printed beside.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import nn

from skdim import DIMTransformer

SHAPE = (128, 128, 3)
IMAGE_BYTES = 128 * 128 * 3
BATCH = 128
SEED = 0


class Patches(nn.Module):
    """One convolution of patches of 16 x 16 pixels, and a linear layer on its map."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 16, 16, 16)
        self.linear = nn.Linear(16 * 8 * 8, n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        return self.linear(features.flatten(1)), features


def write_sparse(path, n_images):
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (n_images, *SHAPE))
    some = np.random.default_rng(SEED).integers(0, 256, (256, *SHAPE), dtype=np.uint8)
    images[:: -(-n_images // len(some))] = some[: len(range(0, n_images, -(-n_images // len(some))))]
    images.flush()


def resident(field):
    """Resident memory in GB: now, VmRSS, or at its highest, VmHWM. Pages of mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field))


def train(path, n_in_memory):
    X = np.load(path, mmap_mode="r")
    if n_in_memory:
        X = np.array(X[:n_in_memory])
    dim = DIMTransformer(encoder=Patches, max_epochs=1, batch_size=BATCH, random_state=SEED)
    # What is loaded and set up at the first training.
    dim.fit(np.array(X[: 2 * BATCH]))
    before = resident("VmRSS")
    start = time.perf_counter()
    dim.fit(X)
    return {
        "n_images": len(X),
        "fit": time.perf_counter() - start,
        "epoch": dim.history_[0]["seconds"],
        "above": resident("VmHWM") - before,
        "peak": resident("VmHWM"),
        "machine": describe_machine(dim.device_),
    }


def read(path):
    """Seconds of reading all rows in random order, a batch at a time."""
    X = np.load(path, mmap_mode="r")
    order = np.random.default_rng(SEED).permutation(len(X))
    start = time.perf_counter()
    for batch in range(0, len(X), BATCH):
        X[order[batch : batch + BATCH]]
    return time.perf_counter() - start


def in_child(work, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20, help="of the file (default 20)")
    parser.add_argument("--in-memory", type=float, default=1.5, help="gigabytes of the array in memory (default 1.5)")
    parser.add_argument("--folder", type=Path, help="where to write the file (default: the system's for such files)")
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = parse_arguments(arguments)
    n_images, n_in_memory = (int(size * 1e9) // IMAGE_BYTES for size in (arguments.gigabytes, arguments.in_memory))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "images.npy"
        write_sparse(path, n_images)
        status = path.stat()
        # The array before and after, so that a drift of the machine's speed shows.
        before = in_child(train, path, n_in_memory)
        mapped = in_child(train, path, 0)
        after = in_child(train, path, n_in_memory)
        seconds = in_child(read, path)
    print(f"machine   {mapped['machine']}")
    print(f"file      {status.st_size / 1e9:.1f} GB, sparse: {status.st_blocks * 512 / 1e9:.2f} GB on disk")
    print(f"images    3 x 128 x 128, uint8, in batches of {BATCH}; one convolution of patches; seed {SEED}")
    print(f"reading   {1e6 * seconds / n_images:.0f} us an image in random order, without training\n")
    print(f"{'':12}{'images':>9}{'epoch us/image':>16}{'MB/s':>7}{'fit us/image':>14}{'peak GB':>9}{'above start':>13}")
    for name, run in (("in memory", before), ("memory map", mapped), ("in memory", after)):
        epoch, fit = (run[part] / run["n_images"] for part in ("epoch", "fit"))
        print(f"{name:12}{run['n_images']:>9}{1e6 * epoch:>16.0f}{IMAGE_BYTES / 1e6 / epoch:>7.0f}", end="")
        print(f"{1e6 * fit:>14.0f}{run['peak']:>9.2f}{run['above']:>13.2f}")
    for part in ("epoch", "fit"):
        in_memory = (before[part] + after[part]) / (before["n_images"] + after["n_images"])
        print(f"speed of the memory map against the array, {part}: {in_memory * mapped['n_images'] / mapped[part]:.2f}")


if __name__ == "__main__":
    main()
