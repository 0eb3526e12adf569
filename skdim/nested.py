"""Nested values, trees of dicts, lists, tensors and plain values, as one string of bytes.

The bytes are in safetensors format: the tensors, and in its metadata JSON for everything else, so that nothing in them
is ever run. A SHA-256 over all of them tells what is damaged.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

__all__ = ["is_storable", "pack", "separate", "unpack"]

NO_DIGEST = b"0" * 64
DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def pack(tree: Any) -> bytearray:
    """Put a tree of dicts, lists, tuples, tensors, arrays and plain values into the bytes of a safetensors file.

    Raises
    ------
    TypeError
        If there is something else in it.
    """
    plain, tensors = separate(tree)
    metadata = {"sha256": NO_DIGEST.decode(), "tree": json.dumps(plain)}
    content = bytearray(safetensors.torch.save(tensors, metadata))
    digest = hashlib.sha256(content).hexdigest().encode()
    # Quotes in the text are escaped, so the first match is the entry itself.
    start, end = DIGEST.search(content).span(1)  # type: ignore[union-attr]
    content[start:end] = digest
    return content


def unpack(content: bytes) -> Any:
    """Read what `pack` made.

    Raises
    ------
    ValueError
        If a bit of it is not as it was.
    """
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    entry = DIGEST.search(header)
    if entry is None:
        raise ValueError("it is empty or incomplete" if len(content) <= 8 + len(header) else "it has no checksum")
    start, end = (8 + position for position in entry.span(1))
    blank = hashlib.sha256(content[:start] + NO_DIGEST)
    blank.update(memoryview(content)[end:])
    if blank.hexdigest().encode() != entry[1]:
        raise ValueError("its checksum is wrong")
    return _from_json(json.loads(json.loads(header)["__metadata__"]["tree"]), safetensors.torch.load(content))


def is_storable(value: Any) -> bool:
    """Tell whether a checkpoint can hold a value."""
    try:
        separate(value)
    except TypeError:
        return False
    return True


def separate(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separate a tree into what JSON can hold and its tensors, by their paths in it, on the CPU.

    Raises
    ------
    TypeError
        If there is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    return _to_json(tree, tensors, ""), tensors


def _to_json(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise TypeError(f"there are two tensors of the name {path!r}")
        # A copy, because tied weights share their memory, which safetensors does not allow.
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        # As pairs, because keys may be numbers.
        return {"dict": [[key, _to_json(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "biuf":
        # A copy in the machine's own order of bytes, which torch wants.
        return {"array": _to_json(torch.from_numpy(value.astype(value.dtype.newbyteorder("="))), tensors, path)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a checkpoint cannot hold {path[1:]!r}, a {type(value).__name__}")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return _from_json(value["array"], tensors).numpy()
    if "tuple" in value:
        return tuple(_from_json(item, tensors) for item in value["tuple"])
    return {key: _from_json(item, tensors) for key, item in value["dict"]}
