"""What all estimators of skdim have beside what scikit-learn's have."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.exceptions import InconsistentVersionWarning

from skdim._version import __version__

__all__ = ["EstimatorMixin", "unchanged_on_error"]


class EstimatorMixin:
    """Links an estimator's HTML representation to the API reference, and its pickles to the version that wrote them.

    scikit-learn shows tooltips only with a link, and stamps its own estimators only.
    """

    _doc_link_module = "skdim"
    _doc_link_template = "https://scikit-deepinfomax.readthedocs.io/en/stable/api.html"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {**state, "_skdim_version": __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        version = state.pop("_skdim_version", "unknown")
        if version != __version__:
            warnings.warn(
                InconsistentVersionWarning(
                    estimator_name=type(self).__name__,
                    current_sklearn_version=__version__,
                    original_sklearn_version=version,
                ),
                stacklevel=2,
            )
        super().__setstate__(state)  # type: ignore[misc]


@contextmanager
def unchanged_on_error(estimator: BaseEstimator) -> Iterator[None]:
    """Leave an estimator as it was where its `fit` fails or is interrupted, and not half of one fit, half of another.

    Parameters
    ----------
    estimator : BaseEstimator
        Whose attributes are put back.
    """
    before = vars(estimator).copy()
    try:
        yield
    except BaseException:
        # In one step, because who interrupts may do so twice.
        estimator.__dict__ = before
        raise
