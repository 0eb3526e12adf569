"""Layers that encoders and critics are made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, log2

import torch
from torch import Tensor, nn

from skdim.layouts import ImageShape

__all__ = ["FlattenMap", "conv_norm_relu", "evaluating", "halving_stack", "mean_over_map", "n_halvings", "padded_conv"]

Pair = tuple[int, int]


class FlattenMap(nn.Module):
    """Flatten maps (N, K, h, w) to (N, h * w * K), in the order in which channels_last stores them.

    Flattening to K * h * w would copy the map, and its gradient would make every layer before it copy too.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a block, without gradients; each part gets its own mode back."""
    modes = {part: part.training for part in module.modules()}
    is_training = any(modes.values())
    if is_training:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # By the method, in which an encoder may do more; a part after what it is a part of.
        for part, mode in modes.items() if is_training else ():
            part.train(mode)


def mean_over_map(values: Tensor) -> Tensor:
    """Average maps (N, K, h, w) to (N, K); leave vectors (N, K) as they are."""
    return values.mean((2, 3)) if values.ndim == 4 else values


def padded_conv(
    n_in: int, n_out: int, size: Pair, kernel: Pair = (3, 3), stride: Pair = (1, 1)
) -> tuple[nn.Conv2d, Pair]:
    """Build a convolution without bias, padded by half its kernel, and the size of map it yields.

    A side of one pixel is left alone, so that signals of 1 x 1 x p pass a one-dimensional form of the same layer. A
    side that the kernel covers whole, in its only place, gets a kernel of its length and no padding.
    """
    rows, columns = (_along(*side) for side in zip(size, kernel, stride, strict=True))
    kernels, strides, padding, sides = zip(rows, columns, strict=True)
    return nn.Conv2d(n_in, n_out, kernels, strides, padding, bias=False), sides


def _along(side: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and pixels that come out along one side of a map."""
    if side == 1:
        return 1, 1, 0, 1
    padding = (kernel - 1) // 2
    n_out = (side + 2 * padding - kernel) // stride + 1
    if n_out == 1 and kernel - padding >= side:
        # The same sum without the zeros of the padding, with which torch's bfloat16 convolution on the CPU, seen in
        # 2.13, returns NaN now and then.
        return side, 1, 0, 1
    return kernel, stride, padding, n_out


def conv_norm_relu(
    n_in: int, n_out: int, size: Pair, kernel: Pair = (3, 3), stride: Pair = (1, 1)
) -> tuple[nn.Sequential, Pair]:
    """Build padded convolution, batch norm and ReLU, and the size of map they yield."""
    conv, size = padded_conv(n_in, n_out, size, kernel, stride)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)), size


def halving_stack(
    shape: ImageShape, widths: Sequence[int], kernel: int = 4
) -> tuple[list[nn.Module], list[ImageShape]]:
    """Stack of convolutions with batch norm and ReLU, each of which halves the map.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width that enter.
    widths : sequence of int
        Channels after each stage.
    kernel : int, default=4
        4 halves with a padding of 1; 5 halves with a padding of 2 and rounds up.

    Returns
    -------
    stages : list of nn.Module
        One module a stage.
    shapes : list of tuple
        Channels, height and width after each stage.
    """
    stages: list[nn.Module] = []
    shapes = []
    channels, height, width = shape
    for n_out in widths:
        stage, (height, width) = conv_norm_relu(channels, n_out, (height, width), (kernel, kernel), (2, 2))
        stages.append(stage)
        shapes.append((n_out, height, width))
        channels = n_out
    return stages, shapes


def n_halvings(height: int, width: int) -> int:
    """Count the halvings that bring the longer side between 4 and 7."""
    return max(0, floor(log2(max(height, width) / 4)))
