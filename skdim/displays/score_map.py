"""What of an image its embedding knows."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skdim.batches import Standardizer
from skdim.displays.figures import figure_size, get_axes, import_pyplot, remove_lines, with_defaults
from skdim.inference import local_scores
from skdim.pictures import Pictures, mosaic
from skdim.subjects import find_transformer, images_of

__all__ = ["ScoreMapDisplay"]


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
    def from_estimator(
        cls, estimator: BaseEstimator, X: Any, *, background: Any = None, ax: Any = None, **image_kwargs: Any
    ) -> Self:
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
        **image_kwargs
            Of ``Axes.imshow``, for the maps.

        Returns
        -------
        ScoreMapDisplay
            The display.

        Raises
        ------
        ValueError
            If there is no local critic, or no other image.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        dim, (X, background) = find_transformer(estimator, X, background, name=cls.__name__)
        if "local" not in getattr(dim, "discriminators_", {}):
            raise ValueError(
                f"{cls.__name__} needs the local critic, discriminators_['local']: fit with a local_weight above 0 in "
                "this process; a loaded or copied estimator has no critics."
            )
        images = images_of(dim, X)
        others = None if background is None else images_of(dim, background)
        if others is None and len(images) < 2:
            raise ValueError("X has a single image: set background to the images to compare it with.")
        standardize = Standardizer(dim.mean_, dim.std_, dim.device_)
        scores = local_scores(dim.net_.module_, images, others, standardize)
        return cls(Pictures(images)[:], scores.numpy()).plot(ax=ax, **image_kwargs)

    def plot(self, *, ax: Any = None, **image_kwargs: Any) -> Self:
        """Plot the images above their maps.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to plot; None makes a figure.
        **image_kwargs
            Of ``Axes.imshow``, for the maps: "viridis" is the default of ``cmap``, and 0.7 that of ``alpha``, their
            opacity, because under them is the image in grey.

        Returns
        -------
        ScoreMapDisplay
            The display.
        """
        n_images, height, width, _ = self.pictures.shape
        grey = np.repeat(self.pictures.mean(axis=3, keepdims=True), 3, axis=3)
        tiles = np.stack([self.pictures, grey])
        canvas, (xs, ys) = mosaic(tiles)
        # Each location covers its share of the image.
        rows, columns = (
            np.arange(side) * n // side for side, n in zip((height, width), self.scores.shape[1:], strict=True)
        )
        maps = np.stack([np.full((n_images, height, width), np.nan), self.scores[:, rows][:, :, columns]])
        scores = mosaic(maps[..., None], fill=np.nan)[0][..., 0]
        self.ax_, self.figure_ = get_axes(self, ax, figure_size(tiles))
        from matplotlib.image import AxesImage

        self.ax_.imshow(canvas, interpolation="nearest")
        defaults = {"cmap": "viridis", "alpha": 0.7, "interpolation": "nearest"}
        drawn = self.ax_.imshow(scores, **with_defaults(AxesImage, defaults, image_kwargs))
        # In axes of its own it is as high as the images.
        beside = self.ax_.inset_axes((1.01, 0, 0.015, 1))
        # Signals are too flat for more.
        label = "Score: high where\nit knows more" if 4 * height > width else "Score"
        self.colorbar_ = self.figure_.colorbar(drawn, cax=beside, label=label)
        self.ax_.set_xticks(xs, [str(i) for i in range(n_images)])
        self.ax_.set_yticks(ys, ["Image", "Scores"])
        self.ax_.set_title("What the embedding knows about")
        remove_lines(self.ax_)
        return self
