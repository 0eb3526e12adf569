"""Where images lie in the embedding."""

from numbers import Integral, Number, Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.utils import check_consistent_length, check_scalar, column_or_1d
from sklearn.utils.multiclass import type_of_target

from skdim.displays.figures import COLORS, MARKERS, get_axes, import_pyplot, legend_beside, with_defaults
from skdim.pictures import Pictures
from skdim.subjects import check_number_of_labels, embed, find_transformer, images_of, is_missing

__all__ = ["EmbeddingDisplay"]

# Numbers without decimals that are read as classes; more are values.
MAX_CLASSES = 48

# What matplotlib takes of each point.
OF_POINTS = {"s", "c", "color", "facecolor", "edgecolor", "linewidth", "alpha"}

# Width of a thumbnail, in points.
THUMBNAIL = 22


class EmbeddingDisplay:
    """Embeddings in two dimensions, coloured by label.

    Parameters
    ----------
    coordinates : ndarray of shape (n, 2)
        Where to draw each image.
    y : array-like of shape (n,), default=None
        Classes, which get a legend, or continuous values, which get a colour bar, as more than 48 different whole
        numbers do. Images whose entry is None, NaN or NA are drawn in grey, below the others.
    pictures : array-like of shape (n, height, width, 3), default=None
        The images, for thumbnails, in [0, 1]. Those of `from_estimator` are made of its X as they are drawn.
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
        pictures: ArrayLike | Pictures | None = None,
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
            What brings the embeddings to two dimensions, by its ``fit_transform``. A transformer is cloned.
        n_thumbnails : int, default=0
            At most so many images are drawn at their points. There are fewer where points are close, because none is
            drawn over another; `thumbnails_` tells which there are.
        random_state : int, RandomState instance or None, default=None
            Of the projections that have a name.
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
            If there is no such projection, it does not give two columns, the embeddings have a single dimension, there
            is a single image, or `y` is unfit.
        TypeError
            If `projection` has no ``fit_transform``, or `n_thumbnails` is no integer.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        is_name = isinstance(projection, str)
        is_transformer = hasattr(projection, "fit_transform") and not isinstance(projection, type)
        if not (projection in ("pca", "tsne") if is_name else is_transformer):
            message = f"projection must be 'pca', 'tsne' or a transformer with fit_transform, got {projection!r}."
            raise ValueError(message) if is_name else TypeError(message)
        _check_n_thumbnails(n_thumbnails)
        if y is not None:
            check_number_of_labels(X, column_or_1d(np.asarray(y)))
        dim, (X,) = find_transformer(estimator, X, name=cls.__name__)
        Z = embed(dim, X)
        y = _checked_labels(y, Z)
        axis_labels = ("", "")
        if is_name:
            if len(Z) < 2:
                raise ValueError(
                    f"Found array with {len(Z)} sample(s) while a minimum of 2 is required by {cls.__name__}."
                )
            if Z.shape[1] < 2:
                raise ValueError(f"{cls.__name__} needs embeddings of two dimensions at least, got n_components=1.")
            name = {"pca": "Principal component", "tsne": "t-SNE"}[projection]
            axis_labels = (f"{name} 1", f"{name} 2")
            perplexity = min(30.0, (len(Z) - 1) / 3)
            projection = PCA(2) if projection == "pca" else TSNE(2, perplexity=perplexity)
            projection.set_params(random_state=random_state)
        else:
            # One that is no estimator of scikit-learn's kind is copied.
            projection = clone(projection, safe=False)
        coordinates = np.asarray(projection.fit_transform(Z))
        if coordinates.shape != (len(Z), 2):
            raise ValueError(f"projection must give two columns, got an array of shape {coordinates.shape}.")
        pictures = Pictures(images_of(dim, X)) if n_thumbnails else None
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

        Raises
        ------
        ValueError
            If coordinates, `y` or `n_thumbnails` are unfit, or there are no pictures for thumbnails.
        TypeError
            If `n_thumbnails` is no integer.
        """
        _check_n_thumbnails(n_thumbnails)
        if n_thumbnails and self.pictures is None:
            raise ValueError("n_thumbnails needs pictures, which this display was made without.")
        coordinates = np.asarray(self.coordinates)
        if coordinates.ndim != 2 or coordinates.shape[1] != 2:
            raise ValueError(f"coordinates must be of shape (n, 2), got {coordinates.shape}.")
        labels = _checked_labels(self.y, coordinates)
        self.ax_, self.figure_ = get_axes(self, ax)
        n_images = len(coordinates)
        chosen, each_image = _styles(scatter_kwargs, n_images)

        def scatter(shown: NDArray[np.intp], **defaults: Any) -> Any:
            if "c" in scatter_kwargs:
                defaults.pop("color", None)
            style = {"s": 14, "linewidth": 0} | defaults | chosen
            style |= {name: _of_images(values, shown) for name, values in each_image.items()}
            return self.ax_.scatter(*coordinates[shown].T, **style)

        frames = np.full(n_images, "black", dtype=object)
        classes: list[Any] = []
        names: list[str] = []
        known = np.arange(n_images) if labels is None else np.flatnonzero(~_are_missing(labels))
        if len(known) < n_images:
            # Below the others, which come after them.
            missing = np.setdiff1d(np.arange(n_images), known)
            frames[missing] = "lightgrey"
            classes.append(scatter(missing, color="lightgrey", label="no label"))
            names.append("no label")
        labels = None if labels is None else _of_one_type(labels[known])
        if labels is None:
            scatter(known, color=COLORS[0])
        elif not len(labels):
            legend_beside(self.ax_, classes, names)
        elif _are_classes(labels):
            for i, label in enumerate(np.unique(labels)):
                shown = known[labels == label]
                frames[shown] = color = COLORS[i % len(COLORS)]
                # Each five classes have another one, shifted each time that colours and markers have come round.
                turn = i // 5
                marker = MARKERS[(turn + turn // len(MARKERS)) % len(MARKERS)]
                classes.append(scatter(shown, color=color, marker=marker, label=str(label)))
                # An empty text is shown as Python shows it.
                names.append(str(label) or repr(""))
            legend_beside(self.ax_, classes, names)
        elif {"c", "color"} & (chosen.keys() | each_image.keys()):
            scatter(known)
        else:
            drawn = scatter(known, c=labels, cmap="viridis")
            self.figure_.colorbar(drawn, ax=self.ax_, label="y")
        self.ax_.set(xlabel=self.axis_labels[0], ylabel=self.axis_labels[1], xticks=[], yticks=[])
        self.thumbnails_ = self._draw_thumbnails(n_thumbnails, frames)
        return self

    def _draw_thumbnails(self, n_thumbnails: int, frames: NDArray[Any]) -> list[int]:
        if not n_thumbnails or self.pictures is None:
            return []
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        chosen = self._choose_thumbnails(n_thumbnails)
        if not chosen:
            return []
        pictures = self.pictures if isinstance(self.pictures, Pictures) else np.asarray(self.pictures)
        coordinates = np.asarray(self.coordinates)
        for i, picture in zip(chosen, pictures[np.array(chosen)], strict=True):
            image = OffsetImage(picture, zoom=THUMBNAIL / max(picture.shape[:2]), interpolation="nearest")
            frame = {"edgecolor": frames[i], "linewidth": 1.5}
            self.ax_.add_artist(AnnotationBbox(image, coordinates[i], pad=0.1, bboxprops=frame))
        return chosen

    def _choose_thumbnails(self, n_thumbnails: int) -> list[int]:
        # Only once the layout is settled are distances on the page known.
        self.figure_.canvas.figure.draw_without_rendering()
        page = self.ax_.transData.transform(np.asarray(self.coordinates)) * 72 / self.figure_.dpi
        chosen: list[int] = []
        # In an order of chance, because the first images are often of one class.
        for i in np.random.RandomState(0).permutation(len(page)).tolist():
            # The frame takes a quarter more.
            if len(chosen) < n_thumbnails and all(np.abs(page[j] - page[i]).max() > 1.25 * THUMBNAIL for j in chosen):
                chosen.append(i)
        return chosen


def _styles(scatter_kwargs: dict[str, Any], n_images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what a user has chosen for all points, by matplotlib's first names, from what has an entry an image."""
    from matplotlib.collections import PathCollection

    chosen, each_image = with_defaults(PathCollection, {}, scatter_kwargs), {}
    for name in OF_POINTS & chosen.keys():
        value = chosen[name]
        # A tuple is one colour.
        if (isinstance(value, list) or getattr(value, "ndim", 0) > 0) and len(value) == n_images:
            each_image[name] = chosen.pop(name)
    colors = each_image.get("c", [])
    if "norm" not in chosen and all(isinstance(color, Real) for color in colors) and np.isfinite(colors).any():
        # One scale for all classes, which are drawn one after another.
        chosen = {"vmin": np.nanmin(colors), "vmax": np.nanmax(colors)} | chosen
    return chosen, each_image


def _of_images(values: Any, shown: NDArray[np.intp]) -> Any:
    """Pick the entries of some images from a list or an array of any kind."""
    return [values[i] for i in shown] if isinstance(values, list) else np.asarray(values)[shown]


def _check_n_thumbnails(n_thumbnails: int) -> None:
    check_scalar(n_thumbnails, "n_thumbnails", Integral, min_val=0)


def _checked_labels(y: ArrayLike | None, coordinates: NDArray[Any]) -> NDArray[Any] | None:
    if y is None:
        return None
    labels: NDArray[Any] = column_or_1d(np.asarray(y))
    check_consistent_length(coordinates, labels)
    return labels


def _are_missing(labels: NDArray[Any]) -> NDArray[np.bool_]:
    return np.array([is_missing(label) for label in labels.tolist()], dtype=bool)


def _of_one_type(labels: NDArray[Any]) -> NDArray[Any]:
    """Bring labels that a gap among them has made objects back to numbers or texts."""
    are_plain = labels.dtype == object and all(isinstance(label, str | Number | np.generic) for label in labels)
    return np.array(labels.tolist()) if are_plain else labels


def _are_classes(labels: NDArray[Any]) -> bool:
    """Tell classes, which a legend lists, from values, and from numbers too many for a legend."""
    is_listed = labels.dtype.kind not in "iuf" or len(np.unique(labels)) <= MAX_CLASSES
    return is_listed and type_of_target(labels) in ("binary", "multiclass")
