"""Neural lower bounds of mutual information and total correlation, measured on samples that trained nothing."""

import copy
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from torch import Tensor, nn
from torch.utils.data import Dataset

from skdim.batches import Standardizer
from skdim.devices import resolve_device, usual_torch
from skdim.discriminators import GlobalConcatCritic, LocalConcatCritic
from skdim.evaluation.inputs import as_numpy, mean_and_scale, standardized
from skdim.images import check_images
from skdim.layouts import ImageShape, check_image_shape
from skdim.objectives import donsker_varadhan
from skdim.randomness import private_rng
from skdim.statistics import channel_statistics
from skdim.transformer import DIMTransformer

__all__ = ["mutual_information_bound", "total_correlation_bound"]

N_UNITS = 512
BATCH_SIZE = 512
LR = 5e-4
PATIENCE = 5
# How often the held-out samples are paired anew, which the logarithm of the mean in the bound is averaged over.
N_PAIRINGS = 10

CONSTRAINTS: dict[str, list[Any]] = {
    "image_shape": DIMTransformer._parameter_constraints["image_shape"],
    "data_format": DIMTransformer._parameter_constraints["data_format"],
    "max_epochs": [Interval(Integral, 1, None, closed="left")],
    "device": [str],
    "random_state": ["random_state"],
}

# Scores of N samples, and in N rows those of one sample a pairing, drawn from the product of the marginals.
Scores = Callable[[Tensor, int, np.random.RandomState], tuple[Tensor, Tensor]]


def mutual_information_bound(
    X: Any,
    Z: Any,
    *,
    image_shape: ImageShape | None = None,
    data_format: str = "auto",
    max_epochs: int = 50,
    device: str = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> float:
    r"""Lower bound of the mutual information between inputs and embeddings, by MINE.

    A network T is trained to raise the Donsker-Varadhan bound

    .. math:: I(X; Z) \ge E_{p(x, z)}[T(x, z)] - \log E_{p(x) p(z)}[e^{T(x, z)}]

    on three fifths of the samples. Its best epoch is chosen on one fifth, and the bound is measured on the last, so
    that what the network learned by heart adds nothing. It starts from the constant T, whose bound is 0.

    Parameters
    ----------
    X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
        Inputs: vectors, or images, which the network reads by convolutions.
    Z : array-like of shape (n, d)
        Their embeddings.
    image_shape : tuple of int, default=None
        Channels, height and width of the images; None infers it from `X`, of which rows (n, p) then are vectors.
    data_format : {"auto", "channels_first", "channels_last"}, default="auto"
        Order of the axes of an image, as in `DIMTransformer`.
    max_epochs : int, default=50
        Most passes over the samples. Training stops when the bound has not risen for five.
    device : str, default="auto"
        "cpu", "cuda", "cuda:N", or "auto", which is CUDA where there is one, else the CPU.
    random_state : int, RandomState instance or None, default=None
        Draws the split, initial weights and batches.

    Returns
    -------
    float
        The bound, in nats, at most ``log(ceil(n / 5))``: the scores T are kept within half of that around 0, because
        the mean of exponentials of a wider range can't be estimated from the held-out samples, and the bound that seems
        to come out then has no limit. From n samples no method measures more than about log(n) with confidence
        (McAllester and Stratos, AISTATS 2020). A value near the limit says "large", not how large.

    Raises
    ------
    ValueError
        If a parameter, inputs or embeddings are unfit, or there are fewer than ten.

    References
    ----------
    M. I. Belghazi et al., "Mutual Information Neural Estimation", ICML 2018, arXiv:1801.04062.

    Examples
    --------
    >>> import numpy as np
    >>> from skdim.evaluation import mutual_information_bound
    >>> rng = np.random.default_rng(0)
    >>> x, noise = rng.standard_normal((2, 2000, 1))
    >>> y = 0.9 * x + 0.19**0.5 * noise  # correlation 0.9: -log(1 - 0.81) / 2 = 0.83 nats
    >>> 0.6 < mutual_information_bound(x, y, device="cpu", random_state=0) < 0.9
    True
    """
    params = {
        "image_shape": image_shape,
        "data_format": data_format,
        "max_epochs": max_epochs,
        "device": device,
        "random_state": random_state,
    }
    validate_parameter_constraints(CONSTRAINTS, params, "mutual_information_bound")
    if image_shape is not None:
        image_shape = check_image_shape(image_shape)
    place = resolve_device(device)
    with usual_torch(place):
        embeddings = _standardized(_checked(Z, ensure_min_samples=10), place)
        shape, read = _inputs(X, image_shape, data_format, place)
        check_consistent_length(X, Z)
        rng = check_random_state(random_state)
        critic_class = LocalConcatCritic if shape[1:] == (1, 1) else GlobalConcatCritic
        with private_rng(rng.randint(np.iinfo(np.int32).max), place):
            critic = critic_class(shape, embeddings.shape[1], N_UNITS).to(place)

        def scores(rows: Tensor, n_pairings: int, rng: np.random.RandomState) -> tuple[Tensor, Tensor]:
            maps, vectors = critic.encode(read(rows), embeddings[rows])
            # The rows are in random order: those some steps away are others drawn at random.
            others = [vectors.roll(rng.randint(1, len(rows)), 0) for _ in range(n_pairings)]
            return critic.score(maps, vectors[:, None]), critic.score(maps, torch.stack(others, dim=1))

        return _held_out_bound(critic, critic.tail[-1], scores, len(embeddings), max_epochs, place, rng)


def total_correlation_bound(
    Z: Any,
    *,
    max_epochs: int = 50,
    device: str = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> float:
    r"""Lower bound of the total correlation of an embedding's dimensions: the paper's neural dependency measure.

    The Donsker-Varadhan bound of the divergence between the embeddings and embeddings whose every dimension comes from
    another sample,

    .. math:: D(p(z) \,\|\, \prod_j p(z_j)) \ge E_{p(z)}[T(z)] - \log E_{\prod_j p(z_j)}[e^{T(z)}],

    which is 0 where the dimensions are independent. It is trained and measured as in `mutual_information_bound`, in
    batches of at most 512 samples. Where a batch has fewer samples than dimensions, some dimensions come from the same
    sample, and the bound is a looser one.

    Parameters
    ----------
    Z : array-like of shape (n, d)
        Embeddings.
    max_epochs : int, default=50
        Most passes over the samples. Training stops when the bound has not risen for five.
    device : str, default="auto"
        "cpu", "cuda", "cuda:N", or "auto", which is CUDA where there is one, else the CPU.
    random_state : int, RandomState instance or None, default=None
        Draws the split, initial weights and batches.

    Returns
    -------
    float
        The bound, in nats; see `mutual_information_bound` for how large it can be.

    Raises
    ------
    ValueError
        If a parameter or the embeddings are unfit, or there are fewer than ten.

    Examples
    --------
    >>> import numpy as np
    >>> from skdim.evaluation import total_correlation_bound
    >>> Z = np.random.default_rng(0).standard_normal((2000, 8))
    >>> abs(total_correlation_bound(Z, device="cpu", random_state=0)) < 0.05
    True
    """
    params = {"max_epochs": max_epochs, "device": device, "random_state": random_state}
    validate_parameter_constraints(CONSTRAINTS, params, "total_correlation_bound")
    place = resolve_device(device)
    with usual_torch(place):
        embeddings = _standardized(_checked(Z, ensure_min_samples=10), place)
        n_samples, n_dims = embeddings.shape
        rng = check_random_state(random_state)
        with private_rng(rng.randint(np.iinfo(np.int32).max), place):
            critic = nn.Sequential(
                nn.Linear(n_dims, N_UNITS), nn.ReLU(), nn.Linear(N_UNITS, N_UNITS), nn.ReLU(), nn.Linear(N_UNITS, 1)
            ).to(place)
        columns = torch.arange(n_dims, device=place)

        def scores(rows: Tensor, n_pairings: int, rng: np.random.RandomState) -> tuple[Tensor, Tensor]:
            # Each dimension from another sample, as long as there are as many samples as dimensions.
            steps = (
                np.stack([rng.permutation(len(rows))[:n_dims] for _ in range(n_pairings)])
                if n_dims <= len(rows)
                else rng.randint(len(rows), size=(n_pairings, n_dims))
            )
            source = torch.arange(len(rows), device=place)[:, None, None] + torch.from_numpy(steps).to(place)
            return critic(embeddings[rows]), critic(embeddings[rows[source % len(rows)], columns])

        return _held_out_bound(critic, critic[-1], scores, n_samples, max_epochs, place, rng)


def _inputs(
    X: Any, image_shape: ImageShape | None, data_format: str, device: torch.device
) -> tuple[ImageShape, Callable[[Tensor], Tensor]]:
    """Shape of an input and a function that reads some, standardised; vectors are images of one pixel."""
    # NumPy would read all of a Dataset.
    if image_shape is None and not isinstance(X, Dataset) and np.ndim(X) == 2:
        vectors = _standardized(_checked(X), device)
        return (vectors.shape[1], 1, 1), lambda rows: vectors[rows, :, None, None]
    # What messages name; it is given what a fit is.
    named = type("mutual_information_bound", (BaseEstimator,), {})()
    images = check_images(named, X, image_shape=image_shape, data_format=data_format, reset=True)
    standardize = Standardizer(*channel_statistics(images), device)
    return images.shape, lambda rows: standardize(images.take(rows.cpu().numpy()))


def _checked(values: Any, **options: Any) -> NDArray[np.float32]:
    with config_context(array_api_dispatch=False):
        checked: NDArray[np.float32] = check_array(as_numpy(values), dtype=np.float32, **options)
        return checked


def _standardized(values: NDArray[np.float32], device: torch.device) -> Tensor:
    """Neither measure changes when a dimension is scaled or shifted."""
    return torch.from_numpy(standardized(values, *mean_and_scale(values))).to(device)


def _held_out_bound(
    critic: nn.Module,
    last_layer: Any,
    scores: Scores,
    n_samples: int,
    max_epochs: int,
    device: torch.device,
    rng: np.random.RandomState,
) -> float:
    """Train a critic on three fifths of the samples, choose its epoch on a fifth, return its bound on the last."""
    # Scores of 0 everywhere: the bound starts from 0, and a critic that never generalises stays there.
    nn.init.zeros_(last_layer.weight)
    nn.init.zeros_(last_layer.bias)
    parts = np.split(rng.permutation(n_samples), [3 * n_samples // 5, 4 * n_samples // 5])
    training, validation, test = (torch.from_numpy(part).to(device) for part in parts)
    optimizer = torch.optim.Adam(critic.parameters(), lr=LR)
    limit = math.log(len(test)) / 2
    best, best_state, misses = 0.0, copy.deepcopy(critic.state_dict()), 0
    for _ in range(max_epochs):
        order = training[torch.from_numpy(rng.permutation(len(training))).to(device)]
        for rows in torch.tensor_split(order, -(-len(order) // BATCH_SIZE)):
            loss = _loss(*scores(rows, 1, rng), limit)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
        bound = _bound(scores, validation, limit, rng)
        if bound > best:
            best, best_state, misses = bound, copy.deepcopy(critic.state_dict()), 0
        else:
            misses += 1
        if misses == PATIENCE:
            break
    critic.load_state_dict(best_state)
    return _bound(scores, test, limit, rng)


def _loss(positive: Tensor, negative: Tensor, limit: float) -> Tensor:
    positive, negative = (limit * torch.tanh(score.flatten(1) / limit) for score in (positive, negative))
    return donsker_varadhan(positive, negative)


@torch.inference_mode()
def _bound(scores: Scores, rows: Tensor, limit: float, rng: np.random.RandomState) -> float:
    order = rows[torch.from_numpy(rng.permutation(len(rows))).to(rows.device)]
    batches = torch.tensor_split(order, -(-len(order) // BATCH_SIZE))
    positives, negatives = zip(*(scores(batch, N_PAIRINGS, rng) for batch in batches), strict=True)
    positive, negative = (torch.cat(parts).double() for parts in (positives, negatives))
    return -_loss(positive, negative, limit).item()
