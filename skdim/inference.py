"""Encoding all images, in batches of one size."""

import torch
from torch import Tensor, nn

from skdim.batches import Standardizer
from skdim.devices import is_out_of_memory
from skdim.encoders import read_layers
from skdim.images import Images

__all__ = ["encode"]

# Images a batch. On the CPU larger batches bring nothing; on CUDA the batch shrinks where memory is short.
CPU_BATCH = 128
CUDA_BATCH = 1024


def encode(encoder: nn.Module, images: Images, standardize: Standardizer, layer: str, width: int) -> Tensor:
    """Compute one layer of an encoder for all images, in float32.

    Parameters
    ----------
    encoder : nn.Module
        In evaluation mode, on the device of `standardize`.
    images : Images
        Any number of images.
    standardize : Standardizer
        Applied to each batch.
    layer : str
        Which layer.
    width : int
        Its values an image.

    Returns
    -------
    Tensor of shape (n, width), float32
        On the CPU.
    """
    on_cuda = standardize.device.type == "cuda"
    # Copies into pinned memory run while the next batch is computed.
    output = torch.empty((len(images), width), pin_memory=on_cuda)
    batch_size = CUDA_BATCH if on_cuda else CPU_BATCH
    start = 0
    with torch.inference_mode():
        while start < len(images):
            batch = images.take(slice(start, start + batch_size))
            try:
                values = _encode_batch(encoder, standardize, batch, layer, batch_size)
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch_size == 1:
                    raise
                batch_size //= 2
                continue
            output[start : start + len(batch)].copy_(values, non_blocking=True)
            start += len(batch)
    if on_cuda:
        torch.cuda.synchronize(standardize.device)
    return output


def _encode_batch(encoder: nn.Module, standardize: Standardizer, batch: Tensor, layer: str, batch_size: int) -> Tensor:
    n_rows = len(batch)
    # Kernels are chosen by batch size and differ in the last bit: every batch gets the same size.
    if n_rows < batch_size:
        batch = torch.cat([batch, batch.new_zeros(batch_size - n_rows, *batch.shape[1:])])
    return read_layers(encoder, standardize(batch))[layer][:n_rows].flatten(1)
