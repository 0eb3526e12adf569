"""From any accepted array to checked images: all errors about the input are raised here, before any work."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data
from torch.utils.data import DataLoader

from skdim.files import is_image_files, read_images
from skdim.notices import warn
from skdim.sources import LazyArray, as_lazy_array, check_dtype, prefetched, tensor_as_array

ImageShape = tuple[int, int, int]

__all__ = ["ImageShape", "Images", "as_array", "check_image_shape", "check_images"]

# Rows read at once where a pass over all images makes float copies.
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Images:
    """Checked images, in the memory layout they came in.

    Attributes
    ----------
    array : ndarray or LazyArray of shape (n, C, H, W) or (n, H, W, C)
        uint8 or native float32; a view of the user's array wherever one will do.
    shape : tuple of int
        Channels, height and width.
    channels_last : bool
        Whether `array` has the channels last.
    """

    array: NDArray[Any] | LazyArray
    shape: ImageShape
    channels_last: bool

    def __len__(self) -> int:
        return len(self.array)

    @property
    def n_images(self) -> int:
        """How many there are."""
        return len(self.array)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or float32."""
        return self.array.dtype

    def take(self, rows: Any) -> torch.Tensor:
        """Read some images into a tensor of shape (len(rows), C, H, W) and the dtype of `array`."""
        batch = self.array[rows]
        # torch knows no read-only tensors and no negative strides.
        if not (batch.flags.writeable and batch.flags.c_contiguous):
            batch = batch.copy(order="C")
        images = torch.from_numpy(batch)
        return images.permute(0, 3, 1, 2) if self.channels_last else images

    def shares_memory(self, array: NDArray[Any]) -> bool:
        """Tell whether these may be the same bytes as some of an array's."""
        mine = self.array.source if isinstance(self.array, LazyArray) else self.array
        return isinstance(mine, np.ndarray) and np.may_share_memory(mine, array)

    def head(self, n: int) -> torch.Tensor:
        """Read the first `n` images, or all of fewer."""
        return self.take(slice(n))

    def some(self, n: int) -> torch.Tensor:
        """Read `n` images from all over, or all of fewer."""
        return self.take(np.linspace(0, len(self) - 1, min(n, len(self))).astype(np.int64))

    def read(self, selections: Iterable[Any], *, pinned: bool = False) -> Iterator[torch.Tensor]:
        """Take one selection of rows after another, where they are read from elsewhere ahead of their use.

        Parameters
        ----------
        selections : iterable
            Of what `take` takes.
        pinned : bool, default=False
            Whether into pinned memory.
        """

        def take(rows: Any) -> torch.Tensor:
            return self.take(rows).pin_memory() if pinned else self.take(rows)

        return prefetched(take, selections) if isinstance(self.array, LazyArray) else map(take, selections)

    def chunks(self, size: int, part: int = 0, n_parts: int = 1) -> Iterator[torch.Tensor]:
        """Read all images in their order, or those of one of several parts, `size` at a time."""
        first, last = (len(self) * (part + i) // n_parts for i in (0, 1))
        return self.read(slice(start, min(start + size, last)) for start in range(first, last, size))


def check_images(
    estimator: BaseEstimator,
    X: Any,
    *,
    image_shape: ImageShape | None,
    data_format: str,
    reset: bool,
    min_samples: int = 1,
) -> Images:
    """Check the input of an estimator and bring it into the form of images.

    Parameters
    ----------
    estimator : BaseEstimator
        Named in the messages; with `reset`, gets ``n_features_in_`` and ``feature_names_in_``.
    X : array-like
        Flat rows (n, p) or images (n, C, H, W), (n, H, W, C) or (n, H, W); a NumPy array, DataFrame, torch tensor,
        list of arrays or anything that converts to an array. uint8 and float32 are kept, other types become float32.
        What `skdim.sources.as_lazy_array` opens is not read here, and its values are checked when they are.
        Or a sequence of paths or Pillow images, which are read as `skdim.files.read_images` does, in colour where
        `image_shape` has three or four channels.
    image_shape : tuple of int or None
        Channels, height and width, where known.
    data_format : {"auto", "channels_first", "channels_last"}
        Order of the axes of an image, in flat rows too (where "auto" means "channels_first").
    reset : bool
        Whether this is a first fit, which sets the shape.
    min_samples : int, default=1
        The least number of images; training needs two.

    Returns
    -------
    Images
        The checked images.

    Raises
    ------
    ValueError
        If shapes do not fit, are ambiguous or empty, or there are NaN or infinite values.
    TypeError
        If `X` is sparse, or holds what is no number.

    Warns
    -----
    UserWarning
        If a first fit gets an `image_shape` that looks like height, width and channels.
    """
    name = type(estimator).__name__
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a DataLoader, but images are needed here that can be read in any order, or again: pass its dataset."
        )
    # A few grey files among colour ones may be all that this call gets.
    mode = {3: "RGB", 4: "RGBA"}.get(image_shape[0]) if image_shape is not None else None
    lazy, are_pictures = as_lazy_array(X, mode, name)
    if is_image_files(X):
        X, are_pictures = read_images(X, mode=mode), True
    if are_pictures:
        data_format = "channels_last"
    X = as_array(X, name) if lazy is None else lazy
    ndim = getattr(X, "ndim", 2)
    if reset and image_shape is not None and (data_format == "auto" or (data_format == "channels_last" and ndim < 4)):
        _warn_of_channels_last(image_shape)
    if ndim > 4:
        raise ValueError(f"Found array with dim {ndim}, while dim <= 4 is required by {name}.")
    if ndim < 3:
        if image_shape is not None:
            _refuse_one_image(getattr(X, "shape", ()), image_shape, name)
        flat = _validate(estimator, X, reset, min_samples)
        shape = image_shape or _guess_shape(flat.shape[1])
        if prod(shape) != flat.shape[1]:
            raise ValueError(
                f"cannot reshape {flat.shape[1]} features to image_shape={shape}, which has {prod(shape)}."
            )
        channels_last = data_format == "channels_last"
    else:
        if 0 in X.shape[1:]:
            raise ValueError(
                f"Found array with 0 feature(s) (shape={X.shape}) while a minimum of 1 is required by {name}."
            )
        shape, channels_last = _infer_layout(X.shape, image_shape, data_format, name)
        flat = _validate(estimator, X.reshape(len(X), prod(X.shape[1:])), reset, min_samples)
    channels, height, width = shape
    stored = (height, width, channels) if channels_last else shape
    return Images(flat.reshape(len(flat), *stored), shape, channels_last)


def check_image_shape(image_shape: Any) -> ImageShape:
    """Check the parameter `image_shape`: three positive integers."""
    if len(image_shape) != 3 or not all(isinstance(side, int | np.integer) and side > 0 for side in image_shape):
        raise ValueError(
            f"image_shape must be three positive integers (channels, height, width) or None, got {image_shape!r}."
        )
    channels, height, width = (int(side) for side in image_shape)
    return channels, height, width


def as_array(X: Any, name: str) -> Any:
    """Make an array of what is given as images, where scikit-learn's validation would not, or in its own way.

    Parameters
    ----------
    X : array-like
        As of `check_images`, but for what is read from disk.
    name : str
        The estimator's, for messages.

    Returns
    -------
    ndarray, DataFrame or sparse matrix
        The latter two as they are: it is scikit-learn's validation that takes or refuses them.

    Raises
    ------
    ValueError
        If images differ in shape.
    TypeError
        If `X` holds what is no number.
    """
    if sparse.issparse(X):
        return X
    if hasattr(X, "columns"):
        _refuse_frame_of_images(X, name)
        for dtype in getattr(X, "dtypes", ()):
            if getattr(dtype, "kind", "") in ("m", "M"):
                raise TypeError(f"{name} expects numbers, got a column of dtype {dtype}.")
        return X
    if isinstance(X, list | tuple):
        _refuse_gaps(X, name)
        # Each would lose something in NumPy's hands: a tensor its gradient, a masked array its mask.
        special = torch.Tensor | np.ma.MaskedArray
        X = [as_array(image, name) if isinstance(image, special) else image for image in X]
    if isinstance(X, torch.Tensor):
        return tensor_as_array(X, name)
    if isinstance(X, str | os.PathLike):
        raise TypeError(
            f"{name} expects an array of images, got {type(X).__name__}: skdim.files.read_images makes one of a "
            "folder of image files."
        )
    if isinstance(X, bytes | dict | set | frozenset | None) or (hasattr(X, "__next__") and not hasattr(X, "__array__")):
        raise TypeError(f"{name} expects an array of images, got {type(X).__name__}.")
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(f"{name} does not support masked arrays; fill the masked values first, with X.filled().")
    if isinstance(X, list | tuple):
        X = _stack(X)
    elif not isinstance(X, np.ndarray):
        X = np.asarray(X)
    if X.dtype == object and X.ndim == 1 and len(X) and np.ndim(X[0]):
        # A column of a DataFrame, each of whose entries is an image.
        return as_array(X.tolist(), name)
    check_dtype(X.dtype, name)
    return X


def _refuse_frame_of_images(frame: Any, name: str) -> None:
    """Say what to pass instead of a DataFrame whose only column has paths or arrays in its cells."""
    # Other tables than pandas' and polars' may have no head.
    if len(frame.columns) != 1 or not hasattr(frame, "head"):
        return
    for cell in np.asarray(frame.head(1)).ravel():
        if np.ndim(cell) or (is_image_files([cell]) and not _is_number(cell)):
            raise TypeError(
                f"{name} expects numbers, or a column of images or their paths: pass the column itself, "
                f"X[{frame.columns[0]!r}], in place of a DataFrame."
            )


def _refuse_gaps(entries: Sequence[Any], name: str) -> None:
    """Name what is neither a path nor a Pillow image among such."""
    is_file = [is_image_files([entry]) for entry in entries]
    if any(is_file) and not all(is_file):
        index = is_file.index(False)
        raise TypeError(
            f"{name} expects paths or Pillow images throughout, or none: entry {index} is {entries[index]!r:.80}."
        )


def _is_number(entry: Any) -> bool:
    with suppress(TypeError, ValueError):
        float(entry)
        return True
    return False


def _stack(rows: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    """Make one array of a list of images or rows, or say which one differs."""
    dtypes = [getattr(row, "dtype", None) for row in rows]
    other = next((i for i, dtype in enumerate(dtypes) if (dtype == np.uint8) != (dtypes[0] == np.uint8)), None)
    if other is not None:
        raise ValueError(
            "All images must be uint8 or none, because uint8 images are scaled by 1/255 and others are not: image 0 is "
            f"{dtypes[0]}, image {other} is {dtypes[other]}."
        )
    try:
        return np.asarray(rows)
    except ValueError as error:
        shapes = [np.shape(row) for row in rows]
        other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
        if other is None:
            raise
        raise ValueError(
            f"All images must have the same shape: image 0 has shape {shapes[0]}, image {other} has shape "
            f"{shapes[other]}."
        ) from error


def _validate(estimator: BaseEstimator, X: Any, reset: bool, min_samples: int) -> NDArray[Any] | LazyArray:
    """scikit-learn's own validation of flat rows, without a float64 copy."""
    if isinstance(X, LazyArray):
        # All but the values: an array of this shape that takes a single byte stands in.
        stand_in = np.broadcast_to(np.uint8(0), X.shape)
        validate_data(estimator, stand_in, dtype=np.uint8, reset=reset, ensure_min_samples=min_samples)
        return X
    try:
        # A float64 value beyond float32 becomes infinite in the cast and is refused by the check that follows it.
        with np.errstate(over="ignore"):
            return validate_data(
                estimator, X, dtype=[np.float32, np.uint8], reset=reset, ensure_min_samples=min_samples
            )
    except OverflowError as error:
        raise ValueError("Input X contains a value too large for dtype('float32').") from error
    except ValueError as error:
        what = str(error).splitlines()[0]
        index = _first_not_finite(X) if what.startswith("Input X contains") else None
        if index is None:
            raise
        # In place of advice on imputing columns.
        raise ValueError(f"{what.rstrip('.')}, in image {index}.") from error


def _first_not_finite(X: Any) -> int | None:
    with np.errstate(over="ignore"), suppress(TypeError, ValueError):
        for index, row in enumerate(np.asarray(X)):
            if not np.isfinite(np.asarray(row, dtype=np.float32)).all():
                return index
    return None


def _guess_shape(n_features: int) -> ImageShape:
    """Grey square images where the width allows, else signals."""
    side = isqrt(n_features)
    if n_features >= 16 and side * side == n_features:
        return 1, side, side
    side = isqrt(n_features // 3)
    if side >= 8 and 3 * side * side == n_features:
        warn(
            f"X has {n_features} features, which looks like colour images of 3 x {side} x {side}, but rows are read as "
            f"signals of 1 x 1 x {n_features}. Set image_shape=(3, {side}, {side}) if they are images, "
            f"or image_shape=(1, 1, {n_features}) to silence this warning."
        )
    return 1, 1, n_features


def _warn_of_channels_last(image_shape: ImageShape) -> None:
    channels, height, width = image_shape
    if width < min(channels, height) and (width > 1 or channels == height):
        warn(
            f"image_shape={image_shape} is read as (C, H, W), images of {channels} channels of {height} x {width}. For "
            f"rows of (H, W, C) images set image_shape=({width}, {channels}, {height}) and "
            "data_format='channels_last'; data_format='channels_first' silences this warning."
        )


def _refuse_one_image(array_shape: tuple[int, ...], image_shape: ImageShape, name: str) -> None:
    """Tell a grey image, or a signal of several channels, that has no axis for the number of images from rows."""
    channels, height, width = image_shape
    forms = [(height, width)] if channels == 1 else [(channels, width), (width, channels)] if height == 1 else []
    if array_shape in forms and array_shape[1] != prod(image_shape):
        raise ValueError(
            f"X of shape {array_shape} has rows of {array_shape[1]} values, but {name} is expecting images of shape "
            f"{image_shape}; if X is one image, pass X[None]."
        )


def _infer_layout(
    array_shape: tuple[int, ...], image_shape: ImageShape | None, data_format: str, name: str
) -> tuple[ImageShape, bool]:
    """Find the image shape of a 3-D or 4-D array and whether its channels come last."""
    if len(array_shape) == 3:
        height, width = array_shape[1:]
        candidates: dict[ImageShape, bool] = {(1, height, width): False}
        if image_shape is not None and image_shape[1] == 1:
            is_last = data_format == "channels_last"
            candidates[(width, 1, height) if is_last else (height, 1, width)] = is_last
    else:
        a, b, c = array_shape[1:]
        candidates = {}
        if data_format != "channels_last":
            candidates[(a, b, c)] = False
        if data_format != "channels_first":
            candidates.setdefault((c, a, b), True)
    if image_shape is not None and image_shape not in candidates:
        found = " or ".join(str(shape) for shape in candidates)
        channels, height, width = image_shape
        hint = ""
        if array_shape in (image_shape, (height, width, channels)):
            hint = "; if X is one image, pass X[None]"
        elif height == 1 and array_shape[1:] == (width, channels):
            hint = "; signals with their channels last need data_format='channels_last'"
        elif height == 1 and array_shape[1:] == (channels, width):
            hint = "; signals with their channels first need data_format='channels_first'"
        raise ValueError(
            f"X of shape {array_shape} has images of shape {found} (channels, height, width), but {name} is expecting "
            f"images of shape {image_shape}{hint}."
        )
    if len(array_shape) == 4 and data_format == "auto":
        # A cube has the same image shape either way. Else the channels are the axis shorter than both others, by half
        # where those are not the sides of a square, and 1 x 1 x p is a signal.
        channels_first = (a < min(b, c) and (b == c or 2 * a <= min(b, c))) or (a == b == 1 and c > 1)
        channels_last = c < min(a, b) and (a == b or 2 * c <= min(a, b))
        if (a == b == c > 1) or (image_shape is None and channels_first == channels_last):
            raise ValueError(
                f"The layout of X with shape {array_shape} is ambiguous: set data_format to 'channels_first' or "
                "'channels_last' (and image_shape to the channels, height and width, where they are known)."
            )
        if image_shape is None:
            return ((c, a, b), True) if channels_last else ((a, b, c), False)
    if image_shape is None:
        return next(iter(candidates.items()))
    return image_shape, candidates[image_shape]
