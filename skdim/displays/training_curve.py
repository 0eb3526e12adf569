"""How training went."""

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator

from skdim.displays.figures import COLORS, get_axes, legend_beside, with_defaults
from skdim.subjects import find_transformer

__all__ = ["TrainingCurveDisplay"]

# What the history has beside losses and bounds.
NO_TERMS = ("seconds", "images_per_second")


class TrainingCurveDisplay:
    """Every loss term, epoch by epoch.

    Bounds of the mutual information, where there are any, are dashed: they rise as their loss falls.

    Parameters
    ----------
    history : list of dict
        One dict an epoch, as in the attribute `history_` of `DIMTransformer`.

    Attributes
    ----------
    lines_ : dict of str to matplotlib.lines.Line2D
        The curves, by the name of their term.
    ax_ : matplotlib.axes.Axes
        Axes of the plot.
    figure_ : matplotlib.figure.Figure
        Figure of the plot.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim import DIMTransformer
    >>> from skdim.displays import TrainingCurveDisplay
    >>> X, _ = load_digits(return_X_y=True)
    >>> dim = DIMTransformer(max_epochs=2, random_state=0).fit(X)
    >>> display = TrainingCurveDisplay.from_estimator(dim)
    """

    def __init__(self, history: list[dict[str, float]]) -> None:
        self.history = history

    @classmethod
    def from_estimator(cls, estimator: BaseEstimator, *, ax: Any = None, **line_kwargs: Any) -> Self:
        """Plot the history of a fitted transformer.

        Parameters
        ----------
        estimator : DIMTransformer or Pipeline
            Fitted.
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        **line_kwargs
            Of ``Axes.plot``.

        Returns
        -------
        TrainingCurveDisplay
            The display.
        """
        dim, _ = find_transformer(estimator, name=cls.__name__)
        return cls(dim.history_).plot(ax=ax, **line_kwargs)

    def plot(self, *, ax: Any = None, **line_kwargs: Any) -> Self:
        """Plot.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        **line_kwargs
            Of ``Axes.plot``.

        Returns
        -------
        TrainingCurveDisplay
            The display.

        Raises
        ------
        ValueError
            If there are no epochs.
        """
        if not self.history:
            raise ValueError("history has no epochs: with max_epochs=0 there is nothing to plot.")
        self.ax_, self.figure_ = get_axes(self, ax)
        # Epochs differ in their terms where weights were changed between two fits.
        terms = dict.fromkeys(name for epoch in self.history for name in epoch if name not in NO_TERMS)
        from matplotlib.lines import Line2D

        losses = [name for name in terms if not name.endswith("_bound")]
        bounds = [name for name in terms if name not in losses]
        epochs = np.arange(1, len(self.history) + 1)
        self.lines_ = {}
        for name in losses + bounds:
            # A bound has the colour of its loss; the total is black.
            term = name.removesuffix("_bound")
            defaults = {
                "color": "black" if term == "loss" else COLORS[(losses.index(term) - 1) % len(COLORS)],
                "linestyle": "--" if name in bounds else "-",
                "marker": ".",
                "label": "loss (weighted sum)" if name == "loss" else name.replace("_", " "),
            }
            values = [epoch.get(name, np.nan) for epoch in self.history]
            (self.lines_[name],) = self.ax_.plot(epochs, values, **with_defaults(Line2D, defaults, line_kwargs))
        self.ax_.set(xlabel="Epoch", ylabel="Loss (solid), bound in nats (dashed)" if bounds else "Loss")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        self.ax_.spines[["top", "right"]].set_visible(False)
        legend_beside(self.ax_, *self.ax_.get_legend_handles_labels())
        return self
