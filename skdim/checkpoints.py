"""The state of a training on disk: one file an epoch, from which an interrupted training goes on to equal bits."""

import errno
import logging
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from skdim.atomic import write_atomically
from skdim.distributed import ALONE, Group
from skdim.nested import pack, unpack
from skdim.notices import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Checkpoints"]

logger = logging.getLogger("skdim")

# How many checkpoints a folder keeps: the newest may be damaged by what befalls a disk.
N_KEPT = 2

# What else is in the folder, a copy that the user has made for one, is none.
FILE_NAME = re.compile(r"epoch-\d{6,}\.safetensors")


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
        # Absolute, because a callback may go to another folder.
        self.folder = Path(folder).absolute()
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
            _pass_on(error)
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
            _pass_on(error)
            # A full disk shall not end a training of days, whose result needs no disk.
            warn(f"The checkpoint of epoch {epoch} could not be written, training goes on without it: {error}")

    def _paths(self) -> list[Path]:
        """Checkpoints, newest first."""
        paths = (path for path in self.folder.glob("epoch-*.safetensors") if FILE_NAME.fullmatch(path.name))
        return sorted(paths, key=_epoch, reverse=True)

    def _remove_older_than(self, path: Path) -> None:
        older = [other for other in self._paths() if _epoch(other) < _epoch(path)]
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
            # Closing alone would leave the lock with a process that a callback has forked.
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def _read_newest(self) -> dict[str, Any] | None:
        damaged: list[tuple[Path, ValueError | OSError]] = []
        for path in self._paths():
            try:
                content = unpack(path.read_bytes())
            except (ValueError, OSError) as error:
                _pass_on(error)
                damaged.append((path, error))
                continue
            self._check_identity(content["identity"])
            for bad_path, failure in damaged:
                reason = _reason(failure)
                warn(f"The checkpoint {str(bad_path)!r} is damaged ({reason}); training goes on from {path.name}.")
            logger.info("Training goes on from %s", path)
            # A process may have been killed before it did so.
            self._remove_older_than(path)
            return content["state"]
        for _, failure in damaged:
            # What cannot be read now may be whole.
            if isinstance(failure, OSError):
                raise failure
        if damaged:
            raise ValueError(
                f"All checkpoints in checkpoint_dir={str(self.folder)!r} are damaged ({_reason(damaged[0][1])}). Empty "
                "the directory to start anew."
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
                "directory, or empty this one to start anew; in a cross-validation leave checkpoint_dir=None."
            )


def _pass_on(error: ValueError | OSError) -> None:
    """Raise what no system call did: a TimeoutError, an OSError too, by which a handler of signals ends everything."""
    if isinstance(error, OSError) and error.errno is None:
        raise error


def _reason(error: ValueError | OSError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _epoch(path: Path) -> int:
    """Read how many epochs were trained from a checkpoint's name, which sorts so up to a million only."""
    return int(path.stem.removeprefix("epoch-"))
