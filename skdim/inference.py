"""Encoding all images, in batches of one size, and scoring their locations."""

from math import log, log2, prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skdim.batches import Standardizer
from skdim.devices import full_float32, is_out_of_memory, usual_torch
from skdim.discriminators import Critic
from skdim.encoders import mean_over_map, read_layers
from skdim.encoders.blocks import evaluating
from skdim.encoders.convolutional import ConvolutionalEncoder
from skdim.images import Images
from skdim.layouts import ImageShape
from skdim.loaders import LoadedImages
from skdim.model import InfoMaxModel
from skdim.sources import MappedPages

__all__ = ["encode", "local_scores"]

# Images a batch. On the CPU larger batches bring nothing, nor do more pixels; on CUDA the batch shrinks where memory is
# short.
CPU_BATCH = 128
CPU_PIXELS = 1 << 18
CUDA_BATCH = 1024
# Most of an output that is put into pinned memory.
PINNED_BYTES = 1 << 28
# A critic may hold as many numbers a pair of location and embedding as it has units.
SCORED_BATCH = 32


def encode(
    encoder: nn.Module,
    images: Images | LoadedImages,
    standardize: Standardizer,
    layer: str,
    width: int,
    out: NDArray[Any] | None = None,
) -> Tensor:
    """Compute one layer of an encoder for all images, in float32.

    Parameters
    ----------
    encoder : nn.Module
        On the device of `standardize`; its modes are kept.
    images : Images or LoadedImages
        Any number of images that is known.
    standardize : Standardizer
        Applied to each batch.
    layer : str
        Which layer.
    width : int
        Its values an image.
    out : ndarray of shape (n, width), float32, default=None
        Where to put them.

    Returns
    -------
    Tensor of shape (n, width), float32
        On the CPU; that of `out`, if it is given.
    """
    on_cuda = standardize.device.type == "cuda"
    shape = (images.n_images or 0, width)
    # Copies into pinned memory run while the next batch is computed; torch rounds it up and keeps it for later.
    is_pinned = on_cuda and 4 * shape[0] * width <= PINNED_BYTES
    # Tensors made in the user's inference mode could not be written to outside it.
    with torch.inference_mode(False):
        output = (
            torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=is_pinned)
            if out is None
            else torch.from_numpy(out)
        )
        are_finite = torch.ones((), dtype=torch.bool, device=standardize.device)
    pages = None if out is None else MappedPages(out)
    batch_size = CUDA_BATCH if on_cuda else _cpu_batch(images.shape)
    start = 0
    # What an encoder of the user's keeps of a pass, a table of positions say, has to serve in training, too.
    inference = torch.inference_mode(isinstance(encoder, ConvolutionalEncoder))
    # In training, between whose steps a callback may ask, it is not in evaluation mode.
    with usual_torch(standardize.device), inference, full_float32, evaluating(encoder):
        for rest in images.chunks(batch_size):
            while len(rest):
                batch = rest[:batch_size]
                try:
                    values = _encode_batch(encoder, standardize, batch, layer, batch_size)
                    is_finite = values.isfinite().all()
                except RuntimeError as error:
                    if not is_out_of_memory(error) or batch_size == 1:
                        raise
                    batch_size //= 2
                    continue
                are_finite &= is_finite
                written = output[start : start + len(batch)].copy_(values, non_blocking=True)
                if pages is not None:
                    pages.touch(written.numpy())
                start, rest = start + len(batch), rest[len(batch) :]
    if on_cuda:
        # Not all of the device, which would break what another thread may be recording on it.
        torch.cuda.current_stream(standardize.device).synchronize()
    if not are_finite:
        index = int((~output.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(
            f"The {layer} of image {index} of X is not finite. Probably its values are too far from those of the "
            "images in fit, or the encoder's weights are unfit."
        )
    return output


def _cpu_batch(image_shape: ImageShape) -> int:
    # A power of two, as kernels like it; nothing but the shape counts, so that all batches of an encoder have one size.
    return min(CPU_BATCH, 1 << max(0, round(log2(CPU_PIXELS / prod(image_shape[1:])))))


def _encode_batch(encoder: nn.Module, standardize: Standardizer, batch: Tensor, layer: str, batch_size: int) -> Tensor:
    # Batch norms folded into convolutions would bring 5 to 7 %, but other bits than `encoder_` and a second network.
    n_rows = len(batch)
    # Kernels are chosen by batch size and differ in the last bit: every batch gets the same size.
    if n_rows < batch_size:
        batch = torch.cat([batch, batch.new_zeros(batch_size - n_rows, *batch.shape[1:])])
    if standardize.device.type == "cuda":
        # The next batch is prepared while this one is copied and computed.
        batch = batch.pin_memory()
    return read_layers(encoder, standardize(batch))[layer][:n_rows].flatten(1)


def local_scores(model: InfoMaxModel, images: Images, others: Images | None, standardize: Standardizer) -> Tensor:
    """Score each location of images against the image's embedding, relative to locations of other images.

    Parameters
    ----------
    model : InfoMaxModel
        With a local critic, on the device of `standardize`; its modes are kept.
    images : Images
        The images.
    others : Images or None
        The other images; None means that for each of `images` these are the rest of them, at least one.
    standardize : Standardizer
        Applied to each batch.

    Returns
    -------
    Tensor of shape (n, h, w), float32
        On the CPU: score, less the logarithm of the mean exponential of the scores of all other images' locations
        against the same embedding.
    """
    critic: Critic = model.critics["local"]  # type: ignore[assignment]
    with usual_torch(standardize.device), torch.inference_mode(), full_float32, evaluating(model):
        maps, vectors, (height, width) = _encode_pairs(model, critic, images, standardize)
        own = critic.score(maps, vectors[:, None])[:, 0]
        other_maps = maps if others is None else _encode_pairs(model, critic, others, standardize)[0]
        levels = []
        for start in range(0, len(other_maps), SCORED_BATCH):
            scores = critic.score_all(other_maps[start : start + SCORED_BATCH], vectors)
            if others is None:
                column = torch.arange(scores.shape[1], device=scores.device)
                scores[column + start, column] = -torch.inf
            levels.append(torch.logsumexp(scores.flatten(1), dim=1))
        n_others = len(other_maps) - (others is None)
        level = torch.logsumexp(torch.stack(levels), dim=0) - log(n_others * own.shape[1])
    return (own - level[:, None]).view(-1, height, width).cpu()


def _encode_pairs(
    model: InfoMaxModel, critic: Critic, images: Images, standardize: Standardizer
) -> tuple[Tensor, Tensor, torch.Size]:
    """Both sides' parts of the critic's scores, (n, L, U) and (n, U), and height and width of the features."""
    parts = []
    for start in range(0, len(images), SCORED_BATCH):
        embedding, features = model.encoder(standardize(images.take(slice(start, start + SCORED_BATCH))))
        embedding = mean_over_map(embedding)
        if model.noise is not None:
            embedding = model.noise.on_support(embedding)
        parts.append(critic.encode(features, embedding))
    maps, vectors = (torch.cat(side) for side in zip(*parts, strict=True))
    return maps, vectors, features.shape[2:]
