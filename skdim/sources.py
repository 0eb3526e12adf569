"""Images that stay where they are, in mapped files, arrays on disk and datasets, and are read a few rows at a time."""

import copy
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch.utils.data import Dataset, IterableDataset

from skdim.files import is_pillow_image, picture_as_array
from skdim.notices import warn

__all__ = ["LazyArray", "MappedPages", "as_lazy_array", "as_stored", "check_dtype", "prefetched", "tensor_as_array"]

Selection = TypeVar("Selection")
Result = TypeVar("Result")

# What is read before it is asked for, beside what is in use.
N_AHEAD = 2

# Pages of a mapped file that may be resident, and how many may come with a row: with a page, newer kernels map all of
# the block that it was read from the disk in.
RESIDENT_BYTES = 1 << 28
WINDOW_BYTES = 1 << 21

# Interfaces of arrays whose values are in memory, of the host or of a device.
IN_MEMORY = ("__array_interface__", "__cuda_array_interface__", "__dlpack__", "__array_namespace__")


class LazyArray:
    """Rows of numbers that are read when they are indexed: an array, as far as shapes and reading go.

    Parameters
    ----------
    source : object
        Where they are.
    read : callable
        ``read(rows)`` returns the values of a slice or an array of indices of rows.
    shape : tuple of int
        Of all rows.
    dtype : np.dtype
        Of what `read` returns.

    Attributes
    ----------
    dtype : np.dtype
        Of what indexing returns: uint8, or float32 for all other numbers.
    """

    def __init__(
        self, source: Any, read: Callable[[Any], NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.source, self._read = source, read
        self.shape, self.ndim = shape, len(shape)
        self._declared = np.dtype(dtype), shape[1:]
        self.dtype = np.dtype(np.uint8 if dtype == np.uint8 else np.float32)
        self.nbytes = prod(shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, n_rows: int, *row_shape: int) -> "LazyArray":
        """Give the rows, of which there are `n_rows`, another shape."""
        other = copy.copy(self)
        other.shape, other.ndim = (n_rows, *row_shape), 1 + len(row_shape)
        return other

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Read a slice of rows, or those of an array of indices.

        Raises
        ------
        ValueError
            If the source brings others than it has declared, or values that float32 does not hold.
        """
        indices = range(len(self))[rows] if isinstance(rows, slice) else rows
        try:
            values = self._read(rows)
        except Exception as error:
            title = type(self.source).__name__
            error.add_note(f"While images {min(indices)} to {max(indices)} of X, a {title}, were read.")
            raise
        dtype, row_shape = self._declared
        if values.shape != (len(indices), *row_shape) or (values.dtype == np.uint8) != (dtype == np.uint8):
            raise ValueError(
                f"X, a {type(self.source).__name__}, brought images {min(indices)} to {max(indices)} as {values.dtype} "
                f"of shape {values.shape}, where its own shape and dtype say {dtype} of shape "
                f"{(len(indices), *row_shape)}."
            )
        return as_stored(values, self.dtype, indices).reshape(len(values), *self.shape[1:])


def as_stored(values: NDArray[Any], dtype: np.dtype[Any], indices: Any) -> NDArray[Any]:
    """Bring numbers to uint8 or finite float32.

    Parameters
    ----------
    values : ndarray of shape (n, ...)
        Numbers.
    dtype : np.dtype
        uint8, for values that are, or float32.
    indices : sequence of n int
        Which images these are, for messages.

    Raises
    ------
    ValueError
        If there are NaN, infinite values, or values beyond float32.
    """
    if dtype == np.uint8:
        return values
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = values.astype(np.float32, copy=False)
        # As scikit-learn does: the sum is quick, and tells in nearly all cases.
        if np.isfinite(values.sum()):
            return values
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        bad = int(finite.argmin())
        what = "NaN" if np.isnan(values[bad]).any() else "infinity or a value too large for dtype('float32')"
        raise ValueError(f"Input X contains {what}, in image {indices[bad]}.")
    return values


def as_lazy_array(X: Any, mode: str | None, name: str) -> tuple[LazyArray | None, bool]:
    """Open what holds its images elsewhere than in memory.

    Parameters
    ----------
    X : object
        A NumPy array in a mapped file, an array on disk that reads what it is indexed with (of h5py, zarr, dask), a
        map-style torch Dataset, or anything else.
    mode : {"RGB", "RGBA"} or None
        Of Pillow images in a dataset; None is that of the first one.
    name : str
        The estimator's, for messages.

    Returns
    -------
    array : LazyArray or None
        None for anything else.
    are_pictures : bool
        Whether these are Pillow images, which have their channels last.

    Raises
    ------
    TypeError, ValueError
        If these cannot be images.
    """
    if isinstance(X, Dataset):
        items = _Items(X, mode, name)
        return LazyArray(X, items, items.shape, items.dtype), items.are_pictures
    if type(X) in (np.ndarray, np.memmap) and X.ndim > 1 and _mapped_file(X) is not None:
        read: Callable[[Any], NDArray[Any]] = _MappedRows(X)
    elif _slices_lazily(X):
        read = _SlicedRows(X, name)
    else:
        return None, False
    if not all(isinstance(side, int | np.integer) for side in X.shape):
        raise ValueError(
            f"{name} needs to know the shape of X, a {type(X).__name__}, which is {X.shape}: call "
            "X.compute_chunk_sizes() before, if it is one of dask."
        )
    check_dtype(X.dtype, name)
    if X.dtype.kind == "c":
        raise ValueError("Complex data not supported")
    if X.dtype.kind == "O":
        raise TypeError(f"{name} expects numbers, got objects in a {type(X).__name__}.")
    return LazyArray(X, read, tuple(X.shape), X.dtype), False


def check_dtype(dtype: Any, name: str) -> None:
    """Refuse texts, dates and structures.

    Raises
    ------
    ValueError, TypeError
        In scikit-learn's words.
    """
    if dtype.kind in "US":
        raise ValueError(
            "dtype='numeric' is not compatible with arrays of bytes/strings. "
            "Convert your data to numeric values explicitly instead."
        )
    if dtype.kind in "mMV":
        raise TypeError(f"{name} expects numbers, got an array of dtype {dtype}.")


def tensor_as_array(X: torch.Tensor, name: str) -> NDArray[Any]:
    """Convert a tensor of any device and of dtypes that NumPy has not."""
    if X.is_meta:
        raise TypeError(f"{name} expects images, got a tensor on the meta device, which holds no values.")
    if X.layout != torch.strided or X.is_nested or X.is_quantized:
        kind = "nested" if X.is_nested else "quantized" if X.is_quantized else str(X.layout)
        raise TypeError(f"{name} expects a dense tensor, got a tensor that is {kind}.")
    X = X.detach().cpu().resolve_conj().resolve_neg()
    return (X.float() if X.is_floating_point() and X.element_size() < 4 else X).numpy()


def prefetched(read: Callable[[Selection], Result], selections: Iterable[Selection]) -> Iterator[Result]:
    """Read one selection after another in a thread of its own, two ahead of their use.

    Parameters
    ----------
    read : callable
        Its errors are raised here, in their turn.
    selections : iterable
        What it is called with.

    Yields
    ------
    object
        What it returns. Whoever stops early closes the generator, or lets go of it: the thread then ends.
    """
    selections = iter(selections)
    with ThreadPoolExecutor(1, thread_name_prefix="skdim-reader") as reader:
        ahead = deque(reader.submit(read, rows) for rows in islice(selections, N_AHEAD))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(reader.submit(read, rows) for rows in islice(selections, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()


class MappedPages:
    """Gives the pages of a mapped file back from time to time, so that they do not add up in resident memory.

    Parameters
    ----------
    array : ndarray
        One that lies in no mapped file has nothing to give back.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        mapped = _mapped_file(array)
        # A private mapping would lose what was written to it; of a shared one the file has it.
        can_release = mapped is not None and mapped.mode != "c" and hasattr(mmap, "MADV_DONTNEED")
        # Of a small file all may stay.
        can_release = can_release and len(mapped.base) > RESIDENT_BYTES
        self._mapping = mapped.base if can_release else None
        self._touched = 0

    def touch(self, rows: NDArray[Any]) -> None:
        """Count rows that were read or written."""
        self._touched += rows.nbytes + len(rows) * WINDOW_BYTES
        if self._mapping is not None and self._touched > RESIDENT_BYTES:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _mapped_file(array: NDArray[Any]) -> Any:
    """Find the np.memmap that an array is or is a view of; None is none."""
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, np.memmap) and isinstance(owner.base, mmap.mmap) else None


class _MappedRows:
    """Reads rows of an array in a mapped file."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array.view(np.ndarray)
        self._pages = MappedPages(array)

    def __call__(self, rows: Any) -> NDArray[Any]:
        values = np.array(self._array[rows]) if isinstance(rows, slice) else self._array[rows]
        self._pages.touch(values)
        return values


def _slices_lazily(X: Any) -> bool:
    """Tell an array that reads what it is indexed with from one that is in memory, and from what is no array."""
    return (
        isinstance(getattr(X, "dtype", None), np.dtype)
        and isinstance(getattr(X, "shape", None), tuple)
        # Series and the like have one dimension, and are no images.
        and len(X.shape) > 1
        and hasattr(X, "__getitem__")
        and not sparse.issparse(X)
        and not any(hasattr(X, interface) for interface in IN_MEMORY)
    )


class _SlicedRows:
    """Reads rows of an array on disk."""

    def __init__(self, array: Any, name: str) -> None:
        self._array, self._name = array, name

    def __call__(self, rows: Any) -> NDArray[Any]:
        if isinstance(rows, slice):
            values = self._array[rows]
        else:
            # HDF5 takes indices that increase only.
            rows, order = np.unique(rows, return_inverse=True)
            values = self._array[rows]
        # What is computed here only may turn out to be masked.
        values = values.compute() if hasattr(values, "compute") else values
        _refuse_masked(values, self._name)
        values = np.asarray(values)
        return values if isinstance(rows, slice) else values[order]


class _Items:
    """Reads the images of a map-style dataset: its items, or the first part of each."""

    def __init__(self, dataset: Any, mode: str | None, name: str) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{name} expects a dataset whose items have indices and a length, got {type(dataset).__name__}; an "
                "iterable one may come in a torch.utils.data.DataLoader that has a length."
            )
        if len(dataset) == 0:
            raise ValueError(f"Found array with 0 sample(s) (a {type(dataset).__name__}), a minimum of 1 is required.")
        self._dataset, self._name, self._mode = dataset, name, mode
        image = self._image(0)
        self.are_pictures = is_pillow_image(image)
        first = self._array(0, image)
        again = self._array(0, self._image(0))
        if first.tobytes() != again.tobytes():
            warn(
                f"Item 0 of X, a {type(dataset).__name__}, differs each time it is read, but images are read several "
                "times and must stay the same. Random transforms belong in augmentation."
            )
        if self.are_pictures and first.ndim == 3:
            # A few grey images among colour ones are read as colours.
            self._mode = {3: "RGB", 4: "RGBA"}[first.shape[2]]
        self.shape, self.dtype = (len(dataset), *first.shape), first.dtype

    def __call__(self, rows: Any) -> NDArray[Any]:
        indices = range(len(self._dataset))[rows] if isinstance(rows, slice) else rows.tolist()
        return np.stack([self._checked(index) for index in indices])

    def _checked(self, index: int) -> NDArray[Any]:
        array = self._array(index, self._image(index))
        if array.shape != self.shape[1:] or (array.dtype == np.uint8) != (self.dtype == np.uint8):
            raise ValueError(
                f"All images must have the same shape and type: item 0 has shape {self.shape[1:]} and dtype "
                f"{self.dtype}, item {index} has shape {array.shape} and dtype {array.dtype}."
            )
        return array

    def _image(self, index: int) -> Any:
        try:
            item = self._dataset[index]
        except Exception as error:
            error.add_note(f"Raised by item {index} of X, a {type(self._dataset).__name__}.")
            raise
        return item[0] if isinstance(item, tuple | list) else item

    def _array(self, index: int, image: Any) -> NDArray[Any]:
        if isinstance(image, torch.Tensor):
            array = tensor_as_array(image, self._name)
        else:
            _refuse_masked(image, self._name)
            try:
                array = picture_as_array(image, self._mode) if is_pillow_image(image) else np.asarray(image)
            except Exception as error:
                error.add_note(f"Raised by item {index} of X, a {type(self._dataset).__name__}.")
                raise
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{self._name} expects images of numbers, got {type(image).__name__} as item {index} of X.")
        return array


def _refuse_masked(values: Any, name: str) -> None:
    if np.ma.is_masked(values):
        raise TypeError(f"{name} does not support masked arrays; fill the masked values first.")
