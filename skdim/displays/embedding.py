"""Where images lie in the embedding."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.utils import check_consistent_length
from sklearn.utils.multiclass import type_of_target

from skdim.displays.figures import COLORS, MARKERS, get_axes, import_pyplot, legend_beside, with_defaults
from skdim.pictures import as_pictures
from skdim.subjects import embed, find_transformer, images_of

__all__ = ["EmbeddingDisplay"]

# Integers that are read as classes; more are values.
MAX_CLASSES = 48

# Width of a thumbnail, in points.
THUMBNAIL = 22


class EmbeddingDisplay:
    """Embeddings in two dimensions, coloured by label.

    Parameters
    ----------
    coordinates : ndarray of shape (n, 2)
        Where to draw each image.
    y : array-like of shape (n,), default=None
        Classes, which get a legend, or continuous values, which get a colour bar, as more than 48 different integers
        do.
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
        estimator: BaseEstimator,
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

        Raises
        ------
        ValueError
            If there is no such projection, or the embeddings have a single dimension.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        dim, (X,) = find_transformer(estimator, X, name=cls.__name__)
        Z = embed(dim, X)
        if y is not None:
            check_consistent_length(Z, y)
        axis_labels = ("", "")
        if isinstance(projection, str):
            if projection not in ("pca", "tsne"):
                raise ValueError(f"projection must be 'pca', 'tsne' or a transformer, got {projection!r}.")
            if Z.shape[1] < 2:
                raise ValueError(f"{cls.__name__} needs embeddings of two dimensions at least, got n_components=1.")
            name = {"pca": "Principal component", "tsne": "t-SNE"}[projection]
            axis_labels = (f"{name} 1", f"{name} 2")
            perplexity = min(30.0, (len(Z) - 1) / 3)
            projection = PCA(2) if projection == "pca" else TSNE(2, perplexity=perplexity, random_state=random_state)
        coordinates = np.asarray(projection.fit_transform(Z))
        pictures = as_pictures(images_of(dim, X)) if n_thumbnails else None
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
        self.ax_, self.figure_ = get_axes(self, ax)
        from matplotlib.collections import PathCollection

        def scatter(x: Any, y: Any, **defaults: Any) -> Any:
            if "c" in scatter_kwargs:
                defaults.pop("color", None)
            style = with_defaults(PathCollection, {"s": 14, "linewidth": 0} | defaults, scatter_kwargs)
            return self.ax_.scatter(x, y, **style)

        x, y = np.asarray(self.coordinates).T
        frames = np.full(len(x), "black", dtype=object)
        if self.y is None:
            scatter(x, y, color=COLORS[0])
        elif _are_classes(self.y):
            labels = np.asarray(self.y)
            for i, label in enumerate(np.unique(labels)):
                is_it = labels == label
                frames[is_it] = color = COLORS[i % len(COLORS)]
                marker = MARKERS[i // 5 % len(MARKERS)]
                scatter(x[is_it], y[is_it], color=color, marker=marker, label=str(label))
            legend_beside(self.ax_)
        elif {"c", "color"} & scatter_kwargs.keys():
            scatter(x, y)
        else:
            drawn = scatter(x, y, c=np.asarray(self.y), cmap="viridis")
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
        self.figure_.canvas.figure.draw_without_rendering()
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


def _are_classes(y: ArrayLike) -> bool:
    """Tell classes, which a legend lists, from values, and from numbers too many for a legend."""
    labels = np.asarray(y)
    is_listed = labels.dtype.kind not in "iu" or len(np.unique(labels)) <= MAX_CLASSES
    return is_listed and type_of_target(y) in ("binary", "multiclass")
