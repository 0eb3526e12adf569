"""Writing a file so that it is there whole or not at all."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["replaced_atomically", "write_atomically"]


@contextmanager
def replaced_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, for writing, which becomes `path` when the block ends without an error.

    Whatever happens, a killed process or a full disk, `path` is the new file or what it was before. A process that is
    killed may leave a temporary file, whose name starts with a dot and that of `path` and ends in ".tmp".

    Parameters
    ----------
    path : Path
        In a folder that is there.

    Raises
    ------
    OSError
        If the file cannot be written, or what is there is no regular file. The error names `path`.
    """
    # Where a link leads there is the file to replace, not the link; a device is none.
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    # Not tempfile, whose files only their owner can read: the mode is the umask's.
    # Cut, because a name may be as long as a name can be.
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write to a full disk names no file.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all, see `replaced_atomically`.

    Parameters
    ----------
    path : Path
        In a folder that is there.
    data : bytes or bytearray
        Its content.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with replaced_atomically(path) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk too, where the system has a call for it."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # A folder that may be written to and not listed; the file is there.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such thing.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
