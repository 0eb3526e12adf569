"""Embeddings as NumPy arrays, whatever output the user has chosen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context

__all__ = ["embed"]


def embed(transformer: Any, X: Any) -> NDArray[Any]:
    """Transform images to an array, whatever output the user has chosen.

    Parameters
    ----------
    transformer : DIMTransformer or Pipeline
        Fitted.
    X : array-like
        Images.

    Returns
    -------
    ndarray of shape (n, n_features_out)
        What `transform` returns.
    """
    with config_context(array_api_dispatch=False):
        return np.asarray(transformer.transform(X))
