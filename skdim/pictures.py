"""Images of any number of channels as pictures to look at."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skdim.images import Images

__all__ = ["Pictures", "mosaic", "pixel_values", "principal_colors", "to_rgb"]


def pixel_values(images: Images, rows: Any) -> NDArray[Any]:
    """Images of shape (n, height, width, C) as floats, bytes scaled to [0, 1]."""
    values = images.take(rows).permute(0, 2, 3, 1).numpy()
    return values / np.float32(255) if values.dtype == np.uint8 else values


class Pictures:
    """Images as pictures in [0, 1], made of those that are asked for, which are scaled alike.

    Parameters
    ----------
    images : Images
        The images.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Picture some images, as an array of shape (len(rows), height, width, 3)."""
        return to_rgb(pixel_values(self.images, rows))


def to_rgb(values: NDArray[Any]) -> NDArray[Any]:
    """Bring values (n, height, width, C) of any range to colours in [0, 1], signals to a visible height."""
    if values.shape[3] not in (1, 3):
        values = principal_colors(values)
        # Some extreme pixels must not take all the contrast.
        low, high = np.percentile(values, [1, 99], axis=(0, 1, 2))
    elif values.min() >= 0 and values.max() <= 1:
        low, high = np.zeros(1), np.ones(1)
    else:
        low, high = values.min(keepdims=True).ravel(), values.max(keepdims=True).ravel()
    scaled = (values - low) / np.where(high > low, high - low, 1)
    for axis, other in ((1, 2), (2, 1)):
        scaled = np.repeat(scaled, max(1, scaled.shape[other] // (4 * scaled.shape[axis])), axis=axis)
    return np.broadcast_to(np.clip(scaled, 0, 1), (*scaled.shape[:3], 3))


def principal_colors(values: NDArray[Any]) -> NDArray[Any]:
    """First three principal components of the pixels (n, height, width, C); what is missing is 0."""
    pixels = values.reshape(-1, values.shape[3]).astype(np.float64)
    pixels -= pixels.mean(axis=0)
    _, directions = np.linalg.eigh(pixels.T @ pixels)
    directions = directions[:, ::-1][:, :3]
    # Eigenvectors have no sign of their own.
    directions = np.where(directions.sum(axis=0) < 0, -directions, directions)
    colors = np.zeros((*values.shape[:3], 3))
    colors[..., : directions.shape[1]] = (pixels @ directions).reshape(*values.shape[:3], -1)
    return colors


def mosaic(
    tiles: NDArray[Any], *, fill: float = 1.0, first_column_apart: bool = False
) -> tuple[NDArray[Any], tuple[NDArray[Any], NDArray[Any]]]:
    """Put tiles (rows, columns, height, width, channels) side by side; find the centres of columns and rows."""
    n_rows, n_columns, height, width, channels = tiles.shape
    gap = max(1, min(height, width) // 8)
    lefts = np.arange(n_columns) * (width + gap)
    if first_column_apart:
        lefts[1:] += 2 * gap
    tops = np.arange(n_rows) * (height + gap)
    canvas = np.full((tops[-1] + height, lefts[-1] + width, channels), fill)
    for top, row in zip(tops, tiles, strict=True):
        for left, tile in zip(lefts, row, strict=True):
            canvas[top : top + height, left : left + width] = tile
    return canvas, (lefts + (width - 1) / 2, tops + (height - 1) / 2)
