"""Features, labels and validation splits of probes."""

from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from skdim.images import CHUNK_BYTES
from skdim.statistics import RESOLUTION
from skdim.subjects import is_missing

__all__ = [
    "as_numpy",
    "check_labels",
    "encode_labels",
    "mean_and_scale",
    "standardized",
    "validated",
    "validation_split",
]


def as_numpy(values: Any) -> Any:
    """Bring tensors, which a transformer returns with scikit-learn's array API dispatch on, to NumPy's arrays."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values


def validated(estimator: BaseEstimator, X: Any, *y: Any, **options: Any) -> Any:
    """Validate labels, and features as float32 by scikit-learn's `validate_data`, in NumPy whatever they come in.

    Parameters
    ----------
    estimator : BaseEstimator
        Named in the messages.
    X : array-like of shape (n, n_features)
        Features.
    *y : array-like of shape (n,)
        Labels, if there are any.
    **options
        Of `validate_data`.

    Returns
    -------
    ndarray or tuple
        What `validate_data` returns.
    """
    labels = [check_labels(each, type(estimator).__name__) for each in y]
    with config_context(array_api_dispatch=False):
        return validate_data(estimator, as_numpy(X), *labels, dtype=np.float32, **options)


def mean_and_scale(X: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean of each column and what its deviations are divided by, to standardise features.

    Parameters
    ----------
    X : ndarray of shape (n, n_features), float32
        Features to train on.

    Returns
    -------
    mean, scale : ndarray of shape (n_features,), float32
        The standard deviation; infinite where a column is constant, as far as float32 tells: nothing is learned of it,
        so that what it is later must not count.
    """
    # NumPy makes a float64 copy of what it computes moments of: some megabytes at a time.
    n_columns = max(1, CHUNK_BYTES // (np.dtype(np.float64).itemsize * len(X)))
    blocks = [X[:, first : first + n_columns] for first in range(0, X.shape[1], n_columns)]
    mean, std = (
        np.concatenate([moment(block, axis=0, dtype=np.float64) for block in blocks]) for moment in (np.mean, np.std)
    )
    return mean.astype(np.float32), np.where(std > RESOLUTION * np.abs(mean), std, np.inf).astype(np.float32)


def standardized(X: NDArray[np.float32], mean: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Standardise features, with a single copy of them.

    Parameters
    ----------
    X : ndarray of shape (n, n_features), float32
        Features.
    mean, scale : ndarray of shape (n_features,), float32
        Of features to train on.

    Returns
    -------
    ndarray of shape (n, n_features), float32
        Standardised features.
    """
    result: NDArray[np.float32] = X - mean
    result /= scale
    return result


def check_labels(y: Any, name: str) -> NDArray[Any]:
    """Refuse labels that are missing, all of them or some, and what is no label of a class.

    Parameters
    ----------
    y : array-like of shape (n,) or None
        Labels.
    name : str
        Of what needs them, for the message.

    Returns
    -------
    ndarray of shape (n,)
        The labels.

    Raises
    ------
    ValueError
        If there are none, or they are unfit.
    """
    if y is None:
        raise ValueError(f"{name} requires y to be passed, but the target y is None.")
    if isinstance(y, list | tuple):
        # NumPy would make the text "nan" of a gap between texts.
        y = np.array(y, dtype=object) if any(map(is_missing, y)) else y
    y = column_or_1d(as_numpy(y), warn=True)
    if y.dtype.kind == "f":
        assert_all_finite(y, input_name="y")
    missing: Any = []
    if y.dtype.kind in "OmM":
        missing = np.flatnonzero(np.isnat(y) if y.dtype.kind in "mM" else [is_missing(label) for label in y])
    if len(missing):
        raise ValueError(
            f"Input y contains {len(missing)} missing labels, the first of image {missing[0]}: {name} needs one for "
            "each image."
        )
    check_classification_targets(y)
    labels: NDArray[Any] = y
    return labels


def encode_labels(y: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Turn labels into classes 0, 1, ...

    Parameters
    ----------
    y : ndarray of shape (n,)
        Labels, checked.
    name : str
        Of the classifier, for the message.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        The different labels, sorted.
    labels : ndarray of shape (n,), int64
        Which of them each one is.

    Raises
    ------
    ValueError
        If there are fewer than two classes.
    """
    classes, labels = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        count = "only one class" if len(classes) else "no samples"
        raise ValueError(f"{name} needs samples of at least 2 classes, but y has {count}.")
    return classes, labels.astype(np.int64)


def validation_split(
    labels: NDArray[np.int64],
    validation_fraction: float,
    random_state: np.random.RandomState,
    *,
    min_training: int = 2,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the rows, stratified where there are enough of them for it; the first part has some of each class.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Labels from 0.
    validation_fraction : float
        Share of the second part.
    random_state : RandomState
        Draws the split.
    min_training : int, default=2
        The least number of rows in the first part; batch norm needs two.

    Returns
    -------
    training, validation : ndarray
        Indices of the rows of each part. Only where there are fewer rows than classes and validation samples do some
        classes have none in the first.

    Raises
    ------
    ValueError
        If too few rows are left for the first part.
    """
    counts = np.bincount(labels)
    n_validation = ceil(validation_fraction * len(labels))
    n_training = len(labels) - n_validation
    if n_training < min_training:
        raise ValueError(
            f"validation_fraction={validation_fraction} leaves {n_training} of {len(labels)} samples to train on, but "
            f"{min_training} are needed."
        )
    is_only = counts[labels] == 1
    others = np.flatnonzero(~is_only)
    if (counts > 1).sum() > min(n_validation, n_training - is_only.sum()):
        order = random_state.permutation(len(labels))
        _, first_of_each_class = np.unique(labels[order], return_index=True)
        order = np.concatenate([np.delete(order, first_of_each_class), order[first_of_each_class]])
        return order[n_validation:], order[:n_validation]
    training, validation = train_test_split(
        others, test_size=n_validation, stratify=labels[others], random_state=random_state
    )
    return np.concatenate([training, np.flatnonzero(is_only)]), validation
