"""Plots of a fitted transformer, in the way of scikit-learn's displays. They need matplotlib.

Of a fitted Pipeline its `DIMTransformer` is shown, with the images as the steps before it leave them; the steps behind
it do not count.

Images are shown in grey if they have one channel and in colour if they have three. Of any other number of channels the
first three principal components of the pixels shown are the red, green and blue.
"""

from math import ceil, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skdim.batches import Standardizer
from skdim.images import Images, check_images
from skdim.inference import local_scores
from skdim.pictures import as_pictures, mosaic, pixel_values, principal_colors, to_rgb
from skdim.transformer import DIMTransformer

__all__ = ["EmbeddingDisplay", "FilterDisplay", "NeighborsDisplay", "ScoreMapDisplay", "TrainingCurveDisplay"]

# Ten colours that people with any kind of colour vision tell apart (M. A. Petroff, arXiv:2107.02270).
COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
# Neighbouring markers tell apart what small points of like colours do not.
MARKERS = "o^sDvP*X"

# What the history has beside losses and bounds.
NO_TERMS = ("seconds", "images_per_second")

# Lines of a legend that a figure of the usual size has room for.
LEGEND_ROWS = 16

# Width of a thumbnail, in points.
THUMBNAIL = 22


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
    def from_estimator(cls, estimator: DIMTransformer, *, ax: Any = None, **line_kwargs: Any) -> Self:
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
        dim, _ = _transformer(cls, estimator)
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
        """
        self.ax_, self.figure_ = _axes(self, ax)
        if not self.history:
            raise ValueError("history has no epochs: with max_epochs=0 there is nothing to plot.")
        # Epochs differ in their terms where weights were changed between two fits.
        terms = dict.fromkeys(name for epoch in self.history for name in epoch if name not in NO_TERMS)
        losses = [name for name in terms if not name.endswith("_bound")]
        bounds = [name for name in terms if name not in losses]
        epochs = np.arange(1, len(self.history) + 1)
        self.lines_ = {}
        for name in losses + bounds:
            # A bound has the colour of its loss; the total is black.
            term = name.removesuffix("_bound")
            style = {
                "color": "black" if term == "loss" else COLORS[(losses.index(term) - 1) % len(COLORS)],
                "linestyle": "--" if name in bounds else "-",
                "marker": ".",
                "label": "loss (weighted sum)" if name == "loss" else name.replace("_", " "),
            }
            values = [epoch.get(name, np.nan) for epoch in self.history]
            (self.lines_[name],) = self.ax_.plot(epochs, values, **(style | line_kwargs))
        self.ax_.set(xlabel="Epoch", ylabel="Loss (solid), bound in nats (dashed)" if bounds else "Loss")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        self.ax_.spines[["top", "right"]].set_visible(False)
        _legend_beside(self.ax_)
        return self


class EmbeddingDisplay:
    """Embeddings in two dimensions, coloured by label.

    Parameters
    ----------
    coordinates : ndarray of shape (n, 2)
        Where to draw each image.
    y : array-like of shape (n,), default=None
        Classes, which get a legend, or continuous values, which get a colour bar.
    pictures : ndarray of shape (n, height, width, 3), default=None
        The images, for thumbnails, in [0, 1].
    axis_labels : tuple of str, default=("", "")
        Names of the two dimensions.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes of the plot.
    figure_ : matplotlib.figure.Figure
        Figure of the plot.
    thumbnails_ : list of int
        Which images have a thumbnail.
    """

    def __init__(
        self,
        coordinates: NDArray[Any],
        *,
        y: ArrayLike | None = None,
        pictures: NDArray[Any] | None = None,
        axis_labels: tuple[str, str] = ("", ""),
    ) -> None:
        self.coordinates = coordinates
        self.y = y
        self.pictures = pictures
        self.axis_labels = axis_labels

    @classmethod
    def from_estimator(
        cls,
        estimator: DIMTransformer,
        X: Any,
        y: ArrayLike | None = None,
        *,
        projection: Any = "pca",
        n_thumbnails: int = 0,
        random_state: int | np.random.RandomState | None = None,
        ax: Any = None,
        **scatter_kwargs: Any,
    ) -> Self:
        """Transform images, project them to two dimensions and plot them.

        Parameters
        ----------
        estimator : DIMTransformer or Pipeline
            Fitted.
        X : array-like
            Images, as for `DIMTransformer.transform`.
        y : array-like of shape (n,), default=None
            Classes or continuous values.
        projection : {"pca", "tsne"} or transformer, default="pca"
            What brings the embeddings to two dimensions, by its ``fit_transform``.
        n_thumbnails : int, default=0
            At most so many images are drawn at their points. There are fewer where points are close, because none is
            drawn over another; `thumbnails_` tells which there are.
        random_state : int, RandomState instance or None, default=None
            Of "tsne".
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        **scatter_kwargs
            Of ``Axes.scatter``.

        Returns
        -------
        EmbeddingDisplay
            The display.
        """
        _pyplot(f"{cls.__name__}.from_estimator")
        dim, (X,) = _transformer(cls, estimator, X)
        Z = _embed(dim, X)
        if y is not None:
            check_consistent_length(Z, y)
        axis_labels = ("", "")
        if isinstance(projection, str):
            if projection not in ("pca", "tsne"):
                raise ValueError(f"projection must be 'pca', 'tsne' or a transformer, got {projection!r}.")
            name = {"pca": "Principal component", "tsne": "t-SNE"}[projection]
            axis_labels = (f"{name} 1", f"{name} 2")
            perplexity = min(30.0, (len(Z) - 1) / 3)
            projection = PCA(2) if projection == "pca" else TSNE(2, perplexity=perplexity, random_state=random_state)
        coordinates = np.asarray(projection.fit_transform(Z))
        pictures = as_pictures(_images(dim, X)) if n_thumbnails else None
        display = cls(coordinates, y=y, pictures=pictures, axis_labels=axis_labels)
        return display.plot(n_thumbnails=n_thumbnails, ax=ax, **scatter_kwargs)

    def plot(self, *, n_thumbnails: int = 0, ax: Any = None, **scatter_kwargs: Any) -> Self:
        """Plot.

        Parameters
        ----------
        n_thumbnails : int, default=0
            At most so many images are drawn at their points. There are fewer where points are close, because none is
            drawn over another; `thumbnails_` tells which there are.
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        **scatter_kwargs
            Of ``Axes.scatter``.

        Returns
        -------
        EmbeddingDisplay
            The display.
        """
        if n_thumbnails < 0:
            raise ValueError(f"n_thumbnails must be at least 0, got {n_thumbnails}.")
        self.ax_, self.figure_ = _axes(self, ax)
        points = {"s": 14, "linewidths": 0} | scatter_kwargs
        x, y = np.asarray(self.coordinates).T
        frames = np.full(len(x), "black", dtype=object)
        if self.y is None:
            self.ax_.scatter(x, y, **({"color": COLORS[0]} | points))
        elif type_of_target(self.y) in ("binary", "multiclass"):
            labels = np.asarray(self.y)
            for i, label in enumerate(np.unique(labels)):
                is_it = labels == label
                frames[is_it] = color = COLORS[i % len(COLORS)]
                style = {"color": color, "marker": MARKERS[i // 5 % len(MARKERS)], "label": str(label)}
                self.ax_.scatter(x[is_it], y[is_it], **(style | points))
            _legend_beside(self.ax_)
        else:
            drawn = self.ax_.scatter(x, y, c=np.asarray(self.y), **({"cmap": "viridis"} | points))
            self.figure_.colorbar(drawn, ax=self.ax_, label="y")
        self.ax_.set(xlabel=self.axis_labels[0], ylabel=self.axis_labels[1], xticks=[], yticks=[])
        self.thumbnails_ = self._draw_thumbnails(n_thumbnails, frames)
        return self

    def _draw_thumbnails(self, n_thumbnails: int, frames: NDArray[Any]) -> list[int]:
        if not n_thumbnails:
            return []
        if self.pictures is None:
            raise ValueError("n_thumbnails needs pictures, which this display was made without.")
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        # Only once the layout is settled are distances on the page known.
        self.figure_.draw_without_rendering()
        page = self.ax_.transData.transform(self.coordinates) * 72 / self.figure_.dpi
        chosen: list[int] = []
        for i, place in enumerate(page):
            # The frame takes a quarter more.
            if len(chosen) < n_thumbnails and all(np.abs(page[j] - place).max() > 1.25 * THUMBNAIL for j in chosen):
                chosen.append(i)
                picture = self.pictures[i]
                image = OffsetImage(picture, zoom=THUMBNAIL / max(picture.shape[:2]), interpolation="nearest")
                frame = {"edgecolor": frames[i], "linewidth": 1.5}
                self.ax_.add_artist(AnnotationBbox(image, self.coordinates[i], pad=0.1, bboxprops=frame))
        return chosen


class NeighborsDisplay:
    """Query images and the images nearest to them in the embedding, nearest first.

    Parameters
    ----------
    queries : ndarray of shape (q, height, width, 3)
        The query images, in [0, 1].
    neighbors : ndarray of shape (q, k, height, width, 3)
        Their neighbours.
    indices : ndarray of shape (q, k)
        Which images the neighbours are.
    distances : ndarray of shape (q, k)
        Their distances in the embedding.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes of the plot.
    figure_ : matplotlib.figure.Figure
        Figure of the plot.
    """

    def __init__(
        self, queries: NDArray[Any], neighbors: NDArray[Any], indices: NDArray[Any], distances: NDArray[Any]
    ) -> None:
        self.queries = queries
        self.neighbors = neighbors
        self.indices = indices
        self.distances = distances

    @classmethod
    def from_estimator(
        cls,
        estimator: DIMTransformer,
        X_query: Any,
        X: Any,
        *,
        n_neighbors: int = 4,
        metric: str = "manhattan",
        ax: Any = None,
    ) -> Self:
        """Find and plot the nearest neighbours.

        Parameters
        ----------
        estimator : DIMTransformer or Pipeline
            Fitted.
        X_query : array-like of q images
            Images to find neighbours of. One that is in `X` too is its own nearest neighbour.
        X : array-like of images
            Among which to find them.
        n_neighbors : int, default=4
            Neighbours of each query.
        metric : str, default="manhattan"
            Distance of embeddings, as in `sklearn.neighbors.NearestNeighbors`; the default is the paper's.
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.

        Returns
        -------
        NeighborsDisplay
            The display.
        """
        _pyplot(f"{cls.__name__}.from_estimator")
        dim, (X_query, X) = _transformer(cls, estimator, X_query, X)
        search = NearestNeighbors(n_neighbors=n_neighbors, metric=metric).fit(_embed(dim, X))
        distances, indices = search.kneighbors(_embed(dim, X_query))
        # Together, so that they are scaled alike.
        found = pixel_values(_images(dim, X), indices.ravel())
        pictures = to_rgb(np.concatenate([pixel_values(_images(dim, X_query)), found]))
        queries, neighbors = np.split(pictures, [len(indices)])
        return cls(queries, neighbors.reshape(*indices.shape, *pictures.shape[1:]), indices, distances).plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Plot.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.

        Returns
        -------
        NeighborsDisplay
            The display.
        """
        tiles = np.concatenate([self.queries[:, None], self.neighbors], axis=1)
        self.ax_, self.figure_ = _axes(self, ax, _figure_size(tiles))
        canvas, (xs, _) = mosaic(tiles, first_column_apart=True)
        self.ax_.imshow(canvas, interpolation="nearest")
        names = ["Query", *(str(i + 1) for i in range(self.neighbors.shape[1]))]
        self.ax_.set_xticks(xs, names)
        self.ax_.set(yticks=[], title="Nearest neighbours in the embedding")
        _bare(self.ax_)
        return self


class ScoreMapDisplay:
    """Which locations of an image its embedding knows about.

    The local critic scores each location of an image against the image's embedding. The map shows by how much that
    exceeds the scores of other images' locations against the same embedding (the logarithm of the mean of their
    exponentials). With "infonce", "dv" and "jsd", this estimates in nats how much more probable the location is given
    the embedding, the pointwise mutual information.

    Parameters
    ----------
    pictures : ndarray of shape (n, height, width, 3)
        The images, in [0, 1].
    scores : ndarray of shape (n, h, w)
        Score of each location.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes of the plot.
    figure_ : matplotlib.figure.Figure
        Figure of the plot.
    colorbar_ : matplotlib.colorbar.Colorbar
        The scale of the scores.
    """

    def __init__(self, pictures: NDArray[Any], scores: NDArray[Any]) -> None:
        self.pictures = pictures
        self.scores = scores

    @classmethod
    def from_estimator(cls, estimator: DIMTransformer, X: Any, *, background: Any = None, ax: Any = None) -> Self:
        """Score the locations of images and plot them over the images.

        Parameters
        ----------
        estimator : DIMTransformer or Pipeline
            Fitted in this process with a `local_weight`: a loaded one has no critics.
        X : array-like of n images
            Images to show.
        background : array-like of images, default=None
            The other images; none of them should be in `X`. None takes the others of `X`.
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.

        Returns
        -------
        ScoreMapDisplay
            The display.

        Raises
        ------
        ValueError
            If there is no local critic, or no other image.
        """
        _pyplot(f"{cls.__name__}.from_estimator")
        dim, (X, background) = _transformer(cls, estimator, X, background)
        if "local" not in getattr(dim, "discriminators_", {}):
            raise ValueError(
                f"{cls.__name__} needs the local critic, discriminators_['local']: fit with a local_weight above 0 in "
                "this process; a loaded or copied estimator has no critics."
            )
        images = _images(dim, X)
        others = None if background is None else _images(dim, background)
        if others is None and len(images) < 2:
            raise ValueError("X has a single image: set background to the images to compare it with.")
        standardize = Standardizer(dim.mean_, dim.std_, dim.device_)
        scores = local_scores(dim.net_.module_, images, others, standardize)
        return cls(as_pictures(images), scores.numpy()).plot(ax=ax)

    def plot(self, *, ax: Any = None, alpha: float = 0.7, cmap: str = "viridis") -> Self:
        """Plot the images above their maps.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        alpha : float, default=0.7
            Opacity of the maps; under them is the image in grey.
        cmap : str, default="viridis"
            Colour map of the scores.

        Returns
        -------
        ScoreMapDisplay
            The display.
        """
        n_images, height, width, _ = self.pictures.shape
        grey = np.repeat(self.pictures.mean(axis=3, keepdims=True), 3, axis=3)
        tiles = np.stack([self.pictures, grey])
        self.ax_, self.figure_ = _axes(self, ax, _figure_size(tiles))
        canvas, (xs, ys) = mosaic(tiles)
        self.ax_.imshow(canvas, interpolation="nearest")
        # Each location covers its share of the image.
        rows, columns = (
            np.arange(side) * n // side for side, n in zip((height, width), self.scores.shape[1:], strict=True)
        )
        maps = np.stack([np.full((n_images, height, width), np.nan), self.scores[:, rows][:, :, columns]])
        drawn = self.ax_.imshow(
            mosaic(maps[..., None], fill=np.nan)[0][..., 0], cmap=cmap, alpha=alpha, interpolation="nearest"
        )
        # In axes of its own it is as high as the images.
        beside = self.ax_.inset_axes((1.01, 0, 0.015, 1))
        self.colorbar_ = self.figure_.colorbar(drawn, cax=beside, label="Score: high where\nit knows more")
        self.ax_.set_xticks(xs, [str(i) for i in range(n_images)])
        self.ax_.set_yticks(ys, ["Image", "Scores"])
        self.ax_.set_title("What the embedding knows about")
        _bare(self.ax_)
        return self


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
    def from_estimator(cls, estimator: DIMTransformer, *, ax: Any = None) -> Self:
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
        dim, _ = _transformer(cls, estimator)
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
        pictures = 0.5 + 0.5 * np.broadcast_to(values, (n_filters, height, width, 3)) / np.abs(values).max()
        n_columns = ceil(sqrt(n_filters))
        n_rows = ceil(n_filters / n_columns)
        tiles = np.ones((n_rows * n_columns, height, width, 3))
        tiles[:n_filters] = pictures
        tiles = tiles.reshape(n_rows, n_columns, height, width, 3)
        self.ax_, self.figure_ = _axes(self, ax)
        self.ax_.imshow(mosaic(tiles)[0], interpolation="nearest")
        title = f"First convolution: {n_filters} filters of {height} x {width}"
        if n_channels not in (1, 3):
            title += f"\nColours: principal components of the {n_channels} channels"
        self.ax_.set(xticks=[], yticks=[], title=title)
        _bare(self.ax_)
        return self


def _pyplot(caller: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} requires matplotlib. You can install matplotlib with `pip install matplotlib`"
        ) from error
    return plt


def _axes(display: object, ax: Any, figsize: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """Return axes to plot into and their figure."""
    plt = _pyplot(f"{type(display).__name__}.plot")
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    return ax, ax.figure


def _transformer(display: type, estimator: Any, *inputs: Any) -> tuple[DIMTransformer, list[Any]]:
    """Find a pipeline's transformer, and inputs, but for None, as it gets them."""
    steps = [] if not isinstance(estimator, Pipeline) else [step for _, step in estimator.steps]
    place = next((i for i, step in enumerate(steps) if isinstance(step, DIMTransformer)), 0)
    if place:
        before = estimator[:place]
        inputs = tuple(None if X is None else before.transform(X) for X in inputs)
    dim = steps[place] if steps else estimator
    if not isinstance(dim, DIMTransformer):
        raise TypeError(
            f"{display.__name__} needs a fitted DIMTransformer or a Pipeline with one, got a "
            f"{type(estimator).__name__}: pass the step that is a DIMTransformer, of a search "
            "search.best_estimator_['dim'] for instance."
        )
    check_is_fitted(dim)
    return dim, list(inputs)


def _legend_beside(ax: Any) -> None:
    n_columns = ceil(len(ax.get_legend_handles_labels()[1]) / LEGEND_ROWS)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        markerscale=2,
        ncols=n_columns,
        **({"fontsize": "small", "columnspacing": 1.0, "handletextpad": 0.2} if n_columns > 1 else {}),
    )


def _bare(ax: Any) -> None:
    """Leave names, but no lines, around images."""
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _embed(estimator: DIMTransformer, X: Any) -> NDArray[Any]:
    with config_context(array_api_dispatch=False):
        return np.asarray(estimator.transform(X))


def _images(estimator: DIMTransformer, X: Any) -> Images:
    return check_images(
        estimator, X, image_shape=estimator.image_shape_, data_format=estimator.data_format, reset=False
    )


def _figure_size(tiles: NDArray[Any]) -> tuple[float, float]:
    """About an inch a tile, within what a page holds."""
    n_rows, n_columns, height, width, _ = tiles.shape
    inch = min(1.0, 10 / n_columns)
    # Titles and labels need some height beside flat images.
    return n_columns * inch + 0.6, min(max(n_rows * inch * height / width, 1.0), 14) + 0.6
