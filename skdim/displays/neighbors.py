"""Which images are near each other."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.neighbors import NearestNeighbors

from skdim.displays.figures import figure_size, get_axes, import_pyplot, remove_lines
from skdim.pictures import mosaic, pixel_values, to_rgb
from skdim.subjects import embed, find_transformer, images_of

__all__ = ["NeighborsDisplay"]


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
        estimator: BaseEstimator,
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
        import_pyplot(f"{cls.__name__}.from_estimator")
        dim, (X_query, X) = find_transformer(estimator, X_query, X, name=cls.__name__)
        images, query_images = images_of(dim, X), images_of(dim, X_query)
        search = NearestNeighbors(n_neighbors=n_neighbors, metric=metric)
        # Of one point, so that parameters are refused before images are embedded.
        search.fit(np.zeros((1, dim._n_features_out)))
        if n_neighbors > len(images):
            raise ValueError(
                f"n_neighbors must be at most the number of images in X, {len(images)}, got {n_neighbors}."
            )
        distances, indices = search.fit(embed(dim, X)).kneighbors(embed(dim, X_query))
        # Together, so that they are scaled alike.
        found = pixel_values(images, indices.ravel())
        pictures = to_rgb(np.concatenate([pixel_values(query_images, slice(None)), found]))
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
        self.ax_, self.figure_ = get_axes(self, ax, figure_size(tiles))
        canvas, (xs, _) = mosaic(tiles, first_column_apart=True)
        self.ax_.imshow(canvas, interpolation="nearest")
        names = ["Query", *(str(i + 1) for i in range(self.neighbors.shape[1]))]
        self.ax_.set_xticks(xs, names)
        self.ax_.set(yticks=[], title="Nearest neighbours in the embedding")
        remove_lines(self.ax_)
        return self
