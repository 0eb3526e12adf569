"""Images that are read a part at a time: mapped files, arrays on disk, datasets, loaders and cached image files."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from skorch.callbacks import Callback
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from skdim import DIMTransformer
from skdim.evaluation import FineTunedClassifier, evaluate, retrieval_scorer
from skdim.files import read_images
from skdim.sources import prefetched

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 12, 10, 3), dtype=np.uint8)
ROWS = RNG.normal(size=(50, 16)).astype(np.float32)


class Tiny(nn.Module):
    """An encoder that takes no time."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(image_shape[0], 4, 2, 2), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(features.mean((2, 3))), features


def small(**params):
    params = {"encoder": Tiny, "mi_units": 4, "max_epochs": 2, "batch_size": 16, "random_state": 0} | params
    return DIMTransformer(4, **params)


def result(X, **params):
    """Everything that training and transform make of images."""
    dim = small(**params).fit(X)
    return [dim.loss_curve_, dim.mean_, dim.std_, *weights(dim), dim.transform(X)]


def weights(dim):
    return [weight.cpu().numpy() for weight in dim.encoder_.state_dict().values()]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def mapped(X, folder, mode="r"):
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode=mode)


class OnDisk:
    """An array that reads what it is indexed with, and remembers how much of it at once."""

    def __init__(self, values, error_at=None):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.largest = self.n_reads = 0
        self.error_at = error_at

    def __getitem__(self, rows):
        self.n_reads += 1
        if self.n_reads == self.error_at:
            raise OSError("the disk is gone")
        values = self.values[rows]
        self.largest = max(self.largest, len(values))
        return values


class Items(Dataset):
    def __init__(self, items):
        self.items = items
        self.read = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        return self.items[index]


def h5(X, folder):
    h5py = pytest.importorskip("h5py")
    return h5py.File(folder / "X.h5", "w").create_dataset("X", data=X, chunks=(7, *X.shape[1:]))


def zarr_array(X, folder):
    zarr = pytest.importorskip("zarr")
    array = zarr.open(str(folder / "X.zarr"), mode="w", shape=X.shape, dtype=X.dtype, chunks=(7, *X.shape[1:]))
    array[:] = X
    return array


def cached(X, folder):
    for index, image in enumerate(X):
        Image.fromarray(image).save(folder / f"{index:03}.png")
    return read_images(folder, cache=folder / "cache.npy")


SOURCES = {
    "mapped": mapped,
    "mapped, copy on write": lambda X, folder: mapped(X, folder, "c"),
    "mapped, writeable": lambda X, folder: mapped(X, folder, "r+"),
    "view of a mapped": lambda X, folder: np.asarray(mapped(np.repeat(X, 2, axis=0), folder))[::2],
    "HDF5": h5,
    "zarr": zarr_array,
    "on disk": lambda X, folder: OnDisk(X),
    "dataset": lambda X, folder: Items(list(X)),
    "dataset of tuples": lambda X, folder: TensorDataset(torch.from_numpy(X), torch.zeros(len(X))),
}
OF_PICTURES = {
    "dataset of pictures": lambda X, folder: Items([(Image.fromarray(image), 0) for image in X]),
    "cached files": cached,
}


@pytest.mark.parametrize("source", (SOURCES | OF_PICTURES).values(), ids=SOURCES | OF_PICTURES)
def test_images_elsewhere_give_the_bits_of_those_in_memory(source, tmp_path):
    assert_same(result(source(IMAGES, tmp_path)), result(IMAGES))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_rows_elsewhere_give_the_bits_of_those_in_memory(source, tmp_path):
    assert_same(result(source(ROWS, tmp_path)), result(ROWS))


@pytest.mark.parametrize("dtype", ["f8", ">f4", "f2", "i2", "?"])
@pytest.mark.parametrize("source", [mapped, h5], ids=["mapped", "HDF5"])
def test_numbers_of_all_types(source, dtype, tmp_path):
    X = (IMAGES * 0.7).astype(dtype)
    assert_same(result(source(X, tmp_path)), result(X))


@pytest.mark.parametrize("params", [{"augmentation": "standard"}, {"batch_size": 49}, {"batch_size": 1000}])
def test_other_batches(params, tmp_path):
    assert_same(result(mapped(IMAGES, tmp_path), **params), result(IMAGES, **params))


def test_partial_fit_and_checkpoints(tmp_path):
    X = mapped(IMAGES, tmp_path)
    for in_memory, elsewhere in [(IMAGES, X), (IMAGES, OnDisk(IMAGES))]:
        dims = [small().partial_fit(each).partial_fit(each) for each in (in_memory, elsewhere)]
        assert np.array_equal(*(dim.transform(IMAGES) for dim in dims))
    constant = {"lr_schedule": "constant", "checkpoint_dir": tmp_path / "checkpoints"}
    small(**constant, max_epochs=1).fit(IMAGES)
    # They are the same images, wherever they are.
    small(**constant, max_epochs=2).fit(X)
    with pytest.raises(ValueError, match="holds the training of other images"):
        small(**constant, max_epochs=2).fit(mapped(IMAGES[::-1], tmp_path))


def test_no_method_reads_all_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("skdim.statistics.CHUNK_BYTES", 4000)
    monkeypatch.setattr("skdim.transformer.CHUNK_BYTES", 4000)
    monkeypatch.setattr("skdim.images.CHUNK_BYTES", 4000)
    monkeypatch.setattr("skdim.inference.CPU_BATCH", 16)
    X = OnDisk(IMAGES)
    dim = small(checkpoint_dir=tmp_path).fit(X)
    dim.partial_fit(X).transform(X)
    assert 0 < X.largest <= 16
    with pytest.warns(UserWarning, match="of another range"):
        small().fit(IMAGES.astype(np.float32)).transform(X)
    assert X.largest <= 16


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_a_mapped_file_does_not_stay_in_memory(tmp_path):
    command = [sys.executable, Path(__file__).with_name("footprint.py"), "mapped", tmp_path / "X", tmp_path / "out"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    megabytes, grown, n_embeddings = map(float, output.split())
    assert n_embeddings == 2
    assert grown < 0.5 * megabytes


def readers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("skdim-reader")]


def test_reading_ahead_keeps_the_order_and_stays_within_bounds():
    read = []
    items = prefetched(lambda item: read.append(item) or item * 2, range(100))
    taken = []
    for item in items:
        taken.append(item)
        time.sleep(1e-4)
        assert len(read) <= len(taken) + 2
    assert taken == list(range(0, 200, 2))
    assert read == list(range(100))
    assert not readers()


def test_who_stops_early_stops_the_reading():
    read = []
    items = prefetched(read.append, range(100))
    next(items)
    assert readers()
    items.close()
    assert not readers()
    assert len(read) <= 4


class Fails(Callback):
    def __init__(self, error):
        self.error = error

    def on_batch_end(self, net, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in a callback")], ids=["interrupt", "error"])
def test_no_thread_outlives_an_error_in_training(error):
    with pytest.raises(type(error)):
        small(callbacks=[Fails(error)]).fit(OnDisk(IMAGES))
    assert not readers()


# Reads of the statistics and of the first epoch's batches and, once more, of the first rows.
@pytest.mark.parametrize("error_at", [1, 2, 3, 5])
def test_an_error_in_reading_is_the_users(error_at):
    X = OnDisk(IMAGES, error_at)
    dim = small()
    before = dict(vars(dim))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        dim.fit(X)
    assert re.search(r"While images \d+ to \d+ of X, a OnDisk, were read", "".join(caught.value.__notes__))
    assert vars(dim) == before
    assert not readers()


@pytest.mark.parametrize("params", [{}, {"warm_start": True}])
def test_each_call_that_goes_on_has_an_order_of_its_own(params):
    def orders():
        items = Items(list(IMAGES))
        dim = small(**params)
        for _ in range(3):
            (dim.fit if params else dim.partial_fit)(DataLoader(items, 16, shuffle=True))
            yield items.read[-len(IMAGES) :]  # those of the last epoch

    first, second = list(orders()), list(orders())
    assert first == second
    assert first[1] != first[2]


def test_an_error_in_going_on_leaves_the_training_as_it_was():
    dim = small().partial_fit(IMAGES)
    before = dim.transform(IMAGES)
    with pytest.raises(OSError, match="the disk is gone"):
        dim.partial_fit(OnDisk(IMAGES, 3))
    assert np.array_equal(dim.transform(IMAGES), before)
    same = small().partial_fit(IMAGES).partial_fit(IMAGES)
    assert np.array_equal(dim.partial_fit(IMAGES).transform(IMAGES), same.transform(IMAGES))


@pytest.mark.parametrize("source", [mapped, h5, lambda X, folder: Items(list(X))], ids=["mapped", "HDF5", "dataset"])
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("f4", np.nan, "Input X contains NaN, in image 30."),
        ("f8", -np.inf, "Input X contains infinity or a value too large for dtype('float32'), in image 30."),
        ("f8", 1e39, "Input X contains infinity or a value too large for dtype('float32'), in image 30."),
    ],
    ids=["NaN", "infinity", "beyond float32"],
)
def test_values_that_are_no_numbers_are_found_where_they_are(source, dtype, value, message, tmp_path):
    X = ROWS.astype(dtype)
    X[30, 3] = value
    X = source(X, tmp_path)
    fitted = small().fit(ROWS)
    before = fitted.transform(ROWS)
    for method in (small().fit, fitted.partial_fit, fitted.transform):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(X)
    assert np.array_equal(fitted.transform(ROWS), before)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")  # of scikit-learn's check
def test_large_finite_values_are_none_of_these(tmp_path):
    X = (ROWS / np.abs(ROWS).max() * np.finfo(np.float32).max).astype(np.float32)
    assert_same(result(mapped(X, tmp_path)), result(X))


BAD_ARRAYS = {
    "complex": (ROWS + 1j, ValueError, "Complex data not supported"),
    "texts": (ROWS.astype("S4"), ValueError, "not compatible with arrays of bytes/strings"),
    "dates": (ROWS.astype("M8[D]"), TypeError, "expects numbers, got an array of dtype datetime64[D]"),
    "structures": (np.zeros((10, 2), dtype=[("a", float)]), TypeError, "expects numbers"),
    "five dimensions": (np.zeros((9, 1, 4, 2, 2)), ValueError, "Found array with dim 5, while dim <= 4 is required"),
    "one image": (IMAGES[:1], ValueError, "Found array with 1 sample(s) (shape=(1, 360)) while a minimum of 2"),
    "no pixels": (np.empty((10, 0)), ValueError, "0 feature(s) (shape=(10, 0)) while a minimum of 1 is required"),
    "no cube": (np.zeros((9, 3, 3, 3)), ValueError, "is ambiguous: set data_format"),
}


@pytest.mark.parametrize(("X", "error", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_on_disk_are_refused_as_those_in_memory_are(X, error, message):
    elsewhere = OnDisk(X)
    for each in (X, elsewhere):
        with pytest.raises(error, match=re.escape(message)):
            small().fit(each)
    assert elsewhere.n_reads == 0


def test_rows_of_another_width(tmp_path):
    with pytest.raises(ValueError, match="X has 12 features, but DIMTransformer is expecting 16 features as input"):
        small().fit(ROWS).transform(mapped(ROWS[:, :12], tmp_path))


def test_masked_items_of_a_dataset():
    masked = np.ma.masked_less(ROWS, 0)
    masked[3, 0] = np.ma.masked

    class Masked(torch.utils.data.Dataset):
        def __len__(self):
            return len(masked)

        def __getitem__(self, index):
            return masked[index]

    with pytest.raises(TypeError, match="does not support masked arrays"):
        small().fit(Masked())


def test_masked_values_on_disk():
    with pytest.raises(TypeError, match="does not support masked arrays"):
        small().fit(OnDisk(np.ma.masked_less(ROWS, 0)))
    # What marks none is no fault of the images.
    assert_same(result(OnDisk(np.ma.masked_array(ROWS))), result(ROWS))


def test_values_that_turn_out_to_be_masked_when_computed():
    dask_array = pytest.importorskip("dask.array")
    masked = dask_array.ma.masked_less(dask_array.from_array(ROWS, chunks=(10, 16)), 0)
    with pytest.raises(TypeError, match="does not support masked arrays"):
        small().fit(masked)


class Liar(OnDisk):
    """An array that brings what it does not say."""

    def __init__(self, values, change):
        super().__init__(values)
        self.change = change

    def __getitem__(self, rows):
        return self.change(super().__getitem__(rows))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda values: values / 255, r"float64 of shape \(50, 12, 10, 3\)"),
        (lambda values: values[:-1], r"uint8 of shape \(49, 12, 10, 3\)"),
        (lambda values: values.transpose(0, 2, 1, 3), r"uint8 of shape \(50, 10, 12, 3\)"),
    ],
    ids=["dtype", "number", "axes"],
)
def test_what_an_array_brings_is_what_it_says(change, found):
    fitted = small().fit(IMAGES)
    for method in (small().fit, fitted.transform):
        message = f"X, a Liar, brought images 0 to 49 as {found}, where its own shape and dtype say uint8 of shape"
        with pytest.raises(ValueError, match=message):
            method(Liar(IMAGES, change))


def test_an_array_of_unknown_length():
    dask_array = pytest.importorskip("dask.array")
    X = dask_array.from_array(ROWS, chunks=(10, 16))
    with pytest.raises(ValueError, match=r"needs to know the shape of X, a Array, which is \(nan, 16\): call X.comp"):
        small().fit(X[X[:, 0] > 0])


def test_an_error_names_the_item_that_has_raised_it():
    pictures = [Image.fromarray(image) for image in IMAGES]
    pictures[13] = pictures[13].convert("I;16")
    with pytest.raises(ValueError, match="grey of more than 8 bits") as caught:
        small().fit(Items(pictures))
    assert "Raised by item 13 of X, a Items." in caught.value.__notes__


def test_arrays_in_memory_and_tables_are_not_taken_for_arrays_on_disk(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(mapped(ROWS, tmp_path), columns=[f"pixel{i}" for i in range(16)])
    dim = small().fit(frame)
    assert dim.feature_names_in_[3] == "pixel3"
    assert np.array_equal(dim.transform(frame), small().fit(ROWS).transform(ROWS))
    with pytest.raises(TypeError, match="Sparse data was passed"):
        small().fit(scipy.sparse.csr_array(ROWS))


# Datasets


class Endless(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class OfLength(Endless):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([*IMAGES[:9], IMAGES[0, :4]], ValueError, "item 0 has shape (12, 10, 3) and dtype uint8, item 9 has shape (4"),
        ([*IMAGES[:9], IMAGES[0] / 255], ValueError, "item 9 has shape (12, 10, 3) and dtype float64"),
        ([{"image": IMAGES[0]}] * 3, TypeError, "expects images of numbers, got dict as item 0 of X"),
        ([("a", 0)] * 3, TypeError, "got str as item 0 of X"),
        ([], ValueError, "Found array with 0 sample(s) (a Items)"),
        (list(IMAGES[:1]), ValueError, "Found array with 1 sample(s)"),
    ],
    ids=["another size", "another type", "dicts", "texts", "none", "one"],
)
def test_items_that_are_no_images(items, error, message):
    with pytest.raises(error, match=re.escape(message)):
        small().fit(Items(items))


def test_an_iterable_dataset_is_sent_to_a_loader():
    with pytest.raises(TypeError, match=r"may come in a torch\.utils\.data\.DataLoader that has a length"):
        small().fit(Endless())


def test_an_item_that_raises_is_named():
    class Broken(Items):
        def __getitem__(self, index):
            return 1 / (index - 7) if index == 7 else super().__getitem__(index)

    with pytest.raises(ZeroDivisionError) as caught:
        small().fit(Broken(list(IMAGES)))
    assert "Raised by item 7 of X, a Broken." in caught.value.__notes__


def test_pictures_in_a_dataset_are_read_as_files_are():
    pictures = [Image.fromarray(image) for image in IMAGES]
    pictures[3] = pictures[3].convert("L")
    dim = small().fit(Items(pictures))
    assert dim.image_shape_ == (3, 12, 10)
    assert np.array_equal(dim.transform(Items(pictures)), dim.transform(pictures))
    # All grey, for a transformer of colour images.
    grey = [picture.convert("L") for picture in pictures]
    assert np.array_equal(dim.transform(Items(grey)), dim.transform(grey))


class Jittered(Items):
    def __getitem__(self, index):
        return super().__getitem__(index) + np.random.default_rng().random(dtype=np.float32)


def test_a_dataset_whose_items_change_is_warned_about():
    with pytest.warns(
        UserWarning, match="Item 0 of X, a Jittered, differs each time .* belong in augmentation"
    ) as caught:
        small(max_epochs=0).fit(Jittered(list(ROWS.astype(np.float32))))
    assert caught[0].filename == __file__


# Loaders


def loader(X, **params):
    return DataLoader(TensorDataset(torch.from_numpy(X), torch.zeros(len(X))), **{"batch_size": 16} | params)


class Orders:
    """Batches of one order after another, each time it is iterated."""

    def __init__(self, *orders):
        self.orders = list(orders)

    def __iter__(self):
        return iter(self.orders.pop(0))

    def __len__(self):
        return 2


@pytest.mark.parametrize("X", [IMAGES, ROWS], ids=["images", "rows"])
def test_a_loader_that_brings_our_batches_gives_our_bits(X):
    # Without a prior nothing but the order is drawn.
    params = {"prior_weight": 0, "max_epochs": 1, "batch_size": 25}
    watched = Items(list(X))
    expected = small(**params).fit(watched)
    # After the statistics of all images, before the look at the last step's embeddings.
    order = watched.read[-58:-8]
    assert sorted(order) == list(range(50))
    ours, in_turn = ([indices[:25], indices[25:]] for indices in (order, list(range(50))))
    dim = small(**params).fit(DataLoader(Items(list(X)), batch_sampler=Orders(ours, in_turn, ours)))
    assert_same(weights(dim), weights(expected))
    assert dim.loss_curve_ == expected.loss_curve_


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # Python 3.12, of torch's forking
@pytest.mark.parametrize("n_workers", [0, 2])
def test_transform_of_a_loader(n_workers):
    dim = small().fit(loader(IMAGES, num_workers=n_workers, drop_last=True))
    assert dim.n_iter_ == 2
    for batch_size in (7, 16, 200):
        Z = dim.transform(loader(IMAGES, batch_size=batch_size, num_workers=n_workers))
        assert np.array_equal(Z, dim.transform(IMAGES))


@pytest.mark.parametrize("batch_size", [50, 100, 290])
def test_transform_cuts_the_batches_of_a_loader_as_it_likes(batch_size):
    dim = small(max_epochs=0).fit(IMAGES)
    X = np.random.default_rng(1).integers(0, 256, (300, *IMAGES.shape[1:]), dtype=np.uint8)
    assert np.array_equal(dim.transform(loader(X, batch_size=batch_size)), dim.transform(X))


def test_a_loader_of_all_images_has_their_statistics(monkeypatch):
    # Some twelve images at once, out of batches of eight.
    monkeypatch.setattr("skdim.statistics.CHUNK_BYTES", 12 * 8 * IMAGES[0].size)
    dim = small(max_epochs=0).fit(loader(IMAGES, batch_size=8))
    np.testing.assert_allclose(dim.mean_, IMAGES.mean(axis=(0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(dim.std_, IMAGES.std(axis=(0, 1, 2)) / 255, rtol=1e-6)


def test_random_state_draws_the_order_of_a_loader_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    dims = [small(random_state=seed).fit(loader(IMAGES, shuffle=True)) for seed in (0, 0, 1)]
    dims[0].transform(loader(IMAGES))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(weights(dims[0]), weights(dims[1]))
    assert dims[0].loss_curve_ == dims[1].loss_curve_ != dims[2].loss_curve_


class WithoutItems(IterableDataset):
    def __len__(self):
        return 40

    def __iter__(self):
        return iter(())


BAD_LOADERS = {
    "no length": (lambda: DataLoader(Endless(), 16), "expects a DataLoader with a length"),
    "nothing": (lambda: loader(IMAGES[:5], drop_last=True), "Found array with 0 sample(s) (a DataLoader)"),
    "a last batch of one": (lambda: loader(IMAGES[:33]), "a single image (33 images in batches of 16)"),
    "batches of one": (lambda: loader(IMAGES, batch_size=1), "Found array with 1 sample(s)"),
    "a later batch of one": (
        lambda: DataLoader(Items(list(IMAGES)), batch_sampler=[[0, 1], [2]]),
        "brought a batch of a single image, and training needs two at least: set drop_last=True",
    ),
    "other images": (
        lambda: [loader(IMAGES), loader(IMAGES[:, :4])],
        "the first batch has images of shape (12, 10, 3), read as uint8, batch 1 of shape (4, 10, 3)",
    ),
    "NaN": (lambda: loader(np.where(np.arange(50)[:, None] == 30, np.nan, ROWS)), "Input X contains NaN, in image 30."),
    "more than its length": (lambda: DataLoader(OfLength(40), 16), "should bring 40 images by its length"),
    "more batches": (lambda: DataLoader(OfLength(40), 16, drop_last=True), "should bring 2 batches by its length, but"),
    "more batches than images make": (
        lambda: [loader(IMAGES), loader(IMAGES[16:], batch_size=4)],
        "should bring 4 batches by its length, but has more",
    ),
    "no batch": (lambda: DataLoader(WithoutItems(), 16), "should bring 3 batches by its length, but has none"),
    "complex": (
        lambda: [loader(IMAGES), loader(IMAGES.astype(np.complex64))],
        "the first batch has images of shape (12, 10, 3), read as uint8, batch 1 of shape (12, 10, 3) and dtype comp",
    ),
    "fewer than its length": (lambda: DataLoader(OfLength(60), 16), "should bring 60 images by its length, but has 50"),
}


class TwoLoaders(DataLoader):
    def __init__(self, first, second):
        super().__init__(first.dataset, batch_size=16)
        self.second = second

    def __iter__(self):
        yield next(super().__iter__())
        yield from self.second


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(("make", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS)
def test_loaders_that_cannot_train(make, message):
    made = make()
    made = TwoLoaders(*made) if isinstance(made, list) else made
    dim = small()
    before = dict(vars(dim))
    with pytest.raises(ValueError, match=re.escape(message)):
        dim.fit(made)
    assert vars(dim) == before


def test_a_loader_of_dicts():
    with pytest.raises(TypeError, match="expects an array of images, got dict"):
        small().fit(DataLoader(Items([{"image": row} for row in ROWS]), 16))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"shuffle": True}, "expects a DataLoader that keeps the order of its images, got one with a RandomSampler"),
        ({"drop_last": True}, "expects a DataLoader that brings all images, got one with drop_last=True"),
    ],
    ids=["shuffled", "incomplete"],
)
def test_loaders_whose_rows_could_not_be_told_apart(params, message):
    shuffled = loader(IMAGES, **params)
    fitted = small().fit(shuffled)
    for method in (fitted.transform, small(max_epochs=10**9).fit_transform):
        with pytest.raises(ValueError, match=message):
            method(shuffled)


def test_batches_of_a_samplers_own_making_train_but_do_not_transform():
    data = TensorDataset(torch.from_numpy(IMAGES))
    batches = BatchSampler(SequentialSampler(data), 10, drop_last=False)

    class Own:
        def __iter__(self):
            return iter(batches)

        def __len__(self):
            return len(batches)

    dim = small().fit(DataLoader(data, batch_sampler=Own()))
    assert dim.n_iter_ == 2
    with pytest.raises(ValueError, match="transform needs to know how many images"):
        dim.transform(DataLoader(data, batch_sampler=Own()))


def test_where_a_loader_cannot_serve(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_dir needs images in an order that can be taken up again"):
        small(checkpoint_dir=tmp_path / "checkpoints").fit(loader(IMAGES))
    assert not (tmp_path / "checkpoints").exists()
    dim = small().fit(IMAGES)
    with pytest.raises(TypeError, match="pass its dataset"):
        retrieval_scorer(dim, loader(IMAGES))


# Where embeddings go


def test_transform_writes_into_an_array_or_a_mapped_file(tmp_path):
    dim = small().fit(IMAGES)
    expected = dim.transform(IMAGES)
    arrays = [
        np.full((50, 4), np.nan, dtype=np.float32),
        np.full((50, 9), np.nan, dtype=np.float32)[:, 2:6],
        np.lib.format.open_memmap(tmp_path / "Z.npy", "w+", np.float32, (50, 4)),
    ]
    for out in arrays:
        for X in (IMAGES, OnDisk(IMAGES), loader(IMAGES)):
            out[:] = np.nan
            assert dim.transform(X, out=out) is out
            assert np.array_equal(out, expected)
    assert np.array_equal(np.load(tmp_path / "Z.npy"), expected)
    assert not hasattr(dim, "set_transform_request")


def test_set_output_wraps_what_was_written():
    pandas = pytest.importorskip("pandas")
    dim = small().set_output(transform="pandas").fit(IMAGES)
    out = np.empty((50, 4), dtype=np.float32)
    frame = dim.transform(IMAGES, out=out)
    assert isinstance(frame, pandas.DataFrame)
    assert np.array_equal(frame.to_numpy(), out)
    assert np.array_equal(out, dim.set_output(transform="default").transform(IMAGES))


def read_only():
    out = np.empty((50, 16), dtype=np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((50, 15), dtype=np.float32), "a float32 NumPy array of shape (50, 16), got float32 (50, 15)"),
        (np.empty((49, 16), dtype=np.float32), "got float32 (49, 16)"),
        (np.empty((50, 16)), "got float64 (50, 16)"),
        (np.empty((50, 16), dtype=np.dtype("f4").newbyteorder()), "f4 (50, 16)"),
        (torch.empty(50, 16), "got Tensor"),
        (read_only(), "can be written to"),
        (np.empty((50, 16), dtype=np.float32)[::-1], "not negative"),
    ],
    ids=["width", "rows", "type", "byte order", "tensor", "read-only", "backwards"],
)
def test_arrays_that_cannot_take_the_embeddings(out, message):
    dim = small().set_params(n_components=16).fit(ROWS)
    X = OnDisk(ROWS)
    with pytest.raises(ValueError, match=re.escape(message)):
        dim.transform(X, out=out)
    assert X.n_reads == 0


@pytest.mark.parametrize("elsewhere", [False, True], ids=["array", "mapped"])
def test_embeddings_are_not_written_over_the_images(elsewhere, tmp_path):
    X = mapped(ROWS, tmp_path, "r+") if elsewhere else ROWS.copy()
    dim = small().set_params(n_components=16).fit(X)
    for overlapping in (X, X[:, :]):
        with pytest.raises(ValueError, match="out must not overlap X"):
            dim.transform(X, out=overlapping)
    assert np.array_equal(X, ROWS)


# Around it


@pytest.mark.parametrize("source", [mapped, h5], ids=["mapped", "HDF5"])
def test_a_search_in_a_pipeline(source, tmp_path):
    y = np.arange(50) % 2
    pipeline = make_pipeline(small(max_epochs=1), KNeighborsClassifier())
    grid = {"dimtransformer__local_weight": [0.5, 1.0]}
    searches = [GridSearchCV(pipeline, grid, cv=2).fit(X, y) for X in (IMAGES, source(IMAGES, tmp_path))]
    scores = [search.cv_results_["mean_test_score"] for search in searches]
    assert np.array_equal(*scores)
    assert np.array_equal(*(search.predict(IMAGES) for search in searches))


def test_evaluation_of_a_mapped_file(tmp_path):
    X, y = mapped(IMAGES, tmp_path), np.arange(50) % 2
    dim = small().fit(X)
    assert retrieval_scorer(dim, X) == retrieval_scorer(dim, IMAGES)
    tables = [evaluate(dim, each, y, each, y, probes=["knn"], layers=["embedding"]) for each in (X, IMAGES)]
    assert tables[0].equals(tables[1])
    tuned = [FineTunedClassifier(dim, max_epochs=2, random_state=0).fit(each, y) for each in (X, IMAGES)]
    assert np.array_equal(*(classifier.predict_proba(X) for classifier in tuned))


# Image files


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = [f"{index:02}.png" for index in range(40)] + [f"more/{index:02}.PNG" for index in range(10)]
    for name, image in zip(names, IMAGES, strict=True):
        Image.fromarray(image).save(folder / name)
    (folder / "labels.txt").write_text("none")
    (folder / ".hidden.png").write_text("none")
    return folder


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_a_folder(photos, n_jobs):
    for folder in (photos, str(photos)):
        assert np.array_equal(read_images(folder, n_jobs=n_jobs), IMAGES)
    small_images = read_images(photos, size=(4, 5), mode="L", n_jobs=n_jobs)
    assert np.array_equal(small_images, read_images(sorted(photos.rglob("[0-9]*")), size=(4, 5), mode="L"))


def test_a_bad_file_in_a_folder_is_named(photos):
    (photos / "more" / "05.PNG").write_text("no image")
    with pytest.raises(OSError, match=r"Image 45, '.*05.PNG', cannot be read"):
        read_images(photos, n_jobs=3)


def test_folders_that_are_none(photos):
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image files: none that ends in"):
        read_images(photos / "empty")
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        read_images(photos / "nowhere")
    with pytest.raises(ValueError, match="which is no folder"):
        read_images(photos / "00.png")


def test_a_cache_is_made_once(photos, monkeypatch):
    cache = photos.parent / "cache.npy"
    X = read_images(photos, cache=cache, n_jobs=2)
    assert isinstance(X, np.memmap)
    assert not X.flags.writeable
    assert np.array_equal(X, IMAGES)
    assert np.array_equal(np.load(cache), IMAGES)
    monkeypatch.setattr("skdim.files._pixels", None)  # nothing is decoded any more
    monkeypatch.chdir(photos)
    assert np.array_equal(read_images(Path("."), cache=cache), IMAGES)


def test_a_cache_of_deep_images_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("skdim.files.BLOCK", 3)
    deep = [tmp_path / f"{index}.tiff" for index in range(7)]
    for index, path in enumerate(deep):
        Image.fromarray(np.full((4, 5), 1000 + index, dtype=np.uint16)).save(path)
    X = read_images(deep, cache=tmp_path / "cache.npy")
    assert X.dtype == np.float32
    assert np.array_equal(X[:, 0, 0], np.arange(1000, 1007))


def change(path):
    Image.fromarray(IMAGES[7]).save(path)
    os.utime(path, ns=(0, 12345))


@pytest.mark.parametrize("what", ["pixels", "a file more", "a file less", "mode", "size"])
def test_a_cache_of_anything_else_is_made_anew(photos, what):
    cache = photos.parent / "cache.npy"
    before = read_images(photos, cache=cache)
    options = {"mode": {"mode": "L"}, "size": {"size": (12, 11)}}.get(what, {})
    if what == "pixels":
        change(photos / "03.png")
    elif what == "a file more":
        change(photos / "99.png")
    elif what == "a file less":
        (photos / "03.png").unlink()
    found = read_images(photos, cache=cache, **options)
    assert np.array_equal(found, read_images(photos, **options))
    assert not np.array_equal(found, before)


def test_a_cache_that_cannot_be_made_is_as_it_was(photos):
    cache = photos.parent / "cache.npy"
    read_images(photos, cache=cache)
    (photos / "99.png").write_bytes((photos / "00.png").read_bytes()[:150])
    with pytest.raises(OSError, match=r"99.png', cannot be read"):
        read_images(photos, cache=cache)
    assert np.array_equal(np.load(cache), IMAGES)
    assert sorted(path.name for path in photos.parent.iterdir()) == ["cache.npy", "photos"]


def test_caches_that_are_refused(photos):
    other = photos.parent / "X.npy"
    for write in (lambda: np.save(other, IMAGES), lambda: other.write_bytes(b"")):
        write()
        before = other.read_bytes()
        with pytest.raises(ValueError, match="is a file that read_images did not write"):
            read_images(photos, cache=other)
        assert other.read_bytes() == before
    with pytest.raises(ValueError, match="cache needs files, got a Pillow image as image 0"):
        read_images([Image.fromarray(IMAGES[0])], cache=photos.parent / "cache.npy")
    with pytest.raises(FileNotFoundError, match=r"Image 1, 'nowhere.png', cannot be read"):
        read_images([photos / "00.png", "nowhere.png"], cache=photos.parent / "cache.npy")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_streaming_to_cuda_gives_the_bits_of_resident_images(monkeypatch, tmp_path):
    X = mapped(IMAGES, tmp_path)
    expected = result(X, device="cuda")
    assert_same(result(IMAGES, device="cuda"), expected)
    monkeypatch.setattr("skdim.batches._free_memory", lambda device: 0)
    assert_same(result(X, device="cuda"), expected)


DATA = TensorDataset(torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler(range(48)),
        WeightedRandomSampler([1.0] * 48, 48),
        DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_loaders_with_any_random_sampler_do_not_transform(sampler):
    fitted = small(max_epochs=0).fit(DATA.tensors[0])
    with pytest.raises(ValueError, match=f"keeps the order of its images, got one with a {type(sampler).__name__}"):
        fitted.transform(DataLoader(DATA, 16, sampler=sampler))
    with pytest.raises(ValueError, match=f"keeps the order of its images, got one with a {type(sampler).__name__}"):
        fitted.transform(DataLoader(DATA, batch_sampler=BatchSampler(sampler, 16, drop_last=False)))


def test_loaders_that_bring_all_in_order_transform_whatever_their_options():
    X = DATA.tensors[0]
    fitted = small(max_epochs=0).fit(X)
    in_order = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=False)
    # 48 images are three batches of 16: there is none to drop.
    for loader in (DataLoader(DATA, 16, drop_last=True), DataLoader(DATA, 16, sampler=in_order)):
        assert np.array_equal(fitted.transform(loader), fitted.transform(X))


def test_a_private_mapping_keeps_what_was_written_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("skdim.sources.RESIDENT_BYTES", 0)
    stored = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "X.npy", stored)
    X = np.load(tmp_path / "X.npy", mmap_mode="c")
    X[:] = 255 - X
    small(max_epochs=0).fit(X).transform(X)
    assert np.array_equal(X, 255 - stored)


class Batchwise(Callback):
    def on_batch_end(self, net, **kwargs):
        pass


def test_the_loss_of_an_epoch_is_the_mean_over_images_however_many_a_batch_has():
    X = torch.rand(34, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dim = small(max_epochs=1, callbacks=[Batchwise()]).fit(DataLoader(TensorDataset(X), 16))
    batches = dim.net_.history[-1]["batches"]
    losses, sizes = ([batch[name] for batch in batches] for name in ("train_loss", "train_batch_size"))
    assert sizes == [16, 16, 2]
    # Against a single negative the loss of the last two images is far lower.
    assert np.mean(losses) < np.average(losses, weights=sizes) - 0.1
    assert dim.loss_curve_[0] == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)


class Mixed(Dataset):
    """Bytes, then the same images as numbers."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = torch.full((1, 8, 8), index, dtype=torch.uint8)
        return image if index < 20 else image.float()


def test_a_loader_whose_later_batches_are_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"read as uint8, batch 1 of shape .* and dtype float32"):
        small().fit(DataLoader(Mixed(), 20))


def test_items_that_are_lists_begin_with_their_image():
    expected = small().fit(Items(list(IMAGES)))
    assert_same(weights(small().fit(Items([[image, 0] for image in IMAGES]))), weights(expected))


def test_pictures_with_transparency_among_grey_ones():
    pictures = [Image.fromarray(np.dstack([image, image[..., :1]])) for image in IMAGES]
    pictures[3] = pictures[3].convert("L")
    dim = small(image_shape=(4, 12, 10)).fit(Items(pictures))
    assert np.array_equal(dim.transform(Items(pictures)), dim.transform(pictures))
