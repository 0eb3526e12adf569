"""What can be read from an encoder: its layers, their shapes, its local features and their receptive fields."""

from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skdim.encoders.blocks import evaluating, mean_over_map
from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.encoders.standardized import StandardizedEncoder
from skdim.layouts import ImageShape

__all__ = ["InvalidEncoderError", "layer_shapes", "local_features", "read_layers", "receptive_fields"]

# Pixels of all images that `receptive_fields` encodes at once.
PROBED_PIXELS = 1 << 17


class InvalidEncoderError(ValueError):
    """An encoder does not do what an encoder does."""


def read_layers(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Compute the layers of any encoder; the user's have an embedding and local features.

    Parameters
    ----------
    encoder : nn.Module
        One of this package's encoders or the user's.
    images : Tensor of shape (N, C, H, W)
        Standardised images.

    Returns
    -------
    dict
        At least "embedding" (N, d), the mean where the encoder returns a map of embeddings, and "features"
        (N, K, h, w).
    """
    if isinstance(encoder, StandardizedEncoder):
        layers = read_layers(encoder.encoder, images)
        return layers | {"embedding": encoder.norm(layers["embedding"])}
    if _has_known_forward(encoder):
        return encoder.layers(images)
    embedding, features = encoder(images)
    return {"embedding": mean_over_map(embedding), "features": features}


def local_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Compute the local features only, without the layers after them where the encoder is one of this package's.

    Parameters
    ----------
    encoder : nn.Module
        One of this package's encoders or the user's.
    images : Tensor of shape (N, C, H, W)
        Standardised images.

    Returns
    -------
    Tensor of shape (N, K, h, w)
        The local features.
    """
    if isinstance(encoder, StandardizedEncoder):
        return local_features(encoder.encoder, images)
    if _has_known_forward(encoder):
        return encoder.local(images)
    return encoder(images)[1]


def _has_known_forward(encoder: nn.Module) -> TypeGuard[ConvolutionalEncoder]:
    """Tell whether an encoder computes what its class's `layers` and `local` say; a subclass may override forward."""
    return isinstance(encoder, ConvolutionalEncoder) and type(encoder).forward is ConvolutionalEncoder.forward


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
        Layer name to shape; "local" is always among them, and "embedding" is (d,) for a map of embeddings too.

    Raises
    ------
    ValueError
        If the module does not return an embedding of shape (N, d) or (N, d, gh, gw) and features of shape
        (N, K, h, w).
    """
    name = type(encoder).__name__
    try:
        with evaluating(encoder):
            output = encoder(torch.zeros(2, *image_shape))
            if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)):
                raise InvalidEncoderError(
                    f"encoder must return (embedding, features), two tensors; {name} returned {type(output).__name__}."
                )
            embedding, features = output
            if embedding.ndim not in (2, 4) or features.ndim != 4 or len(embedding) != 2 or len(features) != 2:
                raise InvalidEncoderError(
                    "encoder must return an embedding of shape (N, d) or (N, d, gh, gw) and features of shape "
                    f"(N, K, h, w); for images of shape {(2, *image_shape)} {name} returned shapes "
                    f"{tuple(embedding.shape)} and {tuple(features.shape)}."
                )
            layers = read_layers(encoder, torch.zeros(2, *image_shape))
    except InvalidEncoderError:
        raise
    except Exception as error:
        raise InvalidEncoderError(f"encoder {name} cannot take images of shape {image_shape}: {error}") from error
    return {"local": tuple(features.shape[1:])} | {key: tuple(value.shape[1:]) for key, value in layers.items()}


def receptive_fields(encoder: nn.Module, image_shape: ImageShape) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find which pixels each location of the local features depends on.

    Encodes, for each row of pixels, an image that is NaN there: what depends on the row is NaN too, whatever the
    weights. Likewise for columns.

    Parameters
    ----------
    encoder : nn.Module
        The encoder, on the CPU; its mode is kept.
    image_shape : tuple of int
        Channels, height and width.

    Returns
    -------
    rows : ndarray of shape (h, 2), int64
        For each row of the local map the least half-open interval of rows of pixels that holds all it depends on.
    columns : ndarray of shape (w, 2), int64
        Likewise for columns.
    """
    with evaluating(encoder):
        return _fields(encoder, image_shape, axis=2), _fields(encoder, image_shape, axis=3)


def _fields(encoder: nn.Module, image_shape: ImageShape, axis: int) -> NDArray[np.int64]:
    """Intervals of pixels that the local map depends on along one axis, 2 or 3, of the images."""
    length = image_shape[axis - 1]
    per_chunk = max(1, PROBED_PIXELS // (image_shape[1] * image_shape[2]))
    chunks = []
    for lines in torch.arange(length).split(per_chunk):
        images = torch.zeros(len(lines), *image_shape)
        images.movedim(axis, 1)[torch.arange(len(lines)), lines] = torch.nan
        chunks.append(local_features(encoder, images).isnan().movedim(axis, 1).flatten(2).any(2))
    depends = torch.cat(chunks).T.numpy()
    first, last = depends.argmax(1), length - depends[:, ::-1].argmax(1)
    return np.stack([first, np.where(depends.any(1), last, first)], axis=1)
