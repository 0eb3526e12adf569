"""What a display shows: the transformer of a pipeline, and images as it gets them."""

from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skdim.images import Images, check_images
from skdim.transformer import DIMTransformer

__all__ = ["find_transformer", "images_of"]


def find_transformer(display: type, estimator: Any, *inputs: Any) -> tuple[DIMTransformer, list[Any]]:
    """Find a pipeline's transformer, and inputs, but for None, as it gets them."""
    steps = [] if not isinstance(estimator, Pipeline) else [step for _, step in estimator.steps]
    place = next((i for i, step in enumerate(steps) if isinstance(step, DIMTransformer)), 0)
    if place:
        before = estimator[:place]
        inputs = tuple(None if X is None else before.transform(X) for X in inputs)
    dim = steps[place] if steps else estimator
    if not isinstance(dim, DIMTransformer):
        raise TypeError(
            f"{display.__name__} needs a fitted DIMTransformer or a Pipeline with one, got a "
            f"{type(estimator).__name__}: pass the step that is a DIMTransformer, of a search "
            "search.best_estimator_['dim'] for instance."
        )
    check_is_fitted(dim)
    return dim, list(inputs)


def images_of(estimator: DIMTransformer, X: Any) -> Images:
    """Check images as the transformer's own `transform` does."""
    return check_images(
        estimator, X, image_shape=estimator.image_shape_, data_format=estimator.data_format, reset=False
    )
