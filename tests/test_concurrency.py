"""Others at work in the process, and processes that it is forked into."""

import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from skdim import DIMTransformer
from skdim.devices import full_float32

IMAGES = np.random.default_rng(0).random((40, 1, 6, 6), dtype=np.float32)


class Dropping(nn.Module):
    """An encoder that draws from torch's global generator."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(n_components))

    def forward(self, images):
        features = torch.relu(self.conv(images)) + 0.01 * torch.rand(1)
        return self.head(features), features


class AtEpochs(Callback):
    """Calls a function of its own at the end of each epoch."""

    def __init__(self, *actions):
        self.actions = list(actions)

    def on_epoch_end(self, net, **kwargs):
        if self.actions:
            self.actions.pop(0)()


def small(**params):
    return DIMTransformer(4, **{"mi_units": 8, "batch_size": 10, "max_epochs": 2, "random_state": 0} | params)


class Jittered(Dataset):
    """Images that differ each time, by numbers from torch's global generator."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index] + 0.01 * torch.rand(1).numpy()


# What draws from torch's global generators: an encoder; a DataLoader and its dataset.
DRAWING = [({"encoder": Dropping}, IMAGES), ({}, DataLoader(Jittered(), batch_size=10, shuffle=True))]
drawing = pytest.mark.parametrize(("params", "X"), DRAWING, ids=["encoder", "loader"])


@drawing
def test_others_may_load_while_what_draws_from_global_generators_trains(params, X):
    stored = pickle.dumps(small().fit(IMAGES))
    loading = threading.Thread(target=pickle.loads, args=(stored,), daemon=True)

    def load():
        loading.start()
        loading.join(timeout=30)
        assert not loading.is_alive()

    small(callbacks=[AtEpochs(load)], **params).fit(X)


@drawing
def test_global_generators_are_the_users_between_the_steps_of_what_draws_from_them(params, X):
    drawn = []
    torch.manual_seed(3)
    expected, after = torch.rand(2), torch.rand(2)
    torch.manual_seed(3)
    dim = small(callbacks=[AtEpochs(lambda: drawn.append(torch.rand(2)))], **params).fit(X)
    assert torch.equal(drawn[0], expected)
    assert torch.equal(torch.rand(2), after)
    assert dim.loss_curve_ == small(**params).fit(X).loss_curve_


def test_transform_of_a_loader_draws_alike_and_leaves_global_generators_to_the_user():
    dim = small().fit(IMAGES)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Z = dim.transform(DataLoader(Jittered(), batch_size=10))
    assert torch.equal(torch.rand(2), expected)
    assert np.array_equal(Z, dim.transform(DataLoader(Jittered(), batch_size=10)))


class Waiting(Dataset):
    """Images that are there when they are let go."""

    def __init__(self):
        self.free = threading.Event()

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        assert self.free.wait(timeout=60)
        return IMAGES[index]


def test_a_loader_that_another_thread_reads_has_no_say_in_what_a_training_draws():
    def fit(*actions):
        loader = DataLoader(list(IMAGES), batch_size=10, shuffle=True)
        return small(max_epochs=4, callbacks=[AtEpochs(*actions)]).fit(loader).loss_curve_

    alone = fit()
    waiting = Waiting()
    other = threading.Thread(target=lambda: small(max_epochs=0).fit(DataLoader(waiting, batch_size=10, shuffle=True)))

    def start():
        other.start()
        # So that it has come as far as it comes, and is in the middle of drawing for some steps.
        time.sleep(0.2)
        threading.Timer(0.2, waiting.free.set).start()

    beside = fit(start)
    other.join()
    assert beside == alone


def test_filters_of_warnings_are_left_alone(monkeypatch):
    with full_float32:  # only what comes first may say that it is deprecated
        pass

    entered = []
    catch_warnings = warnings.catch_warnings
    monkeypatch.setattr(warnings, "catch_warnings", lambda **options: entered.append(True) or catch_warnings(**options))
    with full_float32:
        assert not torch.backends.cudnn.allow_tf32
    # They are the whole process's, and another thread may put its own back meanwhile.
    assert not entered


FORKS = """
    import multiprocessing, pickle, sys, threading, time
    import numpy as np, torch
    from skdim.evaluation import LinearProbe, retrieval_scorer
    from test_concurrency import Dropping, small

    context = multiprocessing.get_context("fork")

    def ends(work):
        process = context.Process(target=work)
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
        return process.exitcode == 0

    def transform():
        assert np.allclose(dim.transform(images), embeddings, atol=1e-5)

    # On two threads, which a fork has not.
    torch.set_num_threads(2)
    images = np.random.default_rng(0).random((64, 3, 20, 20), dtype=np.float32)
    dim = small(batch_size=32).fit(images)
    embeddings = dim.transform(images)
    assert ends(transform), "transform"
    assert ends(lambda: retrieval_scorer(dim, images)), "scorer"
    wide = np.random.default_rng(0).standard_normal((600, 400))
    assert ends(lambda: LinearProbe(device="cpu").fit(wide, np.arange(600) % 2)), "probe"

    class Slow(Dropping):
        def forward(self, images):
            if self.training:
                busy.set()
                time.sleep(0.3)
            return super().forward(images)

    stored = pickle.dumps(dim)
    busy = threading.Event()
    training = threading.Thread(target=small(encoder=Slow).fit, args=(images[:10],))
    training.start()
    busy.wait()
    assert ends(lambda: pickle.loads(stored).transform(images)), "loading"
    training.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_load_and_transform():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKS)]
    subprocess.run(command, env=environment, check=True, timeout=300)
