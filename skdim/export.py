"""The fitted encoder, with the scaling of its input, as an ONNX file. Needs onnx, onnxscript and onnxruntime."""

import copy
import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skdim.atomic import write_atomically
from skdim.batches import Standardizer
from skdim.encoders import read_layers
from skdim.layouts import ImageShape

__all__ = ["write_onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# What protobuf, and so an ONNX file without files beside it, has room for.
MAX_BYTES = (1 << 31) - 1

# Most that the file may differ from the encoder, as a share of the layer's largest value.
TOLERANCE = 1e-4


def write_onnx(
    path: str | os.PathLike[str],
    encoder: nn.Module,
    layer: str,
    image_shape: ImageShape,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    *,
    is_uint8: bool,
) -> None:
    """Write a file that computes one layer of an encoder, once it has been seen to compute the same values.

    Parameters
    ----------
    path : str or path-like
        The file; one that is there is replaced.
    encoder : nn.Module
        In evaluation mode; it is left as it is.
    layer : str
        Which layer.
    image_shape : tuple of int
        Channels, height and width.
    mean, std : ndarray of shape (C,)
        As for `Standardizer`.
    is_uint8 : bool
        Whether the file takes uint8 images, else float32.

    Raises
    ------
    ImportError
        If a package is missing.
    ValueError
        If torch cannot export the encoder for any number of images, what it exports computes something else, or the
        weights are more than an ONNX file holds.
    OSError
        If the file cannot be written. One that was there is as it was.
    """
    _check_packages()
    # Exporting takes a while.
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    name = type(encoder).__name__
    n_bytes = sum(weight.nbytes for weight in encoder.state_dict().values())
    if n_bytes > MAX_BYTES:
        raise ValueError(f"encoder {name} has {n_bytes} bytes of weights, but an ONNX file holds {MAX_BYTES}.")
    on_cpu = copy.deepcopy(encoder).cpu()
    network = _FromStoredImages(on_cpu, Standardizer(mean, std, torch.device("cpu")), layer).eval()
    try:
        content = _export(network, _random_images(2, image_shape, mean, std, is_uint8), layer)
    except Exception as error:
        raise ValueError(
            f"encoder {name} cannot be exported for any number of images N (which a forward finds in images.shape[0]; "
            f"len(images) fixes it): {error}"
        ) from error
    for n_images in (1, 3):
        _check_same_values(network, content, _random_images(n_images, image_shape, mean, std, is_uint8))
    write_atomically(Path(path), content)


class _FromStoredImages(nn.Module):
    """From images (N, C, H, W), uint8 or float32, to one layer of the encoder (N, width)."""

    def __init__(self, encoder: nn.Module, standardize: Standardizer, layer: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.standardize = standardize
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return read_layers(self.encoder, self.standardize(images))[self.layer].flatten(1)


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"to_onnx requires {', '.join(missing)}. You can install what is missing with "
            f"`pip install {' '.join(missing)}`"
        )


def _random_images(
    n_images: int, image_shape: ImageShape, mean: NDArray[np.float32], std: NDArray[np.float32], is_uint8: bool
) -> Tensor:
    rng = np.random.default_rng(n_images)
    shape = (n_images, *image_shape)
    if is_uint8:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    # A channel that was constant, with an infinite std, is left out whatever it is.
    spread = np.where(np.isinf(std), 1.0, std)
    images = mean[:, None, None] + spread[:, None, None] * rng.standard_normal(shape)
    return torch.from_numpy(images.astype(np.float32))


def _export(network: nn.Module, images: Tensor, layer: str) -> bytes:
    with _quiet(), torch.no_grad():
        # Not the exporter's own tracing, which takes a batch size that is fixed for an answer.
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network, (images,), dynamic_shapes=dynamic, strict=False)
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["images"],
            output_names=[layer],
            verbose=False,
        )
    model = exported.model_proto
    for node in model.graph.node:
        # Stack traces, with the paths of the machine that exports.
        node.ClearField("metadata_props")
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says about other packages and about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_same_values(network: _FromStoredImages, content: bytes, images: Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = network(images).numpy()
    # A NaN is no agreement.
    if found.shape != expected.shape or not abs(found - expected).max() <= TOLERANCE * abs(expected).max():
        raise ValueError(
            f"What torch exports of encoder {type(network.encoder).__name__} computes other values of "
            f"{network.layer!r} in onnxruntime than the encoder does; no file was written."
        )
