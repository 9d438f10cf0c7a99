"""Checkpoints that survive being killed, a full disk and a damaged file: named tensors, a nested state, and JSON.

A checkpoint is a folder, ``step-000000042``, of three files: ``weights.safetensors``, ``state.pt`` (``torch.save``,
only ever read with ``weights_only=True``) and ``manifest.json``, which has the length and the SHA-256 of the other two
and of itself. It is written under a name that starts with ``.tmp-`` and renamed when all of it is on the disk.

A folder of checkpoints belongs to one run at a time. One more checkpoint than ``keep`` has to fit the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from horizonplan.training.contents import check_tensors, checked_meta, checked_state, state_bytes, write_tensors
from horizonplan.training.files import Written, in_words, length, make_folder, sync_folder, write_new
from horizonplan.units import format_bytes

SCHEMA_VERSION = 1
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
ASIDE = ".replaced"  # the end of the name that a checkpoint has while another one of its step takes its place

_NAME = re.compile(rf"step-(\d{{9,}})({re.escape(ASIDE)})?")
_TEMPORARY = re.compile(r"\.tmp-step-\d{9,}-[0-9a-f]{8}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIGEST = "0" * 64


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or one that cannot be trusted."""


class CheckpointWarning(UserWarning):
    """A checkpoint that was passed over, or one that could not be removed."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step.

    Attributes:
        path: its folder.
        step: the step it was saved at.
        weights: tensors by name, on the CPU.
        state: nested dicts, lists, tuples, numbers, strings and tensors, on the CPU.
        meta: what JSON can say.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Manifest:
    step: int
    meta: dict[str, Any]
    files: dict[str, Written]


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint, then remove the oldest ones.

    If this raises, ``folder`` holds the checkpoints that it held before. One of the same step is replaced. Only one
    tensor at a time is copied, besides those of ``state`` that see a part of their storage.

    Args:
        folder: the folder of checkpoints; made if it is not there.
        step: training steps done, at least 0.
        weights: dense tensors by name. They come back detached.
        state: anything that ``torch.load(weights_only=True)`` reads. Tensors come back detached.
        meta: values that JSON gives back as they are: no tuples, keys that are strings, numbers that are finite.
        keep: how many whole checkpoints stay: this one and the newest of the others. Whole ones have a sound manifest
            and files of the right length; their contents are not read again. Damaged ones stay and do not count.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: ``step`` or ``keep`` is out of range.
        CheckpointError: something in ``weights``, ``state`` or ``meta`` could not be read again, or the system
            refused to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in range(4):
        ...         _ = save(Path(folder), step, {"w": torch.ones(2)}, {"lr": [0.1]}, {"epoch": step})
        ...     found = latest(Path(folder))
        ...     sorted(os.listdir(folder)), found.weights, found.state, found.meta
        (['step-000000002', 'step-000000003'], {'w': tensor([1., 1.])}, {'lr': [0.1]}, {'epoch': 3})
    """
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number >= {least}.")
    folder = Path(folder)
    try:
        check_tensors(weights, "weights")
        meta, state = checked_meta(meta), checked_state(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint of step {step}: {error}") from error
    final = folder / f"step-{step:09d}"
    try:
        make_folder(folder)
        for path in _leftovers(folder):
            _remove(path)
        surplus = _surplus(folder, step, keep)
        _make(final, step, weights, state, meta)
    except OSError as error:
        raise CheckpointError(_refusal(error, folder, step, weights, state)) from error
    for path in (final.with_name(final.name + ASIDE), *surplus):
        if os.path.lexists(path):
            _remove(path)
    return final


def load(path: Path) -> Checkpoint:
    """Read a checkpoint's folder, after both hashes were found right. No code in it is executed.

    Raises:
        CheckpointError: something is wrong with it.
    """
    path = Path(path)
    manifest = _verified(path)
    weights = _decoded(path, WEIGHTS, _read_tensors)
    state = _decoded(path, STATE, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    if not isinstance(state, dict):
        raise _damaged(path, f"{STATE} holds a {type(state).__name__} instead of a dict")
    return Checkpoint(path, manifest.step, weights, state, manifest.meta)


def latest(folder: Path) -> Checkpoint | None:
    """Read the newest valid checkpoint in a folder of checkpoints.

    Returns:
        ``None`` if there is none, or no folder. Each invalid one that is newer is told in a :class:`CheckpointWarning`.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    try:
        found = _found(Path(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {in_words(error)}. Give a folder of checkpoints.") from error
    for _, path in found:
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", CheckpointWarning, stacklevel=2)
    return None


def present(folder: Path) -> list[Path]:
    """What has a checkpoint's name in a folder, valid or not, the newest first."""
    return [path for _, path in _found(folder)] if folder.is_dir() else []


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, so that they are no longer taken for the run's; returns the new paths.

    Raises:
        CheckpointError: the system refused.
    """
    aside = []
    try:
        for other, path in _found(folder) if folder.is_dir() else []:
            if other > step:
                aside.append(path.with_name(f"abandoned-{path.name}-{secrets.token_hex(4)}"))
                os.replace(path, aside[-1])
    except OSError as error:
        raise CheckpointError(f"{folder}: {in_words(error)}; its later checkpoints could not be renamed.") from error
    return aside


def _make(final: Path, step: int, weights: Mapping[str, Tensor], state: Any, meta: Mapping[str, Any]) -> None:
    part = _temporary(final)
    try:
        os.mkdir(part)
        _fill(part, step, weights, state, meta)
        _publish(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _fill(part: Path, step: int, weights: Mapping[str, Tensor], state: Any, meta: Mapping[str, Any]) -> None:
    """Write the three files of a checkpoint into an empty folder, the manifest last."""
    files = {
        WEIGHTS: write_new(part / WEIGHTS, lambda file: write_tensors(file, weights)),
        STATE: write_new(part / STATE, lambda file: torch.save(state, file)),
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "meta": meta,
        "files": {name: asdict(written) for name, written in files.items()},
        "sha256": _NO_DIGEST,
    }
    text = json.dumps(manifest, indent=2) + "\n"
    head, _, tail = text.rpartition(_NO_DIGEST)
    write_new(part / MANIFEST, f"{head}{hashlib.sha256(text.encode()).hexdigest()}{tail}".encode())
    sync_folder(part)


def _publish(part: Path, final: Path) -> None:
    """Rename ``part`` to ``final``. Killed at any moment, there is a whole checkpoint of the step if there was one."""
    aside = final.with_name(final.name + ASIDE)
    try:
        if os.path.lexists(final):  # no system call swaps two folders everywhere
            os.replace(final, aside)
        os.replace(part, final)
        sync_folder(final.parent)
    except BaseException:
        with suppress(OSError):
            if not os.path.lexists(part):
                os.replace(final, part)
            if os.path.lexists(aside):
                os.replace(aside, final)
        raise


def _leftovers(folder: Path) -> list[Path]:
    """What a killed run left to remove. A checkpoint that was put aside in vain gets its name back."""
    left = [folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    for _, path in _found(folder):
        final = path.with_name(path.name.removesuffix(ASIDE))
        if path != final and os.path.lexists(final):
            left.append(path)
        elif path != final:
            os.replace(path, final)
    return left


def _surplus(folder: Path, step: int, keep: int) -> list[Path]:
    """The whole checkpoints to remove when one of ``step`` is there: all but the ``keep`` - 1 newest others."""
    return [path for other, path in _found(folder) if other != step and _is_whole(path)][keep - 1 :]


def _remove(path: Path) -> None:
    """Remove a folder in a way that leaves nothing that looks like a checkpoint when it is cut short."""
    try:
        if not _TEMPORARY.fullmatch(path.name):
            renamed = _temporary(path)
            os.replace(path, renamed)
            path = renamed
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        message = f"{path} could not be removed: {in_words(error)}. The next save tries again."
        warnings.warn(message, CheckpointWarning, stacklevel=3)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name.removesuffix(ASIDE)}-{secrets.token_hex(4)}")


def _refusal(error: OSError, folder: Path, step: int, weights: Mapping[str, Tensor], state: dict[str, Any]) -> str:
    """Why a checkpoint could not be written, in words, and what to do."""
    wanted = sum(tensor.nbytes for tensor in weights.values()) + state_bytes(state)
    place = f" while writing {Path(error.filename).name} in {folder}" if error.filename else f" in {folder}"
    with suppress(OSError):
        place += f", where {format_bytes(shutil.disk_usage(folder).free)} are free"
    intact = _intact(folder)
    last = f"The last intact checkpoint is {intact}" if intact else "There is no intact checkpoint"
    remedy = "Free space (or raise the quota or limit)" if error.errno in _NO_SPACE else "Set that right"
    return (
        f"checkpoint of step {step}: {in_words(error)}{place}. "
        f"Its tensors are {wanted} bytes ({format_bytes(wanted)}). {last}. {remedy}, then train again with resume=True."
    )


def _intact(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes are right."""
    with suppress(OSError):
        for _, path in _found(folder):
            with suppress(CheckpointError):
                _verified(path)
                return path
    return None


def _found(folder: Path) -> list[tuple[int, Path]]:
    """What has a checkpoint's name: step and path, the newest first, and what was put aside after its replacement."""
    matches = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    found = [(int(match[1]), match[0]) for match in matches if match and match[1] == f"{int(match[1]):09d}"]
    return [(step, folder / name) for step, name in sorted(found, key=lambda item: (-item[0], item[1]))]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as file:
        # Copies: what the library gives is the file itself, mapped into memory.
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping


def _decoded(path: Path, name: str, decode: Callable[[Path], Any]) -> Any:
    try:
        return decode(path / name)
    except MemoryError:  # which says nothing about the file
        raise
    except Exception as error:  # whatever a decoder makes of a file with the right hash and the wrong content
        raise _damaged(path, f"{name} cannot be read", error) from error


def _is_whole(path: Path) -> bool:
    try:
        _manifest(path)
    except CheckpointError:
        return False
    return True


def _verified(path: Path) -> _Manifest:
    """The manifest, after the files' hashes were found to be what it says."""
    manifest = _manifest(path)
    for name, written in manifest.files.items():
        try:
            with (path / name).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read", error) from error
        if sha256 != written.sha256:
            raise _damaged(path, f"{name} has the SHA-256 {sha256} instead of {written.sha256}")
    return manifest


def _manifest(path: Path) -> _Manifest:
    """The manifest, if it is sound and the files have the lengths that it says."""
    try:
        length(path / MANIFEST)
        content = (path / MANIFEST).read_bytes()
        data = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read", error) from error
    manifest = _parsed(path, data, content)
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise _damaged(path, f"{MANIFEST} is that of step {manifest.step}")
    for name, written in manifest.files.items():
        try:
            size = length(path / name)
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read", error) from error
        if size != written.bytes:
            raise _damaged(path, f"{name} has {size} bytes instead of {written.bytes}")
    return manifest


def _parsed(path: Path, data: Any, content: bytes) -> _Manifest:
    version: Any = data.get("schema_version") if isinstance(data, dict) else None
    if not _is_count(version) or version < 1:
        raise _damaged(path, f"{MANIFEST} has no schema_version, so it is none")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version={version} is newer than this horizonplan reads ({SCHEMA_VERSION}); upgrade it."
        )
    digest, step, meta, files = (data.get(key) for key in ("sha256", "step", "meta", "files"))
    unsigned = content.replace(digest.encode(), _NO_DIGEST.encode()) if _is_digest(digest) else b""
    if hashlib.sha256(unsigned).hexdigest() != digest:
        raise _damaged(path, f"{MANIFEST} has another SHA-256 than it says")
    named = isinstance(files, dict) and files.keys() == {WEIGHTS, STATE} and all(map(_is_written, files.values()))
    if not _is_count(step) or not isinstance(meta, dict) or not named:
        raise _damaged(path, f"{MANIFEST} does not say step, meta, and the bytes and sha256 of {WEIGHTS} and {STATE}")
    return _Manifest(step, meta, {name: Written(**written) for name, written in files.items()})


def _is_written(data: Any) -> bool:
    fields = isinstance(data, dict) and data.keys() == {"bytes", "sha256"}
    return fields and _is_count(data["bytes"]) and _is_digest(data["sha256"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _damaged(path: Path, what: str, error: Exception | None = None) -> CheckpointError:
    return CheckpointError(f"{path}: {what}{f' ({in_words(error)})' if error else ''}; use another checkpoint.")
