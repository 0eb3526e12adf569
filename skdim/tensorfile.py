"""One file of tensors and plain values: the safetensors format, checksums, atomic writing, defensive reading.

A file is a length, a JSON header and the tensors. Two entries of the header's metadata are ours: "skdim", a JSON text
with the plain values and the checksum of the tensors, and "sha256", the checksum of that text.
"""

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from skdim.atomic import write_atomically

__all__ = ["InvalidFileError", "check_names", "check_shapes", "read_header", "read_tensors", "write_tensor_file"]

# Ten thousand epochs or columns fit.
MAX_HEADER_BYTES = 1 << 22
# Lists and objects in it, each of which takes a hundred times its two characters in memory.
MAX_CONTAINERS = 1 << 16

# A text in JSON. Possessive, so that nothing of a long one is kept to go back to.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)

# How files of other kinds begin. As lengths of headers, all of these are far beyond the most.
FOREIGN = {
    b"PK\3\4": "a zip archive, as torch.save writes it",
    **{
        bytes([0x80, protocol]): "a pickle, which joblib.load or pickle.load reads, if you trust where it is from: "
        "loading it runs whatever it says"
        for protocol in (2, 3, 4, 5)
    },
}


class InvalidFileError(ValueError):
    """A file does not hold what `DIMTransformer.save` writes, or not for this class."""


def write_tensor_file(path: str | os.PathLike[str], content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and plain values to a file, whole or not at all.

    Parameters
    ----------
    path : str or path-like
        The file; one that is there is replaced.
    content : dict
        Values that JSON has.
    tensors : mapping of str to Tensor
        On any device.

    Raises
    ------
    ValueError
        If the content is longer than `read_header` reads.
    """
    # Clones, because the format knows neither views nor tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(content | {"tensors_sha256": _digest(tensors)}, allow_nan=False)
    data = safetensors.torch.save(tensors, {"skdim": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    length = int.from_bytes(data[:8], "little")
    # As `read_header` reads them: the header, and the text in it.
    n_containers = max(map(_count_containers, (data[8 : 8 + length], text.encode())))
    if length > MAX_HEADER_BYTES or n_containers > MAX_CONTAINERS:
        raise ValueError(
            "History, column names and the rest of what is to be saved beside the weights are too long: they take more "
            f"than {MAX_HEADER_BYTES} bytes or {MAX_CONTAINERS} lists and dicts."
        )
    write_atomically(Path(path), data)


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read all but the tensors.

    Parameters
    ----------
    file : binary file
        At its beginning.
    size : int
        Its bytes.

    Returns
    -------
    declared : dict
        Name to description of the tensors that the file says it has, nothing of which is checked.
    content : dict
        The plain values; their checksum is right.
    digest : str
        The checksum that the tensors must have.

    Raises
    ------
    InvalidFileError
        If this is not such a file, or it is damaged.
    """
    if size == 0:
        raise InvalidFileError("it is empty")
    if size < 8:
        raise InvalidFileError("it is truncated")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        for beginning, kind in FOREIGN.items():
            if start.startswith(beginning):
                raise InvalidFileError(f"it is no safetensors file; it begins like {kind}")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise InvalidFileError(f"it is truncated or no safetensors file: it declares a header of {length} bytes")
    declared = _parse_json(file.read(length), "header")
    metadata = declared.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.keys() == {"sha256", "tree"}:
        raise InvalidFileError(
            "it is a checkpoint of a training, which fit goes on from with checkpoint_dir and the same parameters and "
            "images"
        )
    if not isinstance(metadata, dict) or metadata.keys() != {"skdim", "sha256"}:
        raise InvalidFileError("it is a safetensors file of other software")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidFileError("its metadata are not all texts")
    # A text from JSON may have lone surrogates, which UTF-8 has not.
    text = metadata["skdim"].encode("utf-8", "surrogatepass")
    if hashlib.sha256(text).hexdigest() != metadata["sha256"]:
        raise InvalidFileError("the checksum of its metadata is wrong, the file is damaged")
    content = _parse_json(text, "metadata")
    digest = content.pop("tensors_sha256", None)
    if not isinstance(digest, str):
        raise InvalidFileError("it has no checksum of its tensors")
    return declared, content, digest


def _count_containers(text: bytes) -> int:
    """Count lists and objects in a JSON text."""
    outside = STRING.sub(b"", text)
    return outside.count(b"[") + outside.count(b"{")


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    if _count_containers(text) > MAX_CONTAINERS:
        raise InvalidFileError(f"its {name} has more than {MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"its {name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFileError(f"its {name} is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is there twice")
    return entries


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def check_names(found: Mapping[str, Any], expected: Iterable[str], what: str) -> None:
    """Refuse a file in which names are missing or unknown; `what` says of what, in the message."""
    for name in sorted(set(expected) - found.keys()):
        raise InvalidFileError(f"the {what} {reprlib.repr(name)} is missing")
    for name in sorted(found.keys() - set(expected)):
        raise InvalidFileError(f"the {what} {reprlib.repr(name)} is unknown")


def check_shapes(declared: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Compare the tensors that a file says it has with those of the network it calls for."""
    check_names(declared, expected, "tensor")
    for name, tensor in expected.items():
        shape = declared[name].get("shape") if isinstance(declared[name], dict) else None
        if shape != list(tensor.shape):
            raise InvalidFileError(
                f"the tensor {name!r} has shape {reprlib.repr(shape)}, expected {list(tensor.shape)}"
            )


def read_tensors(file: BinaryIO, size: int, expected: Mapping[str, Tensor], digest: str) -> dict[str, Tensor]:
    """Read the tensors.

    Parameters
    ----------
    file : binary file
        After its header.
    size : int
        Its bytes.
    expected : mapping of str to Tensor
        Tensors of the names, shapes and dtypes that it must have, which may be on the meta device.
    digest : str
        As `read_header` gave it.

    Returns
    -------
    dict
        Name to Tensor, on the CPU.

    Raises
    ------
    InvalidFileError
        If the tensors are others, or damaged.
    """
    needed = sum(tensor.nbytes for tensor in expected.values())
    if size != file.tell() + needed:
        raise InvalidFileError(
            f"it is truncated or of other dtypes: {needed} bytes of tensors should follow the header, "
            f"{size - file.tell()} do"
        )
    file.seek(0)
    try:
        tensors = safetensors.torch.load(file.read(size))
    except (SafetensorError, KeyError, AssertionError, RuntimeError, ValueError) as error:
        raise InvalidFileError(f"it is no valid safetensors file: {error}") from error
    for name, tensor in expected.items():
        if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (tensor.dtype, tensor.shape):
            raise InvalidFileError(f"the tensor {name!r} is not {tensor.dtype} of shape {list(tensor.shape)}")
    if _digest(tensors) != digest:
        raise InvalidFileError("the checksum of its tensors is wrong, the file is damaged")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
