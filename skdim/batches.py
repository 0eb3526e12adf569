"""Batches of images on the training device, drawn by a permutation from a generator of their own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skdim.images import Images


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
        # x * scale + shift, not (x - mean) / std: no intermediate value can overflow.
        self.scale = torch.from_numpy(1 / std.astype(np.float64)).float().view(-1, 1, 1).to(device)
        self.byte_scale = self.scale / 255
        self.shift = torch.from_numpy(-mean / std.astype(np.float64)).float().view(-1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Standardise images of shape (N, C, H, W), uint8 or float32, from any device."""
        scale = self.byte_scale if images.dtype == torch.uint8 else self.scale
        images = images.to(self.device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
        return torch.addcmul(self.shift, images, scale)


class Batches(torch.utils.data.Dataset[Any]):
    """All training images; iterating gives the standardised batches of one epoch, in a new order each time.

    All batches have one size, so that compiled code serves them all, and none is too small for batch norm or negatives.
    No image is left out; where the images do not divide into such batches, a few random ones, fewer than there are
    batches, are in two of them. On CUDA the images live on the device, as they are stored, if they take up at most
    half of its free memory.

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

    Attributes
    ----------
    n_drawn : int
        Images in the batches of an epoch, those that are in two of them counted twice.
    """

    def __init__(self, images: Images, standardize: Standardizer, batch_size: int, generator: torch.Generator) -> None:
        self.images = images
        self.standardize = standardize
        self.generator = generator
        self.n_batches = -(-len(images) // batch_size)
        self.batch_size = -(-len(images) // self.n_batches)
        self.n_drawn = self.n_batches * self.batch_size
        self.resident: Tensor | None = None
        device = standardize.device
        if device.type == "cuda" and images.array.nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
            self.resident = images.take(slice(None)).to(device)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator, device=self.generator.device)
        # What the last batch lacks comes from the first one, so that none holds an image twice.
        order = torch.cat([order, order[: self.n_drawn - len(order)]])
        if self.resident is None:
            for rows in order.cpu().numpy().reshape(self.n_batches, self.batch_size):
                batch = self.images.take(rows)
                # From pinned memory the copy to the device runs beside the step before.
                yield self.standardize(batch.pin_memory() if order.is_cuda else batch)
        else:
            for indices in order.split(self.batch_size):
                yield self.standardize(self.resident[indices])
