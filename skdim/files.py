"""Reading image files and Pillow images into one array."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["is_image_files", "read_images"]

CHANNELS = {"RGB": 3, "RGBA": 4}
GREY_MODES = {"1", "L", "LA", "La"}
# Grey of more than 8 bits: 16-bit and 32-bit integers and floats.
DEEP_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
# Of the EXIF standard: how a camera was held. From 5 on the sides are swapped.
ORIENTATION_TAG = 0x0112


def is_image_files(X: Any) -> bool:
    """Tell whether something is a non-empty sequence of paths and Pillow images."""
    if not isinstance(X, list | tuple) and len(getattr(X, "shape", ())) != 1:
        return False
    return len(X) > 0 and all(isinstance(entry, str | os.PathLike) or _is_pillow_image(entry) for entry in X)


def read_images(files: Sequence[Any], *, size: tuple[int, int] | None = None, mode: str | None = None) -> NDArray[Any]:
    """Read image files into one array. Needs Pillow.

    Turned as the camera says (EXIF). Colour palettes are resolved. Without `mode`, files that are all grey give grey
    images and others colour ones, without transparency.

    Parameters
    ----------
    files : sequence of str, path-like or PIL.Image.Image
        At least one. All formats that Pillow reads; of an animation or a stack, the first image.
    size : tuple of int, default=None
        Height and width to scale all images to, whatever their proportions. With None, all must have one size.
    mode : {"L", "RGB", "RGBA"}, default=None
        Grey, colours, or colours and opacity.

    Returns
    -------
    ndarray of shape (n, height, width) or (n, height, width, channels)
        Pixels, uint8, and without channels where grey. Grey images of more than 8 bits become float32 with their
        values as they are.

    Raises
    ------
    ImportError
        If Pillow is not installed.
    OSError
        If a file cannot be read; FileNotFoundError if there is none. The message names the file and its index.
    ValueError
        If sizes differ, or some images are grey of more than 8 bits and others, or `mode`, are not.

    Examples
    --------
    >>> from pathlib import Path
    >>> from skdim.files import read_images
    >>> X = read_images(sorted(Path("photos").glob("*.jpg")), size=(64, 64))  # doctest: +SKIP
    """
    if mode not in (None, "L", "RGB", "RGBA"):
        raise ValueError(f"mode must be 'L', 'RGB', 'RGBA' or None, got {mode!r}.")
    if len(files) == 0:
        raise ValueError("files must name at least one image, got none.")
    # Headers first: what does not fit together is found before the long work.
    sizes, kinds = zip(*(_read_header(index, file) for index, file in enumerate(files)), strict=True)
    height, width = size or _common_size(files, sizes)
    kind = _common_kind(files, kinds, mode)
    shape = (len(files), height, width) + ((CHANNELS[kind],) if kind in CHANNELS else ())
    images = np.empty(shape, dtype=np.float32 if kind == "deep" else np.uint8)
    for index, file in enumerate(files):
        with _opened(index, file) as image:
            images[index] = _pixels(image, kind, (width, height))
    return images


def _is_pillow_image(entry: Any) -> bool:
    # Whoever has a Pillow image has imported Pillow.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(entry, pillow.Image)


@contextmanager
def _opened(index: int, file: Any) -> Iterator[Any]:
    """Open one image; whatever goes wrong with it names it."""
    if _is_pillow_image(file):
        yield file
        return
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading image files requires Pillow. You can install Pillow with `pip install pillow`"
        ) from error
    try:
        with Image.open(file) as image:
            yield image
    # A broken file may raise anything in Pillow's decoders.
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"Image {index}, {os.fspath(file)!r}, cannot be read: {error}") from error


def _read_header(index: int, file: Any) -> tuple[tuple[int, int], str]:
    """Height and width, and "L", "RGB" or "deep", of an image."""
    with _opened(index, file) as image:
        height, width = image.height, image.width
        if image.getexif().get(ORIENTATION_TAG, 1) >= 5:
            height, width = width, height
        return (height, width), "L" if image.mode in GREY_MODES else "deep" if image.mode in DEEP_MODES else "RGB"


def _common_size(files: Sequence[Any], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"All images must have the same size: image 0, {files[0]!r}, has {sizes[0]} (height, width), image "
                f"{index}, {files[index]!r}, has {size}. Read them with skdim.files.read_images(files, size=...)."
            )
    return sizes[0]


def _common_kind(files: Sequence[Any], kinds: tuple[str, ...], mode: str | None) -> str:
    if "deep" not in kinds:
        return mode or ("RGB" if "RGB" in kinds else "L")
    deep = kinds.index("deep")
    if mode is not None:
        raise ValueError(f"Image {deep}, {files[deep]!r}, is grey of more than 8 bits: mode={mode!r} cannot hold it.")
    for index, kind in enumerate(kinds):
        if kind != "deep":
            raise ValueError(
                f"Images of 8 bits and grey images of more cannot be mixed: image {index}, {files[index]!r}, has 8 "
                f"bits, image {deep}, {files[deep]!r}, more."
            )
    return "deep"


def _pixels(image: Any, kind: str, size: tuple[int, int]) -> NDArray[Any]:
    from PIL import Image, ImageOps

    if image.getexif().get(ORIENTATION_TAG, 1) > 1:
        image = ImageOps.exif_transpose(image)
    if kind == "deep":
        # Through float, because Pillow does not scale all of these modes.
        image = Image.fromarray(np.asarray(image, dtype=np.float32))
    elif image.mode != kind:
        image = image.convert(kind)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC if kind != "deep" else Image.Resampling.BILINEAR)
    return np.asarray(image)
