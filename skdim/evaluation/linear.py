"""Linear probe: the one measure of a representation that everybody reports."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skdim.base import EstimatorMixin, unchanged_on_error
from skdim.devices import resolve_device, usual_torch
from skdim.evaluation.inputs import encode_labels, standardized, validated, validation_split
from skdim.statistics import RESOLUTION

__all__ = ["LinearProbe"]

# On standardised features the best regularisation lies inside: near 10 for some tens of samples, near 1e-3 for wide
# layers of many thousands.
CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

# Fewer samples than these are split several times: on a single small split the choice is a matter of luck.
FEW_SAMPLES = 1000
N_SPLITS = 5


class LinearProbe(ClassifierMixin, EstimatorMixin, BaseEstimator):
    r"""Standardise features, then classify them with a linear model whose regularisation is chosen on a split.

    Minimises over the weights W and the intercepts, which are not regularised,

    .. math:: \frac{1}{2} \|W\|^2 + C \sum_i \ell(W z_i + b, y_i)

    as `sklearn.linear_model.LogisticRegression` and, but for its intercepts, `sklearn.svm.LinearSVC` do, but for all
    classes at once, by L-BFGS with full batches on any device. (Two classes have two rows of weights: with the log loss
    the same C then regularises half as much as in `LogisticRegression`.) C is tried from small to large, each time from
    the solution before, and the one with the best accuracy on the split is taken, on ties the one with the lowest loss
    there; the path ends where the accuracy falls by more than chance explains. Fewer than 1000 samples are split five
    times, and the means decide. The model with the chosen C is then fitted to all samples.

    Parameters
    ----------
    loss : {"log_loss", "squared_hinge"}, default="log_loss"
        "log_loss" is multinomial logistic regression, "squared_hinge" a linear support vector machine, one class
        against the rest, which has no `predict_proba`.

    Cs : sequence of float, default=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
        Candidates for the inverse strength of regularisation. With a single one there is nothing to choose and no
        split.

    validation_fraction : float, default=0.2
        Share of the training samples that each split holds out to choose C on.

    max_iter : int, default=100
        Most iterations of L-BFGS for each C. Features wider than a thousand are then short of convergence; more
        iterations change their accuracy by tenths of a percent.

    device : str, default="auto"
        "cpu", "cuda", "cuda:N", or "auto", which is CUDA where there is one, else the CPU.

    random_state : int, RandomState instance or None, default=None
        Draws the splits.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    C_ : float
        The chosen C.
    coef_ : ndarray of shape (n_classes, n_features), float32
        Weights of standardised features.
    intercept_ : ndarray of shape (n_classes,), float32
        Intercepts.
    mean_, scale_ : ndarray of shape (n_features,), float32
        With which features are standardised; the scale of a constant one is infinite.
    n_iter_ : int
        Iterations of the last fit, to all samples.
    n_features_in_ : int
        Width of the features.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names of `X`, where it had any that are all strings.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim.evaluation import LinearProbe
    >>> X, y = load_digits(return_X_y=True)
    >>> LinearProbe(random_state=0).fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > 0.9
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {
        "loss": [StrOptions({"log_loss", "squared_hinge"})],
        "Cs": ["array-like"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "device": [str],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        loss: str = "log_loss",
        *,
        Cs: Sequence[float] | NDArray[Any] = CS,
        validation_fraction: float = 0.2,
        max_iter: int = 100,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.loss = loss
        self.Cs = Cs
        self.validation_fraction = validation_fraction
        self.max_iter = max_iter
        self.device = device
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any) -> Self:
        """Choose C and fit the linear model.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features, computed with as float32.
        y : array-like of shape (n,)
            Labels.

        Returns
        -------
        LinearProbe
            The fitted probe.

        Raises
        ------
        ValueError
            If a parameter, the features or the labels are unfit.
        """
        if (
            np.ndim(self.Cs) != 1
            or not len(self.Cs)
            or not all(isinstance(C, Real) and 0 < float(C) < np.inf for C in self.Cs)
        ):
            raise ValueError(f"Cs must be positive, finite numbers, at least one, got {self.Cs!r}.")
        Cs = sorted(float(C) for C in self.Cs)
        device = resolve_device(self.device)
        with unchanged_on_error(self), usual_torch(device):
            X, y = validated(self, X, y, ensure_min_samples=2)
            self.classes_, labels = encode_labels(y, type(self).__name__)
            rng = check_random_state(self.random_state)
            n_splits = 0 if len(Cs) == 1 else N_SPLITS if len(labels) < FEW_SAMPLES else 1
            splits: list[Any] = [
                validation_split(labels, self.validation_fraction, rng, min_training=1) for _ in range(n_splits)
            ]
            order = np.arange(len(labels))
            if len(splits) == 1:
                # Rows in the order of the split: both parts are then views, and a wide matrix is copied once.
                order, n_fitted_on = np.concatenate(splits[0]), len(splits[0][0])
                splits = [(slice(n_fitted_on), slice(n_fitted_on, None))]
            samples, targets = torch.from_numpy(X[order]).to(device), torch.from_numpy(labels[order]).to(device)
            mean, scale = _standardize(samples)
            basis = None
            if X.shape[1] > 2 * len(X):
                # All steps stay in the space of the samples, which is narrower.
                basis, coordinates = torch.linalg.qr(samples.T)
                samples = coordinates.T.contiguous()
            start = np.zeros((len(self.classes_), samples.shape[1] + 1))
            self.C_, start = self._choose(samples, targets, splits, Cs, start) if splits else (Cs[0], start)
            solution, self.n_iter_ = self._minimize(samples, targets, self.C_, start)
            weights = solution.astype(np.float32)
            coef = weights[:, :-1] if basis is None else weights[:, :-1] @ basis.cpu().numpy().T
            self.coef_, self.intercept_ = np.ascontiguousarray(coef), weights[:, -1].copy()
            self.mean_, self.scale_ = mean.cpu().numpy(), scale.cpu().numpy()
        return self

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Compute the scores of the classes.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n, n_classes), or (n,) for two classes, float32
            The higher, the likelier; of two classes, the second's score less the first's.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    @available_if(lambda probe: probe.loss == "log_loss")
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Compute the probabilities of the classes; only with ``loss="log_loss"``.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Probabilities, in the order of `classes_`.
        """
        probabilities: NDArray[np.float64] = softmax(self._scores(X).astype(np.float64), axis=1)
        return probabilities

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
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def _scores(self, X: Any) -> NDArray[np.float32]:
        check_is_fitted(self)
        X = validated(self, X, reset=False)
        scores: NDArray[np.float32] = standardized(X, self.mean_, self.scale_) @ self.coef_.T + self.intercept_
        return scores

    def _choose(
        self, samples: Tensor, targets: Tensor, splits: list[Any], Cs: list[float], start: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the C with the best mean accuracy on what the splits hold out, and weights that it led to."""
        starts = [start] * len(splits)
        n_held_out = len(targets[splits[0][1]])
        best_C, best_weights, best = Cs[0], start, (0.0, -np.inf)
        for C in Cs:
            found = []
            for i, (fitted_on, held_out) in enumerate(splits):
                starts[i], _ = self._minimize(samples[fitted_on], targets[fitted_on], C, starts[i])
                weights = torch.from_numpy(starts[i]).to(samples)
                scores = torch.addmm(weights[:, -1], samples[held_out], weights[:, :-1].T).double()
                loss, _ = LOSSES[self.loss](scores, targets[held_out])
                n_correct = (scores.argmax(dim=1) == targets[held_out]).sum()
                found.append((n_correct.item(), -loss.item()))
            # Counts, because means of equal accuracies may differ in the last bit.
            n_correct, negative_loss = np.sum(found, axis=0)
            accuracy = n_correct / (n_held_out * len(splits))
            # Two standard errors, and a sample: what is left of a path that falls by more is of no use.
            if accuracy < best[0] - 2 * (best[0] * (1 - best[0]) / n_held_out) ** 0.5 - 1 / n_held_out:
                break
            if (accuracy, negative_loss) > best:
                best_C, best_weights, best = C, starts[0], (accuracy, negative_loss)
        return best_C, best_weights

    def _minimize(
        self, samples: Tensor, targets: Tensor, C: float, start: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], int]:
        result = minimize(
            _regularized(LOSSES[self.loss], samples, targets, 1 / (C * len(samples)), start.shape),
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": self.max_iter, "gtol": 1e-4, "ftol": 1e-9},
        )
        return result.x.reshape(start.shape), int(result.nit)


def _standardize(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise columns in place, constant ones to zero, and return means and standard deviations (inf for those)."""
    # Powers of two change no digit; without them squares of very large or small values would not fit into float32.
    _, exponent = torch.frexp(torch.maximum(samples.amax(dim=0), -samples.amin(dim=0)))
    exponent.clamp_(-120, 120)
    samples.ldexp_(-exponent)
    variance, mean = torch.var_mean(samples, dim=0, correction=0)
    std = variance.sqrt()
    scale = torch.where(std > RESOLUTION * mean.abs(), std, torch.inf)
    samples.sub_(mean).div_(scale)
    return mean.ldexp_(exponent), scale.ldexp_(exponent)


def _regularized(
    loss_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    samples: Tensor,
    targets: Tensor,
    strength: float,
    shape: tuple[int, ...],
) -> Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]:
    """Make the function of flat weights that is minimised, with its gradient.

    Only the two products with the samples are in float32: all else is small, and L-BFGS wants its digits.
    """

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = torch.from_numpy(flat.reshape(shape)).to(samples.device)
        single = weights.float()
        scores = torch.addmm(single[:, -1], samples, single[:, :-1].T)
        loss, score_gradient = loss_and_gradient(scores.double(), targets)
        coef = weights[:, :-1]
        coef_gradient = (score_gradient.float().T @ samples).double() + strength * coef
        gradient = torch.cat([coef_gradient, score_gradient.sum(dim=0)[:, None]], dim=1)
        return (loss + strength / 2 * coef.square().sum()).item(), gradient.cpu().numpy().ravel()

    return objective


def _log_loss(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.arange(len(scores), device=scores.device)
    log_proba = torch.log_softmax(scores, dim=1)
    gradient = log_proba.exp()
    gradient[row, targets] -= 1
    return -log_proba[row, targets].mean(), gradient / len(scores)


def _squared_hinge(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.arange(len(scores), device=scores.device)
    sign = torch.full_like(scores, -1.0)
    sign[row, targets] = 1.0
    shortfall = (1 - sign * scores).clamp_(min=0)
    return shortfall.square().sum(dim=1).mean(), -2 * sign * shortfall / len(scores)


# A loss and its gradient by the scores.
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "log_loss": _log_loss,
    "squared_hinge": _squared_hinge,
}
