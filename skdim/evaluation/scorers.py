"""Scorers of a fitted transformer, for ``GridSearchCV(scoring=...)`` and `cross_val_score`."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch.nn.functional import affine_grid, grid_sample

from skdim.devices import usual_torch
from skdim.evaluation.inputs import check_labels, encode_labels
from skdim.evaluation.linear import LinearProbe
from skdim.evaluation.probes import knn_probe, n_voting_neighbors
from skdim.images import Images
from skdim.subjects import check_number_of_labels, embed, find_transformer, images_of

__all__ = ["knn_scorer", "linear_probe_scorer", "retrieval_scorer"]

# Sides of a crop as shares of the image's: two crops of an image share objects and colours more than pixels.
CROP_SIDES = (0.4, 1.0)
# Each half needs an image to find and another to mistake it for.
MIN_IMAGES = 4
# The score falls with the number of images among which one is sought; more than these are left out.
MAX_IMAGES = 2000
# Wider embeddings are reduced, so that their covariance can be estimated from that many images.
MAX_WIDTH = 256
# Share of the mean variance added to that of each direction, so that noise in the smallest is not blown up.
RIDGE = 1e-3
MAX_CORRELATION = 0.999


def knn_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Accuracy of nearest neighbours among held-out images, each classified by the twenty most similar others.

    Where a class of median size has fewer images than that, as many as it has. An image of a much smaller class is
    outvoted by those of others; `linear_probe_scorer` serves where such classes count.

    Parameters
    ----------
    estimator : DIMTransformer or Pipeline
        Fitted. A classifier at the end of a pipeline does not count.
    X : array-like
        Held-out images.
    y : array-like of shape (n,)
        Their labels, of two classes at least.

    Returns
    -------
    float
        Accuracy.

    Raises
    ------
    ValueError
        If there are no labels, some are missing or all the same, or each image has one of its own.
    """
    y = check_labels(y, "knn_scorer")
    classes, _ = encode_labels(y, "knn_scorer")
    if len(classes) == len(y):
        raise ValueError(
            f"knn_scorer needs held-out images of the same class, but the labels of all {len(y)} differ: hold more "
            "images out, with fewer folds for one, or take retrieval_scorer."
        )
    check_number_of_labels(X, y)
    scaler, neighbors = knn_probe(n_voting_neighbors(y))
    Z = scaler.fit_transform(embed(estimator, X))
    # Without samples, scikit-learn predicts each of those it was fitted on from the others.
    return float(neighbors.fit(Z, y).score(None, y))


def linear_probe_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Accuracy of `LinearProbe` in a cross-validation of three folds inside the held-out images.

    Parameters
    ----------
    estimator : DIMTransformer or Pipeline
        Fitted. A classifier at the end of a pipeline does not count.
    X : array-like
        Held-out images.
    y : array-like of shape (n,)
        Their labels, of two classes at least, with three images or more.

    Returns
    -------
    float
        Mean accuracy of the folds.

    Raises
    ------
    ValueError
        If there are no labels, some are missing or all the same, no class has three images, or a fold's training part
        has only one class.
    """
    y = check_labels(y, "linear_probe_scorer")
    _, labels = encode_labels(y, "linear_probe_scorer")
    check_number_of_labels(X, y)
    if (most := np.bincount(labels).max()) < 3:
        raise ValueError(
            f"linear_probe_scorer needs three held-out images of a class, but y has {'one' if most == 1 else 'two'} at "
            "most: hold more images out, with fewer folds for one, or take knn_scorer or retrieval_scorer."
        )
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(y, y))
    Z = embed(estimator, X)
    return float(cross_val_score(LinearProbe(random_state=0), Z, y, cv=folds, error_score="raise").mean())


def retrieval_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """How well one crop of an image finds another crop of it among crops of all images; needs no labels.

    Two crops are cut out of each image, at random but always the same, four tenths to all of its side long, and scaled
    to its size. For each crop, the other crops of all images are ranked by the cosine similarity of their embeddings;
    the score is the mean reciprocal rank of the image's own. The similarity is taken in canonical directions, whitened
    and weighed by signal (what two crops of an image share) to noise (what they don't). These are learned on one half
    of the images and the score is taken on the other, both ways. Embeddings wider than 256, or than a half has images,
    are reduced to as many principal components first.

    It can be compared between settings because nothing of a setting is in it: no loss, weight or discriminator, and the
    same task for all. Ranks do not change with the scale of an embedding and, through the canonical directions, hardly
    with any other invertible linear map, which a linear probe could undo too, as long as no direction is a hundred
    times as wide as the others, the embedding no wider than 256, and a half of several times as many images as that.
    Chance is ``(1 + 1/2 + ... + 1/m) / m`` for the m images in a half, 0.007 for 1000, and an embedding that has
    collapsed to a point scores no more: tied ranks count as their mean. Scores of different images, of different
    numbers of them or behind different steps of a pipeline can't be compared.

    It tells whether parts of an image are recognised as parts of one thing, which is what Deep InfoMax and its kin
    train for. It does not tell whether classes are told apart: what sets one image off from all others may be
    irrelevant to its class, and an encoder trained on crops has an advantage that its accuracy need not show.

    Parameters
    ----------
    estimator : DIMTransformer or Pipeline
        Fitted. The steps of a pipeline that are before its DIMTransformer come before the crops; those behind it do
        not count.
    X : array-like
        Held-out images, at least four. Of more than 2000, 2000 are drawn at random, always the same.
    y : None
        Ignored.

    Returns
    -------
    float
        Mean reciprocal rank, between 0 and 1.

    Raises
    ------
    ValueError
        If there are fewer than four images.
    """
    dim, (X,) = find_transformer(estimator, X, name="retrieval_scorer")
    images = images_of(dim, X)
    if len(images) < MIN_IMAGES:
        raise ValueError(
            f"Found array with {len(images)} sample(s) while a minimum of {MIN_IMAGES} is required by retrieval_scorer."
        )
    # Crops are arrays of their own, whose columns have no names. With the same encoder, of which a copy makes another.
    fitted, dim = dim, object.__new__(type(dim))
    dim.__dict__ |= {name: value for name, value in vars(fitted).items() if name != "feature_names_in_"}
    dim.data_format = "channels_first"
    rng = np.random.RandomState(0)
    rows = rng.choice(len(images), min(len(images), MAX_IMAGES), replace=False)
    with usual_torch(torch.device("cpu")):
        crops = np.stack([embed(dim, _Crops(images, rows, rng)) for _ in range(2)])
    halves = np.array_split(crops.astype(np.float64), 2, axis=1)
    return float(np.mean([_retrieval(*halves), _retrieval(*halves[::-1])]))


def _retrieval(learned_on: NDArray[np.float64], scored_on: NDArray[np.float64]) -> float:
    """Mean reciprocal rank of the two crops of shape (2, n, d), in directions learned on those of other images."""
    n_directions = min(MAX_WIDTH, learned_on.shape[2], learned_on.shape[1])
    pca = PCA(n_directions, random_state=0).set_output(transform="default")
    # A collapsed embedding has no variance to explain.
    with np.errstate(invalid="ignore"):
        pca.fit(np.concatenate(list(learned_on)))
    variance = pca.explained_variance_
    whitening = (variance + RIDGE * variance.mean() + np.finfo(float).tiny) ** -0.5
    first, second = ((pca.transform(crops) * whitening) for crops in learned_on)
    # Correlations between the two crops, and the directions in which they are that correlated.
    correlation, directions = np.linalg.eigh((first.T @ second + second.T @ first) / (2 * len(first)))
    correlation = correlation.clip(0, MAX_CORRELATION)
    signal_to_noise = correlation / (1 - correlation)
    projection = whitening[:, None] * directions * np.sqrt(signal_to_noise)
    first, second = (_unit_rows(pca.transform(crops) @ projection) for crops in scored_on)
    similarity = first @ second.T
    return (_mean_reciprocal_rank(similarity) + _mean_reciprocal_rank(similarity.T)) / 2


class _Crops:
    """A random part of each image, scaled to the image's size: an array, as far as reading goes, of crops as needed."""

    def __init__(self, images: Images, rows: NDArray[np.int64], rng: np.random.RandomState) -> None:
        self.images, self.rows = images, rows
        self.shape, self.dtype = (len(rows), *images.shape), images.dtype
        side = rng.uniform(*CROP_SIDES, len(rows))
        self.theta = torch.zeros(len(rows), 2, 3)
        self.theta[:, 0, 0] = self.theta[:, 1, 1] = torch.from_numpy(side)
        self.theta[:, :, 2] = torch.from_numpy((1 - side[:, None]) * rng.uniform(-1, 1, (len(rows), 2)))

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        batch = self.images.take(self.rows[rows])
        grid = affine_grid(self.theta[rows], list(batch.shape), align_corners=False)
        crops = grid_sample(batch.float(), grid, padding_mode="border", align_corners=False)
        return (crops.round().to(torch.uint8) if batch.dtype == torch.uint8 else crops).numpy()


def _unit_rows(Z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre embeddings and scale each to length 1; those without a direction become 0."""
    Z = Z - Z.mean(axis=0)
    norm = np.linalg.norm(Z, axis=1, keepdims=True)
    return np.divide(Z, norm, out=np.zeros_like(Z), where=norm > 0)


def _mean_reciprocal_rank(similarity: NDArray[np.float64]) -> float:
    own = np.diag(similarity)[:, None]
    # The image itself is among the equal ones.
    rank = (similarity > own).sum(axis=1) + ((similarity == own).sum(axis=1) + 1) / 2
    return float(np.mean(1 / rank))
