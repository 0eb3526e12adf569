"""Growth on paper: what an image costs, and the time and price of training on many images and many GPUs.

    python examples/benchmarks/scaling.py                              # measures and prints the tables of SCALING.md
    python examples/benchmarks/scaling.py --price 2 --tflops 150       # for another GPU

Measured here, without a GPU: processor seconds, floating-point operations, dispatched operations and bytes kept for the
backward pass, weights and normalised channels of `DIMTransformer` at its defaults; processor seconds to decode and to
gather an image. Assumed: what GPUs, network and disks do and cost, each an option below. Computed from these two: all
that is said of GPUs. SCALING.md explains the formulas, and has what one GPU took.
"""

import argparse
import io
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import describe_machine
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from skdim import DIMTransformer
from skdim.files import read_images
from skdim.model import MAX_PAIR_ELEMENTS

# float32: gradients, encoded embeddings, reductions and statistics travel and are kept as such.
NUMBER = 4
# Weight, gradient and Adam's two moments.
NUMBERS_PER_WEIGHT = 4
HOST_GPUS = 8


class Workload(NamedTuple):
    """What is measured of images of one size."""

    size: int
    seconds: float
    encode_seconds: float
    # Of an image, in a batch of N: flop + pair_flop * N.
    flop: float
    pair_flop: float
    encode_flop: float
    n_operations: int
    saved_bytes: int
    n_weights: int
    norm_channels: list[int]
    n_critics: int
    n_units: int
    n_locations: int
    decode_seconds: float
    gather_bytes: float

    @property
    def image_bytes(self):
        return 3 * self.size**2


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[32, 224], help="sides of the images (default 32 224)")
    add("--n-images", type=int, default=4096, help="of 32 x 32, of others as many pixels (default 4096)")
    add("--batch-size", type=int, default=128, help="images of each GPU in a step (default 128)")
    add("--tflops", type=float, default=100, help="10^12 operations a second that a GPU does in training (default 100)")
    add("--launch", type=float, default=5, help="microseconds to launch an operation (default 5)")
    add("--network", nargs=2, type=float, default=[200, 25], help="GB/s of a GPU, in a host and between (200 25)")
    add("--latency", nargs=2, type=float, default=[30, 100], help="microseconds of a collective, likewise (30 100)")
    add("--resident", type=float, default=40, help="GB of images that a GPU holds (default 40)")
    add("--host-memory", type=float, default=1000, help="GB of images that a host of 8 GPUs holds (default 1000)")
    add("--disk", type=float, default=5, help="GB/s that a host of 8 GPUs reads at random (default 5)")
    add("--price", type=float, default=3, help="dollars an hour of a GPU (default 3)")
    return parser.parse_args()


def seconds_of(work):
    """Seconds of all processors, which others on the machine change little."""
    start = time.process_time()
    work()
    return time.process_time() - start


def noise(n, size):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are dispatched, without views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


class SavedBytes:
    """Context that adds up the memory kept for the backward pass, without the weights."""

    def __init__(self, module):
        self.weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        # Returned as it is, a result would keep its own graph alive.
        return tensor.detach()

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        self.total = sum(self.storages.values())


def measure(size, n_images, batch_size):
    """Measure the defaults on images of one size."""
    # A step as a GPU makes it: with as many scores at once.
    MAX_PAIR_ELEMENTS["cpu"] = MAX_PAIR_ELEMENTS["cuda"]
    n = max(batch_size, n_images * 32**2 // size**2)
    X = noise(n, size)
    dim = DIMTransformer(max_epochs=1, batch_size=batch_size, device="cpu", random_state=0).fit(X)
    seconds = seconds_of(lambda: dim.partial_fit(X)) / n
    encode_seconds = seconds_of(lambda: dim.transform(X)) / n

    net, model = dim.net_, dim.net_.module_
    model.train()
    flop = {}
    # Two batch sizes tell what an image costs by itself from what it costs for each other one.
    for n_batch in (batch_size // 2, batch_size):
        batch = torch.randn(n_batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as flops:
            net.train_step(batch)
        flop[n_batch] = flops.get_total_flops() / n_batch
    pair_flop = (flop[batch_size] - flop[batch_size // 2]) / (batch_size - batch_size // 2)
    with OperationCounter() as operations:
        net.train_step(batch)
    with SavedBytes(model) as saved:
        net.train_step(batch)
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as encode_flops:
        _, features = model.encoder(batch)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Workload(
        size=size,
        seconds=seconds,
        encode_seconds=encode_seconds,
        flop=flop[batch_size] - pair_flop * batch_size,
        pair_flop=pair_flop,
        encode_flop=encode_flops.get_total_flops() / len(batch),
        n_operations=operations.n,
        saved_bytes=saved.total,
        n_weights=sum(weight.numel() for weight in model.parameters()),
        norm_channels=[norm.num_features for norm in norms],
        n_critics=len(model.critics),
        n_units=dim.mi_units,
        n_locations=math.prod(features.shape[2:]),
        decode_seconds=decode_seconds(size),
        gather_bytes=gather_bytes(size, batch_size),
    )


def decode_seconds(size, n=64):
    """Seconds to decode a JPEG file of a smooth image on one core, as `skdim.files.read_images` does."""
    picture = Image.fromarray(noise(1, 8)[0]).resize((size, size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.jpg") for i in range(n)]
        for path in paths:
            path.write_bytes(stream.getvalue())
        return seconds_of(lambda: read_images(paths)) / n


def gather_bytes(size, batch_size, total=1 << 28):
    """Bytes a second that one thread copies of random images of an array in memory into batches."""
    images = np.ones((total // (3 * size**2), size, size, 3), dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return images.nbytes / seconds_of(lambda: [len(images[rows]) for rows in batches])


def bytes_a_step(workload, n_gpus, batch_size):
    """Bytes that each GPU sends in a step, by what they are."""
    n_images = n_gpus * batch_size
    share = (n_gpus - 1) / n_gpus
    return {
        # A ring sends every number twice: once to be added, once to be spread.
        "gradients": 2 * share * NUMBER * workload.n_weights,
        # Forward and backward.
        "embeddings": 2 * share * NUMBER * n_images * workload.n_units * workload.n_critics,
        "reductions": 2 * share * NUMBER * n_images * workload.n_critics,
        # Mean and variance of each process to all, and the sums of two gradients.
        "statistics": (n_gpus + 2) * share * NUMBER * 2 * sum(workload.norm_channels),
    }


def n_collectives(workload):
    """Count those of a step: two gradients; forward and backward, two for each critic and one for each batch norm."""
    return 2 + 2 * (2 * workload.n_critics + len(workload.norm_channels))


def step_parts(workload, n_images, n_gpus, batch, options):
    """Seconds of one step by what they are spent on, of `batch` images on each GPU."""
    is_one_host = n_gpus <= HOST_GPUS
    network, latency = (pair[0 if is_one_host else 1] for pair in (options.network, options.latency))
    rate = options.tflops * 1e12
    pairs = workload.pair_flop * batch * batch * n_gpus
    if batch * batch * n_gpus * workload.n_locations > MAX_PAIR_ELEMENTS["cuda"]:
        # Not kept, but computed again in the backward pass: four multiplications instead of three.
        pairs *= 4 / 3
    sent = sum(bytes_a_step(workload, n_gpus, batch).values())
    size = n_images * workload.image_bytes / 1e9
    n_hosts = math.ceil(n_gpus / HOST_GPUS)
    read = batch * workload.image_bytes
    return {
        "compute": batch * workload.flop / rate,
        "pairs": pairs / rate,
        "launch": workload.n_operations * options.launch * 1e-6,
        "network": sent / (network * 1e9) + n_collectives(workload) * latency * 1e-6 if n_gpus > 1 else 0.0,
        "gather": read / workload.gather_bytes if size > options.resident else 0.0,
        # Each host reads what its own GPUs take.
        "disk": read * min(n_gpus, HOST_GPUS) / (options.disk * 1e9) if size > options.host_memory * n_hosts else 0.0,
    }


def step_seconds(parts):
    """Seconds of a step, and what binds it.

    Launching runs beside computing, and reading beside both; the network waits for them, as there is one all-reduce of
    all gradients after the backward pass.
    """
    reading = max(parts["gather"], parts["disk"])
    on_gpu = max(parts["compute"] + parts["pairs"], parts["launch"]) + parts["network"]
    names = ("gather", "disk") if reading > on_gpu else ("compute", "pairs", "launch", "network")
    return max(reading, on_gpu), max(names, key=parts.__getitem__)


def duration(seconds):
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def money(dollars):
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2g}"


def print_table(header, rows):
    print(f"| {' | '.join(header)} |")
    print(f"|{'|'.join(' --- ' for _ in header)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def print_measured(workloads, batch_size):
    rows = {
        "processor seconds to train on 1000 images": lambda w: f"{1e3 * w.seconds:.2f}",
        "processor seconds to transform 1000 images": lambda w: f"{1e3 * w.encode_seconds:.2f}",
        "GFLOP an image, training, alone": lambda w: f"{w.flop / 1e9:.3f}",
        "MFLOP an image, training, for each image of its batch": lambda w: f"{w.pair_flop / 1e6:.3f}",
        "GFLOP an image, transform": lambda w: f"{w.encode_flop / 1e9:.4f}",
        "operations a step": lambda w: str(w.n_operations),
        "million weights in training": lambda w: f"{w.n_weights / 1e6:.2f}",
        "MB of weights, gradients and moments": lambda w: f"{NUMBERS_PER_WEIGHT * NUMBER * w.n_weights / 1e6:.0f}",
        f"MB kept for the backward pass, batch of {batch_size}": lambda w: f"{w.saved_bytes / 1e6:.0f}",
        "batch norms, and their channels": lambda w: f"{len(w.norm_channels)}, {sum(w.norm_channels)}",
        "processor ms to decode a JPEG file": lambda w: f"{1e3 * w.decode_seconds:.2f}",
        "GB/s gathered at random from memory": lambda w: f"{w.gather_bytes / 1e9:.1f}",
    }
    header = ["measured", *(f"3 x {each.size} x {each.size}" for each in workloads)]
    print_table(header, [[name, *map(show, workloads)] for name, show in rows.items()])


def print_bytes(workload, batch_size):
    columns = {n_gpus: bytes_a_step(workload, n_gpus, batch_size) for n_gpus in (2, 8, 1024)}
    rows = [[name, *(f"{sent[name] / 1e6:.3g}" for sent in columns.values())] for name in columns[2]]
    rows.append(["together", *(f"{sum(sent.values()) / 1e6:.3g}" for sent in columns.values())])
    print_table([f"MB a step, {workload.size} x {workload.size}", *(f"{n} GPUs" for n in columns)], rows)


def cells(workload, n_images, n_gpus, batch, options):
    """Compute a row's steps, their time, what binds and the price."""
    seconds, binds = step_seconds(step_parts(workload, n_images, n_gpus, batch, options))
    n_steps = math.ceil(n_images / (n_gpus * batch))
    price = 20 * n_steps * seconds / 3600 * n_gpus * options.price
    times = [duration(n_steps * seconds), duration(20 * n_steps * seconds)]
    return [f"{20 * n_steps:,}", f"{1e3 * seconds:.2f}", binds, *times, money(price)]


COLUMNS = ["steps in 20 epochs", "ms a step", "binds", "1 epoch", "20 epochs", "price of 20"]


def print_times(workloads, options):
    sets = {"1 M": 10**6, "100 M": 10**8, "10 B": 10**10}
    rows = [
        [name, str(workload.size), str(n_gpus), *cells(workload, n_images, n_gpus, options.batch_size, options)]
        for workload in workloads
        for name, n_images in sets.items()
        for n_gpus in (1, 8, 1024)
    ]
    print_table(["images", "side", "GPUs", *COLUMNS], rows)


def print_batches(workload, options):
    rows = [
        [str(batch), str(n_gpus), f"{batch * n_gpus:,}", *cells(workload, 10**8, n_gpus, batch, options)]
        for n_gpus, batches in ((8, (16, 128, 1024)), (1024, (2, 8, 32, 128)))
        for batch in batches
    ]
    header = [f"images a GPU, of 100 M, {workload.size} x {workload.size}", "GPUs", "global batch", *COLUMNS]
    print_table(header, rows)


def main():
    options = parse_arguments()
    print(f"{describe_machine(torch.device('cpu'))}; images of noise, seed 0\n")
    workloads = [measure(size, options.n_images, options.batch_size) for size in options.sizes]
    print_measured(workloads, options.batch_size)
    print_bytes(workloads[0], options.batch_size)
    print_times(workloads, options)
    print_batches(workloads[0], options)


if __name__ == "__main__":
    main()
