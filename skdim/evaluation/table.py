"""All probes of all layers, beside what they have to beat."""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.utils import check_random_state

from skdim.evaluation.inputs import check_labels, encode_labels
from skdim.evaluation.probes import PROBES
from skdim.images import refuse_loader
from skdim.subjects import check_number_of_labels, embed, find_transformer, images_of
from skdim.transformer import DIMTransformer

__all__ = ["evaluate"]

# What `output_layer` can name; not every encoder has all.
LAYERS = ("embedding", "hidden", "features")


def evaluate(
    dim: BaseEstimator,
    X_train: Any,
    y_train: Any,
    X_test: Any,
    y_test: Any,
    *,
    probes: Sequence[str] = ("linear", "svm", "mlp", "knn", "classifier"),
    layers: Sequence[str] | None = None,
    random_state: int | np.random.RandomState | None = 0,
) -> Any:
    """Measure how well classes can be read from a transformer's layers, from pixels, from PCA and without training.

    Each probe is fitted on the training images' features and labels; whatever it chooses, it chooses on a split of
    them. The test images only yield the accuracies. Beside the transformer stand raw pixels; principal components, as
    many as each layer is wide but at most one for four training images; and the untrained encoder, which is the
    transformer with ``max_epochs=0`` and the same `random_state`, and the same first weights if that is an int.

    Parameters
    ----------
    dim : DIMTransformer or Pipeline
        Fitted; it is not changed. Of a pipeline its transformer is measured, on images as the steps before it leave
        them; the steps behind it do not count.
    X_train : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
        Images of the shape seen in `fit`, to which probes are fitted.
    y_train : array-like of shape (n,)
        Their labels, of two classes at least.
    X_test : array-like of shape (m, p), (m, C, H, W), (m, H, W, C) or (m, H, W)
        Held-out images.
    y_test : array-like of shape (m,)
        Their labels.
    probes : sequence of {"linear", "svm", "mlp", "knn", "classifier"}, default=all of them
        "linear" and "svm" are `LinearProbe` with the log loss and the squared hinge loss, "mlp" is `MLPProbe`, "knn"
        `knn_probe` of twenty neighbours, or as many as a class of median size has samples, and "classifier" the
        perceptron of 15, 10 and n_classes units, each with batch norm, that earlier implementations put on the
        embedding.
    layers : sequence of str, default=None
        Layers of the encoder, as `output_layer` names them; None is all.
    random_state : int, RandomState instance or None, default=0
        Seeds probes and PCA.

    Returns
    -------
    pandas.DataFrame, or list of dict where pandas is not installed
        A row for each representation: "features" ("raw pixels", "PCA", "untrained encoder" or "Deep InfoMax"), "layer"
        (None for the first two), "width", and for each probe its accuracy on the test images, between 0 and 1.

    Raises
    ------
    ValueError
        If probe, layer, images or labels are unfit.
    TypeError
        If there is no transformer in `dim`, or images come in a DataLoader.
    NotFittedError
        If `dim` is not fitted.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim import DIMTransformer
    >>> from skdim.evaluation import evaluate
    >>> X, y = load_digits(return_X_y=True)
    >>> dim = DIMTransformer(max_epochs=2, random_state=0).fit(X[:1000])
    >>> table = evaluate(dim, X[:1000], y[:1000], X[1000:], y[1000:], probes=["linear", "knn"])
    """
    _check_names("probes", probes, list(PROBES))
    y_train, y_test = (check_labels(y, "evaluate") for y in (y_train, y_test))
    for X, y in ((X_train, y_train), (X_test, y_test)):
        refuse_loader(X)
        check_number_of_labels(X, y)
    encode_labels(y_train, "evaluate")
    dim, (X_train, X_test) = find_transformer(dim, X_train, X_test, name="evaluate")
    known = [layer for layer in LAYERS if layer in dim._layer_shapes]
    layers = known if layers is None else layers
    _check_names("layers", layers, known)
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    rows = []
    for title, layer, Z_train, Z_test in _representations(dim, X_train, X_test, layers, seed):
        row = {"features": title, "layer": layer, "width": Z_train.shape[1]}
        for name in probes:
            probe = PROBES[name](str(dim.device_), seed, y_train)
            row[name] = float(probe.fit(Z_train, y_train).score(Z_test, y_test))
        rows.append(row)
    if importlib.util.find_spec("pandas") is None:
        return rows
    import pandas

    return pandas.DataFrame(rows)


def _check_names(parameter: str, names: Sequence[str], known: Sequence[str]) -> None:
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not names or not set(names) <= set(known):
        raise ValueError(f"{parameter} must be a sequence of names out of {list(known)}, got {names!r}.")


def _representations(
    dim: DIMTransformer, X_train: Any, X_test: Any, layers: Sequence[str], seed: int
) -> Iterator[tuple[str, str | None, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield title, layer and features of training and test images; one at a time, because they may be large."""
    pixels_train, pixels_test = _pixels(dim, X_train), _pixels(dim, X_test)
    yield "raw pixels", None, pixels_train, pixels_test
    n_images, n_pixels = pixels_train.shape
    # Standardised, components of a few images each are noise that drowns the others.
    most = max(1, min(n_pixels, n_images // 4))
    widths = {min(int(np.prod(dim._layer_shapes[layer])), most) for layer in layers}
    pca = PCA(max(widths), random_state=seed).set_output(transform="default").fit(pixels_train)
    pixels_train, pixels_test = pca.transform(pixels_train), pca.transform(pixels_test)
    for width in sorted(widths):
        yield "PCA", None, pixels_train[:, :width], pixels_test[:, :width]
    del pixels_train, pixels_test
    untrained = _untrained(dim).fit(X_train)
    # Copies, as output_layer is set on them.
    for title, transformer in (("untrained encoder", untrained), ("Deep InfoMax", copy.deepcopy(dim))):
        for layer in layers:
            transformer.set_params(output_layer=layer)
            yield title, layer, embed(transformer, X_train), embed(transformer, X_test)


def _untrained(dim: DIMTransformer) -> DIMTransformer:
    """Make a transformer of the network that was fitted, whatever the parameters may say by now, without training.

    Nothing that came with the training has a say in its absence: weights, checkpoints, callbacks, other processes.
    """
    options = dim._encoder_options
    return type(dim)(
        n_components=dim._layer_shapes["embedding"][0],
        image_shape=dim.image_shape_,
        data_format=dim.data_format,
        encoder=dim._encoder_spec,
        multiple_globals=options["multiple_globals"],
        prior="normal",
        prior_matching="noise",
        prior_weight=float(options["standardized"]),
        max_epochs=0,
        device=str(dim.device_),
        random_state=copy.deepcopy(dim.random_state),
    )


def _pixels(dim: DIMTransformer, X: Any) -> NDArray[np.float32]:
    images = images_of(dim, X)
    return images.array[:].reshape(len(images), -1).astype(np.float32)
