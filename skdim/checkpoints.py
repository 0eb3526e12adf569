"""The state of a training on disk: one file an epoch, from which an interrupted training goes on to equal bits.

A file is in safetensors format: the tensors, and in its metadata JSON for everything else, so that nothing in it is
ever run. A SHA-256 over all its bytes tells a damaged file.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from skdim.atomic import write_atomically
from skdim.distributed import ALONE, Group
from skdim.images import CHUNK_BYTES, Images
from skdim.notices import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Checkpoints", "describe", "describe_images", "is_storable"]

# How many checkpoints a folder keeps: the newest may be damaged by what befalls a disk.
N_KEPT = 2

NO_DIGEST = b"0" * 64
DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class Checkpoints:
    """The checkpoints of one training in a folder of their own; a context manager that keeps other trainings out.

    Parameters
    ----------
    folder : str or path-like
        Made if it is not there.
    identity : dict
        What makes this training the one it is, by name: its parameters, as `describe` gives them, and "images".
    adopted : collection of str, default=()
        Names of which a checkpoint's value is taken over instead of compared.
    group : Group, default=ALONE
        The processes that train together. The first of them reads and writes, and tells the others.

    Attributes
    ----------
    identity : dict
        As given, with what was adopted.
    saved : dict or None
        The state in the newest checkpoint that is whole.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, Any],
        adopted: Collection[str] = (),
        group: Group = ALONE,
    ) -> None:
        self.folder = Path(folder)
        self.identity = dict(identity)
        self.adopted = adopted
        self.group = group
        self.saved: dict[str, Any] | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Claim the folder and read its newest checkpoint.

        Raises
        ------
        OSError
            If the folder cannot be written to.
        ValueError
            If it is in use, or holds another training or nothing but damaged checkpoints.
        """
        try:
            with self.group.together():
                if self.group.rank == 0:
                    self._open()
            self.saved, self.identity = self.group.broadcast((self.saved, self.identity))
        except BaseException:
            self._release()
            raise
        return self

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            for left_over in self.folder.glob(".epoch-*.tmp"):
                left_over.unlink()
            probe = self.folder / ".epoch-probe.tmp"
            probe.write_bytes(b"?")
            probe.unlink()
            self.saved = self._read_newest()
        except OSError as error:
            raise OSError(
                error.errno, f"checkpoint_dir={str(self.folder)!r} cannot be used: {error.strerror or error}"
            ) from error

    def __exit__(self, *_: object) -> None:
        self._release()

    def write(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write the state after an epoch, and remove all older checkpoints but one.

        Parameters
        ----------
        epoch : int
            Epochs trained.
        state : dict
            Of tensors and plain values, nested at will.

        Warns
        -----
        UserWarning
            If the file cannot be written. The checkpoints there are stay.
        """
        if self.group.rank > 0:
            return
        content = pack({"identity": self.identity, "state": dict(state)})
        path = self.folder / f"epoch-{epoch:06}.safetensors"
        try:
            write_atomically(path, content)
            self._remove_older_than(path)
        except OSError as error:
            # A full disk shall not end a training of days, whose result needs no disk.
            warn(f"The checkpoint of epoch {epoch} could not be written, training goes on without it: {error}")

    def _paths(self) -> list[Path]:
        """Checkpoints, newest first."""
        return sorted(self.folder.glob("epoch-*.safetensors"), reverse=True)

    def _remove_older_than(self, path: Path) -> None:
        older = [other for other in self._paths() if other < path]
        for superseded in older[N_KEPT - 1 :]:
            superseded.unlink()

    def _claim(self) -> None:
        if fcntl is None:
            return
        # On the folder itself: nothing to leave behind, and the system lets go of it for a killed process.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} is in use by another training; each needs a directory of its own."
            ) from error
        except OSError as error:
            # Network file systems may have no locks, or none on folders.
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR):
                raise

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_newest(self) -> dict[str, Any] | None:
        damaged: list[tuple[Path, ValueError]] = []
        for path in self._paths():
            try:
                content = unpack(path.read_bytes())
            except ValueError as error:
                damaged.append((path, error))
                continue
            self._check_identity(content["identity"])
            for bad_path, reason in damaged:
                warn(f"The checkpoint {str(bad_path)!r} is damaged ({reason}); training goes on from {path.name}.")
            # A process may have been killed before it did so.
            self._remove_older_than(path)
            return content["state"]
        if damaged:
            raise ValueError(
                f"All checkpoints in checkpoint_dir={str(self.folder)!r} are damaged ({damaged[0][1]}). Empty the "
                "directory to start anew."
            )
        return None

    def _check_identity(self, saved: dict[str, Any]) -> None:
        self.identity |= {name: saved[name] for name in self.adopted if name in saved}
        names = [name for name in {**saved, **self.identity} if saved.get(name) != self.identity.get(name)]
        if names:
            what = "images" if "images" in names else "parameters"
            differences = "; ".join(
                f"{name}: {saved.get(name)!r} there, {self.identity.get(name)!r} here" for name in names
            )
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} holds the training of other {what} ({differences}). Use another "
                "directory, or empty this one to start anew."
            )


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
        and what they hold, other objects by their attributes. What a function reads of its module is not told.
    """
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> Any:
    """Describe a value that is part of those with the ids `inside`."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, list | tuple):
        return [_describe(item, inside) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _describe(item, inside) for key, item in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        array = np.ascontiguousarray(value.detach().float().cpu() if isinstance(value, Tensor) else value)
        if array.dtype == object:
            return [_describe(item, inside) for item in array.ravel()]
        return {"shape": list(array.shape), "dtype": str(value.dtype), "sha256": _digest(array.tobytes())}
    if isinstance(value, partial):
        return {"partial": [_describe(part, inside) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, MethodType):
        return {"method": [_describe(value.__func__, inside), _describe(value.__self__, inside)]}
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    if isinstance(value, nn.Module):
        return f"{name} {_digest_module(value)}"
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
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
    return {name: _describe(attributes | getattr(value, "__dict__", {}), inside)}


def _digest(data: bytes) -> str:
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
    tensors: dict[str, Tensor] = {}
    tree = _to_json({"structure": repr(module), "weights": weights, "attributes": attributes}, tensors, "")
    digest = hashlib.sha256(json.dumps(tree).encode())
    for tensor in tensors.values():
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
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
    rows = max(1, CHUNK_BYTES * len(images) // images.array.nbytes)
    for chunk in images.chunks(rows):
        digest.update(chunk.contiguous().numpy().data)
    return {
        "shape": [len(images), *images.shape],
        "dtype": str(images.array.dtype),
        "sha256": digest.hexdigest()[:16],
    }


def is_storable(value: Any) -> bool:
    """Tell whether a checkpoint can hold a value."""
    try:
        _to_json(value, {}, "")
    except TypeError:
        return False
    return True


def pack(tree: Any) -> bytearray:
    """Put a tree of dicts, lists, tuples, tensors and plain values into the bytes of a safetensors file.

    Raises
    ------
    TypeError
        If there is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(tree, tensors, ""))
    content = bytearray(safetensors.torch.save(tensors, {"sha256": NO_DIGEST.decode(), "tree": text}))
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
    if "tuple" in value:
        return tuple(_from_json(item, tensors) for item in value["tuple"])
    return {key: _from_json(item, tensors) for key, item in value["dict"]}
