"""From any accepted array to checked images: all errors about the input are raised here, before any work."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data
from torch.utils.data import DataLoader

from skdim.arrays import as_array
from skdim.files import is_image_files, read_images
from skdim.layouts import ImageShape, guess_shape, infer_layout, refuse_one_image, warn_of_channels_last, warn_of_grey
from skdim.sources import LazyArray, as_lazy_array, prefetched

__all__ = ["Images", "check_images", "refuse_loader"]

# Bytes read, or made of what is read, at once in a pass over all images.
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

    def chunks(self, size: int | None = None, part: int = 0, n_parts: int = 1) -> Iterator[torch.Tensor]:
        """Read all images in their order, or those of one of several parts, `size` or CHUNK_BYTES at a time."""
        size = size or max(1, CHUNK_BYTES * len(self) // self.array.nbytes)
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
        Named in the messages; with `reset`, gets ``n_features_in_``, ``feature_names_in_`` and ``_channels_last``,
        whether its images had their channels last.
    X : array-like
        Flat rows (n, p) or images (n, C, H, W), (n, H, W, C) or (n, H, W); a NumPy array, DataFrame, torch tensor,
        list of arrays or anything that converts to an array. uint8 and float32 are kept, other types become float32.
        What `skdim.sources.as_lazy_array` opens is not read here, and its values are checked when they are.
        Or a sequence of paths or Pillow images, which are read as `skdim.files.read_images` does, in colour where
        `image_shape` has three or four channels.
    image_shape : tuple of int or None
        Channels, height and width, where known.
    data_format : {"auto", "channels_first", "channels_last"}
        Order of the axes of an image, in flat rows too, where "auto" means "channels_first", and is refused after a fit
        on images that had their channels last.
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
        If a first fit gets an `image_shape` that looks like height, width and channels, or none and images that look
        like something else than what they are read as.
    """
    name = type(estimator).__name__
    refuse_loader(X)
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
        warn_of_channels_last(image_shape)
    if ndim > 4:
        raise ValueError(
            f"Found array with dim {ndim}, while dim <= 4 is required by {name}: of volumes pass slices, projections, "
            "or planes as channels."
        )
    if ndim < 3:
        if image_shape is not None:
            refuse_one_image(getattr(X, "shape", ()), image_shape, name)
        flat = _validate(estimator, X, reset, min_samples)
        if not reset and data_format == "auto" and getattr(estimator, "_channels_last", False):
            raise ValueError(
                f"X has flat rows, but {name} was fitted on images with their channels last, (n, H, W, C): set "
                "data_format to 'channels_last' if these are such images, flattened, or to 'channels_first' if they "
                "were (n, C, H, W)."
            )
        shape = image_shape or guess_shape(flat)
        if prod(shape) != flat.shape[1]:
            raise ValueError(
                f"cannot reshape {flat.shape[1]} features to image_shape={shape}, which has {prod(shape)}."
            )
        channels_last = given_last = data_format == "channels_last"
    else:
        if 0 in X.shape[1:]:
            raise ValueError(
                f"Found array with 0 feature(s) (shape={X.shape}) while a minimum of 1 is required by {name}."
            )
        if reset and image_shape is None and ndim == 3 and not are_pictures:
            warn_of_grey(X.shape)
        shape, channels_last = infer_layout(X.shape, image_shape, data_format, name)
        given_last = channels_last
        if not channels_last and isinstance(X, np.ndarray) and X.ndim == 4 and not X.flags.c_contiguous:
            in_memory = X.transpose(0, 2, 3, 1)
            if in_memory.flags.c_contiguous:
                # (n, H, W, C) images with their axes swapped: rows in the order of memory need no copy.
                X, channels_last = in_memory, True
        flat = _validate(estimator, X.reshape(len(X), prod(X.shape[1:])), reset, min_samples)
    channels, height, width = shape
    if reset:
        # With one channel, or one pixel, either order is the same.
        estimator._channels_last = given_last and channels > 1 and height * width > 1
    stored = (height, width, channels) if channels_last else shape
    return Images(flat.reshape(len(flat), *stored), shape, channels_last)


def refuse_loader(X: Any) -> None:
    """Refuse a DataLoader, where its order or a single pass over it will not do.

    Raises
    ------
    TypeError
        If `X` is one.
    """
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a DataLoader, but images are needed here that can be read in any order, or again: pass its dataset."
        )


def _validate(estimator: BaseEstimator, X: Any, reset: bool, min_samples: int) -> NDArray[Any] | LazyArray:
    """scikit-learn's own validation of flat rows, without a float64 copy."""
    if isinstance(X, LazyArray):
        # All but the values: an array of this shape that takes a single byte stands in.
        stand_in = np.broadcast_to(np.uint8(0), X.shape)
        validate_data(estimator, stand_in, dtype=np.uint8, reset=reset, ensure_min_samples=min_samples)
        return X
    try:
        # A float64 value beyond float32 becomes infinite in the cast and is refused by the check that follows it.
        with np.errstate(over="ignore", under="ignore"):
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
        # pandas' own missing values are no numbers.
        rows = X.to_numpy(np.float32, na_value=np.nan) if hasattr(X, "iloc") else np.asarray(X)
        for index, row in enumerate(rows):
            if not np.isfinite(np.asarray(row, dtype=np.float32)).all():
                return index
    return None
