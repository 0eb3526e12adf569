"""Which axes of an array are channels, height and width."""

from math import isqrt, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skdim.notices import warn

ImageShape = tuple[int, int, int]

# Images eight times as long as they are high are rare, and of sensors more channels than these.
MOST_SIGNALS = 16

__all__ = [
    "ImageShape",
    "check_image_shape",
    "guess_shape",
    "infer_layout",
    "refuse_one_image",
    "warn_of_channels_last",
    "warn_of_grey",
]


def check_image_shape(image_shape: Any) -> ImageShape:
    """Check the parameter `image_shape`: three positive integers."""
    if len(image_shape) != 3 or not all(isinstance(side, int | np.integer) and side > 0 for side in image_shape):
        raise ValueError(
            "image_shape must be three positive integers (channels, height, width), (1, 1, p) for signals of p values, "
            f"or None, got {image_shape!r}."
        )
    channels, height, width = (int(side) for side in image_shape)
    return channels, height, width


def guess_shape(rows: Any) -> ImageShape:
    """Guess what flat rows, of shape (n, p), are: grey square images where the width allows, else signals."""
    n_features = rows.shape[1]
    side = _side(n_features, 1)
    is_square = side >= 4
    shape = (1, side, side) if is_square else (1, 1, n_features)
    # A million values are enough to tell.
    some = rows[: min(64, 1 + (1 << 20) // n_features)]
    likely = _likely_shape(some)
    if likely is None and not is_square and (side := _side(n_features, 3)) >= 8:
        # Colour images are common enough for their width to tell.
        likely = (3, side, side)
    if likely is not None:
        what = "grey images" if is_square else "signals"
        warn(
            f"X has {n_features} features, which are read as {what} of {' x '.join(map(str, shape[is_square:]))}, "
            f"but look like images of {likely[0]} channels of {likely[1]} x {likely[2]}. Set image_shape={likely} if "
            f"they are, or image_shape={shape} to silence this warning."
        )
    elif not is_square and max(_side(n_features - 1, n) for n in (1, 3)) >= 8 and _has_labels_at_an_end(some):
        warn(
            f"X has {n_features} features, one more than an image has, and is read as signals: leave out the column if "
            f"the first or the last is one of labels or an index, or set image_shape={shape} to silence this warning."
        )
    return shape


def _side(n_features: int, n_channels: int) -> int:
    """Return the side of the square images that have so many values, or 0 if none have."""
    side = isqrt(n_features // n_channels)
    return side if n_channels * side**2 == n_features else 0


def _likely_shape(rows: NDArray[np.uint8 | np.float32]) -> ImageShape | None:
    """Tell rows of square images of several channels by what is alike in them.

    A width of the image further on is the next pixel below, which is more alike than what is a part of the width away;
    of signals only those repeat so whose period is the width. A wrong width has no such minimum.
    """
    n_features = rows.shape[1]
    values = rows.astype(np.float64)

    def difference(lag: int) -> float:
        # All the way round, so that no place counts more than another.
        return float(np.abs(values - np.roll(values, lag, axis=1)).mean())

    likely = {}
    for side in range(8, isqrt(n_features // 2) + 1):
        if n_features % (side * side) == 0:
            below = difference(side)
            beside = min(map(difference, range(side // 4, 3 * side // 4 + 1, max(1, side // 8))))
            # Around 0.4 for photographs, 1 for noise and more for signals.
            if below < 0.75 * beside:
                likely[n_features // side**2, side, side] = below / beside
    return min(likely, key=lambda shape: likely[shape]) if likely else None


def _has_labels_at_an_end(rows: NDArray[np.uint8 | np.float32]) -> bool:
    """Tell a first or last column of the numbers of classes, or of one number after another, from pixels."""
    for column in (rows[:, 0].astype(np.float64), rows[:, -1].astype(np.float64)):
        values = np.unique(column)
        is_index = bool((np.diff(column) == 1).all())
        are_classes = len(values) <= 16 and values[0] in (0, 1) and bool((np.diff(values) == 1).all())
        if len(values) > 1 and (is_index or are_classes):
            return True
    return False


def warn_of_channels_last(image_shape: ImageShape) -> None:
    """Say how a shape is read that looks like height, width and channels."""
    channels, height, width = image_shape
    if width < min(channels, height) and (width > 1 or channels == height):
        warn(
            f"image_shape={image_shape} is read as (C, H, W), images of {channels} channels of {height} x {width}. For "
            f"rows of (H, W, C) images set image_shape=({width}, {channels}, {height}) and "
            "data_format='channels_last'; data_format='channels_first' silences this warning."
        )


def warn_of_grey(array_shape: tuple[int, ...]) -> None:
    """Say that a 3-D array is read as grey images where it looks like something else."""
    n, height, width = array_shape
    short, long = sorted((height, width))
    what = how = ""
    if n <= 4 and short >= 8:
        what, how = f"is one image of {n} channels", f"pass several, (n, {n}, {height}, {width})"
    elif 1 < short <= MOST_SIGNALS and long >= 8 * short:
        what, how = f"has signals of {short} channels", f"set image_shape=({short}, 1, {long})"
        if width == short:
            how += " and data_format='channels_last'"
    if what:
        warn(
            f"X of shape {array_shape} is read as {n} grey images of {height} x {width}. If it {what}, {how}; "
            f"image_shape=(1, {height}, {width}) silences this warning."
        )


def refuse_one_image(array_shape: tuple[int, ...], image_shape: ImageShape, name: str) -> None:
    """Tell a grey image, or a signal of several channels, that has no axis for the number of images from rows."""
    channels, height, width = image_shape
    forms = [(height, width)] if channels == 1 else [(channels, width), (width, channels)] if height == 1 else []
    if array_shape in forms and array_shape[1] != prod(image_shape):
        raise ValueError(
            f"X of shape {array_shape} has rows of {array_shape[1]} values, but {name} is expecting images of shape "
            f"{image_shape}; if X is one image, pass X[None]."
        )


def infer_layout(
    array_shape: tuple[int, ...], image_shape: ImageShape | None, data_format: str, name: str
) -> tuple[ImageShape, bool]:
    """Find the image shape of a 3-D or 4-D array and whether its channels come last."""
    if len(array_shape) == 3:
        height, width = array_shape[1:]
        candidates: dict[ImageShape, bool] = {(1, height, width): False}
        if image_shape is not None and image_shape[1] == 1:
            is_last = data_format == "channels_last"
            candidates[(width, 1, height) if is_last else (height, 1, width)] = is_last
    else:
        a, b, c = array_shape[1:]
        candidates = {}
        if data_format != "channels_last":
            candidates[(a, b, c)] = False
        if data_format != "channels_first":
            candidates.setdefault((c, a, b), True)
    if image_shape is not None and image_shape not in candidates:
        found = " or ".join(str(shape) for shape in candidates)
        channels, height, width = image_shape
        hint = ""
        if array_shape in (image_shape, (height, width, channels)):
            hint = "; if X is one image, pass X[None]"
        elif height == 1 and array_shape[1:] == (width, channels):
            hint = "; signals with their channels last need data_format='channels_last'"
        elif height == 1 and array_shape[1:] == (channels, width):
            hint = "; signals with their channels first need data_format='channels_first'"
        raise ValueError(
            f"X of shape {array_shape} has images of shape {found} (channels, height, width), but {name} is expecting "
            f"images of shape {image_shape}{hint}."
        )
    if len(array_shape) == 4 and data_format == "auto":
        # A cube has the same image shape either way. Else the channels are the axis shorter than both others, by half
        # where those are not the sides of a square, and 1 x 1 x p is a signal.
        channels_first = (a < min(b, c) and (b == c or 2 * a <= min(b, c))) or (a == b == 1 and c > 1)
        channels_last = c < min(a, b) and (a == b or 2 * c <= min(a, b))
        if (a == b == c > 1) or (image_shape is None and channels_first == channels_last):
            raise ValueError(
                f"The layout of X with shape {array_shape} is ambiguous: set data_format to 'channels_first' or "
                "'channels_last' (and image_shape to the channels, height and width, where they are known)."
            )
        if image_shape is None:
            return ((c, a, b), True) if channels_last else ((a, b, c), False)
    if image_shape is None:
        return next(iter(candidates.items()))
    return image_shape, candidates[image_shape]
