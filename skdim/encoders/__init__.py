"""Encoders: from a batch of images to an embedding and the map of local features on the way.

An encoder is an ``nn.Module`` built as ``Encoder(image_shape, n_components)`` whose ``forward`` maps images of shape
(N, C, H, W) to ``(embedding, features)``: the embedding of shape (N, n_components), or a map of embeddings of shape
(N, n_components, gh, gw), and the local features of shape (N, K, h, w). Those that have a name also have ``layers``,
which returns everything `output_layer` can name; `LayerEncoder` makes an encoder of any network.
"""

from skdim.encoders.adapter import LayerEncoder
from skdim.encoders.alexnet import AlexNetEncoder
from skdim.encoders.blocks import FlattenMap, halving_stack, mean_over_map, n_halvings
from skdim.encoders.build import ENCODERS, build_encoder, make_encoder
from skdim.encoders.dcgan import DCGANEncoder
from skdim.encoders.reading import InvalidEncoderError, layer_shapes, local_features, read_layers, receptive_fields
from skdim.encoders.resnet import ResNetEncoder
from skdim.encoders.standardized import StandardizedEncoder
from skdim.encoders.stride1 import Stride1Encoder

__all__ = [
    "ENCODERS",
    "AlexNetEncoder",
    "DCGANEncoder",
    "FlattenMap",
    "InvalidEncoderError",
    "LayerEncoder",
    "ResNetEncoder",
    "StandardizedEncoder",
    "Stride1Encoder",
    "build_encoder",
    "halving_stack",
    "layer_shapes",
    "local_features",
    "make_encoder",
    "mean_over_map",
    "n_halvings",
    "read_layers",
    "receptive_fields",
]
