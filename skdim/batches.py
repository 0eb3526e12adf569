"""Batches of images on the training device, drawn by a permutation from a generator of their own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skdim.distributed import ALONE, Group
from skdim.images import Images
from skdim.loaders import LoadedImages

__all__ = ["Batches", "LoadedBatches", "Standardizer"]


class Standardizer:
    """Turns stored images into what the encoder takes: float32, channels_last, zero mean and unit variance a channel.

    Parameters
    ----------
    mean, std : ndarray of shape (C,)
        Statistics of the training images, in the units of ``x / 255`` for uint8 images and of ``x`` for float ones.
    device : torch.device
        Where the images are wanted.
    """

    def __init__(self, mean: NDArray[np.float32], std: NDArray[np.float32], device: torch.device) -> None:
        self.device = device
        scale = torch.from_numpy(1 / std.astype(np.float64)).float().view(-1, 1, 1).to(device)
        self.byte_scale = scale / 255
        self.byte_shift = torch.from_numpy(-mean / std.astype(np.float64)).float().view(-1, 1, 1).to(device)
        # Of halves, whose difference is exact and cannot overflow.
        self.half_shift = torch.from_numpy(-mean / 2).view(-1, 1, 1).to(device)
        self.double_scale = 2 * scale

    def __call__(self, images: Tensor) -> Tensor:
        """Standardise images of shape (N, C, H, W), uint8 or float32, from any device."""
        are_bytes = images.dtype == torch.uint8
        images = images.to(self.device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
        if are_bytes:
            return torch.addcmul(self.byte_shift, images, self.byte_scale)
        # The difference first: the spread of 300 degrees give or take a hundredth is no rounding then.
        return torch.add(self.half_shift, images, alpha=0.5).mul_(self.double_scale)


class Batches(torch.utils.data.Dataset[Any]):
    """All training images; iterating gives the standardised batches of one epoch, in a new order each time.

    All batches have one size, so that compiled code serves them all, and none is too small for batch norm or negatives.
    No image is left out; where the images do not divide into such batches, a few random ones, fewer than there are
    batches, are in two of them. On CUDA the images live on the device, as they are stored, if they take up at most
    half of its free memory. Of processes that train together each iterates over its own share of each batch, and a few
    images more, up to their number a batch, may be in two.

    Parameters
    ----------
    images : Images
        The training images.
    standardize : Standardizer
        Applied to each batch; its device is the training device.
    batch_size : int
        Most images in a batch.
    generator : torch.Generator
        Draws the permutations; on the training device.
    group : Group, default=ALONE
        The processes that share each batch.

    Attributes
    ----------
    n_drawn : int
        Images in the batches of an epoch, those that are in two of them counted twice.
    """

    def __init__(
        self,
        images: Images,
        standardize: Standardizer,
        batch_size: int,
        generator: torch.Generator,
        group: Group = ALONE,
    ) -> None:
        self.images = images
        self.standardize = standardize
        self.generator = generator
        self.group = group
        # All processes have as many images of a batch.
        most = int(min(batch_size, len(images))) // group.size * group.size
        self.n_batches = -(-len(images) // most)
        self.batch_size = -(-len(images) // (self.n_batches * group.size)) * group.size
        self.n_drawn = self.n_batches * self.batch_size
        self.resident: Tensor | None = None
        device = standardize.device
        if device.type == "cuda" and images.array.nbytes <= _free_memory(device) // 2:
            self.resident = _on_device(images, device)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator, device=self.generator.device)
        # What the last batch lacks comes from the first one, so that none holds an image twice.
        order = torch.cat([order, order[: self.n_drawn - len(order)]])
        order = order.view(self.n_batches, self.group.size, -1)[:, self.group.rank]
        if self.resident is None:
            rows = order.cpu().numpy()
            # From pinned memory the copy to the device runs beside the step before.
            for batch in self.images.read(rows, pinned=order.is_cuda):
                yield self.standardize(batch)
        else:
            for indices in order:
                yield self.standardize(self.resident[indices])


class LoadedBatches(Batches):
    """The batches of a DataLoader as they come; iterating gives those of one epoch, standardised.

    Parameters
    ----------
    images : LoadedImages
        The training images.
    standardize : Standardizer
        Applied to each batch.

    Attributes
    ----------
    n_drawn : int
        Images in the batches of an epoch; where the loader cannot tell, as if all had the size of the first.
    """

    def __init__(self, images: LoadedImages, standardize: Standardizer) -> None:
        self.loaded, self.standardize = images, standardize
        self.n_batches = len(images.loader)
        self.n_drawn = images.n_images or self.n_batches * len(images.first)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loaded.batches():
            if len(batch) < 2:
                raise ValueError(
                    "The DataLoader has brought a batch of a single image, and training needs two at least: set "
                    "drop_last=True, or another batch_size."
                )
            yield self.standardize(batch)


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a CUDA device, those that torch keeps for that among them."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _on_device(images: Images, device: torch.device) -> Tensor:
    """Copy all images to a device, a part at a time: what is on disk needs no room in the host's memory."""
    resident = torch.empty(
        (len(images), *images.shape),
        dtype=torch.uint8 if images.dtype == np.uint8 else torch.float32,
        device=device,
        memory_format=torch.channels_last if images.channels_last else torch.contiguous_format,
    )
    start = 0
    for part in images.chunks():
        resident[start : start + len(part)] = part
        start += len(part)
    return resident
