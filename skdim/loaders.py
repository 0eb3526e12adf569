"""Images that a DataLoader of the user's brings, in its own order and batches."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from skdim.arrays import as_array
from skdim.images import Images, check_images
from skdim.layouts import ImageShape
from skdim.randomness import lent_rng, seeded_generators
from skdim.sources import as_stored

__all__ = ["LoadedImages", "check_loader", "check_order"]


class LoadedImages:
    """Images that a DataLoader brings a batch at a time, in its own order.

    Parameters
    ----------
    loader : DataLoader
        Where from.
    first : Images
        Its first batch.
    item_shape : tuple of int
        Shape in which an image comes.
    name : str
        The estimator's, for messages.

    Attributes
    ----------
    n_images : int or None
        How many it brings in an epoch, where that can be known before.
    """

    def __init__(self, loader: DataLoader[Any], first: Images, item_shape: tuple[int, ...], name: str) -> None:
        self.loader, self.first, self._item_shape, self._name = loader, first, item_shape, name
        self.shape, self.dtype = first.shape, first.dtype
        self.n_images = _n_loaded(loader)
        self.seed(0, torch.device("cpu"))

    def seed(self, seed: int, device: torch.device) -> None:
        """Seed what the loader's order and transforms draw where they have no generator of their own."""
        self._generators = seeded_generators(seed, device)

    def head(self, n: int) -> torch.Tensor:
        """Return the first `n` images of the batch that came first, or all of fewer."""
        return self.first.head(n)

    def some(self, n: int) -> torch.Tensor:
        """Return what `head` does: the others come in their own order."""
        return self.head(n)

    def batches(self) -> Iterator[torch.Tensor]:
        """Load the batches of an epoch, of shape (N, C, H, W) each.

        Raises
        ------
        ValueError
            If images differ in shape or type from the first ones or are not finite, or there are more or fewer of them
            than the loader's length says.
        """
        n_before = 0
        for index, batch in enumerate(_load(self.loader, self._generators)):
            if index == len(self.loader):
                raise ValueError(f"The DataLoader should bring {index} batches by its length, but has more.")
            values = as_array(_images_of(batch), self._name)
            is_uint8 = values.dtype == np.uint8
            is_number = values.dtype.kind in "biuf"
            if values.shape[1:] != self._item_shape or is_uint8 != (self.dtype == np.uint8) or not is_number:
                raise ValueError(
                    f"All images must have the same shape and type: the first batch has images of shape "
                    f"{self._item_shape}, read as {self.dtype}, batch {index} of shape {values.shape[1:]} and dtype "
                    f"{values.dtype}."
                )
            array = as_stored(values, self.dtype, range(n_before, n_before + len(values)))
            n_before += len(values)
            if self.n_images is not None and n_before > self.n_images:
                break
            stored = array.reshape(len(array), *self.first.array.shape[1:])
            yield replace(self.first, array=stored).take(slice(None))
        if self.n_images not in (None, n_before):
            raise ValueError(f"The DataLoader should bring {self.n_images} images by its length, but has {n_before}.")

    def chunks(self, size: int) -> Iterator[torch.Tensor]:
        """Load all images of an epoch in their order, `size` at a time."""
        waiting: list[torch.Tensor] = []
        for batch in self.batches():
            waiting.append(batch)
            if sum(map(len, waiting)) >= size:
                *whole, rest = torch.cat(waiting).split(size)
                yield from whole
                waiting = [rest]
        if waiting:
            yield torch.cat(waiting)


def check_loader(
    estimator: BaseEstimator,
    loader: DataLoader[Any],
    *,
    image_shape: ImageShape | None,
    data_format: str,
    reset: bool,
    min_samples: int = 1,
) -> LoadedImages:
    """Check a DataLoader by its first batch, as `check_images` does; the others are checked when they come.

    Parameters
    ----------
    loader : DataLoader
        Of batches of images, or of tuples or lists that begin with one.
    estimator, image_shape, data_format, reset
        As of `check_images`.
    min_samples : int, default=1
        The least number of images in a batch; training needs two.

    Returns
    -------
    LoadedImages
        The checked images.

    Raises
    ------
    ValueError
        If the loader has no length or no batch, or its images are unfit.
    TypeError
        If its batches hold what is no image.
    """
    name = type(estimator).__name__
    try:
        n_batches = len(loader)
    except TypeError as error:
        raise ValueError(f"{name} expects a DataLoader with a length, but its dataset has none: {error}") from error
    if n_batches == 0:
        raise ValueError(f"Found array with 0 sample(s) (a DataLoader), while a minimum of 1 is required by {name}.")
    batch = next(_load(loader, seeded_generators(0, torch.device("cpu"))), None)
    if batch is None:
        raise ValueError(f"The DataLoader should bring {n_batches} batches by its length, but has none.")
    batch = as_array(_images_of(batch), name)
    first = check_images(
        estimator, batch, image_shape=image_shape, data_format=data_format, reset=reset, min_samples=min_samples
    )
    images = LoadedImages(loader, first, batch.shape[1:], name)
    size = loader.batch_size
    if images.n_images is not None and size is not None and 0 < images.n_images % size < min_samples:
        raise ValueError(
            f"The last batch of the DataLoader has a single image ({images.n_images} images in batches of {size}), and "
            "training needs two at least: set drop_last=True, or another batch_size."
        )
    return images


def check_order(loader: DataLoader[Any]) -> None:
    """Refuse a DataLoader whose images cannot be told apart by their place.

    Raises
    ------
    ValueError
        If it shuffles or leaves images out.
    """
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    is_random = isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)
    if is_random or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
        raise ValueError(
            f"transform expects a DataLoader that keeps the order of its images, got one with a "
            f"{type(sampler).__name__}: set shuffle=False, or pass its dataset."
        )
    if loader.drop_last and _n_listed(loader) % (loader.batch_size or 1):
        raise ValueError("transform expects a DataLoader that brings all images, got one with drop_last=True.")


def _load(loader: DataLoader[Any], generators: Sequence[torch.Generator]) -> Iterator[Any]:
    """Load batches with these in place of torch's global generators, which are the user's between two batches."""
    end = object()
    with lent_rng(generators):
        batches = iter(loader)
    while True:
        with lent_rng(generators):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


def _images_of(batch: Any) -> Any:
    """Return a batch of images, which may be the first part of what a loader brings."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def _n_listed(loader: DataLoader[Any]) -> int:
    """How many images there are to make batches of."""
    is_iterable = isinstance(loader.dataset, IterableDataset)
    return len(loader.dataset if is_iterable else loader.sampler)  # type: ignore[arg-type]


def _n_loaded(loader: DataLoader[Any]) -> int | None:
    """How many images the batches of an epoch have, where the loader makes them, and of all images that it can."""
    if loader.batch_size is None or (loader.drop_last and isinstance(loader.dataset, IterableDataset)):
        return None
    n_images = _n_listed(loader)
    return n_images - n_images % loader.batch_size if loader.drop_last else n_images
