"""What an encoder looks at first."""

from math import ceil, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import nn

from skdim.displays.figures import get_axes, remove_lines
from skdim.pictures import mosaic, principal_colors
from skdim.subjects import find_transformer

__all__ = ["FilterDisplay"]


class FilterDisplay:
    """Filters of the encoder's first convolution.

    Of other than one or three channels, the colours are their first three principal components. Zero, or the mean of
    principal components, is mid-grey. Filters share one scale.

    Parameters
    ----------
    filters : ndarray of shape (K, C, h, w)
        The weights.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes of the plot.
    figure_ : matplotlib.figure.Figure
        Figure of the plot.
    """

    def __init__(self, filters: NDArray[Any]) -> None:
        self.filters = filters

    @classmethod
    def from_estimator(cls, estimator: BaseEstimator, *, ax: Any = None) -> Self:
        """Plot the filters of a fitted transformer.

        Parameters
        ----------
        estimator : DIMTransformer or Pipeline
            Fitted.
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.

        Returns
        -------
        FilterDisplay
            The display.

        Raises
        ------
        ValueError
            If the encoder has no 2-D convolution.
        """
        dim, _ = find_transformer(estimator, name=cls.__name__)
        convolution = next((m for m in dim.encoder_.modules() if isinstance(m, nn.Conv2d)), None)
        if convolution is None:
            raise ValueError(f"The encoder {type(dim.encoder_).__name__} has no 2-D convolution.")
        return cls(convolution.weight.detach().float().cpu().numpy()).plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Plot.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.

        Returns
        -------
        FilterDisplay
            The display.
        """
        n_filters, n_channels, height, width = self.filters.shape
        values = self.filters.transpose(0, 2, 3, 1)
        if n_channels not in (1, 3):
            values = principal_colors(values)
        largest = np.abs(values).max()
        # What rounding leaves of equal filters is nothing to see.
        scale = largest if largest > 1e-12 * np.abs(self.filters).max() else 1.0
        pictures = 0.5 + 0.5 * np.broadcast_to(values, (n_filters, height, width, 3)) / scale
        n_columns = ceil(sqrt(n_filters))
        n_rows = ceil(n_filters / n_columns)
        tiles = np.ones((n_rows * n_columns, height, width, 3))
        tiles[:n_filters] = pictures
        tiles = tiles.reshape(n_rows, n_columns, height, width, 3)
        self.ax_, self.figure_ = get_axes(self, ax)
        self.ax_.imshow(mosaic(tiles)[0], interpolation="nearest")
        title = f"First convolution: {n_filters} filters of {height} x {width}"
        if n_channels not in (1, 3):
            title += f"\nColours: principal components of the {n_channels} channels"
        self.ax_.set(xticks=[], yticks=[], title=title)
        remove_lines(self.ax_)
        return self
