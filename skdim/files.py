"""Reading image files and Pillow images into one array, in memory or in a file."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.lib import format as npy
from numpy.typing import NDArray

from skdim.atomic import replaced_atomically
from skdim.notices import warn

__all__ = ["is_image_files", "is_pillow_image", "picture_as_array", "read_images"]

CHANNELS = {"RGB": 3, "RGBA": 4}
GREY_MODES = {"1", "L", "LA", "La"}
# Grey of more than 8 bits: 16-bit and 32-bit integers and floats.
DEEP_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
# Of the files that make up a folder of images.
SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Images that are decoded before they are written to a cache.
BLOCK = 256
# Ends a cache, before the digest of what it was made of.
CACHE_MARK = b"skdim images "
# Of the EXIF standard: how a camera was held. From 5 to 8, the last there is, the sides are swapped.
ORIENTATION_TAG = 0x0112
# Of TIFF: bits of each sample, samples of a pixel, whether they lie in a plane each, what the last ones are beyond
# colours, and of which kind of number.
BITS_TAG, SAMPLES_TAG, PLANES_TAG, EXTRA_TAG, KIND_TAG = 258, 277, 284, 338, 339
UNSIGNED, SIGNED = 1, 2
TIFF_HINT = (
    "For TIFFs that Pillow does not read whole make the array yourself: "
    "np.stack([tifffile.imread(path) for path in paths])."
)


def is_image_files(X: Any) -> bool:
    """Tell whether something is a non-empty sequence of paths and Pillow images."""
    if not isinstance(X, list | tuple) and len(getattr(X, "shape", ())) != 1:
        return False
    return len(X) > 0 and all(isinstance(entry, str | os.PathLike) or is_pillow_image(entry) for entry in X)


def read_images(
    files: Any,
    *,
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    n_jobs: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> NDArray[Any]:
    """Read image files into one array. Needs Pillow.

    Turned as the camera says (EXIF). Colour palettes are resolved. Without `mode`, files that are all grey give grey
    images and others colour ones, without transparency.

    Parameters
    ----------
    files : str or path-like, or sequence of str, path-like or PIL.Image.Image
        At least one image, of any format that Pillow reads by itself, so no PostScript; of an animation or a stack of
        pages only the first, or the one to which a Pillow image was brought by its ``seek``. A folder stands for the
        image files in it and in the folders in it, in the order of their paths, but for hidden ones; these are files
        whose names end in ".jpg", ".png", ".tif" and the like.
    size : tuple of int, default=None
        Height and width to scale all images to, whatever their proportions. With None, all must have one size.
    mode : {"L", "RGB", "RGBA"}, default=None
        Grey, colours, or colours and opacity.
    n_jobs : int, default=None
        Threads that read; -1 is one for each processor. None is one, unless joblib is configured otherwise.
    cache : str or path-like, default=None
        File in which the pixels are kept, as ".npy"; the array is then mapped from it, read-only, and takes no memory.
        One that was made of the same files, of the same sizes and times of change, with the same options is not made
        again; any other that this function wrote is replaced.

    Returns
    -------
    ndarray of shape (n, height, width) or (n, height, width, channels)
        Pixels, uint8, and without channels where grey. Grey images of more than 8 bits become float32 with their
        values as they are, but for those of PGM files, which Pillow stretches to 65535, and of PNG files with opacity,
        which it cuts to 8 bits.

    Raises
    ------
    ImportError
        If Pillow is not installed.
    OSError
        If a file cannot be read; FileNotFoundError if there is none. The message names the file and its index. If the
        cache cannot be written.
    TypeError
        If an entry is neither a path nor a Pillow image.
    ValueError
        If there are no images, sizes differ, or some images are grey of more than 8 bits and others, or `mode`, are
        not; if `size` or `mode` is none of its kind; if there is a file at `cache` that this function did not write, or
        a Pillow image is to go there.

    Warns
    -----
    UserWarning
        If files have more pages or frames than the first. To have all as images of their own, read them with Pillow:
        ``[page.copy() for page in PIL.ImageSequence.Iterator(image)]``; pages that are channels belong into one array
        of shape (n, C, H, W). The preview that a telephone's photo holds is no such page. If of a TIFF colours of more
        than 8 bits are cut, or channels left out.

    Examples
    --------
    >>> from pathlib import Path
    >>> from skdim.files import read_images
    >>> X = read_images(sorted(Path("photos").glob("*.jpg")), size=(64, 64))  # doctest: +SKIP
    >>> X = read_images("photos", size=(64, 64), n_jobs=-1, cache="photos.npy")  # doctest: +SKIP
    """
    if mode not in (None, "L", "RGB", "RGBA"):
        raise ValueError(f"mode must be 'L', 'RGB', 'RGBA' or None, got {mode!r}.")
    if size is not None and not _is_size(size):
        raise ValueError(f"size must be two positive integers (height, width) or None, got {size!r}.")
    if isinstance(files, str | os.PathLike):
        files = _files_in(Path(files))
    if hasattr(files, "columns"):
        raise TypeError("files must be a folder or a sequence of images, got a table: pass its column of paths.")
    # By position, which in a pandas Series is not the index.
    files = list(files)
    if len(files) == 0:
        raise ValueError(
            "files must name at least one image, got none: if a pattern made the list, no file matches it."
        )
    for index, file in enumerate(files):
        if not isinstance(file, str | os.PathLike) and not is_pillow_image(file):
            raise TypeError(f"files must be paths or Pillow images, got {file!r:.80} as image {index}.")
    n_times = Counter(map(id, files))
    if any(n_times[id(file)] > 1 and is_pillow_image(file) and _count_frames(file) > 1 for file in files):
        raise ValueError(
            "files has one Pillow image of several pages more than once, each time the page it has come to: pass "
            "copies, [page.copy() for page in PIL.ImageSequence.Iterator(image)]."
        )
    if cache is None:
        shape, dtype, fill = _prepare(files, size, mode, n_jobs)
        images = np.empty(shape, dtype)
        fill(images, 0)
        return images
    path = Path(cache)
    # Absolute, because the folder this process works in may be another one next time.
    end = CACHE_MARK + _digest(files, size, mode)
    if not _is_cache(path, end):
        shape, dtype, fill = _prepare(files, size, mode, n_jobs)
        with replaced_atomically(path) as file:
            npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
            for start in range(0, len(files), BLOCK):
                block = np.empty((min(BLOCK, len(files) - start), *shape[1:]), dtype)
                fill(block, start)
                file.write(block.data)
            # Behind the values, where no reader of such files looks: one file cannot contradict itself.
            file.write(end)
    return np.load(path, mmap_mode="r")


def _prepare(
    files: Sequence[Any], size: tuple[int, int] | None, mode: str | None, n_jobs: int | None
) -> tuple[tuple[int, ...], np.dtype[Any], Callable[[NDArray[Any], int], None]]:
    """Find shape and dtype of the array, and a function that fills part of it, from an image on."""
    parallel = Parallel(n_jobs=n_jobs, require="sharedmem")
    # Headers first: what does not fit together is found before the long work.
    headers = parallel(delayed(_read_header)(index, file) for index, file in enumerate(files))
    sizes, kinds, n_pages, losses = zip(*headers, strict=True)
    _warn_of_pages(files, n_pages)
    _warn_of_losses(files, losses)
    height, width = size or _common_size(files, sizes)
    kind = _common_kind(files, kinds, mode)

    def read(images: NDArray[Any], row: int, index: int) -> None:
        with _opened(index, files[index]) as image:
            images[row] = _pixels(image, kind, (width, height))

    def fill(images: NDArray[Any], start: int) -> None:
        parallel(delayed(read)(images, row, start + row) for row in range(len(images)))

    shape = (len(files), height, width) + ((CHANNELS[kind],) if kind in CHANNELS else ())
    return shape, np.dtype(np.float32 if kind == "deep" else np.uint8), fill


def picture_as_array(image: Any, mode: str | None) -> NDArray[Any]:
    """Return the pixels of a single Pillow image, as `read_images` reads it."""
    (height, width), kind, n_pages, loss = _read_header(0, image)
    _warn_of_pages([image], (n_pages,))
    _warn_of_losses([image], (loss,))
    return _pixels(image, _common_kind([image], (kind,), mode), (width, height))


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "Reading image files requires Pillow. You can install Pillow with `pip install pillow`"
        ) from error
    return PIL


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        kind = ValueError if folder.exists() else FileNotFoundError
        raise kind(
            f"files must be a folder or a sequence of images, got {str(folder)!r}, which is no folder: a single file "
            "is [path], a pattern sorted(Path().glob(pattern))."
        )
    files = sorted(path for path in _walk(folder) if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"The folder {str(folder)!r} has no image files: none that ends in {sorted(SUFFIXES)}.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and in those below that are not hidden, through links, each folder once."""
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(root, name) for name in names if name[0] != ".")
        below = sorted(name for name in folders if name[0] != ".")
        # In place: where the walk goes next.
        folders.clear()
        for name in below:
            real = os.path.realpath(Path(root, name))
            if real not in seen:
                folders.append(name)
                seen.add(real)


def _digest(files: Sequence[Any], size: tuple[int, int] | None, mode: str | None) -> bytes:
    """Digest all that the pixels depend on, without reading the files."""
    sources = []
    for index, file in enumerate(files):
        if is_pillow_image(file):
            raise ValueError(f"cache needs files, got a Pillow image as image {index}.")
        status = _status(index, file)
        sources.append([os.path.abspath(os.fspath(file)), status.st_size, status.st_mtime_ns])
    options = [None if size is None else [int(side) for side in size], mode, _pillow().__version__]
    return hashlib.sha256(json.dumps([sources, options]).encode()).hexdigest().encode()


def _status(index: int, file: Any) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise type(error)(f"Image {index}, {os.fspath(file)!r}, cannot be read: {error}") from error


def _is_cache(path: Path, end: bytes) -> bool:
    """Tell whether a file is the cache that has this end; refuse one that is none."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(-min(len(end), path.stat().st_size), os.SEEK_END)
        found = file.read()
    if not found.startswith(CACHE_MARK):
        raise ValueError(f"cache={str(path)!r} is a file that read_images did not write: name another one.")
    return found == end


def _named(file: Any) -> str:
    """Name a file or a Pillow image in a message."""
    return repr(os.fspath(file) if isinstance(file, os.PathLike) else file)


def is_pillow_image(entry: Any) -> bool:
    """Tell a Pillow image from anything else, without importing Pillow."""
    # Whoever has a Pillow image has imported Pillow.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(entry, pillow.Image)


@contextmanager
def _opened(index: int, file: Any) -> Iterator[Any]:
    """Open one image; whatever goes wrong with it names it."""
    if is_pillow_image(file):
        yield file
        return
    pillow = _pillow()
    try:
        with pillow.Image.open(file) as image:
            if image.format == "EPS":
                raise ValueError("it is a PostScript program, which Pillow would have Ghostscript run")
            yield image
    # A broken file may raise anything in Pillow's decoders.
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        hint = f". {TIFF_HINT}" if kind is OSError and Path(file).suffix.lower() in (".tif", ".tiff") else ""
        raise kind(f"Image {index}, {os.fspath(file)!r}, cannot be read: {error}{hint}") from error


def _is_size(size: Any) -> bool:
    return np.shape(size) == (2,) and all(isinstance(side, int | np.integer) and side > 0 for side in size)


def _read_header(index: int, file: Any) -> tuple[tuple[int, int], str, int, str]:
    """Height and width, "L", "RGB" or "deep", the number of pages, and what Pillow leaves out, of an image."""
    with _opened(index, file) as image:
        height, width = image.height, image.width
        if image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8):
            height, width = width, height
        kind = "L" if image.mode in GREY_MODES else "deep" if image.mode in DEEP_MODES else "RGB"
        return (height, width), kind, _count_pages(image), _find_loss(image)


def _find_loss(image: Any) -> str:
    """Tell what Pillow loses of the values in a TIFF, and refuse what it would take for others."""
    # Not isinstance, which would need Pillow's module for them.
    tags = getattr(image, "tag_v2", {})
    n_bits, n_samples = max(tags.get(BITS_TAG, (8,))), tags.get(SAMPLES_TAG, 1)
    kind = tags.get(KIND_TAG, (UNSIGNED,))[0]
    if (image.mode == "L" and kind == SIGNED) or (image.mode == "I" and n_bits == 32 and kind == UNSIGNED):
        raise ValueError(f"Pillow takes its {n_bits}-bit integers for {'un' if kind == SIGNED else ''}signed ones")
    is_colour = image.mode not in GREY_MODES | DEEP_MODES
    if is_colour and n_bits > 8 and tags.get(PLANES_TAG) == 2:
        raise ValueError(f"Pillow does not read colours of {n_bits} bits that lie in planes")
    if is_colour and n_bits > 8:
        return f"colours of {n_bits} bits, which are cut to 8"
    if image.mode == "RGBA" and tags and EXTRA_TAG not in tags:
        return "a fourth channel that is not called opacity, which is left out as if it were"
    if n_samples > len(image.getbands()):
        return f"{n_samples} channels, of which only {len(image.getbands())} can be read"
    return ""


def _count_pages(image: Any) -> int:
    # What a photo has beside itself is a preview, and a page that was sought is meant.
    return 1 if image.format == "MPO" or image.tell() > 0 else _count_frames(image)


def _count_frames(image: Any) -> int:
    try:
        return getattr(image, "n_frames", 1)
    # Pages behind the first may be damaged, or the file closed, which the first needn't mind.
    except Exception:
        return 1


def _warn_of_pages(files: Sequence[Any], n_pages: tuple[int, ...]) -> None:
    stacks = [index for index, n in enumerate(n_pages) if n > 1]
    if stacks:
        index, others = stacks[0], f", and so of {len(stacks) - 1} more" if len(stacks) > 1 else ""
        warn(
            f"Image {index}, {_named(files[index])}, has {n_pages[index]} pages or frames, of which only the first is "
            f"read{others}. To have all as images of their own, pass each as a Pillow image: "
            "[page.copy() for page in PIL.ImageSequence.Iterator(image)]. If the pages are channels, make one array of "
            "shape (n, C, H, W) of them."
        )


def _warn_of_losses(files: Sequence[Any], losses: tuple[str, ...]) -> None:
    index = next((index for index, loss in enumerate(losses) if loss), None)
    if index is not None:
        more = sum(map(bool, losses)) - 1
        others = f", and so have {more} more" if more else ""
        warn(f"Image {index}, {_named(files[index])}, has {losses[index]}{others}. {TIFF_HINT}")


def _common_size(files: Sequence[Any], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"All images must have the same size: image 0, {_named(files[0])}, has {sizes[0]} (height, width), "
                f"image {index}, {_named(files[index])}, has {size}. Read them with "
                "skdim.files.read_images(files, size=...)."
            )
    return sizes[0]


def _common_kind(files: Sequence[Any], kinds: tuple[str, ...], mode: str | None) -> str:
    if "deep" not in kinds:
        return mode or ("RGB" if "RGB" in kinds else "L")
    deep = kinds.index("deep")
    if mode is not None:
        raise ValueError(
            f"Image {deep}, {_named(files[deep])}, is grey of more than 8 bits: mode={mode!r} cannot hold it."
        )
    for index, kind in enumerate(kinds):
        if kind != "deep":
            raise ValueError(
                f"Images of 8 bits and grey images of more cannot be mixed: image {index}, {_named(files[index])}, has "
                f"8 bits, image {deep}, {_named(files[deep])}, more."
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
        # From premultiplied grey Pillow converts to grey with opacity only.
        image = (image.convert("LA") if image.mode == "La" else image).convert(kind)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC if kind != "deep" else Image.Resampling.BILINEAR)
    return np.asarray(image)
