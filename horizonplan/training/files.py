"""Files that are either the old ones or the new ones, whole, whenever the process is killed or the power fails.

A file is written under another name in the same folder and flushed to the disk, then renamed to its own name, and the
folder is flushed as well. Its SHA-256 is taken from the bytes on their way to the disk. The second half says what can
be in a file so that it can be read again: tensors (safetensors), a nested state (``torch.save``).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_BYTES = 1 << 20

Content = bytes | Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Written:
    """What went to the disk: how many bytes, and their SHA-256 in lower-case hexadecimal digits."""

    bytes: int
    sha256: str


def write(path: str | Path, content: Content) -> Written:
    r"""Replace one file by ``content``, which is bytes or a function that writes into a binary file.

    The file at ``path`` is the old one or the new one at any moment. If this raises, it is the old one, unless only the
    folder could not be flushed. Two processes that write the same file at once do not mix their bytes; one of them may
    get a ``FileNotFoundError``.

    Raises:
        OSError: it cannot be written; ``filename`` says what.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "numbers.txt"
        ...     _ = write(path, b"old")
        ...     written = write(path, lambda file: file.writelines([b"1\n", b"2\n"]))
        ...     path.read_bytes(), written.bytes
        (b'1\n2\n', 4)
    """
    path = Path(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of processes that were killed
        stale.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        written = write_new(part, content)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return written


def write_new(path: Path, content: Content) -> Written:
    """Write a file that is not there yet, down to the disk; if this raises, a part of it may be left.

    Raises:
        OSError: it cannot be written, or it is there; ``filename`` says what.
    """
    raw = _HashedFile(path)
    try:
        with io.BufferedWriter(raw, BUFFER_BYTES) as file:
            if callable(content):
                content(cast(BinaryIO, file))
            else:
                file.write(content)
            file.flush()
            raw.sync()
    except BaseException:
        if raw.error is not None:
            raise raw.error from None
        raise
    return Written(raw.count, raw.sha256.hexdigest())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of file systems that cannot do this for a folder
            raise _placed(error, folder) from None
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, down to the disk.

    Raises:
        OSError: one of them cannot be made.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def length(path: Path) -> int:
    """A regular file's length in bytes. Opening something else, such as a pipe, might never end.

    Raises:
        OSError: there is no such file, or it is something else.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def in_words(error: Exception) -> str:
    """An error in one line.

    Of torch's pages on what it will not unpickle only the reason: the rest tells how to execute it all the same.

    Example:
        >>> in_words(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/state.pt"))
        'no space left on device'
    """
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        return text[:1].lower() + text[1:]
    text = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". Please use")[0]
    return " ".join([f"{type(error).__name__}:", *text.splitlines()[:1]])


class _HashedFile(io.RawIOBase):
    """A new file that hashes what it has written, and remembers what went wrong first.

    Writers in C++ (``torch.save``) hide the error that a ``write`` raised behind one of their own, and then write more.
    After an error everything is discarded, so that closing does not fail again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.sha256 = path, 0, hashlib.sha256()
        self.error: BaseException | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data)
        if self.error is not None:
            return view.nbytes
        try:
            count = os.write(self._descriptor, view)
        except BaseException as error:
            self.error = _placed(error, self.path)
            raise
        self.sha256.update(view[:count])
        self.count += count
        return count

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _placed(error, self.path) from None

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()
            finally:
                os.close(self._descriptor)


def _placed(error: BaseException, path: Path) -> BaseException:
    """Say which file the system's error is about."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)
    return error
