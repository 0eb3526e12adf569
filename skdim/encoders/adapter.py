"""An encoder made of any network and the name of the layer whose output is the feature map."""

import copy
import threading
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from skdim.encoders.blocks import evaluating, mean_over_map
from skdim.encoders.reading import InvalidEncoderError
from skdim.layouts import ImageShape

__all__ = ["LayerEncoder"]


class LayerEncoder(nn.Module):
    """Encoder made of an ordinary network and one of its layers, whose output is the map of local features.

    The network, of torchvision or timm for instance, is copied and run as it is. Its output is the embedding where it
    has `n_components` values, else a linear layer on the output, or on its mean over the locations of a map, is.

    Parameters
    ----------
    network : nn.Module
        Maps images (N, C, H, W) to vectors (N, d) or maps (N, K, h, w). A network that ends in a classifier gives a
        better embedding without it (``network.fc = nn.Identity()``).
    layer : str
        Dotted name of the layer, as in ``network.named_modules()``, that yields the local features, of shape
        (N, K, h, w): the last output, where the layer runs more than once, and as the layers after it leave it, where
        they work in place.
    image_shape : tuple of int
        Channels, height and width of an image.
    n_components : int
        Width of the embedding.

    Raises
    ------
    ValueError
        If there is no such layer, or network or layer do not return such tensors for such images.

    Examples
    --------
    >>> from functools import partial
    >>> from torch import nn
    >>> from skdim import DIMTransformer
    >>> from skdim.encoders import LayerEncoder
    >>> network = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1))
    >>> dim = DIMTransformer(encoder=partial(LayerEncoder, network, "1"))
    """

    def __init__(self, network: nn.Module, layer: str, image_shape: ImageShape, n_components: int) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be an instance of torch.nn.Module, got {network!r}.")
        names = [name for name, _ in network.named_modules() if name]
        if layer not in names:
            close = get_close_matches(str(layer), names, n=8, cutoff=0)
            raise ValueError(f"{type(network).__name__} has no layer {layer!r}; some that it has are {close}.")
        self.network = copy.deepcopy(network)
        # What is built where tensors have no values stays there.
        if not any(tensor.is_meta for tensor in self.network.state_dict().values()):
            self.network.cpu()
        self.layer = layer
        self.network.get_submodule(layer).register_forward_hook(_hand_over)
        output = self._probe(image_shape)
        width = output.shape[1]
        is_embedding = output.ndim == 2 and width == n_components
        self.project = nn.Identity() if is_embedding else nn.Linear(width, n_components)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (N, n_components) and the local features (N, K, h, w)."""
        output, features = self._run(images)
        return self.project(mean_over_map(output)), features

    def _run(self, images: Tensor) -> tuple[Any, Any]:
        """Run the network; return its output and the layer's."""
        layer = self.network.get_submodule(self.layer)
        outer = getattr(_handed_over, "outputs", None)
        outputs: dict[nn.Module, Any] = {}
        _handed_over.outputs = outputs
        try:
            output = self.network(images)
        finally:
            _handed_over.outputs = outer
        if layer not in outputs:
            raise InvalidEncoderError(
                f"layer {self.layer!r} of {type(self.network).__name__} is not run by its forward."
            )
        return output, outputs[layer]

    def _run_without_values(self, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
        """Run a copy for shapes alone, of images as large as a stranger's file may say; None where that won't do."""
        try:
            # A copy, because a network may keep what it makes of images.
            valueless = copy.deepcopy(self).to("meta")
            outputs = valueless._run(torch.zeros(shape, device="meta"))
        except Exception:
            # What a network does may depend on values. If it is unfit, running it with values says so.
            return None
        # What the first pass makes has to be there for weights to be loaded into.
        return outputs if valueless.state_dict().keys() == self.state_dict().keys() else None

    def _probe(self, image_shape: ImageShape) -> Tensor:
        """Check what network and layer return for two blank images; return the network's output."""
        shape = (2, *image_shape)
        name = type(self.network).__name__
        try:
            with evaluating(self.network):
                output, features = self._run_without_values(shape) or self._run(torch.zeros(shape))
        except InvalidEncoderError:
            raise
        except Exception as error:
            raise InvalidEncoderError(f"network {name} cannot take images of shape {image_shape}: {error}") from error
        where = f"for images of shape {shape}"
        if not isinstance(output, Tensor) or output.ndim not in (2, 4) or len(output) != 2:
            raise InvalidEncoderError(
                f"network must return a tensor of shape (N, d) or (N, K, h, w); {where} {name} returned "
                f"{_describe(output)}."
            )
        wanted = (
            f"layer must be one that returns a tensor of shape (N, K, h, w); {where} {self.layer!r} of {name} returned"
        )
        if not isinstance(features, Tensor) or features.ndim != 4 or len(features) != 2:
            raise InvalidEncoderError(f"{wanted} {_describe(features)}.")
        if not _has_aspect(features.shape[2:], image_shape) and _has_aspect(features.shape[1:3], image_shape):
            raise InvalidEncoderError(f"{wanted} {_describe(features)}, which seems to have its channels last.")
        return output


# Where the forward pass that runs in this thread collects the outputs of hooked layers: nothing is kept on the module,
# which so can be copied and pickled and run by several threads, nor anywhere once the pass is over.
_handed_over = threading.local()


def _hand_over(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook; a function of the module's, so that it is pickled and copied with the layer."""
    outputs = getattr(_handed_over, "outputs", None)
    if outputs is not None:
        outputs[layer] = output


def _describe(value: Any) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _has_aspect(size: torch.Size, image_shape: ImageShape) -> bool:
    """Whether a map has the sides of an image, up to a common factor and the rounding of a pixel."""
    (height, width), (_, image_height, image_width) = size, image_shape
    rounding = max(image_height, image_width)
    return (
        height <= image_height and width <= image_width and abs(height * image_width - width * image_height) <= rounding
    )
