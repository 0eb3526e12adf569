"""Mean and standard deviation of the channels, by which images are standardised."""

from functools import reduce
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skdim.distributed import ALONE, Group
from skdim.images import CHUNK_BYTES, Images
from skdim.loaders import LoadedImages
from skdim.notices import warn

__all__ = ["RESOLUTION", "SMALLEST_SPREAD", "channel_statistics"]

# Share of a mean below which float32 tells no spread from rounding.
RESOLUTION = 1e-7

# Standard deviation of a channel that is no more than rounding, whatever its mean.
SMALLEST_SPREAD = 1e-30


class _Moments(NamedTuple):
    """Number of images, and mean and variance of each channel over them and all pixels."""

    n_images: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def with_more(self, more: "_Moments") -> "_Moments":
        """Count other images in."""
        n_images = self.n_images + more.n_images
        weight = more.n_images / n_images
        delta = more.mean - self.mean
        variance = self.variance + (weight * (more.variance - self.variance) + weight * (1 - weight) * delta**2)
        return _Moments(n_images, self.mean + weight * delta, variance)


def channel_statistics(
    images: Images | LoadedImages, group: Group = ALONE
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel, over all images and pixels.

    Parameters
    ----------
    images : Images or LoadedImages
        uint8 values are scaled by 1/255 first.
    group : Group, default=ALONE
        The processes that share the work, of which each reads a part of the images.

    Returns
    -------
    mean, std : ndarray of shape (C,), float32
        A constant channel, of which nothing can be learned, has an infinite standard deviation, so that it becomes 0
        when it is standardised, whatever its values are later.

    Warns
    -----
    UserWarning
        If channels are constant.
    """
    per_chunk = max(1, CHUNK_BYTES // (torch.float64.itemsize * prod(images.shape)))
    moments = _Moments(0, np.zeros(images.shape[0]), np.zeros(images.shape[0]))
    with group.together():
        part = (group.rank, group.size) if isinstance(images, Images) else ()
        for chunk in images.chunks(per_chunk, *part):
            moments = moments.with_more(_channel_moments(chunk))
    _, mean, variance = reduce(_Moments.with_more, group.share(moments))
    std = np.sqrt(variance)
    # A spread far below the resolution of float32 is rounding.
    constant = std <= np.maximum(RESOLUTION * np.abs(mean), SMALLEST_SPREAD)
    if constant.all():
        warn("All images are constant, as far as float32 tells: there is nothing to learn from X.")
    elif constant.any():
        warn(
            f"X has the same value everywhere, as far as float32 tells, in {_listed(np.flatnonzero(constant))}: "
            "nothing can be learned of that, and transform leaves out what is there."
        )
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    with np.errstate(under="ignore"):
        return (mean / scale).astype(np.float32), np.where(constant, np.inf, std / scale).astype(np.float32)


def _listed(channels: NDArray[np.intp]) -> str:
    return f"channel{'s' if len(channels) > 1 else ''} {', '.join(map(str, channels))}"


def _channel_moments(images: torch.Tensor) -> _Moments:
    if images.dtype == torch.uint8 and images[:, 0].numel() >= 256:
        # A histogram holds all there is to know of bytes, and takes a seventh of the time that their moments take.
        counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
        shares = torch.stack(counts).double() / counts[0].sum()
        values = torch.arange(256, dtype=torch.float64)
        mean = shares @ values
        variance = (shares * (values - mean[:, None]).square()).sum(dim=1)
    else:
        # Squares of float32 may not fit into it.
        variance, mean = torch.var_mean(images.double(), dim=(0, 2, 3), correction=0)
    return _Moments(len(images), mean.numpy(), variance.numpy())
