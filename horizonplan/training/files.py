"""Files that are either the old ones or the new ones, whole, whenever the process is killed or the power fails.

A file is written under another name in the same folder and flushed to the disk, then renamed to its own name, and the
folder is flushed as well. Its SHA-256 is taken from the bytes on their way to the disk. The second half says what can
be in a file so that it can be read again: tensors (safetensors), a nested state (``torch.save``).
"""

from __future__ import annotations

import copy
import errno
import functools
import glob
import hashlib
import io
import json
import os
import secrets
import stat
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor, nn

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


# What can be in a file


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the safetensors format, with no more than one of them copied at a time.

    The format: the header's length in 8 bytes, little-endian; the header, JSON; the tensors' bytes without gaps.
    Those of large elements go first, so that each is aligned.

    Raises:
        ValueError: a name or a tensor that the format cannot hold.
    """
    check_tensors(tensors)
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, start = {}, 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        code = _safetensors_code(tensor.dtype)
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        plain = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def check_tensors(tensors: Mapping[str, Tensor], called: str = "tensors") -> None:
    """Refuse what :func:`write_tensors` cannot write.

    Args:
        tensors: tensors by name.
        called: what they are called in the error.

    Raises:
        ValueError: a name or a tensor that the format cannot hold.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
            raise ValueError(f"{called}: {name!r} cannot be a tensor's name in a safetensors file; rename it.")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{called}[{name!r}] is a {type(tensor).__name__}: give a tensor.")
        if not _is_dense(tensor) or _safetensors_code(tensor.dtype) is None:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}, of type {type(tensor).__name__}"
            raise ValueError(f"{called}[{name!r}] is {kind}, which safetensors cannot hold; put it into state.")


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@functools.cache
def _safetensors_code(dtype: torch.dtype) -> str | None:
    """The installed safetensors' code for a type that it gives back as it is; ``None`` for others."""
    sample = torch.empty(2, dtype=dtype)
    try:
        data = safetensors.torch.save({"x": sample})
        same = safetensors.torch.load(data)["x"].dtype == dtype
    except Exception:  # each version says no in its own way
        return None
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]
    whole = entry["shape"] == [2] and entry["data_offsets"] == [0, sample.nbytes]
    return str(entry["dtype"]) if same and whole else None


def checked_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, if JSON gives back the same.

    Raises:
        ValueError: it does not: a tuple, a key that is no string, a number that is not finite, an object.
    """
    for key, value in meta.items():
        try:
            back = json.loads(json.dumps({key: value}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"meta[{key!r}] cannot be written as JSON ({error}); leave it out.") from error
        if back != {key: value}:
            raise ValueError(
                f"meta[{key!r}] comes back from JSON as {back}: give lists for tuples, and strings for keys."
            )
    return dict(meta)


def checked_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its tensors detached, and cut loose from storages that it sees a part of.

    Raises:
        ValueError: a part of it could not be loaded again with ``weights_only=True``.
    """
    state = dict(state)
    reason = _unreadable(state)
    if reason is not None:
        key, reason = _culprit(state, "state", reason)
        raise ValueError(
            f"{key} could not be loaded again with weights_only=True ({reason}). Give numbers, strings, tensors, "
            "lists, tuples and dicts."
        )
    held = Counter[Any]()
    for tensor in _tensors(state):
        held[_storage(tensor)] += tensor.nbytes

    def cut(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not _is_dense(tensor) or held[_storage(tensor)] >= tensor.untyped_storage().nbytes():
            return tensor
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    cut_loose: dict[str, Any] = _mapped(state, cut)
    return cut_loose


def _unreadable(value: Any) -> str | None:
    """Why a value could not be read again, found by doing it with its tensors emptied; ``None`` if it can be."""
    file = io.BytesIO()
    try:
        torch.save(_mapped(value, lambda tensor: tensor.new_empty(0) if _is_dense(tensor) else tensor.detach()), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # whatever pickling an object of any kind may raise
        return in_words(error)
    return None


def _culprit(value: Any, key: str, reason: str) -> tuple[str, str]:
    """The innermost part of a value that cannot be read again, and why."""
    parts: Iterator[tuple[Any, Any]] = iter(())
    if type(value) in (dict, OrderedDict):
        parts = iter(value.items())
    elif type(value) in (list, tuple):
        parts = enumerate(value)
    if not reason.startswith("RecursionError"):  # a value that holds itself has no innermost part
        for name, part in parts:
            inner = _unreadable(part)
            if inner is not None:
                return _culprit(part, f"{key}[{name!r}]", inner)
    return key, reason


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with each tensor changed. Containers of other kinds are left as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (dict, OrderedDict):
        copied = copy.copy(value)  # an OrderedDict's attributes too: state_dict has its versions there
        for key in copied:
            copied[key] = _mapped(value[key], change)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return plain and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the storages of a state's dense tensors, each storage once."""
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}.values())


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    """The dense tensors of a nested value."""
    found: list[Tensor] = []

    def gather(tensor: Tensor) -> Tensor:
        found.extend([tensor] if _is_dense(tensor) else [])
        return tensor

    _mapped(value, gather)
    return found
