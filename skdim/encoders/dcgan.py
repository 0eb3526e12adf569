"""The paper's encoder for small images."""

from torch import nn

from skdim.encoders.blocks import halving_stack, n_halvings
from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.layouts import ImageShape

__all__ = ["DCGANEncoder"]


class DCGANEncoder(ConvolutionalEncoder):
    """The paper's encoder for small images: strided convolutions, then two linear layers.

    For 32 x 32 images this is the network of the paper's Table 1: convolutions 64, 128 (the local features, 8 x 8)
    and 256, each 4 x 4 with stride 2, batch norm and ReLU; linear 1024 with batch norm and ReLU; linear
    `n_components`. Other sizes change the number of halvings, never less than two, so that the last map is 4 to 8
    pixels wide where the image has 16 or more: 64 x 64 has four stages with the local features after the third,
    28 x 28 two stages of 5 x 5 convolutions with the local features after the second, as in the paper. A side of one
    pixel is left alone, so that 1 x 1 x p signals train with a one-dimensional form of the same network.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image; any size from 1 x 1.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        Whether to return an embedding for each location of the last convolution's map.
    """

    max_width = 512
    # A local map of this many pixels a side or more still holds small patches rather than whole objects.
    min_local_side = 7

    def __init__(self, image_shape: ImageShape, n_components: int, multiple_globals: bool = False) -> None:
        _, height, width = image_shape
        n_stages = max(2, n_halvings(height, width))
        last_side = max(height, width) >> n_stages
        # The paper's 28 x 28 network: an odd last map calls for 5 x 5 kernels, which round up where 4 x 4 would crop.
        kernel = 5 if last_side >= 4 and last_side % 2 else 4
        widths = [min(64 << stage, self.max_width) for stage in range(n_stages)]
        stages, shapes = halving_stack(image_shape, widths, kernel)
        large = [i for i, (_, h, w) in enumerate(shapes) if max(h, w) >= self.min_local_side]
        n_local = large[-1] + 1 if large else 1
        super().__init__(
            nn.Sequential(*stages[:n_local]),
            nn.Sequential(*stages[n_local:]),
            shapes[-1],
            hidden_widths=[1024],
            n_components=n_components,
            multiple_globals=multiple_globals,
        )
