"""Arrays of whatever is given as images."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from scipy import sparse

from skdim.files import is_image_files, is_pillow_image
from skdim.sources import check_dtype, tensor_as_array

__all__ = ["as_array"]


MASKED = "{} does not support masked arrays; fill the masked values first, with X.filled()."

# Images may be lists of channels, and these of rows.
MAX_DEPTH = 2


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
        _check_parts(X, name)
        # Each would lose something in NumPy's hands: a tensor its gradient, a masked array its mask.
        special = torch.Tensor | np.ma.MaskedArray
        X = _stack([as_array(image, name) if isinstance(image, special) else image for image in X])
    if isinstance(X, torch.Tensor):
        return tensor_as_array(X, name)
    if isinstance(X, str | os.PathLike):
        raise TypeError(
            f"{name} expects an array of images, got {type(X).__name__}: skdim.files.read_images makes one of a "
            "folder of image files, np.load(path, mmap_mode='r') opens an .npy file."
        )
    if is_pillow_image(X):
        raise TypeError(f"{name} expects images, got a single Pillow image: pass [X].")
    if not hasattr(X, "shape") and not isinstance(X, dict) and callable(getattr(X, "keys", None)):
        kind = "an archive of arrays" if isinstance(X, NpzFile) else type(X).__name__
        raise TypeError(f"{name} expects an array of images, got {kind}: pass one of {list(X.keys())}.")
    if isinstance(X, bytes | dict | set | frozenset | None) or (hasattr(X, "__next__") and not hasattr(X, "__array__")):
        hint = ": make a list of it" if hasattr(X, "__next__") else ""
        raise TypeError(f"{name} expects an array of images, got {type(X).__name__}{hint}.")
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(MASKED.format(name))
    if not isinstance(X, np.ndarray):
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


def _check_parts(images: Sequence[Any], name: str) -> None:
    """Refuse, of images that are lists of arrays, what NumPy would make less of than they are."""
    parts = [part for image in images if isinstance(image, list | tuple) for part in _arrays_in(image, MAX_DEPTH)]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise TypeError(MASKED.format(name))
    if len({part.dtype in (np.uint8, torch.uint8) for part in parts}) > 1:
        raise ValueError(
            "All channels of all images must be uint8 or none, because uint8 is scaled by 1/255 and others are not."
        )


def _arrays_in(values: Sequence[Any], depth: int) -> list[Any]:
    """List the arrays and tensors in nested lists, which hold either numbers or none at a level."""
    if not values or isinstance(values[0], int | float):
        return []
    arrays = [value for value in values if isinstance(value, np.ndarray | torch.Tensor)]
    if depth > 1:
        lists = [value for value in values if isinstance(value, list | tuple)]
        arrays += [array for value in lists for array in _arrays_in(value, depth - 1)]
    return arrays


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
            f"{shapes[other]}. Crop, pad or scale them to one first."
        ) from error
