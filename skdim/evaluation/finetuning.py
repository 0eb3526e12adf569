"""Fine-tuning: the encoder goes on learning, from a few labels."""

import copy
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, _fit_context, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from skdim.base import EstimatorMixin
from skdim.batches import Standardizer
from skdim.devices import usual_torch
from skdim.encoders import read_layers
from skdim.evaluation.inputs import check_labels, encode_labels, validation_split
from skdim.evaluation.networks import MLP, Samples, check_hidden_layer_sizes, predict_proba, train
from skdim.images import refuse_loader
from skdim.randomness import private_rng
from skdim.subjects import check_number_of_labels, embed, images_of, unfrozen
from skdim.transformer import DIMTransformer

__all__ = ["FineTunedClassifier"]


class FineTunedClassifier(ClassifierMixin, MetaEstimatorMixin, EstimatorMixin, BaseEstimator):
    """A perceptron on the encoder of a `DIMTransformer`, both trained on labelled images.

    The semi-supervised setting of the paper: the transformer has learned from many images without labels, and a copy of
    its encoder is trained on together with a new perceptron on those that have some. The perceptron reads the layer
    that the transformer's `output_layer` names.

    Parameters
    ----------
    transformer : DIMTransformer or FrozenEstimator
        Where the encoder starts. It is not changed. A fitted one is taken as it is; one that is not is cloned and
        fitted on `X` first. Cloning takes the fit away: in a cross-validation or a grid search wrap a fitted one in
        `sklearn.frozen.FrozenEstimator`.

    hidden_layer_sizes : sequence of int, default=(200,)
        Units of each hidden layer of the perceptron, with batch norm and ReLU.

    dropout : float, default=0.1
        Share of its hidden units that is dropped in training.

    lr : float, default=1e-3
        Learning rate of the perceptron.

    encoder_lr : float, default=1e-4
        Learning rate of the encoder.

    batch_size : int, default=64
        Most images in a batch. Of less than ten such batches, an epoch has up to ten smaller ones, of 16 at least.

    max_epochs : int, default=50
        Most passes over the images.

    patience : int, default=10
        Epochs after which training stops if none has lowered the validation loss by a ten-thousandth of it; more where
        these have less than 50 batches. The weights of the last epoch that has are kept.

    validation_fraction : float, default=0.1
        Share of the images that decides when to stop.

    random_state : int, RandomState instance or None, default=None
        Draws split, initial weights of the perceptron, batches and dropout; also the seed of a transformer that is
        fitted here and whose own `random_state` is None.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    transformer_ : DIMTransformer
        A copy of the transformer with the fine-tuned encoder.
    mlp_ : nn.Module
        The perceptron, in float64. It takes what ``transformer_.transform`` returns.
    history_ : list of dict
        One dict an epoch: "train_loss", "valid_loss", "valid_acc" and "dur", the seconds it took.
    n_iter_ : int
        Epochs trained.
    n_features_in_ : int
        Values an image has.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names of the images that the transformer was fitted on, where they had any that are all strings.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim import DIMTransformer
    >>> from skdim.evaluation import FineTunedClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> dim = DIMTransformer(max_epochs=2, random_state=0).fit(X)
    >>> FineTunedClassifier(dim, max_epochs=5, random_state=0).fit(X[:200], y[:200]).predict(X[200:]).shape
    (1597,)
    """

    _parameter_constraints: dict[str, list[Any]] = {
        "transformer": [DIMTransformer, FrozenEstimator],
        "hidden_layer_sizes": ["array-like"],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "encoder_lr": [Interval(Real, 0, None, closed="neither")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        transformer: DIMTransformer,
        *,
        hidden_layer_sizes: Sequence[int] | NDArray[Any] = (200,),
        dropout: float = 0.1,
        lr: float = 1e-3,
        encoder_lr: float = 1e-4,
        batch_size: int = 64,
        max_epochs: int = 50,
        patience: int = 10,
        validation_fraction: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.transformer = transformer
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.lr = lr
        self.encoder_lr = encoder_lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    # The transformer may be fitted already; its own parameters are validated where it is fitted.
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any) -> Self:
        """Train perceptron and encoder.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            At least three images.
        y : array-like of shape (n,)
            Labels.

        Returns
        -------
        FineTunedClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a parameter, the images or the labels are unfit.
        FloatingPointError
            If training diverges.
        TypeError
            If what is frozen is no `DIMTransformer`, or `X` is a DataLoader.
        """
        name = type(self).__name__
        hidden_layer_sizes = check_hidden_layer_sizes(self.hidden_layer_sizes)
        refuse_loader(X)
        classes, labels = encode_labels(check_labels(y, name), name)
        check_number_of_labels(X, labels)
        if len(labels) < 3:
            raise ValueError(f"Found array with {len(labels)} sample(s) while a minimum of 3 is required by {name}.")
        rng = check_random_state(self.random_state)
        fitted_on, held_out = validation_split(labels, self.validation_fraction, rng)
        # All that can be refused without a fitted transformer is refused above, as fitting one may take hours.
        transformer = self._fitted_copy_of_transformer(X, rng)
        transformer._check_output_layer()
        images = images_of(transformer, X)
        transformer._warn_of_other_scale(images)
        device = transformer.device_
        with usual_torch(device):
            targets = torch.from_numpy(labels).to(device)
            with private_rng(rng.randint(np.iinfo(np.int32).max), device):
                mlp = MLP(transformer._n_features_out, hidden_layer_sizes, len(classes), self.dropout, False)
                standardize = Standardizer(transformer.mean_, transformer.std_, device)
                history = train(
                    NeuralNetClassifier,
                    _EncoderAndMLP(transformer.encoder_, transformer.output_layer, standardize, mlp),
                    Samples(images.take, fitted_on, targets),
                    Samples(images.take, held_out, targets),
                    criterion=nn.CrossEntropyLoss,
                    classes=range(len(classes)),
                    optimizer__param_groups=[("encoder.*", {"lr": self.encoder_lr})],
                    lr=self.lr,
                    batch_size=self.batch_size,
                    max_epochs=self.max_epochs,
                    patience=self.patience,
                    device=device,
                    random_state=rng,
                )
        self.classes_, self.transformer_, self.mlp_ = classes, transformer, mlp.double()
        self.history_, self.n_iter_ = history, len(history)
        self.n_features_in_ = transformer.n_features_in_
        if hasattr(transformer, "feature_names_in_"):
            self.feature_names_in_ = transformer.feature_names_in_
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Compute the probabilities of the classes.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Probabilities, in the order of `classes_`.
        """
        check_is_fitted(self)
        return predict_proba(self.mlp_, embed(self.transformer_, X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            Images.

        Returns
        -------
        ndarray of shape (n,)
            Labels.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _fitted_copy_of_transformer(self, X: Any, rng: np.random.RandomState) -> DIMTransformer:
        transformer = unfrozen(self.transformer)
        if not isinstance(transformer, DIMTransformer):
            raise TypeError(
                f"transformer must be a DIMTransformer, frozen or not, got a frozen {type(transformer).__name__}."
            )
        if not hasattr(transformer, "encoder_"):
            transformer = clone(transformer)
            # scikit-learn's ensembles also take the place of a seed that the user has set; here it counts.
            if transformer.random_state is None:
                transformer.set_params(random_state=rng.randint(np.iinfo(np.int32).max))
            transformer.fit(X)
        # As a pickle does, a copy leaves discriminators and net behind.
        return copy.deepcopy(transformer)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


class _EncoderAndMLP(nn.Module):
    """From stored images to logits."""

    def __init__(self, encoder: nn.Module, layer: str, standardize: Standardizer, mlp: MLP) -> None:
        super().__init__()
        self.encoder, self.mlp = encoder, mlp
        self.layer, self.standardize = layer, standardize

    def forward(self, images: Tensor) -> Tensor:
        return self.mlp(read_layers(self.encoder, self.standardize(images))[self.layer].flatten(1))
