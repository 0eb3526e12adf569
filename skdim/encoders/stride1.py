"""Four convolutions of stride 1."""

from math import floor, log2

from torch import nn

from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.layouts import ImageShape

__all__ = ["Stride1Encoder"]


class Stride1Encoder(ConvolutionalEncoder):
    """Four 4 x 4 convolutions of stride 1 without padding, then one linear layer.

    Convolutions 64, 128 (the local features), 256 and 512, ReLU after each, batch norm after all but the first; a
    3 x 32 x 32 image gives an embedding of `n_components` and local features of 128 x 26 x 26. Sides of 2 to 12
    pixels are padded with zeros to 13, the least the four convolutions can take; a side of one pixel is left alone.
    Along a side of 64 pixels or more the first convolutions get a stride of 2, one for each doubling beyond 32. Up to
    255 pixels the local features have at most 62 locations along it; they and the linear layer grow with larger images.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image; any size from 1 x 1.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        Whether to return an embedding for each location of the last convolution's map.
    """

    min_side = 13

    def __init__(self, image_shape: ImageShape, n_components: int, multiple_globals: bool = False) -> None:
        channels, height, width = image_shape
        missing = [max(0, self.min_side - side) if side > 1 else 0 for side in (height, width)]
        (top, left) = (pad // 2 for pad in missing)
        pad = nn.ZeroPad2d((left, missing[1] - left, top, missing[0] - top)) if any(missing) else nn.Identity()
        size = [height + missing[0], width + missing[1]]
        n_strided = [floor(log2(side / 32)) for side in size]
        layers: list[nn.Module] = []
        for i, n_out in enumerate((64, 128, 256, 512)):
            kernel = [4 if side > 1 else 1 for side in size]
            stride = [2 if i < n else 1 for n in n_strided]
            layers.append(nn.Conv2d(channels, n_out, tuple(kernel), tuple(stride), bias=i == 0))  # type: ignore[arg-type]
            if i > 0:
                layers.append(nn.BatchNorm2d(n_out))
            layers.append(nn.ReLU(inplace=True))
            size = [(side - k) // s + 1 for side, k, s in zip(size, kernel, stride, strict=True)]
            channels = n_out
        super().__init__(
            nn.Sequential(pad, *layers[:5]),
            nn.Sequential(*layers[5:]),
            (channels, size[0], size[1]),
            hidden_widths=[],
            n_components=n_components,
            multiple_globals=multiple_globals,
        )
