"""The paper's encoder for images of 64 x 64."""

from math import ceil, log2

from torch import nn

from skdim.encoders.blocks import Pair, conv_norm_relu
from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.layouts import ImageShape

__all__ = ["AlexNetEncoder"]


class AlexNetEncoder(ConvolutionalEncoder):
    """The paper's encoder for 64 x 64 images (STL-10, Tiny ImageNet), after AlexNet.

    For 64 x 64 images: 3 x 3 convolutions 96 and 192, each followed by a 3 x 3 max pooling of stride 2; 384 (the local
    features, 15 x 15); 384; 192 and max pooling, 7 x 7; two linear layers of 4096; linear `n_components`. Batch norm
    and ReLU follow every layer but the poolings and the last.

    Along a side of more than 64 pixels the first convolution gets a stride that brings it to 33 to 64 and a kernel of
    2 * stride + 1, so that no linear layer grows beyond its size for 64 x 64; a pooling that would leave a local map
    of less than 6 pixels is left out; a side of one pixel is left alone.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image; any size from 1 x 1.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        Whether to return an embedding for each location of the last convolution's map.
    """

    max_side = 64
    # The least for which 28 x 28 images pass the same layers as 32 x 32 ones.
    min_local_side = 6

    def __init__(self, image_shape: ImageShape, n_components: int, multiple_globals: bool = False) -> None:
        channels, *sides = image_shape
        stem_stride = [2 ** max(0, ceil(log2(side / self.max_side))) for side in sides]
        size = (sides[0], sides[1])
        stages: list[nn.Module] = []
        for i, (n_out, min_pooled) in enumerate(
            [(96, self.min_local_side), (192, self.min_local_side), (384, None), (384, None), (192, 1)]
        ):
            rows, columns = stem_stride if i == 0 else (1, 1)
            stage, size = conv_norm_relu(channels, n_out, size, (2 * rows + 1, 2 * columns + 1), (rows, columns))
            if min_pooled is not None:
                pool, size = _max_pool(size, min_pooled)
                stage.append(pool)
            stages.append(stage)
            channels = n_out
        super().__init__(
            nn.Sequential(*stages[:3]),
            nn.Sequential(*stages[3:]),
            (channels, *size),
            hidden_widths=[4096, 4096],
            n_components=n_components,
            multiple_globals=multiple_globals,
        )


def _max_pool(size: Pair, min_side: int) -> tuple[nn.MaxPool2d, Pair]:
    """3 x 3 max pooling of stride 2 along the sides that it leaves with at least `min_side` pixels."""
    pooled = [(side - 3) // 2 + 1 for side in size]
    rows, columns = (side >= min_side for side in pooled)
    pool = nn.MaxPool2d((3 if rows else 1, 3 if columns else 1), (2 if rows else 1, 2 if columns else 1))
    return pool, (pooled[0] if rows else size[0], pooled[1] if columns else size[1])
