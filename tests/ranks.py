"""Trainings by several processes: ``python ranks.py FOLDER SCENARIO:SIZE ...``.

test_distributed.py runs this in a process of its own, which imports once and computes nothing, so that a fork is cheap
and safe. Each scenario is run by SIZE forked processes, with the environment that torchrun gives, and what it returns
in each of them is pickled to FOLDER. Prints a JSON object with the exit statuses.
"""

import copy
import itertools
import json
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which torch imports at the first step; here once for all children
import torch.distributed as dist
from skorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import skdim.distributed
import skdim.model
import skdim.monitoring
from skdim import DIMTransformer

FOLDER = Path(sys.argv[1])
X = np.random.default_rng(0).random((64, 1, 8, 8), dtype=np.float32)
COLOURS = np.random.default_rng(1).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)


class Boom(Exception):
    pass


class Encoder(nn.Module):
    """Small, with batch norms on a map and on vectors, and, if asked for, dropout."""

    p = 0.0

    def __init__(self, image_shape, n_components, multiple_globals=False):
        super().__init__()
        channels, height, width = image_shape
        self.conv = nn.Sequential(nn.Conv2d(channels, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6))
        self.hidden = nn.Linear(6 * height * width // 4, 12, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(self.p)
        self.linear = nn.Linear(12, n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        hidden = torch.relu(self.norm(self.hidden(features.flatten(1))))
        return self.linear(self.drop(hidden)), features


class Dropping(Encoder):
    p = 0.2


def mirrored(images, generator):
    """An augmentation that draws nothing: every other call mirrors."""
    mirrored.calls += 1
    return images.flip(3) if mirrored.calls % 2 else images


mirrored.calls = 0

SMALL = {"n_components": 8, "encoder": Encoder, "mi_units": 8, "batch_size": 32, "max_epochs": 2, "random_state": 0}
COMMON = {**SMALL, "device": "cpu", "precision": "float32"}

OBJECTIVES = ("infonce", "jsd", "dv", "kl", "rkl", "hellinger", "chi2")
GRID = {
    **{
        f"{objective} dot": {"mi_estimator": objective, "global_weight": 0.5}
        for objective in ("infonce", "jsd", "dv", "chi2")
    },
    **{
        f"{objective} concat": {"mi_estimator": objective, "discriminator": "concat", "global_weight": 0.5}
        for objective in ("infonce", "dv", "hellinger")
    },
    "roll": {"negatives": "roll", "global_weight": 0.5},
    "shuffle": {"negatives": "shuffle", "mi_estimator": "dv"},
    "shuffle concat": {"negatives": "shuffle", "mi_estimator": "jsd", "discriminator": "concat", "prior_weight": 0},
    "mixed": {"negatives": {"local": ("batch", "roll"), "global": ("shuffle",)}, "global_weight": 0.5},
    "normal prior": {"prior": "normal", "prior_weight": 1.0},
    "uniform noise": {"prior_matching": "noise"},
    "normal noise": {"prior_matching": "noise", "prior": "normal"},
    "coordinates": {"coordinate_weight": 1.0, "local_samples": 5},
    "views": {"augmentation": mirrored, "global_weight": 0.5, "negatives": ("batch", "shuffle")},
    "views noise": {"augmentation": mirrored, "prior_matching": "noise", "prior": "normal"},
    "views occlusion": {"augmentation": mirrored, "occlusion": True},
    "views locations": {"augmentation": mirrored, "local_samples": 4},
    "many maps": {"encoder": "dcgan", "multiple_globals": True},
    "occlusion": {"occlusion": True},
    "chunks": {"chunks": 200, "global_weight": 0.5},
    "chunks concat": {"chunks": 3000, "discriminator": "concat"},
    "odd number of images": {"n_images": 59, "batch_size": 24, "max_epochs": 2},
    "constant rate": {"lr_schedule": "constant", "lr": 1e-4, "local_weight": 0.3},
}


class FirstGradients(Callback):
    def initialize(self):
        self.gradients = {}

    def on_train_begin(self, net, **kwargs):
        # What an objective does not depend on, a bias of all its scores for one, has gradients of rounding alone, which
        # Adam would make as large as all others.
        for group in net.optimizer_.param_groups:
            group["eps"] = 1e-4

    def on_grad_computed(self, net, named_parameters, **kwargs):
        if not self.gradients:
            self.gradients = {name: weight.grad.clone() for name, weight in named_parameters if weight.grad is not None}


class AtEpoch(Callback):
    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == self.epoch:
            self.act()


class AtBatch(Callback):
    """Acts in the midst of an epoch, after the first batch of the second one."""

    def __init__(self, act):
        self.act = act

    def on_grad_computed(self, net, **kwargs):
        if len(net.history) == 2:
            self.act()


def new(size, **params):
    return DIMTransformer(**{**COMMON, "distributed": size > 1, **params})


def without_times(history):
    return [{name: value for name, value in epoch.items() if "second" not in name} for epoch in history]


def result(dim):
    """Everything of a trained transformer but times."""
    state = {name: value.clone() for name, value in dim.net_.module_.state_dict().items()}
    for name in dim.net_._optimizers:
        for i, values in enumerate(getattr(dim.net_, name + "_").state.values()):
            state |= {f"{name} {i} {key}": value.clone() for key, value in values.items()}
    return {"history": without_times(dim.history_), "state": state, "mean": dim.mean_, "std": dim.std_}


# Of the many, what four processes may do that two do not.
OF_FOUR = ("infonce dot", "dv concat", "mixed", "views", "odd number of images")


def trained(size, n_images=64, chunks=1 << 24, **params):
    """Train on some images, with so many pairs at once."""
    skdim.model.MAX_PAIR_ELEMENTS["cpu"] = chunks
    gradients = FirstGradients()
    dim = new(size, callbacks=[gradients], **{"max_epochs": 1, **params}).fit(X[:n_images])
    return result(dim) | {"gradients": gradients.gradients}


def grid(rank, size):
    return {name: trained(size, **GRID[name]) for name in (OF_FOUR if size == 4 else GRID)}


def product(rank, size):
    """All objectives, critics, negatives and priors with each other.

    One step each: in the next one, among so many, rounding takes some unit across the kink of a ReLU.
    """
    priors = (
        {"prior_weight": 0},
        *(
            {"prior": prior, "prior_matching": how}
            for prior in ("uniform", "normal")
            for how in ("adversarial", "noise")
        ),
    )
    choices = itertools.product(OBJECTIVES, ("dot", "concat"), ("batch", "roll", "shuffle"), priors)
    return {
        f"{objective} {critic} {negatives} {prior}": trained(
            size,
            batch_size=64,
            mi_estimator=objective,
            discriminator=critic,
            negatives=negatives,
            global_weight=0.5,
            **prior,
        )
        for objective, critic, negatives, prior in choices
    }


class Recorded(Dataset):
    """Notes which images are read."""

    def __init__(self):
        self.rows = []

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.rows.append(index)
        return X[index]


def rows(rank, size):
    """Which images a process reads: for statistics and checks, and in each epoch."""
    data = Recorded()
    read = []

    def note():
        read.append(data.rows[:])
        data.rows.clear()

    class Note(Callback):
        def on_train_begin(self, net, **kwargs):
            note()

        def on_epoch_end(self, net, **kwargs):
            note()

    new(size, callbacks=[Note()]).fit(data)
    return read


def estimators(rank, size):
    """What every process should have the same of: pickles, embeddings, draws without a seed, and no process group."""
    np.random.seed(rank)  # noqa: NPY002
    dim = new(size, encoder="dcgan", random_state=None, global_weight=0.5, max_epochs=1).fit(COLOURS)
    norms = [type(module).__name__ for module in dim.encoder_.modules() if "Norm" in type(module).__name__]
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in dim.net_.module_.modules())
    copies = []

    class Copy(Callback):
        def on_epoch_end(self, net, **kwargs):
            copies.append(pickle.loads(pickle.dumps(copy.deepcopy(net.module_.encoder))))

    params = {"augmentation": "standard", "precision": "bfloat16", "callbacks": [Copy()]}
    augmented = new(size, max_epochs=1, **params).fit(COLOURS)
    few = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "pickle": pickle.dumps(dim),
        "generator": dim.net_.generator.get_state(),
        "Z": dim.transform(COLOURS),
        "augmented": augmented.transform(COLOURS),
        "is_initialized": dist.is_initialized(),
        "copy": torch.equal(copies[0].eval()(few)[0], augmented.encoder_(few)[0]),
        "norms": norms,
        "hooks": hooks,
    }


def going_on(rank, size):
    """Train by partial_fit and warm_start."""
    dim = new(size, lr_schedule="constant")
    for _ in range(2):
        dim.partial_fit(X)
    after_two = result(dim)
    dim.set_params(warm_start=True, max_epochs=1).fit(X)
    return after_two, result(dim)


def apart(rank, size):
    """Negatives of a process' own images only; counts the exchanges of embeddings."""
    counted = []
    gather = skdim.distributed.Group.gather

    def count(self, values, n_views=1):
        counted.append(self.size)
        return gather(self, values, n_views)

    skdim.distributed.Group.gather = count
    params = {"gather_negatives": False, "mi_estimator": "dv", "negatives": ("batch", "roll")}
    return result(new(size, **params).fit(X)), counted


def resumed(rank, size):
    """Break off and go on; everything that draws at random is in it."""
    params = {"encoder": Dropping, "augmentation": "standard", "max_epochs": 3, "batch_size": 20, "prior": "normal"}
    uninterrupted = new(size, **params).fit(COLOURS)

    def boom():
        raise Boom

    folder = FOLDER / f"resumed-{size}"
    with suppress(Boom):
        new(size, checkpoint_dir=folder, callbacks=[AtEpoch(2, boom)], **params).fit(COLOURS)
    saved = sorted(path.name for path in folder.iterdir())
    again = new(size, checkpoint_dir=folder, **params).fit(COLOURS)
    over = new(size, checkpoint_dir=folder, **params).fit(COLOURS)
    return saved, result(uninterrupted), result(again), result(over)


def failure(work):
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class Branching(Encoder):
    """Takes another way, through more or less weights, in each process and step."""

    def __init__(self, image_shape, n_components):
        super().__init__(image_shape, n_components)
        self.short = nn.Linear(n_components, n_components)
        self.long = nn.Sequential(nn.Linear(n_components, 9), nn.Linear(9, n_components))

    def forward(self, images):
        embedding, features = super().forward(images)
        if self.training:
            embedding = self.short(embedding) if torch.rand(()) < 0.5 else self.long(embedding)
        return embedding, features


class Normed(Encoder):
    def __init__(self, image_shape, n_components):
        super().__init__(image_shape, n_components)
        self.conv[1] = self.make_norm()

    def forward(self, images):
        dtype = next(self.conv[1].parameters(), images).dtype
        features = torch.relu(self.conv[1](self.conv[0](images).to(dtype))).to(images.dtype)
        hidden = torch.relu(self.norm(self.hidden(features.flatten(1))))
        return self.linear(hidden), features


class Tracking(Normed):
    def make_norm(self):
        return nn.InstanceNorm2d(6, track_running_stats=True)


class Untracked(Normed):
    def make_norm(self):
        return nn.BatchNorm2d(6, track_running_stats=False)


class Biasless(Normed):
    def make_norm(self):
        norm = nn.BatchNorm2d(6)
        norm.bias = None
        return norm


class Double(Normed):
    def make_norm(self):
        return nn.BatchNorm2d(6).double()


def own_modules(rank, size):
    """What encoders of one's own may hold."""
    kinds = (Branching, Tracking, Untracked, Biasless, Double)
    return {kind.__name__: result(new(size, encoder=kind, max_epochs=3).fit(X)) for kind in kinds}


def copies(rank, size):
    """Copies that callbacks make know nothing of other processes, and nor does transform."""

    class Average(Callback):
        def on_train_begin(self, net, **kwargs):
            self.average_ = AveragedModel(net.module_)

        def on_epoch_end(self, net, **kwargs):
            self.average_.update_parameters(net.module_)
            if rank == 0:
                dim.transform(X)

        def on_train_end(self, net, **kwargs):
            net.module_ = self.average_

    dim = new(size, encoder=Untracked, callbacks=[Average()])
    dim.fit(X)
    dim.encoder_.train()(torch.from_numpy(X[:4]))
    dim.encoder_.eval()
    return result(dim), failure(lambda: dim.set_params(distributed=False, callbacks=None).partial_fit(X))


class Failing(Encoder):
    def forward(self, images):
        if self.training and os.environ["RANK"] == "1":
            raise Boom("mine")
        return super().forward(images)


def failures(rank, size):
    """Errors that befall or are found by one process or all; after each the next training begins anew."""

    def boom():
        if rank == 1:
            raise Boom("mine")

    spoilt = X.copy()
    if rank == 1:
        spoilt[3] = np.nan
    occupied = FOLDER / "occupied"
    occupied.write_text("")
    dim = new(size)
    cases = {
        "parameters": lambda: new(size, lr=1e-3 * (1 + rank)).fit(X),
        "images": lambda: new(size).fit(X[: 64 - rank]),
        "first images": lambda: new(size).fit(X[::-1] if rank else X),
        "callbacks": lambda: new(size, callbacks=[AtBatch(boom)] if rank else []).fit(X),
        "named callbacks": lambda: new(size, callbacks=[("it", AtBatch(boom) if rank else AtEpoch(9, boom))]).fit(X),
        "checkpoint_dir": lambda: new(size, checkpoint_dir=FOLDER / "one" if rank else None).fit(X),
        "method": lambda: (new(size, max_epochs=1).fit if rank else new(size, max_epochs=1).partial_fit)(X),
        "validation": lambda: new(size).fit(spoilt),
        "callback": lambda: new(size, callbacks=[AtEpoch(1, boom)]).fit(X),
        "step": lambda: dim.set_params(encoder=Failing).fit(X),
        "directory": lambda: new(size, checkpoint_dir=occupied).fit(X),
        "loader": lambda: new(size).fit(DataLoader(torch.from_numpy(X), 8)),
        "compile": lambda: new(size, compile=True).fit(X),
        "batch_size": lambda: new(size, batch_size=3).fit(X),
        "few": lambda: new(size).fit(X[:3]),
    }
    found = {name: failure(case) for name, case in cases.items()}
    found["fitted"] = hasattr(dim, "encoder_")
    found["after"] = failure(lambda: new(size).fit(X))
    return found


def stops(rank, size):
    """A callback that stops training in one process only."""

    def stop():
        if rank == 1:
            raise skdim.monitoring.StopTraining

    return new(size, max_epochs=4, callbacks=[AtEpoch(2, stop)]).fit(X).n_iter_


KILLED = {"encoder": Dropping, "max_epochs": 4}


def broken_off(rank, size, act, **params):
    """Train until `act`; return the error and the seconds that it took to come."""
    moment = []

    def note():
        moment.append(time.perf_counter())
        act()

    dim = new(size, callbacks=[AtEpoch(3, note)], **KILLED, **params)
    error = failure(lambda: dim.fit(X))
    return error, time.perf_counter() - moment[0], hasattr(dim, "encoder_")


def whole(rank, size):
    return result(new(size, **KILLED).fit(X))


def killed(rank, size, victim=1):
    def die():
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    return broken_off(rank, size, die, checkpoint_dir=FOLDER / f"killed-{size}-{victim}")


def killed_first(rank, size):
    return killed(rank, size, victim=0)


def taken_up(rank, size):
    seen = []
    callbacks = [AtEpoch(epoch, lambda epoch=epoch: seen.append(epoch)) for epoch in range(1, 5)]
    dim = new(size, checkpoint_dir=FOLDER / f"killed-{size}-1", callbacks=callbacks, **KILLED).fit(X)
    return seen, result(dim)


def stalled(rank, size):
    """The last process stops for good; the time limit is the user's."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    number = FOLDER / f"stalled-{size}.pid"

    def stall():
        if rank == size - 1:
            number.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    outcome = broken_off(rank, size, stall)
    if rank == 0:
        os.kill(int(number.read_text()), signal.SIGKILL)
    return outcome


def absent(rank, size):
    """Only one process comes to train."""
    skdim.distributed.TIME_LIMIT = timedelta(seconds=2)
    return failure(lambda: new(size).fit(X)) if rank == 0 else None


def start(scenario, rank, size, port):
    """Run in a fork; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        if size > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
        outcome = globals()[scenario](rank, size)
        (FOLDER / f"{scenario}-{size}-{rank}.pkl").write_bytes(pickle.dumps(outcome))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main():
    statuses = {}
    for name in sys.argv[2:]:
        scenario, _, size = name.partition(":")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        begin = time.perf_counter()
        children = [start(scenario, rank, int(size), port) for rank in range(int(size))]
        statuses[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(name, f"{time.perf_counter() - begin:.1f} s", statuses[name], file=sys.stderr)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
