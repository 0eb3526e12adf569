"""Speed of training and of transform, each as a ratio to a plain baseline measured in the same run.

    python examples/benchmarks/throughput.py            # all sections
    python examples/benchmarks/throughput.py a d h      # some of them

Sections: (a) a bare training loop against fit, (b) the stride-1 network trained as published against the same recipe
here, (c) the official code's training step against the same recipe here, (d) the bare encoder against transform, (e)
skorch's own NeuralNet.fit against fit, (f) share of the machine's matrix-multiply rate and of a roofline, and the
operations that take longest, (g) peak memory, (h) cost against the number of images, the batch size and the critics'
width, (i) on CUDA alone, 100 epochs of 50,000 images, at the defaults and compiled. The images are noise: speed does
not depend on them. The baselines are written here, for the comparison only, as plainly as their originals. A ratio is
the median of several pairs of runs, one after the other, so that a drift of the machine's speed falls on both. Each
section runs in a process of its own, as each baseline would: the allocator keeps what one section freed, and the
official step gains a fifth from it when it follows section (b).
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from skorch import NeuralNet
from torch import nn
from torch.nn.functional import log_softmax, softplus
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from skdim import DIMTransformer
from skdim.batches import Standardizer
from skdim.devices import full_float32, resolve_device
from skdim.encoders import DCGANEncoder, Stride1Encoder
from skdim.images import Images
from skdim.net import MIN_RECORDED_STEPS

DEVICE = resolve_device("auto")

# Images of section (h).
NUMBERS = (1000, 5000, 20_000, 50_000)


def noise(n, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8).astype(dtype, copy=False)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work):
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def compare(title, baseline, ours, n_images, repeats):
    """Print images/s of both and the ratio ours / baseline, median (least to greatest) of the pairs."""
    baseline()
    ours()
    times = [(seconds_of(baseline), seconds_of(ours)) for _ in range(repeats)]
    ratios = [a / b for a, b in times]
    rates = [n_images / statistics.median(each) for each in zip(*times, strict=True)]
    print(
        f"{title:60}{rates[0]:>10.0f}{rates[1]:>10.0f}{statistics.median(ratios):>9.2f}"
        f"  ({min(ratios):.2f} to {max(ratios):.2f}, {repeats} pairs)",
        flush=True,
    )


def trained_net(n=256, **params):
    """Give an estimator whose net can be stepped by hand."""
    return DIMTransformer(**{"max_epochs": 1, "random_state": 0, "lr_schedule": "constant"} | params).fit(noise(n))


def standardized_batches(dim, n, batch_size):
    standardize = Standardizer(dim.mean_, dim.std_, DEVICE)
    images = Images(noise(n), (3, 32, 32), True)
    return [standardize(images.take(slice(i, i + batch_size))) for i in range(0, n, batch_size)]


def bare_loop(dim, batches, epochs):
    """Train the same modules with the same losses and optimizers, and nothing else."""
    model, net = dim.net_.module_, dim.net_
    weights = {"local": dim.local_weight, "global": dim.global_weight, "prior": dim.prior_weight}
    model.train()
    for _ in range(epochs):
        for batch in batches:
            with torch.autocast(DEVICE.type, dtype=net.autocast_dtype, enabled=net.autocast_dtype is not None):
                terms, _, embedding = model([batch], net.generator)
            net.prior_optimizer_.zero_grad()
            model.prior_discriminator_loss(embedding, net.generator).backward()
            net.prior_optimizer_.step()
            terms["prior"] = model.prior_loss(embedding)
            loss = sum(weights[name] * term for name, term in terms.items())
            net.optimizer_.zero_grad()
            loss.backward()
            net.optimizer_.step()


def section_a(arguments):
    """Section (a): bare loop, batches on the device | fit."""
    n = arguments.n_images
    epochs = enough_epochs(2, n)
    dim = trained_net()
    batches = standardized_batches(dim, n, dim.batch_size)
    X = noise(n)
    fit = DIMTransformer(max_epochs=epochs, random_state=0)
    compare(
        "(a) bare loop | fit, defaults",
        lambda: bare_loop(dim, batches, epochs),
        lambda: fit.fit(X),
        n * epochs,
        arguments.repeats,
    )


class PublishedStride1(nn.Module):
    """The stride-1 system as published: both sides concatenated for every pair, the map rolled."""

    def __init__(self):
        super().__init__()
        self.encoder = Stride1Encoder((3, 32, 32), 64)
        self.global_conv = nn.Sequential(nn.Conv2d(128, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3))
        self.global_head = nn.Sequential(
            nn.Linear(32 * 22 * 22 + 64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)
        )
        self.local_head = nn.Sequential(
            nn.Conv2d(128 + 64, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 1), nn.ReLU(), nn.Conv2d(512, 1, 1)
        )
        self.prior_head = nn.Sequential(
            nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
        )

    def score(self, embedding, features):
        tiled = embedding[:, :, None, None].expand(-1, -1, 26, 26)
        local = self.local_head(torch.cat([features, tiled], dim=1))
        flat = self.global_conv(features).flatten(1)
        return local, self.global_head(torch.cat([flat, embedding], dim=1))

    def loss(self, images):
        embedding, features = self.encoder(images)
        others = torch.cat([features[1:], features[:1]])
        terms = [
            softplus(-positive).mean() + softplus(negative).mean()
            for positive, negative in zip(self.score(embedding, features), self.score(embedding, others), strict=True)
        ]
        prior = torch.rand_like(embedding)
        prior_loss = -(
            torch.sigmoid(self.prior_head(prior)).log().mean()
            + (1 - torch.sigmoid(self.prior_head(embedding))).log().mean()
        )
        return terms[0] + 0.5 * terms[1] + 0.1 * prior_loss


def published_stride1_epoch(model, images):
    encoder = list(model.encoder.parameters())
    known = {id(parameter) for parameter in encoder}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizers = [torch.optim.Adam(encoder, lr=1e-4), torch.optim.Adam(heads, lr=1e-4)]
    for batch in images:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        loss.item()


STRIDE1_RECIPE = {
    "encoder": "stride1",
    "discriminator": "concat",
    "mi_estimator": "jsd",
    "negatives": "roll",
    "local_weight": 1.0,
    "global_weight": 0.5,
    "prior_weight": 0.1,
    "mi_units": 512,
    "batch_size": 64,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "max_epochs": 1,
    "random_state": 0,
}


def section_b(arguments):
    """Section (b): stride-1 network as published | the same recipe here."""
    # On the CPU, where it takes long, 256 by default.
    n = arguments.n_images // 16 if DEVICE.type == "cpu" else 8192
    model = PublishedStride1().to(DEVICE)
    images = torch.from_numpy(noise(n, np.float32) / 255).permute(0, 3, 1, 2).contiguous().to(DEVICE).split(64)
    X = noise(n)
    recipe = DIMTransformer(**STRIDE1_RECIPE)
    for precision in ("auto", "float32"):
        recipe.set_params(precision=precision)
        compare(
            f"(b) stride-1 step as published, float32 | fit, {precision}",
            lambda: published_stride1_epoch(model, images),
            lambda: recipe.fit(X),
            n,
            arguments.repeats,
        )


class OfficialHead(nn.Module):
    """The official 1 x 1 convolution network with its layer norm."""

    def __init__(self, n_in, n_units):
        super().__init__()
        self.nonlinear = nn.Sequential(
            nn.Conv1d(n_in, n_units, 1, bias=False), nn.BatchNorm1d(n_units), nn.ReLU(), nn.Conv1d(n_units, n_units, 1)
        )
        self.shortcut = nn.Conv1d(n_in, n_units, 1)
        self.norm = nn.LayerNorm(n_units)

    def forward(self, x):
        return self.norm((self.nonlinear(x) + self.shortcut(x)).permute(0, 2, 1)).permute(0, 2, 1)


class OfficialLocal(nn.Module):
    """The official local objective: every positive gets its own row of all negatives."""

    def __init__(self, n_units):
        super().__init__()
        self.encoder = DCGANEncoder((3, 32, 32), 64)
        self.local_head = OfficialHead(128, n_units)
        self.global_head = OfficialHead(64, n_units)

    def loss(self, images):
        embedding, features = self.encoder(images)
        local = self.local_head(features.flatten(2))
        vector = self.global_head(embedding[:, :, None])
        n, units, n_locations = local.shape
        positive = torch.matmul(local.permute(0, 2, 1), vector)
        rows = local.permute(0, 2, 1).reshape(-1, units)
        negative = torch.mm(vector[:, :, 0], rows.t()).reshape(n, 1, n, n_locations)
        others = 1 - torch.eye(n, device=images.device)[:, None, :, None]
        negative = negative * others - 10 * (1 - others)
        negative = negative.reshape(n, 1, -1).expand(-1, n_locations, -1)
        return -log_softmax(torch.cat([positive, negative], dim=2), dim=2)[:, :, 0].mean()


def official_epochs(model, optimizer, images, epochs):
    for _ in range(epochs):
        for batch in images:
            optimizer.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            optimizer.step()
            loss.item()


OFFICIAL_RECIPE = {
    "mi_units": 512,
    "batch_size": 64,
    "global_weight": 0.0,
    "prior_weight": 0.0,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "max_epochs": 1,
    "random_state": 0,
}


def official_images(n):
    return torch.from_numpy(noise(n, np.float32) / 255).permute(0, 3, 1, 2).contiguous().to(DEVICE)


def section_c(arguments):
    """Section (c): the official local step | the same recipe here."""
    n = arguments.n_images // 2
    epochs = enough_epochs(1, n, **OFFICIAL_RECIPE)
    model = OfficialLocal(512).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images = official_images(n).split(64)
    X = noise(n)
    recipe = DIMTransformer(**OFFICIAL_RECIPE | {"max_epochs": epochs})
    for precision in ("auto", "float32"):
        recipe.set_params(precision=precision)
        compare(
            f"(c) official step, 512 units, float32 | fit, {precision}",
            lambda: official_epochs(model, optimizer, images, epochs),
            lambda: recipe.fit(X),
            n * epochs,
            arguments.repeats,
        )


def section_d(arguments):
    """Section (d): bare encoder | transform."""
    n = arguments.n_images
    dim = trained_net(max_epochs=0)
    X = noise(n)
    batches = standardized_batches(dim, n, 256)

    @torch.inference_mode()
    def bare():
        # As transform computes: without TF32.
        with full_float32:
            for batch in batches:
                dim.encoder_(batch)

    compare("(d) bare encoder, batches on the device | transform", bare, lambda: dim.transform(X), n, arguments.repeats)


class PlainModel(nn.Module):
    """What a skorch user would write: a module that returns the loss terms."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def forward(self, images):
        terms, _, embedding = self.model([images], self.generator)
        return torch.stack([*terms.values(), self.model.prior_loss(embedding)])


class PlainCriterion(nn.Module):
    """The weighted sum of the local and the prior's term."""

    def forward(self, terms, _):
        return terms[0] + 0.1 * terms[1]


def section_e(arguments):
    """Section (e): skorch's own fit | fit."""
    n = arguments.n_images
    epochs = enough_epochs(1, n)
    model = trained_net().net_.module_
    images = np.ascontiguousarray(noise(n, np.float32).transpose(0, 3, 1, 2) / 255)
    X = noise(n)
    net = NeuralNet(
        PlainModel(model).to(DEVICE),
        criterion=PlainCriterion,
        optimizer=torch.optim.Adam,
        lr=1e-3,
        batch_size=128,
        max_epochs=epochs,
        train_split=None,
        verbose=0,
        device=str(DEVICE),
    )
    ours = DIMTransformer(max_epochs=epochs, random_state=0)
    for precision in ("auto", "float32"):
        ours.set_params(precision=precision)
        compare(
            f"(e) skorch NeuralNet.fit, DataLoader, float32 | fit, {precision}",
            lambda: net.fit(images),
            lambda: ours.fit(X),
            n * epochs,
            arguments.repeats,
        )


class Roofline(TorchDispatchMode):
    """Adds up, over all operations, the longer of computing and of moving each input and output once."""

    def __init__(self, flops, bandwidth):
        super().__init__()
        self.flops, self.bandwidth = flops, bandwidth
        self.seconds = self.n_flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function.is_view or function.name().startswith(("aten::empty", "aten::detach")):
            return output
        n_flops = 0
        if function.overloadpacket in flop_registry:
            n_flops = flop_registry[function.overloadpacket](*args, **kwargs, out_val=output)
        # What is updated in place, as by the optimizer, is read and written.
        written = output if output is not None else args
        tensors = [each for each in tree_leaves((args, kwargs, written)) if isinstance(each, torch.Tensor)]
        n_bytes = sum(each.nbytes for each in tensors)
        self.seconds += max(n_flops / self.flops, n_bytes / self.bandwidth)
        self.n_flops += n_flops
        return output


def matmul_rate(dtype, size=2048):
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    for _ in range(3):
        a @ a
    # A GPU takes as long for one as the launch and the wait beside it.
    n = 50 if DEVICE.type == "cuda" else 1
    seconds = min(seconds_of(lambda: [a @ a for _ in range(n)]) for _ in range(10)) / n
    return 2 * size**3 / seconds


def bandwidth(n_bytes=1 << 28):
    """Bytes read and written a second, in copying what no cache holds."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=DEVICE)
    target = source.clone()
    return 2 * n_bytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(5))


def enough_epochs(least, n_images, batch_size=128, **_):
    """On CUDA as many as it takes for steps to be recorded, and for that to weigh little."""
    steps = -(-n_images // batch_size)
    return max(least, -(-3 * MIN_RECORDED_STEPS // steps)) if DEVICE.type == "cuda" else least


def print_operations(net, batch, n_steps=10, n_printed=12):
    """Print which operations a step's time goes to, launched one by one: on CUDA that of their kernels."""
    on_cuda = DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(n_steps):
            net.update(batch)
        synchronize()
    operations = [each for each in profiler.key_averages() if each.key.startswith("aten::")]
    times = {each: each.self_device_time_total if on_cuda else each.self_cpu_time_total for each in operations}
    total = sum(times.values())
    print(f"(f)   {total / n_steps:.0f} µs a step in operations, of which")
    for each in sorted(operations, key=times.get, reverse=True)[:n_printed]:
        share = f"{times[each] / total:.0%}"
        print(f"(f)   {each.key:44}{each.count / n_steps:>6.0f} times{times[each] / n_steps:>10.0f} µs{share:>6}")


def section_f(arguments):
    """Section (f): operations a second as a share of the matrix-multiply rate and of the roofline; the longest ones."""
    half, single, copying = matmul_rate(torch.bfloat16), matmul_rate(torch.float32), bandwidth()
    print(
        f"(f) 2048 x 2048 matrix multiply {half / 1e12:.3f} TFLOP/s bfloat16, {single / 1e12:.3f} float32; "
        f"copy {copying / 1e9:.0f} GB/s read and written"
    )
    X = noise(arguments.n_images)
    for params in ({}, {"batch_size": 512}):
        dim = trained_net(512, **params)
        batch = standardized_batches(dim, dim.batch_size, dim.batch_size)[0]
        dim.net_.module_.train()
        dim.net_.update(batch)
        with Roofline(half, copying) as roofline:
            dim.net_.update(batch)
        # The last epochs, because setting up is not what is asked about.
        n_epochs = enough_epochs(1 + arguments.repeats, len(X), **params)
        epochs = DIMTransformer(max_epochs=n_epochs, random_state=0, **params).fit(X).history_[1:]
        rate = statistics.median(epoch["images_per_second"] for epoch in epochs)
        per_image = roofline.n_flops / len(batch)
        share = roofline.seconds / len(batch) * rate
        print(
            f"(f) {params or 'defaults'}: {rate:.0f} images/s x {per_image / 1e9:.3f} GFLOP = "
            f"{rate * per_image / 1e12:.3f} TFLOP/s, {rate * per_image / half:.0%} of bfloat16; {share:.0%} of a "
            f"roofline of {len(batch) / roofline.seconds:.0f} images/s",
            flush=True,
        )
        print_operations(dim.net_, batch)


def peak_memory(work):
    """Run `work` in a process of its own; return GB at its start and at its peak."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_memory, args=(work, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a process whose memory is measured ended with {process.exitcode}")
    return queue.get()


def _status(field):
    """Read a field of this process's memory, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def _measure_memory(work, queue):
    prepared = work("prepare")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
        work("run", prepared)
        queue.put((before, torch.cuda.max_memory_allocated() / 1e9))
        return
    # The peak is reset first: a child starts with its parent's, and making the data has a peak of its own.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work("run", prepared)
    queue.put((before, _status("VmHWM")))


class FitMemory:
    """Fit on n images; picklable, for a process of its own."""

    def __init__(self, n, flat=False, **params):
        self.n, self.flat, self.params = n, flat, params

    def __call__(self, step, X=None):
        if step == "prepare":
            X = noise(self.n)
            return np.ascontiguousarray(X.transpose(0, 3, 1, 2)).reshape(self.n, -1) if self.flat else X
        DIMTransformer(**{"max_epochs": 1, "random_state": 0} | self.params).fit(X)
        return None


class OfficialMemory:
    """One step of the official form."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __call__(self, step, images=None):
        if step == "prepare":
            return official_images(self.batch_size)
        model = OfficialLocal(512).to(DEVICE)
        model.loss(images).backward()
        return None


def section_g(arguments):
    """Section (g): peak memory above the data, each in a process of its own."""
    rows = [
        ("fit, 50,000 images, defaults", FitMemory(50_000)),
        ("fit, 50,000 rows with image_shape=(3, 32, 32)", FitMemory(50_000, flat=True, image_shape=(3, 32, 32))),
        ("fit, 4,096 images, batch 1024", FitMemory(4096, batch_size=1024)),
        ("fit, 4,096 images, batch 2048", FitMemory(4096, batch_size=2048)),
        ("fit, official recipe, batch 256", FitMemory(1024, **OFFICIAL_RECIPE | {"batch_size": 256})),
        ("official step, batch 256", OfficialMemory(256)),
    ]
    for title, work in rows:
        before, after = peak_memory(work)
        print(f"(g) {title:56}{after - before:>8.2f} GB above the {before:.2f} GB of interpreter and data", flush=True)
    print(
        f"(g) {'official step, batch 1024, one score tensor alone':56}{1024**2 * 64**2 * 4 / 1e9:>8.2f} GB (computed)"
    )


def section_h(arguments):
    """Section (h): cost against n, batch size and units."""
    settings = [("n", n, {}) for n in NUMBERS]
    settings += [("batch_size", size, {"batch_size": size}) for size in (64, 128, 256, 512, 1024, 2048)]
    settings += [("mi_units", units, {"mi_units": units}) for units in (64, 128, 256, 512, 1024, 2048)]
    costs = []
    for name, value, params in settings:
        n = value if name == "n" else arguments.n_images
        X = noise(n)
        # Several epochs of few images: set-up is not what is asked about.
        epochs = enough_epochs(max(1, 5000 // n), n, **params)
        dim = DIMTransformer(max_epochs=epochs, random_state=0, **params)
        dim.fit(X[:1000] if name == "n" else X)
        runs = [seconds_of(lambda dim=dim, X=X: dim.fit(X)) for _ in range(min(3, arguments.repeats))]
        seconds = statistics.median(runs)
        cost = 1e3 * seconds / n / epochs
        print(f"(h) {name:>12} = {value:<8}{cost:>10.3f} ms an image and epoch", flush=True)
        if name == "n":
            costs.append(cost)
    middle = (max(costs) + min(costs)) / 2
    print(
        f"(h) from {NUMBERS[0]:,} to {NUMBERS[-1]:,} images: {middle:.3f} ms an image within "
        f"{max(costs) / middle - 1:.0%}",
        flush=True,
    )


def section_i(arguments):
    """Section (i): 100 epochs of 50,000 images."""
    if DEVICE.type == "cpu":
        print("(i) 100 epochs of 50,000 images: on CUDA only")
        return
    n, epochs = 50_000, 100
    X = noise(n)
    for params in ({}, {"compile": True}, {"compile": True, "batch_size": 512}):
        dim = DIMTransformer(max_epochs=epochs, random_state=0, **params)
        seconds = seconds_of(lambda dim=dim: dim.fit(X))
        first, *others = (epoch["seconds"] for epoch in dim.history_)
        print(
            f"(i) {epochs} epochs of {n} images, {params or 'defaults'}: {seconds:.1f} s, of which the first epoch "
            f"took {first:.2f} s and the others {statistics.median(others):.3f} s each",
            flush=True,
        )


SECTIONS = {
    function.__name__[-1]: function
    for function in (section_a, section_b, section_c, section_d, section_e, section_f, section_g, section_h, section_i)
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", choices=[*SECTIONS, []], help="letters of the sections to run (default all)"
    )
    parser.add_argument("--n-images", type=int, default=4096, help="images an epoch (default 4096)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default 5)")
    arguments = parser.parse_args(argv)
    chosen = arguments.sections or list(SECTIONS)
    print(f"{describe_machine(DEVICE)}; images of 3 x 32 x 32, noise, seed 0")
    print(f"{'':60}{'images/s':>10}{'images/s':>10}{'ratio':>9}", flush=True)
    for letter in chosen:
        process = multiprocessing.get_context("spawn").Process(target=SECTIONS[letter], args=(arguments,))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"section ({letter}) failed")


if __name__ == "__main__":
    main()
