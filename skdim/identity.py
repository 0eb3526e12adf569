"""What a training is, by plain values: those who are to share one, later or beside it, compare them."""

import copyreg
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from math import isfinite
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skdim.devices import resolve_precision
from skdim.images import Images
from skdim.layouts import ImageShape
from skdim.nested import is_storable, separate

__all__ = ["describe", "describe_images", "describe_training"]

# Parameters that are not compared, because training is the same whatever they are, or because the images, the resolved
# device and precision and the drawn seed are compared instead. Callbacks cannot be compared.
NOT_COMPARED = (
    *("callbacks", "checkpoint_dir", "data_format", "device", "distributed", "gather_negatives", "image_shape"),
    *("output_layer", "precision", "random_state", "verbose", "warm_start"),
)


def describe_training(params: Mapping[str, Any], image_shape: ImageShape, device: torch.device) -> dict[str, Any]:
    """Describe what a training depends on, beside its images and seed.

    Parameters
    ----------
    params : mapping of str to object
        Those of `DIMTransformer`.
    image_shape : tuple of int
        Channels, height and width of an image.
    device : torch.device
        Where it trains.

    Returns
    -------
    dict
        What JSON can hold, by name.
    """
    return {
        **{name: describe(value) for name, value in params.items() if name not in NOT_COMPARED},
        "device": device.type,
        "precision": str(resolve_precision(params["precision"], device, image_shape) or torch.float32),
    }


def describe(value: Any) -> Any:
    """Describe a parameter by plain values that another process gives for the same parameter, too.

    Parameters
    ----------
    value : object
        A number, string, collection, array, tensor, module, class, function or object of any other kind.

    Returns
    -------
    object
        What JSON can hold. Arrays and modules are told by digests, classes by their names, functions also by their code
        and what they hold, other objects by their attributes, or by what pickle keeps of them if they show none. What a
        function reads of its module is not told.
    """
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> Any:
    """Describe a value that is part of those with the ids `inside`."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, float) and not isfinite(value):
        # JSON has no such numbers, and nan is not equal to itself.
        return repr(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, list | tuple):
        return [_describe(item, inside) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _describe(item, inside) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_describe(item, inside) for item in value.ravel()]
    if isinstance(value, np.ndarray | Tensor):
        data = _bytes_of(value) if isinstance(value, Tensor) else value.tobytes()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": _digest(data)}
    if isinstance(value, partial):
        return {"partial": [_describe(part, inside) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, MethodType):
        return {"method": [_describe(value.__func__, inside), _describe(value.__self__, inside)]}
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{getattr(named, '__module__', None)}.{named.__qualname__}"
    if isinstance(value, nn.Module):
        return f"{name} {_digest_module(value)}"
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return {name: _describe([value.__code__, value.__defaults__, value.__kwdefaults__, held], inside)}
    if isinstance(value, CodeType):
        # The bytes hold places in these lists, not names and numbers themselves.
        return [_digest(value.co_code), list(value.co_names), _describe(value.co_consts, inside)]
    if isinstance(value, set | frozenset):
        return {name: sorted(json.dumps(_describe(item, inside)) for item in value)}
    if isinstance(value, bytes | complex | range | slice | torch.dtype | torch.device):
        return repr(value)
    if named is value:
        return name
    slots = [slot for parent in type(value).__mro__ for slot in getattr(parent, "__slots__", ())]
    attributes = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    attributes |= getattr(value, "__dict__", {})
    return {name: _describe(attributes or _reduced(value), inside)}


def _reduced(value: Any) -> list[Any]:
    """List what pickle keeps of an object that shows no attributes, as generators and patterns do."""
    with suppress(Exception):
        reduce: Callable[[Any], Any] = copyreg.dispatch_table.get(type(value), lambda each: each.__reduce_ex__(2))
        reduced = reduce(value)
        if isinstance(reduced, tuple):
            return [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
    return []


def _bytes_of(tensor: Tensor) -> memoryview:
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return values.flatten().view(torch.uint8).numpy().data


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_module(module: nn.Module) -> str:
    weights = {name: weight for name, weight in module.state_dict().items() if not nn.parameter.is_lazy(weight)}
    attributes = [
        {
            name: value
            for name, value in vars(part).items()
            if name[0] != "_" and name != "training" and is_storable(value)
        }
        for part in module.modules()
    ]
    # Not the bytes of `pack`: safetensors orders its metadata differently each time.
    plain, tensors = separate({"structure": repr(module), "weights": weights, "attributes": attributes})
    digest = hashlib.sha256(json.dumps(plain).encode())
    for tensor in tensors.values():
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def describe_images(images: Images) -> dict[str, Any]:
    """Describe images by shape, dtype and a digest that does not depend on how they lie in memory.

    Parameters
    ----------
    images : Images
        Any number.

    Returns
    -------
    dict
        What JSON can hold.
    """
    digest = hashlib.sha256()
    for chunk in images.chunks():
        digest.update(chunk.contiguous().numpy().data)
    return {
        "shape": [len(images), *images.shape],
        "dtype": str(images.array.dtype),
        "sha256": digest.hexdigest()[:16],
    }
