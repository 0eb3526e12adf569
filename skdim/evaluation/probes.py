"""Classifiers of features that are learned elsewhere."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNetClassifier
from torch import nn

from skdim.base import EstimatorMixin, unchanged_on_error
from skdim.devices import resolve_device, usual_torch
from skdim.evaluation.inputs import encode_labels, mean_and_scale, standardized, validated, validation_split
from skdim.evaluation.linear import LinearProbe
from skdim.evaluation.networks import MLP, Samples, check_hidden_layer_sizes, predict_proba, train
from skdim.randomness import private_rng

__all__ = ["PROBES", "MLPProbe", "knn_probe", "n_voting_neighbors"]

# Most neighbours that vote in a table and for a scorer.
N_NEIGHBORS = 20


class MLPProbe(ClassifierMixin, EstimatorMixin, BaseEstimator):
    """Standardise features, then classify them with a perceptron.

    The default has the network of the paper's non-linear probe: one hidden layer of 200 units with batch norm, ReLU and
    dropout. It is a `skorch.NeuralNetClassifier` trained by Adam on the cross-entropy of its logits; training stops
    when the loss on a split of the training samples has not fallen, by a ten-thousandth of it at least, for `patience`
    epochs and 50 steps, and the weights of the last epoch in which it has are kept. The samples of the split, a tenth,
    count in the standardisation, and else only decide when to stop.

    Parameters
    ----------
    hidden_layer_sizes : sequence of int, default=(200,)
        Units of each hidden layer.

    dropout : float, default=0.1
        Share of the hidden units that is dropped in training.

    batch_norm_logits : bool, default=False
        Whether batch norm also follows the last layer.

    lr : float, default=1e-3
        Learning rate.

    batch_size : int, default=256
        Most samples in a batch. Of less than ten such batches, an epoch has up to ten smaller ones, of 16 at least.

    max_epochs : int, default=100
        Most passes over the samples.

    patience : int, default=5
        Epochs after which training stops if none has lowered the validation loss by a ten-thousandth of it; more where
        these have less than 50 batches.

    validation_fraction : float, default=0.1
        Share of the training samples that decides when to stop.

    device : str, default="auto"
        "cpu", "cuda", "cuda:N", or "auto", which is CUDA where there is one, else the CPU.

    random_state : int, RandomState instance or None, default=None
        Draws split, initial weights, batches and dropout.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    mlp_ : nn.Module
        The perceptron, in float64: a sample has the same probabilities in any batch, up to rounding. It takes
        standardised features.
    mean_, scale_ : ndarray of shape (n_features,), float32
        With which features are standardised. The scale of one that is constant in training is infinite: it counts for
        nothing, whatever it is later.
    history_ : list of dict
        One dict an epoch: "train_loss", "valid_loss", "valid_acc" and "dur", the seconds it took.
    n_iter_ : int
        Epochs trained.
    n_features_in_ : int
        Width of the features.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names of `X`, where it had any that are all strings.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim.evaluation import MLPProbe
    >>> X, y = load_digits(return_X_y=True)
    >>> MLPProbe(random_state=0).fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > 0.9
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {
        "hidden_layer_sizes": ["array-like"],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "batch_norm_logits": ["boolean"],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "device": [str],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] | NDArray[Any] = (200,),
        *,
        dropout: float = 0.1,
        batch_norm_logits: bool = False,
        lr: float = 1e-3,
        batch_size: int = 256,
        max_epochs: int = 100,
        patience: int = 5,
        validation_fraction: float = 0.1,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.batch_norm_logits = batch_norm_logits
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.device = device
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any) -> Self:
        """Train the perceptron.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features of at least three samples, computed with as float32.
        y : array-like of shape (n,)
            Labels.

        Returns
        -------
        MLPProbe
            The fitted probe.

        Raises
        ------
        ValueError
            If a parameter, the features or the labels are unfit.
        FloatingPointError
            If training diverges.
        """
        hidden_layer_sizes = check_hidden_layer_sizes(self.hidden_layer_sizes)
        device = resolve_device(self.device)
        with unchanged_on_error(self), usual_torch(device):
            X, y = validated(self, X, y, ensure_min_samples=3)
            self.classes_, labels = encode_labels(y, type(self).__name__)
            rng = check_random_state(self.random_state)
            fitted_on, held_out = validation_split(labels, self.validation_fraction, rng)
            self.mean_, self.scale_ = mean_and_scale(X)
            samples = torch.from_numpy(standardized(X, self.mean_, self.scale_)).to(device)
            targets = torch.from_numpy(labels).to(device)
            with private_rng(rng.randint(np.iinfo(np.int32).max), device):
                mlp = MLP(
                    X.shape[1], hidden_layer_sizes, len(self.classes_), self.dropout, bool(self.batch_norm_logits)
                )
                self.history_ = train(
                    NeuralNetClassifier,
                    mlp,
                    Samples(samples.__getitem__, fitted_on, targets),
                    Samples(samples.__getitem__, held_out, targets),
                    criterion=nn.CrossEntropyLoss,
                    classes=range(len(self.classes_)),
                    lr=self.lr,
                    batch_size=self.batch_size,
                    max_epochs=self.max_epochs,
                    patience=self.patience,
                    device=device,
                    random_state=rng,
                )
            self.mlp_ = mlp.double()
            self.n_iter_ = len(self.history_)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Compute the probabilities of the classes.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Probabilities, in the order of `classes_`.
        """
        check_is_fitted(self)
        X = validated(self, X, reset=False)
        return predict_proba(self.mlp_, standardized(X, self.mean_, self.scale_))

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n,)
            Labels.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


def _votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """One vote each, and of classes with as many that of the nearer neighbours wins, not that of the first label."""
    # All that is added is less than a vote.
    return 1 + (2 - distances) / (4 * distances.shape[1])


def knn_probe(n_neighbors: int = N_NEIGHBORS) -> Pipeline:
    """Nearest neighbours by cosine similarity of standardised features, each with one vote; ties go to the nearer ones.

    Papers on contrastive learning often take 200 neighbours with votes weighted by ``exp(similarity / 0.1)``; twenty
    equal votes have no temperature to set. Where a class has fewer than half as many samples, those of others outvote
    it: `evaluate` and `knn_scorer` let no more vote than a class of median size has samples. Standardising gives
    features whose mean is far from 0, as pixels' and those after a ReLU are, angles that tell them apart.

    Parameters
    ----------
    n_neighbors : int, default=20
        Neighbours that vote.

    Returns
    -------
    sklearn.pipeline.Pipeline
        `StandardScaler` and `KNeighborsClassifier`.
    """
    return make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors, weights=_votes, metric="cosine"))


def n_voting_neighbors(y: NDArray[Any]) -> int:
    """Count the neighbours that can vote without those of other classes outvoting a class of usual size.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Labels.

    Returns
    -------
    int
        Twenty, or the median size of a class if that is less.
    """
    _, counts = np.unique(y, return_counts=True)
    return int(min(np.median(counts), N_NEIGHBORS))


# Of the device, a seed and the labels to fit to.
PROBES: dict[str, Callable[[str, int, NDArray[Any]], BaseEstimator]] = {
    "linear": lambda device, seed, y: LinearProbe(device=device, random_state=seed),
    "svm": lambda device, seed, y: LinearProbe("squared_hinge", device=device, random_state=seed),
    "mlp": lambda device, seed, y: MLPProbe(device=device, random_state=seed),
    "knn": lambda device, seed, y: knn_probe(n_voting_neighbors(y)),
    # The small classifier that earlier implementations put on a 64-wide embedding.
    "classifier": lambda device, seed, y: MLPProbe(
        (15, 10), dropout=0.0, batch_norm_logits=True, device=device, random_state=seed
    ),
}
