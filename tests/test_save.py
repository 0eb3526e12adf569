import os
import pickle
import re
import sys
import warnings

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch.callbacks import LRScheduler
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import ENCODERS
from skdim.persistence import InvalidFileError
from skdim.views import StandardAugmentation

RNG = np.random.default_rng(0)
ROWS = RNG.random((12, 16))
IMAGES = RNG.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)


def fitted(X=ROWS, **params):
    return DIMTransformer(**({"n_components": 4, "max_epochs": 1, "random_state": 0} | params)).fit(X)


def saved(dim, folder):
    path = folder / "dim.safetensors"
    dim.save(path)
    return path


def same_state(one, other):
    """Compare all that a pickle of an estimator holds, bit by bit."""
    states = [dim.__getstate__() for dim in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if name == "encoder_":
            assert value.keys() == states[1][name].keys()
            assert all(np.array_equal(array, states[1][name][key]) for key, array in value.items())
        else:
            np.testing.assert_equal(states[1][name], value)
            assert type(states[1][name]) is type(value)
    return True


@pytest.mark.parametrize(
    ("X", "params"),
    [
        (ROWS, {}),
        (ROWS, {"output_layer": "hidden", "lr": 0.01, "mi_units": 8, "batch_size": 5}),
        (IMAGES, {"output_layer": "features"}),
        (IMAGES.reshape(12, -1), {"image_shape": (3, 8, 8)}),
        (IMAGES.astype(np.float32), {"image_shape": [3, 8, 8]}),
        (ROWS, {"random_state": None, "max_epochs": 0}),
        (IMAGES, {"augmentation": StandardAugmentation(crop=np.float32(0.5), quarter_turns=True)}),
    ],
)
def test_a_loaded_estimator_is_the_saved_one(X, params, tmp_path):
    dim = fitted(X, **params)
    copy = DIMTransformer.load(saved(dim, tmp_path))
    assert same_state(dim, copy)
    assert copy.get_params() == dim.get_params()
    assert copy.device_ == dim.device_
    assert not copy.encoder_.training
    assert np.array_equal(copy.transform(X), dim.transform(X))


def test_the_file_is_little_more_than_the_weights(tmp_path):
    dim = fitted()
    weights = sum(tensor.nbytes for tensor in dim.encoder_.state_dict().values())
    assert saved(dim, tmp_path).stat().st_size < 1.01 * weights + 10_000


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_every_encoder_is_saved(encoder, tmp_path):
    dim = fitted(IMAGES, encoder=encoder, max_epochs=0)
    copy = DIMTransformer.load(saved(dim, tmp_path))
    assert same_state(dim, copy)
    assert np.array_equal(copy.transform(IMAGES[:2]), dim.transform(IMAGES[:2]))


def test_column_names_are_saved(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, columns=[f"pixel {i} \u00e4\U0001f600" for i in range(16)])
    dim = fitted(frame)
    copy = DIMTransformer.load(saved(dim, tmp_path))
    assert same_state(dim, copy)
    with pytest.raises(ValueError, match="feature names should match"):
        copy.transform(frame[frame.columns[::-1]])


def test_numpy_scalars_are_parameters_too(tmp_path):
    dim = fitted(n_components=np.int64(4), lr=np.float32(0.01), compile=np.bool_(False), random_state=np.int32(3))
    copy = DIMTransformer.load(saved(dim, tmp_path))
    assert copy.get_params() == dim.get_params()
    assert {type(copy.lr), type(copy.n_components), type(copy.compile)} == {float, int, bool}


def test_a_loaded_estimator_is_an_estimator(tmp_path):
    copy = DIMTransformer.load(saved(fitted(), tmp_path))
    assert same_state(copy, pickle.loads(pickle.dumps(copy)))
    assert not hasattr(clone(copy), "encoder_")
    pytest.importorskip("pandas")
    assert list(copy.set_output(transform="pandas").transform(ROWS)) == [f"dimtransformer{i}" for i in range(4)]
    second = DIMTransformer.load(saved(copy, tmp_path))
    assert np.array_equal(second.transform(ROWS), copy.transform(ROWS).to_numpy())


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_training_goes_on_with_a_warning(method, tmp_path):
    copy = DIMTransformer.load(saved(fitted(warm_start=True), tmp_path))
    with pytest.warns(UserWarning, match="new discriminators and a new optimizer"):
        getattr(copy, method)(ROWS)
    assert copy.n_iter_ == len(copy.history_) == len(copy.loss_curve_) == 2


def test_a_model_from_a_mapped_pickle_is_saved(tmp_path):
    dim = fitted()
    joblib.dump(dim, tmp_path / "dim.joblib")
    mapped = joblib.load(tmp_path / "dim.joblib", mmap_mode="r")
    assert np.array_equal(DIMTransformer.load(saved(mapped, tmp_path)).transform(ROWS), dim.transform(ROWS))


def test_parameters_set_after_fit_are_saved_beside_what_was_fitted(tmp_path):
    dim = fitted()
    expected = dim.transform(ROWS)
    dim.set_params(n_components=3, encoder="stride1")
    copy = DIMTransformer.load(saved(dim, tmp_path))
    assert same_state(dim, copy)
    assert np.array_equal(copy.transform(ROWS), expected)


def test_what_is_not_stored_is_named_and_gets_its_default(tmp_path):
    dim = fitted(callbacks=[LRScheduler()], lr_schedule="constant", random_state=np.random.RandomState(0))
    with pytest.warns(
        UserWarning, match=r"not hold the parameters callbacks, random_state: .*their defaults"
    ) as caught:
        dim.save(tmp_path / "dim.safetensors")
    assert caught[0].filename == __file__
    copy = DIMTransformer.load(tmp_path / "dim.safetensors")
    assert copy.get_params() == dim.get_params() | {"callbacks": None, "random_state": None}
    assert np.array_equal(copy.transform(ROWS), dim.transform(ROWS))


def test_nothing_is_said_where_all_is_stored(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DIMTransformer.load(saved(fitted(), tmp_path))


def test_loading_leaves_the_global_generator_alone(tmp_path):
    path = saved(fitted(), tmp_path)
    before = torch.get_rng_state()
    DIMTransformer.load(path)
    assert torch.equal(torch.get_rng_state(), before)


class Own(nn.Module):
    width = 6

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], self.width, 3, padding=1)
        self.linear = nn.Linear(self.width * image_shape[1] * image_shape[2], n_components)
        self.tied = self.linear
        # Of no state_dict, so it must come from building.
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, images):
        features = torch.relu(self.conv(images)) * self.scale
        return self.linear(features.flatten(1)), features


class Wider(Own):
    width = 7


class Reads(Own):
    """Reads a value while it is built, which the meta device has not."""

    def __init__(self, image_shape, n_components):
        super().__init__(image_shape, n_components)
        self.rate = torch.ones(1).item()


@pytest.mark.parametrize("encoder", [Own, Own((1, 4, 4), 4)], ids=["class", "instance"])
def test_own_encoders_load_into_what_the_user_passes(encoder, tmp_path):
    dim = fitted(encoder=encoder)
    path = saved(dim, tmp_path)
    for given in (Own, Own((1, 4, 4), 4)):
        copy = DIMTransformer.load(path, encoder=given)
        assert copy.get_params() == dim.get_params() | {"encoder": given}
        assert copy.encoder_ is not given
        assert copy.encoder_.tied.weight is copy.encoder_.linear.weight
        assert np.array_equal(copy.transform(ROWS), dim.transform(ROWS))
        with pytest.warns(UserWarning, match="new discriminators"):
            copy.partial_fit(ROWS)


def test_a_checkpoint_is_told_from_what_save_writes(digits, tmp_path):
    DIMTransformer(4, max_epochs=1, random_state=0, checkpoint_dir=tmp_path).fit(digits[0])
    refuses(tmp_path / "epoch-000001.safetensors", "it is a checkpoint of a training, which fit goes on from")


def refuses(path, message, **given):
    with pytest.raises(InvalidFileError, match=re.escape(message)) as caught:
        DIMTransformer.load(path, **given)
    assert str(caught.value).startswith(f"{str(path)!r} cannot be loaded by DIMTransformer.load: ")


def test_own_encoders_load_into_nothing_else(tmp_path):
    path = saved(fitted(encoder=Own), tmp_path)
    refuses(path, "it was saved with an encoder that is not skdim's; pass that as encoder")
    refuses(path, "expected [7, 1, 3, 3]", encoder=Wider)
    refuses(path, "cannot be built and run on torch's meta device", encoder=Own((3, 4, 4), 4))
    refuses(path, "the encoder returns embeddings of shape (5,), expected (4,)", encoder=Own((1, 4, 4), 5))
    refuses(path, "Input type (float) and bias type (double)", encoder=Own((1, 4, 4), 4).double())
    refuses(path, "the tensor 'encoder.conv.0.weight' is missing", encoder=ENCODERS["stride1"])
    refuses(path, "cannot be built", encoder=dict)
    refuses(path, "cannot be built and run on torch's meta device", encoder=Reads)
    assert DIMTransformer.load(path, encoder=Reads((1, 4, 4), 4)).encoder_.rate == 1
    refuses(saved(fitted(), tmp_path), "it holds the encoder 'dcgan', so none can be passed", encoder=Own)


def test_a_subclass_reads_its_own_files_only(tmp_path):
    class Other(DIMTransformer):
        pass

    path = saved(Other(n_components=4, max_epochs=0).fit(ROWS), tmp_path)
    assert type(Other.load(path)) is Other
    refuses(path, "it holds a 'Other'")


def test_what_is_unfit_is_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "dim.safetensors"
    with pytest.raises(NotFittedError):
        DIMTransformer().save(path)
    with pytest.raises(ValueError, match="'lr' parameter"):
        fitted().set_params(lr=-1).save(path)
    with pytest.raises(ValueError, match="output_layer='hidden' is not a layer"):
        fitted(encoder="stride1", max_epochs=0).set_params(output_layer="hidden").save(path)
    monkeypatch.setattr("skdim.tensorfile.MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="take more than 1000 bytes"):
        fitted().save(path)
    assert os.listdir(tmp_path) == []


def test_no_such_device(tmp_path):
    with pytest.raises(ValueError, match="device must be 'auto'"):
        DIMTransformer.load(saved(fitted(), tmp_path), device="tpu")


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_links_are_followed_and_what_is_no_file_stays(tmp_path):
    dim, file, link, pipe = fitted(), tmp_path / "v1", tmp_path / "current", tmp_path / "pipe"
    file.touch()
    link.symlink_to(file)
    dim.save(link)
    assert link.is_symlink()
    assert np.array_equal(DIMTransformer.load(file).transform(ROWS), dim.transform(ROWS))
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Not a regular file"):
        dim.save(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("method", ["save", "to_onnx"])
def test_an_error_names_the_path_given(method, tmp_path, monkeypatch):
    if method == "to_onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr("skdim.export._export", lambda *_: b"")
    monkeypatch.setattr("skdim.export._check_same_values", lambda *_: None)
    (tmp_path / "folder").mkdir()
    for name, error in {"nodir/a.file": FileNotFoundError, "folder": IsADirectoryError}.items():
        path = tmp_path / name
        with pytest.raises(error) as caught:
            getattr(fitted(), method)(path)
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
        assert ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(call, error, tmp_path, monkeypatch):
    path = saved(fitted(), tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        fitted(n_components=3).save(path)
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_save_returns(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def is_folder(descriptor):
        return os.path.isdir(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("folder" if is_folder(fd) else "file"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    saved(fitted(), tmp_path)
    assert calls == ["file", "replace", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="folders are opened on posix only")
def test_a_folder_that_cannot_be_listed_takes_files(tmp_path, monkeypatch):
    open_file = os.open

    def refuse_folders(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_folders)
    dim = fitted()
    assert same_state(dim, DIMTransformer.load(saved(dim, tmp_path)))


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_has_the_mode_that_any_new_file_has(umask, tmp_path):
    before = os.umask(umask)
    try:
        path = saved(fitted(), tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_name_as_long_as_may_be_and_a_relative_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dim = fitted()
    for name in ("a" * 255, "dim"):
        dim.save(name)
        assert same_state(dim, DIMTransformer.load(name))


def test_what_was_pickled_before_there_were_orders_of_channels_is_saved(tmp_path):
    dim = fitted()
    vars(dim).pop("_channels_last")
    dim.save(tmp_path / "dim.safetensors")
    assert np.array_equal(DIMTransformer.load(tmp_path / "dim.safetensors").transform(ROWS), dim.transform(ROWS))


def test_parameters_of_every_plain_kind_and_the_network_they_call_for_are_kept(digits, tmp_path):
    X = digits[0][:60]
    dim = DIMTransformer(
        n_components=4,
        negatives={"local": ("batch", "roll"), "global": "shuffle"},
        prior="normal",
        prior_matching="noise",
        multiple_globals=np.True_,
        augmentation="standard",
        max_epochs=1,
        random_state=0,
    ).fit(X)
    dim.save(tmp_path / "dim.safetensors")
    loaded = DIMTransformer.load(tmp_path / "dim.safetensors")
    assert loaded.get_params() == dim.get_params()
    assert np.array_equal(loaded.transform(X), dim.transform(X))
