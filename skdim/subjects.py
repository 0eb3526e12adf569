"""What is measured and shown: a fitted transformer, on its own or in a pipeline, its images and their embeddings."""

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted
from torch.utils.data import DataLoader

from skdim.images import Images, check_images
from skdim.transformer import DIMTransformer

__all__ = ["check_number_of_labels", "embed", "find_transformer", "images_of", "is_missing", "unfrozen"]


def find_transformer(estimator: Any, *inputs: Any, name: str) -> tuple[DIMTransformer, list[Any]]:
    """Find the transformer of a pipeline, and inputs as it gets them.

    Parameters
    ----------
    estimator : DIMTransformer or Pipeline
        Fitted; either may be frozen.
    *inputs : array-like or None
        Images, as the pipeline takes them.
    name : str
        Of what asks, for the message.

    Returns
    -------
    transformer : DIMTransformer
        The transformer.
    inputs : list
        What the steps before it make of the images; None stays None.

    Raises
    ------
    TypeError
        If there is no transformer.
    NotFittedError
        If it is not fitted.
    """
    found = unfrozen(estimator)
    if isinstance(found, Pipeline):
        steps = [unfrozen(step) for _, step in found.steps]
        place = next((i for i, step in enumerate(steps) if isinstance(step, DIMTransformer)), 0)
        if place:
            before = found[:place]
            inputs = tuple(None if X is None else before.transform(X) for X in inputs)
        found = steps[place]
    if not isinstance(found, DIMTransformer):
        raise TypeError(
            f"{name} needs a fitted DIMTransformer or a Pipeline with one, got a {type(estimator).__name__}: pass the "
            "DIMTransformer in it, search.best_estimator_['dim'] of a search for instance, or transformer_ of a "
            "FineTunedClassifier."
        )
    check_is_fitted(found)
    return found, list(inputs)


def unfrozen(estimator: Any) -> Any:
    """Return what a FrozenEstimator holds, and any other estimator as it is."""
    return unfrozen(estimator.estimator) if isinstance(estimator, FrozenEstimator) else estimator


def images_of(dim: DIMTransformer, X: Any) -> Images:
    """Check images as the transformer's own `transform` does.

    Parameters
    ----------
    dim : DIMTransformer
        Fitted.
    X : array-like
        Images of the shape seen in `fit`.

    Returns
    -------
    Images
        The checked images.
    """
    return check_images(dim, X, image_shape=dim.image_shape_, data_format=dim.data_format, reset=False)


def check_number_of_labels(X: Any, labels: NDArray[Any]) -> None:
    """Refuse labels of another number than images, where that can be told without reading any.

    Parameters
    ----------
    X : array-like
        Images, as a user gives them.
    labels : ndarray of shape (n,)
        Their labels.

    Raises
    ------
    ValueError
        If there are more or fewer.
    """
    # The length of a path tells nothing, that of a DataLoader is in batches.
    if isinstance(X, Sized) and not isinstance(X, str | bytes | DataLoader):
        check_consistent_length(X, labels)


def is_missing(label: Any) -> bool:
    """Tell None, NaN and pandas' NA and NaT from labels."""
    # pandas need not be installed.
    is_nan = isinstance(label, float | np.floating) and bool(np.isnan(label))
    return label is None or is_nan or type(label).__name__ in ("NAType", "NaTType")


def embed(transformer: Any, X: Any) -> NDArray[Any]:
    """Transform images to an array, whatever output the user has chosen.

    Parameters
    ----------
    transformer : DIMTransformer or Pipeline
        Fitted. A predictor at the end of a pipeline does not count.
    X : array-like
        Images.

    Returns
    -------
    ndarray of shape (n, n_features_out)
        What `transform` returns, in an array that can be written to, which a DataFrame's may not be.
    """
    transformer = unfrozen(transformer)
    if isinstance(transformer, Pipeline) and not isinstance(unfrozen(transformer[-1]), DIMTransformer):
        is_predictor = hasattr(transformer, "predict") or not hasattr(transformer, "transform")
        transformer = transformer[:-1] if is_predictor else transformer
    with config_context(array_api_dispatch=False):
        return np.require(transformer.transform(X), requirements="W")
