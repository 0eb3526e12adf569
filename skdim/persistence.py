"""Weights of an encoder as plain NumPy arrays and back, so that a pickle holds nothing of torch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["to_arrays", "with_arrays"]


def to_arrays(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Copy a module's parameters and buffers.

    Parameters
    ----------
    module : nn.Module
        On any device.

    Returns
    -------
    dict
        Name to ndarray.
    """
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}


def with_arrays(module: nn.Module, arrays: dict[str, NDArray[Any]]) -> nn.Module:
    """Load parameters and buffers into a module.

    Parameters
    ----------
    module : nn.Module
        Of the same structure.
    arrays : dict
        As `to_arrays` made them.

    Returns
    -------
    nn.Module
        The module, with copies of the arrays, in evaluation mode.
    """
    # Copies first, because arrays of a memory-mapped joblib file are read-only, which torch does not know.
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return module.eval()
