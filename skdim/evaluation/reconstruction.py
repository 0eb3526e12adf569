"""How much of an image can be drawn again from its embedding."""

from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from skorch import NeuralNetRegressor
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

from skdim.devices import usual_torch
from skdim.encoders import n_halvings
from skdim.evaluation.inputs import mean_and_scale, standardized
from skdim.evaluation.networks import Samples, train
from skdim.images import Images
from skdim.layouts import ImageShape
from skdim.randomness import private_rng
from skdim.subjects import embed, find_transformer, images_of

__all__ = ["ms_ssim", "reconstruction_ms_ssim"]

# Wang, Simoncelli and Bovik, 2003: exponents of the scales, from fine to coarse, and the Gaussian window.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5
# The constants that keep the ratios finite, as shares of the data range.
K_LUMINANCE, K_CONTRAST = 0.01, 0.03

CONSTRAINTS: dict[str, list[Any]] = {
    "max_epochs": [Interval(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
}


def ms_ssim(first: Tensor, second: Tensor, *, data_range: float) -> Tensor:
    """Multi-scale structural similarity of pairs of images.

    A window of 11 x 11 pixels weighs neighbours by a Gaussian of 1.5 pixels, without padding; each scale halves the
    images by averaging 2 x 2 pixels. There are as many of the five scales as still hold a window, and their exponents
    are scaled to a sum of 1: 32 x 32 images have two, 176 pixels a side take all. A smaller window, the largest odd one
    that fits, serves images with a side of less than 11 pixels. The product of contrast and structure, on the
    coarsest scale that of luminance too, is averaged over the image before it is raised to the scale's exponent;
    averages below 0 count as 0.

    Parameters
    ----------
    first, second : Tensor of shape (N, C, H, W)
        Floating-point images, at least 3 x 3, on one device, which must know float64.
    data_range : float
        Largest value an image can have less the smallest: 255 for bytes, 1 for bytes over 255.

    Returns
    -------
    Tensor of shape (N,)
        1 for equal images, averaged over the channels.

    Raises
    ------
    ValueError
        If the images differ in shape, are too small or of integers, or `data_range` is not positive and finite.

    References
    ----------
    Z. Wang, E. P. Simoncelli, A. C. Bovik, "Multi-scale structural similarity for image quality assessment",
    Asilomar 2003.
    """
    if first.shape != second.shape or first.ndim != 4 or min(first.shape[2:]) < 3:
        raise ValueError(
            f"Two tensors (N, C, H, W) of the same images of at least 3 x 3 are required, got shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise ValueError(f"Two floating-point tensors are required, got {first.dtype} and {second.dtype}.")
    if not 0 < data_range < np.inf:
        raise ValueError(f"data_range must be positive and finite, got {data_range}.")
    dtype = first.dtype
    # Variances are differences of second moments, of which lower precision leaves little.
    first, second = first.double(), second.double()
    shorter = min(first.shape[2:])
    window = _gaussian_window(min(WINDOW_SIZE, shorter - 1 + shorter % 2)).to(first)
    n_scales = 1
    while n_scales < len(SCALE_WEIGHTS) and shorter >> n_scales >= len(window):
        n_scales += 1
    weights = np.array(SCALE_WEIGHTS[:n_scales]) / sum(SCALE_WEIGHTS[:n_scales])
    product = torch.ones_like(first[:, :, 0, 0])
    for scale, weight in enumerate(weights):
        luminance, contrast = _similarity(first, second, window, data_range)
        last = scale == n_scales - 1
        value = (luminance * contrast if last else contrast).mean(dim=(2, 3))
        product = product * value.clamp(min=0) ** float(weight)
        if not last:
            first, second = avg_pool2d(first, 2), avg_pool2d(second, 2)
    return product.mean(dim=1).to(dtype)


def _gaussian_window(size: int) -> Tensor:
    distance = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-distance.square() / (2 * WINDOW_SIGMA**2))
    return window / window.sum()


def _similarity(first: Tensor, second: Tensor, window: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at each place of the window."""
    size = len(window)

    def blur(images: Tensor) -> Tensor:
        channels = images.shape[1]
        across = conv2d(images, window.view(1, 1, 1, size).expand(channels, -1, -1, -1), groups=channels)
        return conv2d(across, window.view(1, 1, size, 1).expand(channels, -1, -1, -1), groups=channels)

    c1, c2 = (K_LUMINANCE * data_range) ** 2, (K_CONTRAST * data_range) ** 2
    mean_1, mean_2 = blur(first), blur(second)
    variance_1, variance_2 = blur(first.square()) - mean_1.square(), blur(second.square()) - mean_2.square()
    covariance = blur(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1.square() + mean_2.square() + c1)
    return luminance, (2 * covariance + c2) / (variance_1 + variance_2 + c2)


def reconstruction_ms_ssim(
    dim: BaseEstimator,
    X_train: Any,
    X_test: Any,
    *,
    max_epochs: int = 50,
    random_state: int | np.random.RandomState | None = None,
) -> float:
    """Multi-scale structural similarity between test images and what a decoder makes of their embeddings.

    The decoder, transposed convolutions with batch norm and ReLU, is trained on the embeddings of the training images
    by their mean squared error, on the transformer's device; a tenth of them decides when to stop, as in `MLPProbe`.
    The transformer is not trained on.

    Parameters
    ----------
    dim : DIMTransformer or Pipeline
        Fitted; the `output_layer` of the transformer is decoded.
    X_train, X_test : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
        Images of the shape seen in `fit`, at least 3 x 3; to train on, at least three. The data range is 255 for uint8
        images, else that of the training images; reconstructions are clipped to it.
    max_epochs : int, default=50
        Most passes over the training images.
    random_state : int, RandomState instance or None, default=None
        Draws the split, initial weights and batches.

    Returns
    -------
    float
        Mean of `ms_ssim` over the test images.

    Raises
    ------
    ValueError
        If a parameter or the images are unfit, or there are fewer than three to train on.
    FloatingPointError
        If the decoder's training diverges.
    TypeError
        If there is no transformer in `dim`.
    NotFittedError
        If it is not fitted.
    """
    params = {"max_epochs": max_epochs, "random_state": random_state}
    validate_parameter_constraints(CONSTRAINTS, params, "reconstruction_ms_ssim")
    dim, (X_train, X_test) = find_transformer(dim, X_train, X_test, name="reconstruction_ms_ssim")
    train_images, test_images = (images_of(dim, X) for X in (X_train, X_test))
    if len(train_images) < 3:
        raise ValueError(
            f"Found array with {len(train_images)} sample(s) while a minimum of 3 is required by "
            "reconstruction_ms_ssim: two to train on and one that decides when to stop."
        )
    _, height, width = dim.image_shape_
    if min(height, width) < 3:
        raise ValueError(f"reconstruction_ms_ssim needs images of at least 3 x 3, got {height} x {width}.")
    low, high = _data_range(train_images)
    with usual_torch(dim.device_):
        device, embeddings = dim.device_, [embed(dim, X) for X in (X_train, X_test)]
        mean, scale = mean_and_scale(embeddings[0])
        Z_train, Z_test = (torch.from_numpy(standardized(Z, mean, scale)).to(device) for Z in embeddings)
        targets = ((train_images.take(slice(None)).float() - low) / (high - low)).to(device)
        rng = check_random_state(random_state)
        order = rng.permutation(len(Z_train))
        n_held_out = -(-len(order) // 10)
        with private_rng(rng.randint(np.iinfo(np.int32).max), device):
            decoder = _Decoder(Z_train.shape[1], dim.image_shape_)
            train(
                NeuralNetRegressor,
                decoder,
                Samples(Z_train.__getitem__, order[n_held_out:], targets),
                Samples(Z_train.__getitem__, order[:n_held_out], targets),
                lr=1e-3,
                batch_size=128,
                max_epochs=max_epochs,
                patience=5,
                device=device,
                random_state=rng,
            )
        values = []
        with torch.inference_mode():
            for start in range(0, len(Z_test), 512):
                drawn = decoder(Z_test[start : start + 512]).clamp(0, 1)
                images = (test_images.take(slice(start, start + 512)).to(device).float() - low) / (high - low)
                values.append(ms_ssim(drawn, images, data_range=1.0))
        return torch.cat(values).mean().item()


def _data_range(images: Images) -> tuple[float, float]:
    if images.array.dtype == np.uint8:
        return 0.0, 255.0
    values: NDArray[Any] = images.array[:]
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1.0


class _Decoder(nn.Module):
    """The encoder's halving convolutions, backwards: linear, then doublings, cut to the size of the images."""

    def __init__(self, n_features: int, image_shape: ImageShape) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        n_doublings = max(1, n_halvings(self.height, self.width))
        height, width = (-(-side // 2**n_doublings) for side in (self.height, self.width))
        widths = [32 << stage for stage in range(n_doublings, 0, -1)]
        self.linear = nn.Sequential(
            nn.Linear(n_features, widths[0] * height * width, bias=False),
            nn.BatchNorm1d(widths[0] * height * width),
            nn.ReLU(),
            nn.Unflatten(1, (widths[0], height, width)),
        )
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.grow = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.grow(self.linear(embeddings))[:, :, : self.height, : self.width]
