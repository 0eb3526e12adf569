"""Encoders: from a batch of images to an embedding and the map of local features on the way.

An encoder is an ``nn.Module`` built as ``Encoder(image_shape, n_components)`` whose ``forward`` maps images of shape
(N, C, H, W) to ``(embedding, features)``: the embedding of shape (N, n_components) and the local features of shape
(N, K, h, w). The encoders here also have ``layers``, which returns everything `output_layer` can name.
"""

import copy
from collections.abc import Sequence
from math import floor, log2

import torch
from torch import Tensor, nn

from skdim.images import ImageShape

__all__ = ["DCGANEncoder", "FlattenMap", "Stride1Encoder"]


class FlattenMap(nn.Module):
    """Flatten maps (N, K, h, w) to (N, h * w * K), in the order in which channels_last stores them.

    Flattening to K * h * w would copy the map, and its gradient would make every layer before it copy too.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


def _halving_conv(n_in: int, n_out: int, size: tuple[int, int], kernel: int) -> tuple[nn.Conv2d, tuple[int, int]]:
    """Convolution that halves each side, leaves a side of one pixel alone, and the size it yields."""
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(
        n_in,
        n_out,
        kernel_size=tuple(kernel if side > 1 else 1 for side in size),  # type: ignore[arg-type]
        stride=tuple(2 if side > 1 else 1 for side in size),  # type: ignore[arg-type]
        padding=tuple(padding if side > 1 else 0 for side in size),  # type: ignore[arg-type]
        bias=False,
    )
    height, width = ((side + 2 * padding - kernel) // 2 + 1 if side > 1 else 1 for side in size)
    return conv, (height, width)


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
    channels, *size = shape
    height, width = size
    for n_out in widths:
        conv, (height, width) = _halving_conv(channels, n_out, (height, width), kernel)
        stages.append(nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)))
        shapes.append((n_out, height, width))
        channels = n_out
    return stages, shapes


def n_halvings(height: int, width: int) -> int:
    """Count the halvings that bring the longer side between 4 and 7."""
    return max(0, floor(log2(max(height, width) / 4)))


class DCGANEncoder(nn.Module):
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
    """

    max_width = 512
    # A local map of this many pixels a side or more still holds small patches rather than whole objects.
    min_local_side = 7

    def __init__(self, image_shape: ImageShape, n_components: int) -> None:
        super().__init__()
        _, height, width = image_shape
        n_stages = max(2, n_halvings(height, width))
        last_side = max(height, width) >> n_stages
        # The paper's 28 x 28 network: an odd last map calls for 5 x 5 kernels, which round up where 4 x 4 would crop.
        kernel = 5 if last_side >= 4 and last_side % 2 else 4
        widths = [min(64 << stage, self.max_width) for stage in range(n_stages)]
        stages, shapes = halving_stack(image_shape, widths, kernel)
        large = [i for i, (_, h, w) in enumerate(shapes) if max(h, w) >= self.min_local_side]
        n_local = large[-1] + 1 if large else 1
        self.local = nn.Sequential(*stages[:n_local])
        self.conv = nn.Sequential(*stages[n_local:])
        channels, height, width = shapes[-1]
        self.hidden = nn.Sequential(
            FlattenMap(),
            nn.Linear(channels * height * width, 1024, bias=False),
            nn.BatchNorm1d(1024),
            nn.ReLU(inplace=True),
        )
        self.embedding = nn.Linear(1024, n_components)

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        """Compute every layer that can be read.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images.

        Returns
        -------
        dict
            "embedding" (N, n_components), "hidden" (N, 1024), "features" (N, K, h, w), the last convolution, and
            "local" (N, K', h', w'), the local features.
        """
        local = self.local(images)
        features = self.conv(local)
        hidden = self.hidden(features)
        return {"embedding": self.embedding(hidden), "hidden": hidden, "features": features, "local": local}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (N, n_components) and the local features (N, K, h, w)."""
        layers = self.layers(images)
        return layers["embedding"], layers["local"]


class Stride1Encoder(nn.Module):
    """Four 4 x 4 convolutions of stride 1 without padding, then one linear layer.

    Convolutions 64, 128 (the local features), 256 and 512, ReLU after each, batch norm after all but the first; a
    3 x 32 x 32 image gives an embedding of `n_components` and local features of 128 x 26 x 26. Sides of 2 to 12
    pixels are padded with zeros to 13, the least the four convolutions can take; a side of one pixel is left alone.
    Along a side of 64 pixels or more the first convolutions get a stride of 2, one for each doubling beyond 32, so that
    map and linear layer stay near the size they have for 32 x 32.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image; any size from 1 x 1.
    n_components : int
        Width of the embedding.
    """

    min_side = 13

    def __init__(self, image_shape: ImageShape, n_components: int) -> None:
        super().__init__()
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
        self.local = nn.Sequential(pad, *layers[:5])
        self.conv = nn.Sequential(*layers[5:])
        self.embedding = nn.Sequential(FlattenMap(), nn.Linear(channels * size[0] * size[1], n_components))

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        """Compute every layer that can be read.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images.

        Returns
        -------
        dict
            "embedding" (N, n_components), "features" (N, 512, h, w), the last convolution, and "local"
            (N, 128, h', w'), the local features.
        """
        local = self.local(images)
        features = self.conv(local)
        return {"embedding": self.embedding(features), "features": features, "local": local}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (N, n_components) and the local features (N, 128, h, w)."""
        layers = self.layers(images)
        return layers["embedding"], layers["local"]


ENCODERS: dict[str, type[nn.Module]] = {"dcgan": DCGANEncoder, "stride1": Stride1Encoder}


def read_layers(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Compute the layers of any encoder; the user's have an embedding and local features.

    Parameters
    ----------
    encoder : nn.Module
        One of this module's encoders or the user's.
    images : Tensor of shape (N, C, H, W)
        Standardised images.

    Returns
    -------
    dict
        At least "embedding" (N, d) and "features" (N, K, h, w).
    """
    # Exactly these classes: a subclass may have a forward of its own.
    if type(encoder) in ENCODERS.values():
        return encoder.layers(images)  # type: ignore[operator]
    embedding, features = encoder(images)
    return {"embedding": embedding, "features": features}


def make_encoder(
    encoder: str | nn.Module | type[nn.Module], image_shape: ImageShape, n_components: int
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """Build an encoder, or copy the one given, and check what it returns.

    Parameters
    ----------
    encoder : str, nn.Module class or instance
        Name of an encoder of this module; a class, built as ``encoder(image_shape, n_components)``; or an instance.
    image_shape : tuple of int
        Channels, height and width.
    n_components : int
        Width of the embedding.

    Returns
    -------
    module : nn.Module
        The encoder, on the CPU.
    shapes : dict
        As `layer_shapes` gives them.

    Raises
    ------
    ValueError
        If the encoder cannot take such images or does not return what an encoder returns.
    """
    if isinstance(encoder, nn.Module):
        module = copy.deepcopy(encoder).cpu()
    else:
        encoder_class = ENCODERS[encoder] if isinstance(encoder, str) else encoder
        if not issubclass(encoder_class, nn.Module):
            raise ValueError(f"encoder must be a subclass of torch.nn.Module, got the class {encoder!r}.")
        try:
            module = encoder_class(image_shape, n_components)
        except TypeError as error:
            raise ValueError(
                f"encoder class {encoder_class.__name__} cannot be built as {encoder_class.__name__}(image_shape, "
                f"n_components): {error}"
            ) from error
    shapes = layer_shapes(module, image_shape)
    width = shapes["embedding"][0]
    if width != n_components:
        raise ValueError(f"encoder returns embeddings of width {width}, but n_components={n_components}.")
    return module, shapes


class InvalidEncoderError(ValueError):
    """An encoder does not do what an encoder does."""


def layer_shapes(encoder: nn.Module, image_shape: ImageShape) -> dict[str, tuple[int, ...]]:
    """Find the shape of each layer, without the batch, by encoding two blank images.

    Parameters
    ----------
    encoder : nn.Module
        The encoder, on the CPU; its mode is kept.
    image_shape : tuple of int
        Channels, height and width.

    Returns
    -------
    dict
        Layer name to shape; "local" is always among them.

    Raises
    ------
    ValueError
        If the module does not return an embedding of shape (N, d) and features of shape (N, K, h, w).
    """
    name = type(encoder).__name__
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            output = encoder(torch.zeros(2, *image_shape))
            if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)):
                raise InvalidEncoderError(
                    f"encoder must return (embedding, features), two tensors; {name} returned {type(output).__name__}."
                )
            embedding, features = output
            if embedding.ndim != 2 or features.ndim != 4 or len(embedding) != 2 or len(features) != 2:
                raise InvalidEncoderError(
                    "encoder must return an embedding of shape (N, d) and features of shape (N, K, h, w); for images "
                    f"of shape {(2, *image_shape)} {name} returned shapes {tuple(embedding.shape)} and "
                    f"{tuple(features.shape)}."
                )
            layers = read_layers(encoder, torch.zeros(2, *image_shape))
    except InvalidEncoderError:
        raise
    except Exception as error:
        raise InvalidEncoderError(f"encoder {name} cannot take images of shape {image_shape}: {error}") from error
    finally:
        encoder.train(was_training)
    return {"local": tuple(features.shape[1:])} | {key: tuple(value.shape[1:]) for key, value in layers.items()}


def local_features(encoder: nn.Module, images: Tensor) -> Tensor:
    if type(encoder) in ENCODERS.values():
        return encoder.local(images)
    return encoder(images)[1]


def receptive_fields(encoder, image_shape):
    import numpy as np

    was = encoder.training
    encoder.eval()
    out = []
    with torch.no_grad():
        for axis in (1, 2):
            n = image_shape[axis]
            x = torch.zeros(n, *image_shape)
            i = torch.arange(n)
            if axis == 1:
                x[i, :, i] = torch.nan
            else:
                x[i, :, :, i] = torch.nan
            f = local_features(encoder, x).isnan().any(1).any(2 if axis == 1 else 1).numpy()  # (n, h)
            out.append(np.stack([f.argmax(0), n - f[::-1].argmax(0)], 1))
    encoder.train(was)
    return tuple(out)
