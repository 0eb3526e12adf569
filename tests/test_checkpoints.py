import copy
import errno
import json
import multiprocessing
import os
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from skorch.callbacks import Callback, EarlyStopping, Freezer, LRScheduler
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import DCGANEncoder
from skdim.model import MAX_PAIR_ELEMENTS


class Dropping(nn.Module):
    """An encoder that draws from torch's global generator, with tied weights."""

    def __init__(self, image_shape, n_components, p=0.2):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.tied = self.norm
        self.drop = nn.Dropout(p)
        self.linear = nn.LazyLinear(n_components)

    def forward(self, images):
        features = torch.relu(self.norm(self.conv(images)))
        return self.linear(self.drop(features.flatten(1))), features


class AtEpoch(Callback):
    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == self.epoch:
            self.act(net)


class Epochs(Callback):
    """Counts the epochs it sees."""

    def __init__(self):
        self.numbers = []

    def on_epoch_begin(self, net, **kwargs):
        self.numbers.append(len(net.history))


class Boom(Exception):
    pass


def boom(net):
    raise Boom


def small(checkpoint_dir=None, **params):
    defaults = {"encoder": Dropping, "max_epochs": 4, "batch_size": 50, "mi_units": 8, "random_state": 0}
    return DIMTransformer(8, checkpoint_dir=checkpoint_dir, **defaults | params)


def broken_off(X, folder, epoch, error=Boom, **params):
    """Train until an epoch, of which no checkpoint is written any more."""

    def raise_error(net):
        raise error

    callbacks = [*params.pop("callbacks", []), AtEpoch(epoch, raise_error)]
    with pytest.raises(error):
        small(folder, callbacks=callbacks, **params).fit(X)


def bits(dim):
    """Everything of a trained transformer but times."""
    state = {f"model {name}": value.clone() for name, value in dim.net_.module_.state_dict().items()}
    for name in dim.net_._optimizers:
        for i, values in enumerate(getattr(dim.net_, name + "_").state.values()):
            state |= {f"{name} {i} {key}": value.clone() for key, value in values.items()}
    state["generator"] = dim.net_.generator.get_state()
    history = [[(name, value) for name, value in epoch.items() if "second" not in name] for epoch in dim.history_]
    return state, history


def assert_same_bits(one, other):
    (state, history), (other_state, other_history) = bits(one), bits(other)
    assert history == other_history
    assert state.keys() == other_state.keys()
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def X(digits):
    return digits[0][:100]


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_going_on_at_any_epoch_gives_equal_bits(X, tmp_path, epoch):
    uninterrupted = small().fit(X)
    broken_off(X, tmp_path, epoch)
    seen = Epochs()
    resumed = small(tmp_path, callbacks=[seen]).fit(X)
    assert seen.numbers == [*range(epoch, 5)]
    assert_same_bits(resumed, uninterrupted)
    assert np.array_equal(resumed.transform(X), uninterrupted.transform(X))
    assert resumed.n_iter_ == 4
    assert resumed.loss_curve_ == uninterrupted.loss_curve_
    assert names(tmp_path) == ["epoch-000003.safetensors", "epoch-000004.safetensors"]


@pytest.mark.parametrize(
    "params",
    [
        {"encoder": "dcgan", "negatives": "shuffle"},
        {"encoder": "stride1", "discriminator": "concat", "mi_estimator": "jsd", "negatives": "roll"},
        {"prior_weight": 0, "lr_schedule": "constant", "precision": "float32"},
        {"prior": "normal", "precision": "bfloat16", "local_weight": 0, "global_weight": 1.0},
    ],
)
def test_every_part_of_the_state_is_taken_up(colour_images, tmp_path, params):
    X, _ = colour_images
    params = {"batch_size": 20, "max_epochs": 3} | params
    uninterrupted = small(**params).fit(X)
    broken_off(X, tmp_path, 2, **params)
    assert_same_bits(small(tmp_path, **params).fit(X), uninterrupted)


def test_weights_that_the_backward_pass_makes_again_in_bfloat16_are_not_the_next_steps(X, tmp_path, monkeypatch):
    # Scores of a few embeddings at a time, and once more in the backward pass.
    monkeypatch.setitem(MAX_PAIR_ELEMENTS, "cpu", 1)
    params = {"discriminator": "concat", "precision": "bfloat16", "lr": 0.01, "lr_schedule": "constant"}
    uninterrupted = small(**params).fit(X)
    broken_off(X, tmp_path, 2, **params)
    assert_same_bits(small(tmp_path, **params).fit(X), uninterrupted)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_going_on_on_cuda(digits, tmp_path):
    X, _ = digits
    for params in ({}, {"encoder": "dcgan"}):
        folder = tmp_path / str(len(params))
        uninterrupted = small(device="cuda", **params).fit(X)
        broken_off(X, folder, 3, device="cuda", **params)
        assert_same_bits(small(folder, device="cuda", **params).fit(X), uninterrupted)


def test_a_training_may_be_interrupted_again_and_again(X, tmp_path):
    for epoch in (1, 2, 2, 3, 4):
        broken_off(X, tmp_path, epoch)
    assert_same_bits(small(tmp_path).fit(X), small().fit(X))


def test_an_interrupt_propagates_and_nothing_is_lost(X, tmp_path):
    broken_off(X, tmp_path, 3, error=KeyboardInterrupt)
    assert names(tmp_path) == ["epoch-000001.safetensors", "epoch-000002.safetensors"]
    assert_same_bits(small(tmp_path).fit(X), small().fit(X))


def test_a_training_that_is_over_is_loaded(X, tmp_path):
    first = small(tmp_path).fit(X)
    seen = Epochs()
    again = small(tmp_path, callbacks=[seen]).fit(X)
    assert seen.numbers == []
    assert_same_bits(again, first)
    assert again.history_ == first.history_
    untrained = small(tmp_path / "untrained", max_epochs=0)
    assert np.array_equal(untrained.fit(X).transform(X), untrained.fit(X).transform(X))


def test_more_epochs_at_a_constant_rate(X, tmp_path):
    params = {"lr_schedule": "constant"}
    small(tmp_path, max_epochs=2, **params).fit(X)
    assert_same_bits(small(tmp_path, max_epochs=4, **params).fit(X), small(max_epochs=4, **params).fit(X))
    with pytest.raises(ValueError, match="max_epochs=3, but the checkpoint has 4 epochs of training"):
        small(tmp_path, max_epochs=3, **params).fit(X)


def test_a_training_that_was_broken_off_ends_where_it_stood(X, tmp_path):
    params = {"lr_schedule": "constant"}
    broken_off(X, tmp_path, 2, max_epochs=5, **params)
    assert_same_bits(small(tmp_path, max_epochs=2, **params).fit(X), small(max_epochs=2, **params).fit(X))


def test_without_a_random_state_the_first_attempts_seed_is_taken_over(X, tmp_path):
    broken_off(X, tmp_path, 3, random_state=None)
    shutil.copytree(tmp_path, tmp_path / "copy")
    one = small(tmp_path, random_state=None).fit(X)
    assert_same_bits(small(tmp_path / "copy", random_state=None).fit(X), one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.01}, r"other parameters \(lr: 0.002 there, 0.01 here\)"),
        ({"batch_size": 20, "negatives": "roll"}, r"\(batch_size: 50 there, 20 here; negatives: 'batch' there, 'roll'"),
        ({"max_epochs": 5}, r"\(max_epochs: 4 there, 5 here\)"),
        ({"random_state": 1}, r"\(seed drawn from random_state: \d+ there, \d+ here\)"),
        ({"encoder": "dcgan"}, r"\(encoder: '.*\.Dropping' there, 'dcgan' here\)"),
        ({"precision": "bfloat16"}, r"\(precision: 'torch.float32' there, 'torch.bfloat16' here\)"),
    ],
)
def test_other_parameters_are_refused_by_name(X, tmp_path, changed, message):
    params = {"precision": "float32", "max_epochs": 4}
    broken_off(X, tmp_path, 2, **params)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **params | changed).fit(X)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


OTHER_VALUES = {
    "n_components": 5,
    "encoder": "stride1",
    "local_weight": 2.0,
    "global_weight": 0.5,
    "prior_weight": 0.2,
    "coordinate_weight": 0.1,
    "mi_estimator": "jsd",
    "discriminator": "concat",
    "mi_units": 9,
    "negatives": "roll",
    "local_samples": 2,
    "prior": "normal",
    "prior_matching": "noise",
    "multiple_globals": True,
    "augmentation": "standard",
    "occlusion": True,
    "max_epochs": 2,
    "batch_size": 20,
    "lr": 0.01,
    "lr_schedule": "constant",
    "compile": True,
    "precision": "bfloat16",
}
# Those that change no training, and those that tests of their own change.
OTHERS = {"image_shape", "data_format", "output_layer", "warm_start", "verbose", "callbacks", "checkpoint_dir"}
OTHERS |= {"device", "random_state", "distributed", "gather_negatives"}


def test_all_parameters_are_compared_or_excepted():
    assert {*OTHER_VALUES, *OTHERS} == set(DIMTransformer().get_params(deep=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch's compiler
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_each_parameter_counts(colour_images, tmp_path, name):
    X = colour_images[0][:30]
    params = {"n_components": 4, "mi_units": 8, "max_epochs": 1, "precision": "float32", "random_state": 0}
    DIMTransformer(**params, checkpoint_dir=tmp_path).fit(X)
    with pytest.raises(ValueError, match=f"{name}: .* there, .* here"):
        DIMTransformer(**params | {"checkpoint_dir": tmp_path, name: OTHER_VALUES[name]}).fit(X)


def test_what_does_not_change_training_may_change(colour_images, tmp_path):
    X, _ = colour_images
    broken_off(X, tmp_path, 2, encoder="dcgan")
    channels_last = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
    params = {"encoder": "dcgan", "device": "cpu", "data_format": "channels_last", "output_layer": "hidden"}
    dim = small(tmp_path, **params).fit(channels_last)
    assert dim.n_iter_ == 4


def test_an_encoder_instance_with_other_weights_is_refused(X, tmp_path):
    encoder = Dropping((1, 8, 8), 8)
    broken_off(X, tmp_path, 2, encoder=encoder)
    assert small(tmp_path, encoder=copy.deepcopy(encoder)).fit(X).n_iter_ == 4
    with torch.no_grad():
        encoder.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"encoder: 'test_checkpoints.Dropping .*' there"):
        small(tmp_path, encoder=encoder).fit(X)


def test_an_encoder_class_that_has_changed_is_refused(X, tmp_path):
    widths = [16, 17]

    class Changing(Dropping):
        def __init__(self, image_shape, n_components):
            super().__init__(image_shape, n_components)
            self.more = nn.Linear(3, widths.pop())

    broken_off(X, tmp_path, 2, encoder=Changing)
    with pytest.raises(ValueError, match="checkpoint is of another model than the parameters give"):
        small(tmp_path, encoder=Changing).fit(X)


@pytest.mark.parametrize("change", ["pixel", "order", "fewer", "dtype"])
def test_other_images_are_refused(colour_images, tmp_path, change):
    X, _ = colour_images
    broken_off(X, tmp_path, 2)
    other = X.copy()
    other[-1, -1, -1, -1] ^= 1
    other = {"pixel": other, "order": X[::-1], "fewer": X[1:], "dtype": X.astype(np.float32)}[change]
    with pytest.raises(ValueError, match=r"holds the training of other images \(images: .*'shape': \[60, 3, 12, 10\]"):
        small(tmp_path).fit(other)


def test_the_last_images_count_too(colour_images, tmp_path, monkeypatch):
    # As if they were many more.
    monkeypatch.setattr("skdim.images.CHUNK_BYTES", 4000)
    X = colour_images[0].copy()
    broken_off(X, tmp_path, 2)
    X[-1, -1, -1, -1] ^= 1
    with pytest.raises(ValueError, match="holds the training of other images"):
        small(tmp_path).fit(X)


def damage(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content.clear()
    elif how == "truncated":
        del content[rng.integers(1, len(content)) :]
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        first, last = {"length": (0, 8), "header": (8, header), "tensors": (header, len(content))}[how]
        content[rng.integers(first, last)] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "truncated", "length", "header", "tensors"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(X, tmp_path, how, counted):
    rng = np.random.default_rng(0)
    params = {"max_epochs": 3, "prior_weight": 0}
    expected = small(**params).fit(X)
    broken_off(X, tmp_path / "whole", 3, **params)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "epoch-000002.safetensors", how, rng)
        with pytest.warns(UserWarning, match=r"epoch-000002.safetensors' is damaged \(it.*goes on from epoch-000001"):
            resumed = small(folder, **params).fit(X)
        assert_same_bits(resumed, expected)
        assert names(folder) == ["epoch-000002.safetensors", "epoch-000003.safetensors"]
        counted("damaged checkpoints found")


class Heavier(Callback):
    """Makes the prior's loss count more from epoch to epoch."""

    def on_epoch_end(self, net, **_):
        net.criterion_.weights = net.criterion_.weights | {"prior": 2 * net.criterion_.weights["prior"]}


@pytest.mark.parametrize("make", [LRScheduler, Heavier], ids=["warm restarts", "weights"])
def test_what_a_callback_has_come_to_goes_on(X, tmp_path, make):
    params = {"lr_schedule": "constant"}
    broken_off(X, tmp_path, 3, callbacks=[make()], **params)
    resumed = small(tmp_path, callbacks=[make()], **params).fit(X)
    assert_same_bits(resumed, small(callbacks=[make()], **params).fit(X))


def test_state_of_a_callback_that_no_checkpoint_holds_is_named(X, tmp_path):
    class Opaque:
        def state_dict(self):
            return {"what": object()}

    class Holder(Callback):
        def initialize(self):
            self.opaque_ = Opaque()
            return self

    with pytest.warns(UserWarning, match=r"Checkpoints leave out the state of Holder.opaque_"):
        small(tmp_path, callbacks=[Holder()], max_epochs=1).fit(X)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(X, tmp_path, monkeypatch):
    broken_off(X, tmp_path, 3)
    newest = tmp_path / max(names(tmp_path))
    read = Path.read_bytes

    def read_from_failing_disk(path):
        if path == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_from_failing_disk)
    message = rf"{newest.name}' is damaged \(Input/output error\); training goes on from epoch-000001"
    with pytest.warns(UserWarning, match=message):
        resumed = small(tmp_path).fit(X)
    assert_same_bits(resumed, small().fit(X))


def test_checkpoints_that_cannot_be_read_are_not_said_to_be_damaged(X, tmp_path):
    for epoch in (1, 2):
        (tmp_path / f"epoch-{epoch:06}.safetensors").mkdir()
    with pytest.raises(OSError, match=r"checkpoint_dir=.* cannot be used: Is a directory"):
        small(tmp_path).fit(X)


def test_going_on_is_told_to_the_log(X, tmp_path, caplog):
    broken_off(X, tmp_path, 3)
    newest = max(names(tmp_path))
    with caplog.at_level("INFO", "skdim"):
        small(tmp_path).fit(X)
    assert f"Training goes on from {tmp_path / newest}" in caplog.text


def test_nothing_but_damaged_checkpoints_is_an_error(X, tmp_path):
    broken_off(X, tmp_path, 3)
    for path in tmp_path.iterdir():
        damage(path, "tensors", np.random.default_rng(0))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"All checkpoints in checkpoint_dir=.* are damaged"):
        small(tmp_path).fit(X)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_file_holds_tensors_and_json_and_has_the_umasks_mode(X, tmp_path):
    umask = os.umask(0o027)
    try:
        small(tmp_path / "new", max_epochs=1).fit(X)
    finally:
        os.umask(umask)
    (path,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with safe_open(path, "pt") as file:
        tree = json.loads(file.metadata()["tree"])
        assert "/state/model/encoder.linear.weight" in file.keys()  # noqa: SIM118
    assert tree["dict"][0][0] == "identity"


def test_left_over_files_are_swept(X, tmp_path):
    (tmp_path / ".epoch-000007.safetensors.0badcafe.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    small(tmp_path).fit(X)
    expected = ["epoch-000003.safetensors", "epoch-000004.safetensors", "notes.txt"]
    assert names(tmp_path) == expected
    # As a process leaves it that is killed between writing one and removing another.
    shutil.copy(tmp_path / expected[0], tmp_path / "epoch-000002.safetensors")
    small(tmp_path).fit(X)
    assert names(tmp_path) == expected


def test_the_newest_of_a_million_checkpoints_is_taken(X, tmp_path):
    small(tmp_path).fit(X)
    for old, new in (("000003", "999999"), ("000004", "1000000")):
        (tmp_path / f"epoch-{old}.safetensors").rename(tmp_path / f"epoch-{new}.safetensors")
    seen = Epochs()
    small(tmp_path, callbacks=[seen]).fit(X)
    assert seen.numbers == []


def test_a_directory_is_for_one_training_at_a_time(X, tmp_path):
    def fit_another(net):
        with pytest.raises(ValueError, match="is in use by another training"):
            small(tmp_path, random_state=1).fit(X)

    small(tmp_path, callbacks=[AtEpoch(1, fit_another)]).fit(X)
    assert small(tmp_path).fit(X).n_iter_ == 4


def test_a_path_that_is_no_directory_is_refused(X, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"checkpoint_dir='.*file.*' cannot be used: "):
            small(path).fit(X)
    assert (tmp_path / "file").read_text() == "mine"


def test_warm_start_and_partial_fit(X, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_dir needs warm_start=False"):
        small(tmp_path, warm_start=True).fit(X)
    small(tmp_path).partial_fit(X)
    assert names(tmp_path) == []


def test_early_stopping_goes_on_counting(X, tmp_path):
    def stopping():
        return EarlyStopping(monitor="train_loss", threshold=100.0, threshold_mode="abs", patience=3, load_best=True)

    params = {"max_epochs": 9, "lr_schedule": "constant"}
    uninterrupted = small(callbacks=[stopping()], **params).fit(X)
    assert uninterrupted.n_iter_ == 4
    broken_off(X, tmp_path, 3, callbacks=[stopping()], **params)
    resumed = small(tmp_path, callbacks=[stopping()], **params).fit(X)
    assert_same_bits(resumed, uninterrupted)
    again = small(tmp_path, callbacks=[stopping()], **params).fit(X)
    assert_same_bits(again, uninterrupted)


def test_a_scheduler_of_skorch_and_frozen_weights_go_on(X, tmp_path):
    def callbacks():
        halve = LRScheduler(policy="StepLR", step_size=2, gamma=0.5)
        return [("halve", halve), ("freeze", Freezer(lambda name: name.startswith("encoder.conv"), at=2))]

    params = {"lr_schedule": "constant"}
    uninterrupted = small(callbacks=callbacks(), **params).fit(X)
    broken_off(X, tmp_path, 4, callbacks=callbacks(), **params)
    assert_same_bits(small(tmp_path, callbacks=callbacks(), **params).fit(X), uninterrupted)
    assert uninterrupted.net_.optimizer_.param_groups[0]["lr"] == 0.002 / 4


def test_what_no_checkpoint_can_hold_is_left_out_with_a_warning(X, tmp_path):
    record = AtEpoch(1, lambda net: net.history.record("mine", object()))
    with pytest.warns(UserWarning, match="Checkpoints leave out what a callback has recorded as mine"):
        dim = small(tmp_path, callbacks=[record]).fit(X)
    assert_same_bits(small(tmp_path).fit(X), dim)


class Blur:
    """An augmentation that holds an array."""

    __slots__ = ("strength",)

    def __init__(self, strength):
        self.strength = np.array(strength, dtype=np.float32)

    def __call__(self, images, generator):
        return images * float(1 - self.strength)

    def softer(self, images, generator):
        return self(images, generator)


def scaled_by(factor):
    return lambda images, generator: factor * images


class Endless:
    def __init__(self):
        self.itself = self

    def __call__(self, images, generator):
        return images


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (Blur(0.5), Blur(0.9)),
        (Blur(0.5).softer, Blur(0.9).softer),
        (scaled_by(0.5), scaled_by(0.9)),
        (lambda images, generator: 0.5 * images, lambda images, generator: 0.9 * images),
        (lambda images, generator: images.sin(), lambda images, generator: images.cos()),
        (Endless(), Blur(0.5)),
    ],
)
def test_augmentations_are_told_apart_by_what_they_hold(X, tmp_path, there, here):
    with pytest.raises(RuntimeError, match="stop"):
        small(tmp_path, augmentation=there, callbacks=[AtEpoch(2, raise_stop)]).fit(X)
    with pytest.raises(ValueError, match=r"holds the training of other parameters .augmentation: "):
        small(tmp_path, augmentation=here).fit(X)
    assert_same_bits(small(tmp_path, augmentation=there).fit(X), small(augmentation=there).fit(X))


def raise_stop(net):
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    "params", [{"encoder": "resnet", "occlusion": True}, {"output_layer": "conv"}, {"augmentation": lambda X, g: X[:1]}]
)
def test_parameters_are_refused_before_the_directory_is_made(X, tmp_path, params):
    with pytest.raises(ValueError, match=r"occlusion=True|output_layer|augmentation must return"):
        small(tmp_path / "new", **params).fit(X)
    assert params.get("occlusion") or not (tmp_path / "new").exists()


def test_a_file_system_without_locks_on_folders_serves(X, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert_same_bits(small(tmp_path).fit(X), small().fit(X))


@pytest.mark.parametrize(
    ("checkpointed", "epoch", "message"),
    [
        (False, 1, r"loss term '\w+' is nan in epoch 2"),
        (False, 4, "embeddings are not finite after the last step"),
        (True, 1, r"weight 'encoder\.\S+' is not finite after epoch 1"),
        (True, 4, r"weight 'encoder\.\S+' is not finite after epoch 4"),
    ],
)
def test_a_weight_that_becomes_nan_is_an_error_within_an_epoch(X, tmp_path, checkpointed, epoch, message):
    def poison(net):
        with torch.no_grad():
            next(net.module_.encoder.parameters()).view(-1)[0] = torch.nan

    dim = small(tmp_path if checkpointed else None, callbacks=[AtEpoch(epoch, poison)])
    with pytest.raises(FloatingPointError, match=message):
        dim.fit(X)
    assert not hasattr(dim, "encoder_")
    if checkpointed:
        assert names(tmp_path) == [f"epoch-00000{i}.safetensors" for i in (2, 3) if i < epoch]
        assert_same_bits(small(tmp_path).fit(X), small().fit(X))


def test_a_loss_that_is_not_finite_ends_a_long_epoch_early():
    X = np.random.default_rng(0).random((1200, 16), dtype=np.float32)
    batches = []

    class Count(Dropping):
        def forward(self, images):
            if self.training:
                batches.append(len(images))
            embedding, features = super().forward(images)
            return embedding + (torch.nan if len(batches) > 10 else 0), features

    with pytest.raises(FloatingPointError, match=r"The loss term '\w+' is nan in epoch 1"):
        small(encoder=Count, batch_size=2, max_epochs=1, prior_weight=0).fit(X)
    # After few steps more, but not at each, for which the host would wait for the device.
    assert 50 <= len(batches) <= 300


def test_a_learning_rate_far_too_high_is_an_error(X):
    with pytest.raises(FloatingPointError, match=r"training diverged. Lower lr"):
        small(lr=1e9, lr_schedule="constant", max_epochs=3, batch_size=10).fit(X)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
@pytest.mark.parametrize("fitted", [False, True])
def test_out_of_memory_says_what_to_lower(X, error, fitted):
    class Hungry(Dropping):
        short = False

        def forward(self, images):
            if self.training and Hungry.short:
                raise error
            return super().forward(images)

    dim = small(encoder=Hungry, max_epochs=1)
    if fitted:
        expected = dim.fit(X).transform(X)
    Hungry.short = True
    for train in (dim.fit, dim.partial_fit):
        with pytest.raises(
            torch.OutOfMemoryError, match=r"Out of memory on \w+.* lower batch_size \(now 50\), then mi_units \(now 8\)"
        ):
            train(X)
    assert hasattr(dim, "encoder_") == fitted
    if fitted:
        assert np.array_equal(dim.transform(X), expected)


def test_another_error_of_the_encoder_stays_what_it_is(X):
    class Bad(Dropping):
        def forward(self, images):
            if self.training:
                raise RuntimeError("mine")
            return super().forward(images)

    with pytest.raises(RuntimeError, match=r"^mine$"):
        small(encoder=Bad).fit(X)


def test_a_divergence_names_the_term_and_not_their_sum(digits):
    class Broken(DCGANEncoder):
        def forward(self, images):
            embedding, features = super().forward(images)
            return embedding + (torch.nan if self.training else 0), features

    with pytest.raises(FloatingPointError, match=r"The loss term '(local|prior|prior_discriminator)' is nan"):
        small(encoder=Broken).fit(digits[0])


def test_files_of_the_user_are_neither_read_nor_removed(X, tmp_path):
    copies = [tmp_path / name for name in ("epoch-000002-keep.safetensors", "epoch-before-change.safetensors")]

    def copy_checkpoint(net):
        for path in copies:
            shutil.copy(tmp_path / "epoch-000002.safetensors", path)

    broken_off(X, tmp_path, 5, max_epochs=6, callbacks=[AtEpoch(3, copy_checkpoint)])
    epochs = Epochs()
    small(tmp_path, max_epochs=6, callbacks=[AtEpoch(7, boom), epochs]).fit(X)
    assert epochs.numbers == [5, 6]
    assert all(path.exists() for path in copies)


def test_checkpoints_stay_where_they_are_if_a_callback_goes_to_another_folder(X, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    small("here", callbacks=[AtEpoch(1, lambda net: os.chdir("elsewhere"))]).fit(X)
    assert (tmp_path / "here" / "epoch-000004.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_a_callback_forks_does_not_keep_the_folder(X, tmp_path):
    sleepers = []

    def fork(net):
        sleepers.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True))
        sleepers[-1].start()

    params = {"lr_schedule": "constant", "max_epochs": 2}
    small(tmp_path, callbacks=[AtEpoch(1, fork)], **params).fit(X)
    assert small(tmp_path, **params | {"max_epochs": 3}).fit(X).n_iter_ == 3
    assert sleepers[0].is_alive()
    sleepers[0].kill()
    sleepers[0].join()


def test_an_alarm_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise TimeoutError("time is up")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TimeoutError, match="time is up"):
        DIMTransformer(2, mi_units=4, max_epochs=1, random_state=0, checkpoint_dir=tmp_path).fit(
            np.random.default_rng(0).random((16, 1, 8, 8))
        )
