"""What a checkpoint's files can hold: tensors in the safetensors format, JSON, and states that load without code."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from horizonplan.training.files import in_words


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
        flat = plain.as_strided((plain.numel(),), (1,))  # the stride of a dimension of one element may be anything
        file.write(flat.view(torch.uint8).numpy().data)


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
