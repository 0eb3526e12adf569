import io
import pickle
import re
import warnings
from collections import UserDict
from math import isqrt
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback
from torch import nn

from skdim import DIMTransformer
from skdim.images import check_images
from skdim.views import StandardAugmentation

RNG = np.random.default_rng(0)
ROWS = RNG.random((10, 16))
IMAGES = RNG.integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)

LOOP: list = []
LOOP.append(LOOP)


def archive(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return np.load(file)


def with_value(value, dtype=np.float64):
    X = ROWS.astype(dtype)
    X[3, 4] = value
    return X


BAD_INPUTS = {
    "scalar": (3.0, ValueError, "Expected 2D array, got scalar array instead"),
    "one dimension": (ROWS[0], ValueError, "Reshape your data"),
    "five dimensions": (ROWS.reshape(10, 1, 4, 2, 2), ValueError, "Found array with dim 5, while dim <= 4 is required"),
    "ambiguous cube": (np.zeros((10, 3, 3, 3)), ValueError, "layout of X with shape (10, 3, 3, 3) is ambiguous"),
    "ambiguous sides": (np.zeros((10, 3, 32, 3)), ValueError, "is ambiguous: set data_format to 'channels_first'"),
    "no samples": (np.empty((0, 12)), ValueError, "Found array with 0 sample(s) (shape=(0, 12)) while a minimum of"),
    "no images": (IMAGES[:0], ValueError, "Found array with 0 sample(s)"),
    "no features": (
        np.empty((10, 0)),
        ValueError,
        "Found array with 0 feature(s) (shape=(10, 0)) while a minimum of 1",
    ),
    "no pixels": (np.empty((10, 3, 0, 2)), ValueError, "Found array with 0 feature(s) (shape=(10, 3, 0, 2))"),
    "NaN": (with_value(np.nan), ValueError, "Input X contains NaN, in image "),
    "NaN in images": (np.where(IMAGES == 7, np.nan, IMAGES), ValueError, "Input X contains NaN, in image "),
    "infinity": (with_value(np.inf), ValueError, "Input X contains infinity or a value too large for dtype('float32')"),
    "minus infinity": (with_value(-np.inf), ValueError, "Input X contains infinity"),
    "beyond float32": (with_value(1e39), ValueError, "Input X contains infinity or a value too large"),
    "beyond any float": (np.array([[10**400, 1], [1, 1]], dtype=object), ValueError, "too large for dtype('float32')"),
    "complex": (ROWS + 1j, ValueError, "Complex data not supported"),
    "digits as strings": (ROWS.astype(str), ValueError, "not compatible with arrays of bytes/strings"),
    "words": (np.array([["a", "b"], ["c", "d"]]), ValueError, "not compatible with arrays of bytes/strings"),
    "bytes": (ROWS.astype("S"), ValueError, "not compatible with arrays of bytes/strings"),
    "dict objects": (np.array([[{}, 1], [1, 1]], dtype=object), TypeError, "must be a string or a real number"),
    "None objects": (np.array([[None, 1], [1, 1]], dtype=object), ValueError, "Input X contains NaN"),
    "ragged list": ([[1, 2], [1, 2, 3]], ValueError, "image 0 has shape (2,), image 1 has shape (3,)"),
    "images of two sizes": ([IMAGES[0], IMAGES[0, :, :4]], ValueError, "image 1 has shape (3, 4, 8)"),
    "list of dicts": ([{"a": 1}, {"a": 2}], TypeError, "must be a string or a real number, not 'dict'"),
    "dates": (ROWS.astype("M8[D]"), TypeError, "expects numbers, got an array of dtype datetime64[D]"),
    "structured": (np.zeros((10, 2), dtype=[("a", float)]), TypeError, "expects numbers"),
    "masked": (np.ma.masked_less(ROWS, 0.5), TypeError, "does not support masked arrays"),
    "matrix": (np.matrix(ROWS), TypeError, "np.matrix is not supported"),
    "sparse matrix": (scipy.sparse.csr_matrix(ROWS), TypeError, "Sparse data was passed for X, but dense data is"),
    "sparse array": (scipy.sparse.csr_array(ROWS), TypeError, "Sparse data was passed for X, but dense data is"),
    "dict": ({"a": 1}, TypeError, "expects an array of images, got dict"),
    "None": (None, TypeError, "expects an array of images, got NoneType"),
    "set": ({1, 2}, TypeError, "expects an array of images, got set"),
    "generator": ((row for row in ROWS), TypeError, "expects an array of images, got generator: make a list of it"),
    "string": ("images", TypeError, "expects an array of images, got str: skdim.files.read_images makes"),
    "path of an array": ("X.npy", TypeError, "np.load(path, mmap_mode='r') opens an .npy file"),
    "archive": (archive({"X": ROWS, "y": ROWS[0]}), TypeError, "got an archive of arrays: pass one of ['X', 'y']"),
    "path": (Path("images"), TypeError, "Path: skdim.files.read_images makes one of a folder of image files, np.load("),
    "meta tensor": (torch.zeros(10, 16, device="meta"), TypeError, "a tensor on the meta device"),
    "list of meta tensors": ([torch.zeros(16, device="meta")] * 3, TypeError, "a tensor on the meta device"),
    "sparse tensor": (
        torch.eye(16).to_sparse(),
        TypeError,
        "expects a dense tensor, got a tensor that is torch.sparse_coo",
    ),
    "complex tensor": (torch.from_numpy(ROWS + 1j).conj(), ValueError, "Complex data not supported"),
    "list of tensors of two sizes": ([torch.zeros(3), torch.zeros(4)], ValueError, "image 1 has shape (4,)"),
    "beyond float32 everywhere": (np.full((10, 16), 1e308), ValueError, "too large for dtype('float32')"),
    "beyond float64": (np.full((10, 16), np.longdouble("1e4000")), ValueError, "too large for dtype('float32')"),
    "float16 NaN": (np.full((10, 16), np.nan, dtype=np.float16), ValueError, "Input X contains NaN, in image "),
    "time spans": (ROWS.astype("m8[s]"), TypeError, "expects numbers, got an array of dtype timedelta64[s]"),
    "void": (np.zeros((10, 2), dtype="V8"), TypeError, "expects numbers, got an array of dtype |V8"),
    "list of masked": ([np.ma.masked_less(ROWS[0], 0.5)] * 3, TypeError, "does not support masked arrays"),
    "lists of masked channels": (
        [list(image) for image in np.ma.masked_less(IMAGES, 0.5)],
        TypeError,
        "does not support masked arrays",
    ),
    "lists of channels, some uint8": (
        [*map(list, IMAGES), *map(list, IMAGES / 255)],
        ValueError,
        "All channels of all images must be uint8 or none",
    ),
    "a Pillow image": (Image.new("RGB", (8, 8)), TypeError, "got a single Pillow image: pass [X]"),
    "a file of arrays": (
        UserDict(X=ROWS, y=ROWS[0]),
        TypeError,
        "array of images, got UserDict: pass one of ['X', 'y']",
    ),
    "a list in itself": (LOOP, ValueError, "exceed the maximum number of dimension"),
    "empty list": ([], ValueError, "Expected 2D array, got 1D array instead"),
    "list of empty lists": ([[], []], ValueError, "Found array with 0 feature(s) (shape=(2, 0))"),
    # Texts are names of image files.
    "list of words": (["ab", "cd"], FileNotFoundError, "Image 0, 'ab', cannot be read"),
    "list of None": ([None, None], ValueError, "Expected 2D array, got 1D array instead"),
    "list of objects": ([object(), object()], TypeError, "must be a string or a real number, not 'object'"),
    "range": (range(10), ValueError, "Expected 2D array, got 1D array instead"),
    "map": (map(list, ROWS), TypeError, "expects an array of images, got map"),
    "function": (len, TypeError, "must be a string or a real number, not 'builtin_function_or_method'"),
}
ONE_ROW = {
    "one row": (ROWS[:1], ValueError, "Found array with 1 sample(s) (shape=(1, 16)) while a minimum of 2"),
    "one image": (IMAGES[:1], ValueError, "Found array with 1 sample(s)"),
}


def refuses(call, X, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(X)


class Tiny(nn.Module):
    """An encoder whose state takes no time to compare."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(image_shape[0], 4, 1), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(features.mean((2, 3))), features


def tiny(X):
    return DIMTransformer(n_components=4, encoder=Tiny, mi_units=4, max_epochs=1, random_state=0).fit(X)


@pytest.fixture(scope="module")
def fitted():
    return tiny(ROWS)


def state(dim):
    """Everything the estimator holds, as bytes: what a pickle holds, and what trains."""
    net = getattr(dim, "net_", None)
    parts = [] if net is None else [net.module_, net.optimizer_, net.prior_optimizer_]
    training = pickle.dumps([part.state_dict() for part in parts]), net and bytes(net.generator.get_state().numpy())
    return pickle.dumps(dim), {name: id(value) for name, value in vars(dim).items()}, training


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize(("X", "error", "message"), (BAD_INPUTS | ONE_ROW).values(), ids=BAD_INPUTS | ONE_ROW)
def test_fit_refuses_and_changes_nothing(X, error, message, method, counted):
    counted("bad inputs tried")
    dim = DIMTransformer(n_components=4, random_state=0)
    before = dict(vars(dim))
    refuses(getattr(dim, method), X, error, message)
    assert vars(dim) == before


@pytest.mark.parametrize("method", ["fit", "partial_fit", "transform"])
@pytest.mark.parametrize(("X", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_fitted_estimator_refuses_and_changes_nothing(fitted, X, error, message, method, counted):
    counted("bad inputs tried")
    before = state(fitted)
    if method == "fit" or (getattr(X, "shape", ())[1:] == ROWS.shape[1:] and "sample" not in message):
        refuses(getattr(fitted, method), X, error, message)
    else:
        # Input of another shape may meet the message about shapes first.
        with pytest.raises((TypeError, ValueError, OSError)):
            getattr(fitted, method)(X)
    assert state(fitted) == before


def test_rows_of_another_width(fitted):
    refuses(fitted.transform, ROWS[:, :5], ValueError, "X has 5 features, but DIMTransformer is expecting 16 features")
    refuses(
        fitted.partial_fit, ROWS[:, :5], ValueError, "X has 5 features, but DIMTransformer is expecting 16 features"
    )


def test_cubes_of_another_shape(fitted):
    refuses(fitted.transform, np.zeros((10, 4, 4, 4)), ValueError, "is expecting images of shape (1, 4, 4)")


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [
        ((3, 8, 8), (3, 8, 8)),
        ((8, 8, 3), (3, 8, 8)),
        ((1, 1, 10), (1, 1, 10)),
        ((28, 28, 1), (1, 28, 28)),
        ((13, 26, 28), (13, 26, 28)),
        ((28, 26, 13), (13, 28, 26)),
    ],
)
def test_layouts_with_one_reading(shape, image_shape):
    assert DIMTransformer(n_components=2, max_epochs=0).fit(RNG.random((2, *shape))).image_shape_ == image_shape


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 5, 1), (16, 16, 16), (8, 4, 4), (3, 26, 5), (26, 24, 25), (20, 24, 48), (48, 24, 20)]
)
def test_layouts_with_two_readings(shape):
    refuses(DIMTransformer().fit, RNG.random((2, *shape)), ValueError, "is ambiguous")
    channels_first = DIMTransformer(n_components=2, max_epochs=0, data_format="channels_first")
    assert channels_first.fit(RNG.random((2, *shape))).image_shape_ == shape


def test_images_of_another_shape():
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(IMAGES)
    refuses(dim.transform, IMAGES[:, :, :4], ValueError, "is expecting images of shape (3, 8, 8)")
    refuses(dim.transform, IMAGES[:, :1], ValueError, "is expecting images of shape (3, 8, 8)")
    refuses(dim.transform, IMAGES[:, 0], ValueError, "has images of shape (1, 8, 8)")


@pytest.mark.parametrize(
    ("image_shape", "one"), [((1, 6, 8), (6, 8)), ((3, 1, 20), (3, 20)), ((3, 1, 20), (20, 3)), ((3, 8, 9), (3, 8, 9))]
)
def test_one_image_is_told_how_to_be_passed(image_shape, one):
    dim = DIMTransformer(n_components=2, max_epochs=0, image_shape=image_shape).fit(RNG.random((3, *image_shape)))
    refuses(dim.transform, RNG.random(one), ValueError, "if X is one image, pass X[None]")
    if one != (20, 3):
        assert dim.transform(RNG.random(one)[None]).shape == (1, 2)


def test_signals_may_have_their_channels_last():
    X = RNG.random((5, 3, 20), dtype=np.float32)
    dim = DIMTransformer(n_components=4, max_epochs=1, image_shape=(3, 1, 20), random_state=0)
    refuses(dim.fit, X.transpose(0, 2, 1), ValueError, "with their channels last need data_format='channels_last'")
    expected = dim.fit(X).transform(X)
    dim.set_params(data_format="channels_last")
    refuses(dim.fit, X, ValueError, "with their channels first need data_format='channels_first'")
    assert np.array_equal(dim.fit(X.transpose(0, 2, 1)).transform(X.transpose(0, 2, 1)), expected)


def test_small_integers_of_numpy_do_not_overflow():
    X = np.random.default_rng(0).random((300, 4, 4))
    assert DIMTransformer(4, max_epochs=1, batch_size=np.uint8(100), random_state=0).fit_transform(X).shape == (300, 4)


def test_integers_of_numpy_are_integers():
    names = ("n_components", "mi_units", "local_samples", "max_epochs", "batch_size", "random_state", "verbose")
    params = dict(zip(names, np.array([4, 8, 2, 2, 16, 0, 0]), strict=True))
    dim = DIMTransformer(**params).fit(IMAGES)
    plain = DIMTransformer(**{name: int(value) for name, value in params.items()}).fit(IMAGES)
    assert np.array_equal(dim.transform(IMAGES), plain.transform(IMAGES))


def test_rows_that_do_not_make_images():
    dim = DIMTransformer(image_shape=(3, 32, 32))
    refuses(dim.fit, RNG.random((4, 3070)), ValueError, "cannot reshape 3070 features to image_shape=(3, 32, 32)")


def test_rows_that_look_like_colour_images_are_warned_about():
    dim = DIMTransformer(n_components=2, max_epochs=0)
    with pytest.warns(UserWarning, match=re.escape("Set image_shape=(3, 8, 8)")) as caught:
        dim.fit(RNG.random((4, 192)))
    assert caught[0].filename == __file__
    assert dim.image_shape_ == (1, 1, 192)


# 4, 9 and 16 of them make rows as wide as those of a grey square; 12 ones as wide as those of larger colour images.
@pytest.mark.parametrize("n_channels", [2, 3, 4, 5, 9, 12, 16])
def test_rows_of_several_channels_that_look_so_are_warned_about(n_channels):
    # What is near in them is alike, as in images.
    X = RNG.standard_normal((20, n_channels, 16, 16)).cumsum(axis=2).cumsum(axis=3)
    with pytest.warns(UserWarning, match=re.escape(f"Set image_shape=({n_channels}, 16, 16)")) as caught:
        dim = DIMTransformer(n_components=2, max_epochs=0).fit(X.reshape(20, -1))
    assert caught[0].filename == __file__
    side = 16 * isqrt(n_channels)
    is_square = side * side == 256 * n_channels
    assert dim.image_shape_ == ((1, side, side) if is_square else (1, 1, 256 * n_channels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DIMTransformer(n_components=2, max_epochs=0, image_shape=(n_channels, 16, 16)).fit(X.reshape(20, -1))
        for grey in (X[:, 0].reshape(20, -1), RNG.random((20, side * side)), np.eye(20, side * side)):
            DIMTransformer(n_components=2, max_epochs=0).fit(grey)


def test_signals_are_not_taken_for_images():
    time = np.arange(1280)
    for rows in (
        RNG.standard_normal((20, 1280)),
        RNG.standard_normal((20, 1280)).cumsum(axis=1),
        np.sin(time / 5 + RNG.random((20, 1))) + 0.1 * RNG.standard_normal((20, 1280)),
        np.zeros((20, 1280)) + RNG.random((20, 1)),
        # One value that is far larger than the others.
        RNG.random((20, 1280)) + 1e4 * (time == 14) * RNG.random((20, 1)),
    ):
        assert DIMTransformer(n_components=2, max_epochs=0).fit(rows).image_shape_ == (1, 1, 1280)


@pytest.mark.parametrize("n_channels", [2, 3])
def test_flat_rows_after_images_with_their_channels_last_must_say_which_they_are(tmp_path, n_channels):
    X = RNG.random((20, 8, 8, n_channels)).astype(np.float32)
    dim = DIMTransformer(n_components=2, max_epochs=0, random_state=0).fit(X)
    dim.save(tmp_path / "dim.safetensors")
    expected = dim.transform(X)
    refuses(dim.transform, X[:, 0].reshape(20, -1), ValueError, "features, but DIMTransformer is expecting")
    for each in (dim, pickle.loads(pickle.dumps(dim)), DIMTransformer.load(tmp_path / "dim.safetensors")):
        for work in (each.transform, each.partial_fit):
            refuses(work, X.reshape(20, -1), ValueError, "was fitted on images with their channels last")
        assert np.array_equal(each.transform(X), expected)
        for data_format, images in (("channels_last", X), ("channels_first", X.transpose(0, 3, 1, 2))):
            each.set_params(data_format=data_format)
            np.testing.assert_allclose(each.transform(images.reshape(20, -1)), expected, rtol=1e-5, atol=1e-6)


def test_flat_rows_that_can_be_read_in_one_way_only_are_taken():
    X = RNG.random((20, 8, 8, 3)).astype(np.float32)
    # Images in the memory of others with their channels last, of one channel, and rows from the start.
    for images in (X.transpose(0, 3, 1, 2), X[..., :1], X[..., 0], X.transpose(0, 3, 1, 2).reshape(20, -1)):
        dim = DIMTransformer(n_components=2, max_epochs=0, random_state=0, image_shape=None)
        if images.ndim == 2:
            dim.set_params(image_shape=(3, 8, 8))
        dim.fit(images)
        np.testing.assert_allclose(dim.transform(images.reshape(20, -1)), dim.transform(images), rtol=1e-5, atol=1e-6)


def test_missing_values_of_a_dataframe_name_their_image():
    pandas = pytest.importorskip("pandas")
    for dtype in ("float64", "Float64", "Int64"):
        frame = pandas.DataFrame(np.arange(80.0).reshape(5, 16)).astype(dtype)
        frame.iloc[3, 2] = pandas.NA if dtype[0].isupper() else np.nan
        refuses(DIMTransformer(max_epochs=0).fit, frame, ValueError, "Input X contains NaN, in image 3")


def test_missing_values_of_a_polars_dataframe_name_their_image():
    polars = pytest.importorskip("polars")
    rows = np.arange(80.0).reshape(5, 16)
    rows[3, 2] = np.nan
    refuses(DIMTransformer(max_epochs=0).fit, polars.DataFrame(rows), ValueError, "Input X contains NaN, in image 3")


def test_bfloat16_is_refused_on_a_gpu_that_has_no_convolutions_in_it(monkeypatch):
    monkeypatch.setattr("skdim.transformer.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    dim = DIMTransformer(precision="bfloat16", device="cuda")
    refuses(dim.fit, RNG.random((4, 64)), ValueError, "needs a GPU of compute capability 8.0 at least, cuda has 7.5")


def test_warnings_name_the_users_line_whatever_lies_between():
    def dim():
        return DIMTransformer(n_components=2, max_epochs=0)

    pipeline = make_pipeline(dim(), StandardScaler())
    for train in (dim().fit, dim().fit_transform, dim().partial_fit, pipeline.fit, pipeline.fit_transform):
        with pytest.warns(UserWarning, match="look like images of 3 channels of 8 x 8") as caught:
            train(RNG.random((4, 192)))
        assert caught[0].filename == __file__


@pytest.mark.parametrize(("height", "n_channels"), [(8, 1), (8, 3), (8, 4), (8, 5), (9, 5), (6, 3)])
def test_an_image_shape_that_ends_in_channels_is_warned_about(height, n_channels):
    X = RNG.random((4, height, 8, n_channels))
    for rows in (X.reshape(4, -1), X):
        dim = DIMTransformer(n_components=2, max_epochs=0, image_shape=(height, 8, n_channels))
        message = f"image_shape=({height}, 8, {n_channels}) .* (C, H, W).*image_shape=({n_channels}, {height}, 8)"
        with pytest.warns(UserWarning, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
            dim.fit(rows)
        assert caught[0].filename == __file__
        dim.transform(rows)  # warns no more


@pytest.mark.parametrize(
    ("image_shape", "data_format"),
    [
        ((3, 8, 8), "channels_last"),
        ((8, 8, 3), "channels_first"),
        ((3, 3, 3), "auto"),
        ((8, 6, 6), "auto"),
        ((8, 1, 20), "auto"),
    ],
)
def test_other_image_shapes_are_taken_as_they_are(image_shape, data_format):
    dim = DIMTransformer(n_components=2, max_epochs=0, image_shape=image_shape, data_format=data_format)
    assert dim.fit(RNG.random((4, np.prod(image_shape)))).image_shape_ == image_shape


def test_an_image_shape_that_the_layout_of_the_images_agrees_with_is_not_warned_about():
    dim = DIMTransformer(n_components=2, max_epochs=0, image_shape=(16, 8, 4), data_format="channels_last")
    assert dim.fit(RNG.random((4, 8, 4, 16))).image_shape_ == (16, 8, 4)


def test_one_unit_is_too_few_for_a_dot_critic():
    refuses(DIMTransformer(mi_units=1).fit, ROWS, ValueError, "mi_units must be at least 2 with discriminator='dot'")
    DIMTransformer(n_components=2, mi_units=1, discriminator="concat", max_epochs=1).fit(ROWS)


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3)])
def test_a_single_image_is_told_what_it_lacks(shape):
    refuses(tiny(IMAGES).transform, np.zeros(shape), ValueError, "is expecting images of shape (3, 8, 8); if X is one")


@pytest.mark.parametrize("method", ["transform", "to", "save", "get_feature_names_out"])
def test_not_fitted(method):
    message = "This DIMTransformer instance is not fitted yet. Call 'fit' with appropriate arguments before using"
    refuses(getattr(DIMTransformer(), method), ROWS, NotFittedError, message)


def frames():
    pandas = pytest.importorskip("pandas")
    names = [f"pixel{i}" for i in range(16)]
    numbers = pandas.DataFrame(ROWS, columns=names)
    other = "The feature names should match those that were passed during fit"
    return numbers, {
        "renamed": (numbers.rename(columns={"pixel3": "pixel33"}), ValueError, other),
        "reordered": (numbers[names[::-1]], ValueError, other),
        "fewer": (numbers[names[:5]], ValueError, other),
        "words": (numbers.astype({"pixel0": str}).replace({"pixel0": {str(ROWS[0, 0]): "a"}}), ValueError, "'a'"),
        "missing": (numbers.astype("Float64").mask(numbers > 0.5), ValueError, "Input X contains NaN"),
        "categories": (numbers.assign(pixel0=pandas.Categorical(["a"] * 10)), ValueError, "'a'"),
        "dates": (numbers.astype({"pixel0": "datetime64[ns]"}), TypeError, "got a column of dtype datetime64[ns]"),
        "spans": (numbers.astype({"pixel0": "timedelta64[ns]"}), TypeError, "got a column of dtype timedelta64[ns]"),
        "complex": (numbers + 1j, ValueError, "Complex data not supported"),
        "no rows": (numbers[:0], ValueError, "Found array with 0 sample(s)"),
    }


def test_bad_frames(counted):
    good, bad = frames()
    dim = tiny(good)
    for name, (X, error, message) in bad.items():
        for method in (dim.transform, dim.partial_fit):
            counted("bad inputs tried")
            before = state(dim)
            refuses(method, X, error, message)
            assert state(dim) == before, name
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        dim.transform(ROWS)


@pytest.mark.parametrize("y", [np.zeros(3), ["a"] * 10, np.nan, "classes"])
def test_y_is_ignored(fitted, y):
    assert np.array_equal(clone(fitted).fit(ROWS, y).transform(ROWS), fitted.transform(ROWS))


def test_an_estimator_of_images_refuses_and_changes_nothing(counted):
    dim = tiny(IMAGES)
    before = state(dim)
    for name, (X, _, _) in BAD_INPUTS.items():
        for method in (dim.partial_fit, dim.transform):
            counted("bad inputs tried")
            with pytest.raises((TypeError, ValueError, OSError)):
                method(X)
            assert state(dim) == before, name


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("n_components", 0),
        ("n_components", 1.5),
        ("data_format", "NCHW"),
        ("encoder", "vgg"),
        ("n_components", True),
        ("local_weight", -1),
        pytest.param("local_weight", 10**400, id="local_weight-beyond float64"),
        ("global_weight", np.nan),
        ("prior_weight", "0.1"),
        ("mi_estimator", "mine"),
        ("discriminator", "bilinear"),
        ("mi_units", 0),
        ("negatives", "all"),
        ("prior", "laplace"),
        ("prior_matching", "mmd"),
        ("local_samples", 0),
        ("local_samples", True),
        ("negatives", {"local": "all"}),
        ("negatives", {"prior": "roll"}),
        ("multiple_globals", 2),
        ("augmentation", "weak"),
        ("coordinate_weight", -0.1),
        ("occlusion", "yes"),
        ("output_layer", "conv"),
        ("max_epochs", -1),
        ("batch_size", 1),
        ("batch_size", 1.5),
        ("batch_size", "a"),
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", np.nan),
        ("lr", np.inf),
        ("lr_schedule", "cosine"),
        ("device", 0),
        ("precision", "float16"),
        ("warm_start", 2),
        ("random_state", "abc"),
        ("random_state", -1),
        ("image_shape", (3, 32)),
        ("image_shape", (3, 0, 32)),
        ("image_shape", (1.0, 4.0, 4.0)),
        ("image_shape", 4),
    ],
)
def test_bad_parameters_are_named_at_fit_and_nowhere_else(fitted, parameter, value, counted):
    for dim in (DIMTransformer(), pickle.loads(pickle.dumps(fitted))):
        dim.set_params(**{parameter: value})
        for method in (dim.fit, dim.partial_fit):
            counted("bad inputs tried")
            before = dict(vars(dim))
            with pytest.raises(ValueError, match=f"{parameter}|Seed must be") as caught:
                method(ROWS)
            assert repr(value)[:15] in str(caught.value) or value == -1
            assert vars(dim) == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"coordinate_weight": 1.0}, "local features at two locations"),
        ({"occlusion": True}, "occlusion=True needs local features"),
        ({"augmentation": lambda images: images}, "no room for"),
        ({"augmentation": lambda images, generator: images[:1]}, "images of the shape"),
    ],
)
@pytest.mark.parametrize("with_checkpoints", [False, True])
def test_what_does_not_suit_the_images_is_refused_before_all_of_them_are_read(
    params, message, with_checkpoints, tmp_path
):
    class Items(torch.utils.data.Dataset):
        n_read = 0

        def __len__(self):
            return 500

        def __getitem__(self, index):
            self.n_read += 1
            return np.zeros((1, 2, 2), dtype=np.uint8) + np.uint8(index % 7)

    items = Items()
    with pytest.raises(ValueError, match=message):
        DIMTransformer(**params, checkpoint_dir=tmp_path / "new" if with_checkpoints else None).fit(items)
    assert items.n_read < 10
    assert not any(tmp_path.iterdir())


def test_parameters_are_not_checked_where_scikit_learn_is_told_so():
    with config_context(skip_parameter_validation=True):
        DIMTransformer(4, max_epochs=1, verbose=-3).partial_fit(ROWS)


def test_all_weights_zero():
    dim = DIMTransformer(local_weight=0, global_weight=0, prior_weight=0)
    message = "local_weight, global_weight, prior_weight and coordinate_weight are all 0"
    refuses(dim.fit, ROWS, ValueError, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none():
    refuses(
        DIMTransformer(device="cuda").fit, ROWS, ValueError, "device='cuda' was asked for, but CUDA is not available"
    )


def test_images_of_which_only_some_are_bytes_are_refused():
    images = [IMAGES[0], IMAGES[1], IMAGES[2].astype(np.uint16)]
    refuses(DIMTransformer().fit, images, ValueError, "image 0 is uint8, image 2 is uint16")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, object])
def test_the_image_that_is_not_finite_is_named(dtype):
    for value, message in ((np.nan, "Input X contains NaN, in image 3."), (np.inf, "dtype('float32'), in image 3.")):
        refuses(DIMTransformer().fit, with_value(value, dtype), ValueError, message)
        refuses(DIMTransformer().fit, with_value(value, dtype).reshape(10, 1, 4, 4), ValueError, message)


def test_a_class_is_no_augmentation():
    dim = DIMTransformer(augmentation=StandardAugmentation)
    refuses(dim.fit, ROWS, ValueError, "augmentation must be called with images: pass an instance, Standard")
    for augmentation in (lambda images: images, torch.nn.Identity()):
        dim.set_params(augmentation=augmentation)
        refuses(dim.fit, ROWS, ValueError, "augmentation is called as augmentation(images, generator), which its sign")


def test_unknown_device():
    refuses(DIMTransformer(device="tpu").fit, ROWS, ValueError, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got")


class Wrong(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.linear = nn.Linear(16, n_components)


class ReturnsOne(Wrong):
    def forward(self, images):
        return self.linear(images.flatten(1))


class ReturnsFlatFeatures(Wrong):
    def forward(self, images):
        return self.linear(images.flatten(1)), images.flatten(1)


class HasOtherArguments(Wrong):
    def __init__(self, width):
        super().__init__((1, 4, 4), width)


class TakesTwelve(Wrong):
    def forward(self, images):
        return self.linear(images.flatten(1)[:, :12]), images


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (ReturnsOne, "encoder must return (embedding, features), two tensors; ReturnsOne returned Tensor"),
        (ReturnsFlatFeatures, "returned shapes (2, 64) and (2, 16)"),
        (TakesTwelve, "encoder TakesTwelve cannot take images of shape (1, 4, 4)"),
        (HasOtherArguments, "encoder class HasOtherArguments cannot be built as HasOtherArguments(image_shape, n_comp"),
        (dict, "encoder must be a subclass of torch.nn.Module"),
    ],
)
def test_wrong_encoders(encoder, message):
    refuses(DIMTransformer(encoder=encoder).fit, ROWS, ValueError, message)


def test_an_encoder_of_another_width():
    encoder = TakesTwelve((1, 4, 4), 32)
    encoder.forward = lambda images: (encoder.linear(images.flatten(1)), images)
    refuses(DIMTransformer(encoder=encoder).fit, ROWS, ValueError, "width 32, but n_components=64")


GOOD_INPUTS = {
    "bool": ROWS > 0.5,
    "float16": np.full((10, 16), 60000, dtype=np.float16) * ROWS.round().astype(np.float16),
    "int8": (ROWS * 100 - 50).astype(np.int8),
    "uint16": (ROWS * 60000).astype(np.uint16),
    "longdouble": ROWS.astype(np.longdouble),
    "big endian": ROWS.astype(">f4"),
    "objects": ROWS.astype(object),
    "array of arrays": np.array([*ROWS, None], dtype=object)[:-1],
    "denormal": ROWS * 1e-42,
    "huge": ROWS * 1e30,
    "largest": ROWS * np.finfo(np.float32).max * 2 - np.finfo(np.float32).max,
    "int64": (ROWS * 1e18).astype(np.int64),
    "uint64": (ROWS * 1e19).astype(np.uint64),
    "broadcast": np.broadcast_to(ROWS[0], (10, 16)),
    "tuple of tuples": tuple(map(tuple, ROWS)),
    "buffer": memoryview(ROWS),
    "8-bit float tensor": torch.from_numpy(ROWS).to(torch.float8_e4m3fn),
    "lazily negated tensor": torch.from_numpy(1j * ROWS).conj().imag,
    "arrays and tensors": [ROWS[0], torch.from_numpy(ROWS[1]).requires_grad_()],
    "in order of class": np.repeat(ROWS[:2], 5, axis=0),
    "identical rows": np.tile(ROWS[:1], (10, 1)),
    "two rows": ROWS[:2],
    "list": ROWS.tolist(),
    "list of rows": list(ROWS),
    "tensor": torch.from_numpy(ROWS),
    "tensor with gradient": torch.from_numpy(ROWS).requires_grad_(),
    "bfloat16 tensor": torch.from_numpy(ROWS).bfloat16(),
    "list of tensors": [torch.from_numpy(row).requires_grad_() for row in ROWS],
}


# Values of a spread that float32 cannot tell from none, and values whose sum is beyond it.
@pytest.mark.filterwarnings("ignore:All images are constant")
@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("X", GOOD_INPUTS.values(), ids=GOOD_INPUTS)
def test_unusual_but_sound_input_gives_finite_embeddings(X):
    Z = DIMTransformer(n_components=4, max_epochs=2, random_state=0).fit(X).transform(X)
    assert Z.dtype == np.float32
    assert Z.shape == (len(X), 4)
    assert np.isfinite(Z).all()


def test_constant_images_are_warned_about_and_finite():
    dim = DIMTransformer(n_components=4, max_epochs=2, random_state=0)
    with pytest.warns(UserWarning, match="All images are constant") as caught:
        dim.fit(np.full((10, 16), 7.0))
    assert caught[0].filename == __file__
    Z = dim.transform(np.full((10, 16), 7.0))
    assert np.isfinite(Z).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_channel_that_was_constant_is_left_out_whatever_comes_of_it(dtype, tmp_path):
    X = RNG.integers(0, 100, (40, 3, 8, 8)).astype(dtype)
    X[:, 1] = 100
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0)
    with pytest.warns(UserWarning, match="X has the same value everywhere.* in channel 1: nothing") as caught:
        dim.fit(X)
    assert caught[0].filename == __file__
    assert np.isinf(dim.std_).tolist() == [False, True, False]
    later = X.copy()
    later[:, 1] = RNG.integers(0, 256, (40, 8, 8))
    dim.save(tmp_path / "dim.safetensors")
    for fitted in (dim, DIMTransformer.load(tmp_path / "dim.safetensors"), pickle.loads(pickle.dumps(dim))):
        assert np.array_equal(fitted.transform(later), dim.transform(X))
    assert dim.transform(X).std() > 0


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


@pytest.mark.parametrize(
    "same",
    [
        np.asfortranarray,
        read_only,
        lambda X: np.repeat(X, 2, axis=0)[::2],
        lambda X: X[::-1, ::-1].copy()[::-1, ::-1],
        lambda X: X.astype(X.dtype.newbyteorder()),
        lambda X: np.moveaxis(np.moveaxis(X, 1, -1).copy(), -1, 1),
    ],
    ids=["fortran", "read-only", "strided", "negative strides", "byte order", "swapped axes"],
)
@pytest.mark.parametrize("X", [ROWS, IMAGES], ids=["rows", "images"])
def test_memory_layout_does_not_matter(X, same, recwarn):
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0)
    expected = dim.fit_transform(X)
    before = X.copy()
    assert np.array_equal(dim.fit_transform(same(X)), expected)
    assert np.array_equal(X, before)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_images_with_their_axes_swapped_are_not_copied():
    X = np.zeros((5, 8, 6, 3), dtype=np.uint8)
    options = {"image_shape": None, "data_format": "channels_first", "reset": True}
    images = check_images(DIMTransformer(), X.transpose(0, 3, 1, 2), **options)
    assert images.shape == (3, 8, 6)
    assert images.shares_memory(X)


def test_a_memory_map_and_a_list_of_pictures(tmp_path, fitted):
    pillow = pytest.importorskip("PIL.Image")
    np.save(tmp_path / "X.npy", ROWS)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert np.array_equal(fitted.transform(mapped), fitted.transform(ROWS))
    images = IMAGES.transpose(0, 2, 3, 1)
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0)
    pictures = [pillow.fromarray(image) for image in images]
    assert np.array_equal(dim.fit_transform(pictures), dim.fit_transform(images))


# Arrays of any shape, dtype, byte order and memory layout.

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    npst.datetime64_dtypes(endianness="?"),
    npst.timedelta64_dtypes(endianness="?"),
    npst.byte_string_dtypes(endianness="?", max_len=4),
    npst.unicode_string_dtypes(endianness="?", max_len=4),
    npst.nested_dtypes(max_itemsize=16),
)


@st.composite
def layouts(draw, X):
    """Give an array's values another memory layout, or fewer of them in one."""
    X = X.transpose(draw(st.permutations(range(X.ndim))))
    for axis in range(X.ndim):
        step = draw(st.sampled_from([1, 1, -1, 2, -2]))
        X = X[(slice(None),) * axis + (slice(None, None, step),)]
    if draw(st.booleans()):
        X = np.asfortranarray(X)
    if draw(st.booleans()):
        X = X.view()
        X.flags.writeable = False
    return X


@st.composite
def any_array(draw):
    # The shape of the fitted rows, which the values decide about, or any.
    shape = draw(st.just((3, 16)) | npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
    return draw(layouts(draw(npst.arrays(DTYPES, shape))))


@st.composite
def numbers(draw):
    """Draw numbers in the shapes that the estimators below are fitted on, all of them sound."""
    shape = draw(st.sampled_from([(4, 16), (2, 3, 4, 5)]))
    dtype = draw(st.sampled_from(list("BbhHiIlLfdg?e")))
    elements = st.floats(-1e4, 1e4, width=16) if dtype in "fdge" else None
    X = draw(npst.arrays(np.dtype(dtype).newbyteorder(draw(st.sampled_from("<>"))), shape, elements=elements))
    padded = np.repeat(np.repeat(X, 2, axis=0), 2, axis=-1)
    return draw(st.sampled_from([X, X.copy("F"), padded[::2, ..., ::2], X[::-1].copy()[::-1], np.array(X, subok=True)]))


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


N_EXAMPLES = [60, pytest.param(3000, marks=pytest.mark.slow)]


def refusal(method, X):
    """Return what a method raises, or None."""
    try:
        method(X)
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_examples", N_EXAMPLES)
def test_any_array_is_computed_with_or_refused(n_examples, counted):
    fitted = {"rows": tiny(ROWS), "images": tiny(IMAGES)}

    @examples(n_examples)
    @given(any_array())
    def check(X):
        new = DIMTransformer(n_components=4, mi_units=4, max_epochs=1, random_state=0)
        for dim in (new, *fitted.values()):
            for method in (dim.fit,) if dim is new else (dim.partial_fit, dim.transform):
                before = state(dim)
                error = refusal(method, X)
                if error is None:
                    Z = dim.transform(X)
                    assert Z.shape == (len(X), 4)
                    assert Z.dtype == np.float32
                    assert np.isfinite(Z).all()
                else:
                    counted("bad inputs tried")
                    # Texts are names of files. Values at the end of float32 are beyond it once they are standardised as
                    # those of the first fit were, which only training tells.
                    known = TypeError | ValueError | FileNotFoundError
                    assert isinstance(error, known | FloatingPointError if method == dim.partial_fit else known)
                    assert "torch" not in [
                        call.tb_frame.f_globals["__name__"].split(".")[0] for call in calls_of(error)
                    ]
                    assert state(dim) == before

    check()


def calls_of(error):
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_examples", N_EXAMPLES)
def test_only_the_values_of_an_array_count(n_examples):
    @examples(n_examples)
    @given(numbers())
    def check(X):
        before = X.tobytes()
        plain = np.array(X, dtype=np.uint8 if X.dtype == np.uint8 else np.float32, order="C")
        dims = [
            DIMTransformer(n_components=2, max_epochs=0, random_state=0, data_format="channels_first") for _ in "ab"
        ]
        assert np.array_equal(dims[0].fit_transform(X), dims[1].fit_transform(plain))
        assert np.array_equal(dims[0].mean_, dims[1].mean_)
        assert np.array_equal(dims[0].std_, dims[1].std_)
        assert X.tobytes() == before

    check()


def test_uint8_and_the_same_images_scaled_to_one_agree():
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0)
    scaled = IMAGES.astype(np.float32) / 255
    np.testing.assert_allclose(dim.fit(IMAGES).transform(scaled), dim.transform(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trained", "now"),
    [
        (IMAGES, IMAGES.astype(np.float32)),
        (IMAGES.astype(np.float32), IMAGES),
        (IMAGES.astype(np.uint16), IMAGES / 65535),
        (IMAGES / 255, IMAGES.astype(np.float32)),
    ],
    ids=["uint8, float", "float, uint8", "uint16, scaled", "scaled, float"],
)
def test_another_range_than_in_fit_is_warned_about(trained, now):
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(trained)
    for method in (dim.transform, dim.partial_fit):
        with pytest.warns(UserWarning, match="of another range") as caught:
            method(now)
        assert caught[0].filename == __file__


def test_dim_bright_and_blank_images_are_no_other_range():
    DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(IMAGES).transform(IMAGES[:1] // 250)
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(IMAGES.astype(np.uint16))
    half_dark = IMAGES.astype(np.float32)
    half_dark[: len(IMAGES) // 2] /= 1000
    dim.transform(half_dark)
    for images in (IMAGES // 16, 8.0 * IMAGES, np.zeros_like(IMAGES)):
        dim.transform(images.astype(np.float32))


@pytest.mark.parametrize(
    "now",
    [IMAGES + 273.15 * 8, 50.0 * IMAGES, np.full(IMAGES.shape, 9e4)],
    ids=["another zero", "another unit", "saturated"],
)
def test_another_level_than_in_fit_is_warned_about(now):
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(IMAGES.astype(np.float32))
    with pytest.warns(
        UserWarning, match=r"standard deviations away from those of the images that DIMTr.* another unit"
    ):
        dim.transform(now.astype(np.float32))
    one_channel = IMAGES.astype(np.float32)
    one_channel[:, 0] = now[:, 0]
    dim.transform(one_channel)  # A warning would be an error.


# Of single images, and of all at once, when bytes have a histogram.
@pytest.mark.parametrize("chunk_bytes", [3000, 1 << 24])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mean_and_std_are_those_of_all_images(monkeypatch, dtype, chunk_bytes):
    monkeypatch.setattr("skdim.statistics.CHUNK_BYTES", chunk_bytes)
    X = IMAGES.astype(dtype)
    dim = DIMTransformer(n_components=2, max_epochs=0).fit(X)
    scale = 255 if dtype == np.uint8 else 1
    np.testing.assert_allclose(dim.mean_, X.mean((0, 2, 3), dtype=np.float64) / scale, rtol=1e-5)
    np.testing.assert_allclose(dim.std_, X.std((0, 2, 3), dtype=np.float64) / scale, rtol=1e-5)


def test_cuda_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuses(
        DIMTransformer(device="cuda:3").fit, ROWS, ValueError, "device='cuda:3' was asked for, but there are only 1"
    )


class Overwrite(Callback):
    def __init__(self, X):
        self.X = X

    def on_epoch_end(self, net, **kwargs):
        self.X[:] = 7


def test_images_that_change_while_fit_runs_give_finite_embeddings_and_are_never_written_to():
    X = ROWS.astype(np.float32)
    before = X.copy()
    tiny(X)
    assert np.array_equal(X, before)
    dim = DIMTransformer(4, mi_units=4, max_epochs=2, callbacks=[Overwrite(X)], random_state=0).fit(X)
    assert np.isfinite(dim.transform(before)).all()
    assert not np.array_equal(X, before)


def test_small_differences_on_a_large_background_are_signal():
    rng = np.random.default_rng(0)
    X = (1000 + 0.05 * rng.standard_normal((50, 1, 8, 8))).astype(np.float32)
    dim = DIMTransformer(n_components=4, max_epochs=0).fit(X)
    assert dim.std_[0] == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("given", [False, True])
def test_an_embedding_that_is_not_finite_is_an_error(given):
    X = 1e-3 * np.random.default_rng(0).standard_normal((200, 1, 8, 8)).astype(np.float32)
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0).fit(X)
    X[150, 0, 2, 2] = 3e38
    out = np.empty((200, 4), dtype=np.float32) if given else None
    with pytest.raises(ValueError, match=r"The embedding of image 150 of X is not finite"):
        dim.transform(X, out=out)


def test_images_from_all_over_tell_the_range():
    X = np.random.default_rng(0).random((100, 1, 8, 8), dtype=np.float32)
    dim = DIMTransformer(n_components=4, max_epochs=0).fit(X)
    half_dark = X.copy()
    half_dark[:50] /= 1e5
    dim.transform(half_dark)  # A warning would be an error.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_float32_rounds_to_nothing_are_no_error(dtype):
    X = np.random.default_rng(0).random((16, 1, 8, 8)).astype(dtype)
    X[:, :, 0] *= dtype(1e-44)
    with np.errstate(all="raise"):
        assert np.isfinite(DIMTransformer(2, mi_units=4, max_epochs=1, random_state=0).fit_transform(X)).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            (3, 32, 32),
            r"read as 3 grey images of 32 x 32. If it is one image of 3 channels, pass several, \(n, 3, 32, 32\);",
        ),
        (
            (40, 6, 128),
            r"If it has signals of 6 channels, set image_shape=\(6, 1, 128\); image_shape=\(1, 6, 128\) sil",
        ),
        ((40, 128, 6), r"set image_shape=\(6, 1, 128\) and data_format='channels_last'; image_shape=\(1, 128, 6\)"),
        ((40, 65), r"65 features, one more than an image has, .* image_shape=\(1, 1, 65\)"),
        ((40, 3 * 64 + 1), r"193 features, one more than an image has"),
        ((40, 785), r"785 features, one more than an image has"),
        ((60, 65), r"65 features, one more than an image has"),
    ],
)
def test_an_array_that_may_be_read_as_what_it_is_not_is_warned_of_once(shape, words):
    X = RNG.random(shape).astype(np.float32)
    if shape == (40, 785):
        X = RNG.integers(0, 256, shape, dtype=np.uint8)
        X[:, 0] = np.arange(40)  # an index
    elif shape == (60, 65):
        X = np.column_stack([*reversed(load_digits(return_X_y=True))])[:60]
    elif len(shape) == 2:
        X[:, -1] = np.arange(40) % 3  # labels
    with pytest.warns(UserWarning, match=words) as caught:
        dim = DIMTransformer(4, max_epochs=0).fit(X)
    assert len(caught) == 1
    # Neither again nor where the shape is given.
    dim.transform(X)
    DIMTransformer(4, max_epochs=0, image_shape=dim.image_shape_).fit(X)


@pytest.mark.parametrize(
    "shape", [(5, 32, 32), (40, 40, 120), (40, 1, 128), (40, 50), (40, 64), (40, 65), (4, 3, 16, 16)]
)
def test_an_array_that_can_be_read_in_one_way_only_is_not_warned_of(shape):
    X = RNG.random(shape).astype(np.float32)
    DIMTransformer(4, max_epochs=0).fit(X)
    DIMTransformer(4, max_epochs=0).fit((255 * X).astype(np.uint8))
    X.reshape(len(X), -1)[:, 0] = 0  # as a spectrum without its mean
    DIMTransformer(4, max_epochs=0).fit(X)
