"""CIFAR-10 and CIFAR-100 from a folder of the user's, in either of the forms that their authors publish.

Nothing is downloaded. The Python form is a pickle, which can run any code; here only the few names that its arrays are
made of are allowed, and anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from horizonplan.reproduce.origin import fingerprint

PIXELS = 3 * 32 * 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class CifarError(ValueError):
    """There is no CIFAR where it was looked for, or what is there is something else."""


@dataclass(frozen=True)
class _Form:
    """Where a data set's two parts lie: folders, files of the training part, file of the test part."""

    folders: tuple[str, ...]
    training: tuple[str, ...]
    test: str
    labels: str  # key of the labels (Python form)
    bytes_before: int = 0  # label bytes before an image's pixels (binary form); 0: the Python form


_TEN, _HUNDRED = tuple(f"data_batch_{i}" for i in range(1, 6)), ("train",)
_FORMS = {
    10: (
        _Form(("cifar-10-batches-py", "."), _TEN, "test_batch", "labels"),
        _Form(("cifar-10-batches-bin", "."), tuple(f"{name}.bin" for name in _TEN), "test_batch.bin", "", 1),
    ),
    100: (
        _Form(("cifar-100-python", "."), _HUNDRED, "test", "fine_labels"),
        _Form(("cifar-100-binary", "."), ("train.bin",), "test.bin", "", 2),
    ),
}


def load(folder: str | Path, classes: int = 10) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test part of CIFAR-10 or CIFAR-100.

    Args:
        folder: holds the unpacked archive, or is it.
        classes: 10 or 100.

    Returns:
        Two pairs of images, float32 ``(N, 3, 32, 32)``, and labels, int64 ``(N,)``. Each channel has mean 0 and
        deviation 1 over the training part.

    Raises:
        CifarError: it is not there, or a file is no such file.
    """
    form, place = find(Path(folder), classes)
    parts = [_part([place / name for name in names], form, classes) for names in (form.training, (form.test,))]
    pixels = parts[0][0]
    mean, deviation = pixels.mean(dim=(0, 2, 3), keepdim=True), pixels.std(dim=(0, 2, 3), keepdim=True)
    training, test = (((images - mean) / deviation, labels) for images, labels in parts)
    return training, test


def origin(folder: Path, classes: int) -> str:
    """The fingerprint of a data set's files.

    Raises:
        CifarError: they are not there.
    """
    form, place = find(folder, classes)
    return fingerprint(*(place / name for name in (*form.training, form.test)))


def find(folder: Path, classes: int) -> tuple[_Form, Path]:
    """Where a data set's files lie and what form they have, without reading them.

    Raises:
        CifarError: they are not there.
    """
    if classes not in _FORMS:
        raise CifarError(f"classes={classes}: there are CIFAR-10 and CIFAR-100; give 10 or 100.")
    for form in _FORMS[classes]:
        for name in form.folders:
            if all((folder / name / file).is_file() for file in (*form.training, form.test)):
                return form, folder / name
    wanted = " or ".join(f"{form.folders[0]}/{form.training[0]}" for form in _FORMS[classes])
    raise CifarError(
        f"data={str(folder)!r}: there is no CIFAR-{classes} in it; unpack the archive of its authors there, so that "
        f"it holds {wanted}."
    )


def _part(paths: list[Path], form: _Form, classes: int) -> tuple[Tensor, Tensor]:
    read = [_binary(p, form) if form.bytes_before else _python(p, form) for p in paths]
    pixels = np.concatenate([images for images, _ in read])
    labels = torch.from_numpy(np.concatenate([found for _, found in read]).astype(np.int64))
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise CifarError(f"{paths[0]}: labels from {labels.min()} to {labels.max()}, wanted {classes} classes.")
    return torch.from_numpy(pixels).float().reshape(-1, 3, 32, 32) / 255, labels


def _binary(path: Path, form: _Form) -> tuple[Any, Any]:
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    row = form.bytes_before + PIXELS
    if not len(data) or len(data) % row:
        raise CifarError(f"{path}: {len(data)} bytes are no whole number of images of {row}; unpack it again.")
    rows = data.reshape(-1, row)
    return rows[:, form.bytes_before :], rows[:, form.bytes_before - 1]


def _python(path: Path, form: _Form) -> tuple[Any, Any]:
    try:
        batch = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"], dtype=np.uint8), np.asarray(batch[form.labels.encode()])
    except CifarError:
        raise
    except Exception as error:
        raise CifarError(f"{path} is no batch of CIFAR: {type(error).__name__}: {error}") from error
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS or labels.shape != (len(pixels),):
        raise CifarError(f"{path}: shapes {pixels.shape} and {labels.shape}; wanted (N, {PIXELS}) and (N,).")
    return pixels, labels


class _Arrays(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings and NumPy arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CifarError(f"a batch asks for {module}.{name}, which CIFAR has no use for; it was not run.")
        return super().find_class(module, name)
