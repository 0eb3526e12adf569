"""The paper's residual encoder, on whole images or on overlapping crops."""

from math import ceil, log2

import torch
from torch import Tensor, nn

from skdim.encoders.blocks import Pair, conv_norm_relu, padded_conv
from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.layouts import ImageShape

__all__ = ["ResNetEncoder"]


class ResNetEncoder(ConvolutionalEncoder):
    """Residual encoder: a strided convolution, six bottleneck blocks of three convolutions each, two linear layers.

    For 32 x 32 images: a 3 x 3 convolution 64 of stride 2; two blocks 64 -> 256; one 128 -> 512 of stride 2 (the local
    features, 8 x 8); one 128 -> 512; two 256 -> 1024, the first of stride 2; linear 1024; linear `n_components`. Batch
    norm and ReLU follow every layer but the last.

    Larger images first pass one more strided convolution 64 for each doubling beyond 32, to the nearest; smaller ones
    do without the strides that would leave a local map of less than 6 pixels; a side of one pixel is left alone.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image; any size from 1 x 1.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        Whether to return an embedding for each location of the last convolution's map.
    folded : bool, default=False
        Whether the layers up to the local features see overlapping crops of the image, each on its own, and local
        features are their means over a crop: a location then depends on its crop only. For 32 x 32 images these are
        crops of 8 x 8 at a stride of 4, so that the local map is 7 x 7; in general a side is cut at a stride of an
        eighth of it, of 2 or more, into crops of twice the stride, after padding with zeros to a multiple of it.
    """

    base_side = 32
    # The least for which 24 x 24 to 32 x 32 images pass the same layers.
    min_local_side = 6

    def __init__(
        self, image_shape: ImageShape, n_components: int, multiple_globals: bool = False, folded: bool = False
    ) -> None:
        channels, height, width = image_shape
        size = (height, width)
        n_extra = [max(0, round(log2(side / self.base_side))) for side in size]
        local: list[nn.Module] = []
        for i in range(max(n_extra)):
            stride = (2 if i < n_extra[0] else 1, 2 if i < n_extra[1] else 1)
            conv, size = conv_norm_relu(channels, 64, size, stride=stride)
            local.append(conv)
            channels = 64
        conv, size = conv_norm_relu(channels, 64, size, stride=self._stride(size))
        local.append(conv)
        local += [_Bottleneck(64, 64, 256, size), _Bottleneck(256, 64, 256, size)]
        block = _Bottleneck(256, 128, 512, size, self._stride(size))
        local.append(block)
        size = block.size
        if folded:
            crops = _Crops((height, width))
            size = crops.grid
            local = [_Folded(crops, nn.Sequential(*local))]
        last = _Bottleneck(512, 256, 1024, size, stride=(2, 2))
        super().__init__(
            nn.Sequential(*local),
            nn.Sequential(_Bottleneck(512, 128, 512, size), last, _Bottleneck(1024, 256, 1024, last.size)),
            (1024, *last.size),
            hidden_widths=[1024],
            n_components=n_components,
            multiple_globals=multiple_globals,
        )

    def _stride(self, size: Pair) -> Pair:
        """Stride 2 along the sides that it leaves long enough for a map of small patches."""
        rows, columns = (2 if ceil(side / 2) >= self.min_local_side else 1 for side in size)
        return rows, columns


class _Bottleneck(nn.Module):
    """Residual block: convolutions 1 x 1, 3 x 3 and 1 x 1 with batch norm, and a linear shortcut where shapes differ.

    Attributes
    ----------
    size : tuple of int
        Height and width of the map it yields.
    """

    def __init__(self, n_in: int, n_hidden: int, n_out: int, size: Pair, stride: Pair = (1, 1)) -> None:
        super().__init__()
        squeeze, _ = conv_norm_relu(n_in, n_hidden, size, kernel=(1, 1))
        conv, self.size = conv_norm_relu(n_hidden, n_hidden, size, stride=stride)
        expand, _ = padded_conv(n_hidden, n_out, self.size, kernel=(1, 1))
        self.residual = nn.Sequential(squeeze, conv, expand, nn.BatchNorm2d(n_out))
        self.shortcut: nn.Module = nn.Identity()
        if n_in != n_out or stride != (1, 1):
            project, _ = padded_conv(n_in, n_out, size, kernel=(1, 1), stride=stride)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(n_out))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.residual(maps) + self.shortcut(maps))


class _Crops(nn.Module):
    """Cut images (N, C, H, W) into overlapping crops (N * h * w, C, crop height, crop width), row by row.

    Parameters
    ----------
    size : tuple of int
        Height and width of an image.

    Attributes
    ----------
    grid : tuple of int
        Height and width of the grid of crops, h and w.
    """

    def __init__(self, size: Pair) -> None:
        super().__init__()
        rows, columns = (_cut(side) for side in size)
        self.grid, self.crop, self.stride = zip(rows, columns, strict=True)
        missing = [
            (n - 1) * stride + crop - side
            for side, n, crop, stride in zip(size, self.grid, self.crop, self.stride, strict=True)
        ]
        top, left = (n // 2 for n in missing)
        self.pad = nn.ZeroPad2d((left, missing[1] - left, top, missing[0] - top))

    def forward(self, images: Tensor) -> Tensor:
        crops = self.pad(images)
        for axis, crop, stride in zip((2, 3), self.crop, self.stride, strict=True):
            crops = crops.unfold(axis, crop, stride)
        # (N, C, h, w, rows, columns), copied once into the channels_last layout that convolutions compute fastest in.
        return crops.permute(0, 2, 3, 4, 5, 1).flatten(0, 2).contiguous().permute(0, 3, 1, 2)


def _cut(side: int) -> tuple[int, int, int]:
    """Count the crops along a side, and give their length and stride."""
    if side == 1:
        return 1, 1, 1
    stride = max(2, round(side / 8))
    return max(1, ceil(side / stride) - 1), 2 * stride, stride


class _Folded(nn.Module):
    """Run a network on the crops of an image as on images of their own; its mean over a crop is a location's vector."""

    def __init__(self, crops: _Crops, network: nn.Module) -> None:
        super().__init__()
        self.crops = crops
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.network(self.crops(images)).mean((2, 3))
        return vectors.unflatten(0, (-1, *self.crops.grid)).permute(0, 3, 1, 2)
