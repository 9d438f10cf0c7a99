"""What a batch is, how a model is called with it, and how the loss of the pair is found.

A batch is a tuple or list ``(input, target)`` (more inputs: ``(a, b, target)``), a mapping or
dataclass of named arguments (``labels``, ``target``, ... hold the target), or anything at all
together with a user's ``compute_loss(model, batch)``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

LossFunction = Callable[[Any, Any], Tensor]
ComputeLoss = Callable[[nn.Module, Any], Tensor]

TARGET_NAMES = ("labels", "label", "targets", "target", "y")


def resolve_loss(loss: LossFunction | None = None, compute_loss: ComputeLoss | None = None) -> ComputeLoss:
    """Return ``(model, batch) -> scalar loss`` from what the user gave.

    Args:
        loss: ``(output, target) -> scalar``. ``None``: the model's own ``.loss`` if it returns one, else
            cross-entropy for integer targets and mean squared error for floating ones.
        compute_loss: ``(model, batch) -> scalar``, for anything else; excludes ``loss``.

    Raises:
        ValueError: both are given, or one is no function; or, when called, the batch has no target or the loss is no
            scalar.
    """
    if loss is not None and compute_loss is not None:
        raise ValueError("loss and compute_loss are both given: give one (compute_loss sees the whole batch).")

    for name, given in {"loss": loss, "compute_loss": compute_loss}.items():
        if isinstance(given, type):
            raise ValueError(f"{name}={given.__name__}: this is a class; give an object, {given.__name__}().")
        if given is not None and not callable(given):
            raise ValueError(f"{name}={given!r}: give a function that returns a scalar tensor.")

    def compute(model: nn.Module, batch: Any) -> Tensor:
        return scalar(compute_loss(model, batch) if compute_loss is not None else _loss_of(model, batch, loss))

    return compute


def scalar(loss: Any) -> Tensor:
    """Check that a loss is one floating number in a tensor.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected one floating-point scalar, got {got}; return e.g. loss.mean().")
    return loss if loss.ndim == 0 else loss.reshape(())


def model_inputs(batch: Any) -> Any:
    """The model's arguments in a batch: everything but the target."""
    return _split(batch)[0]


def target_of(batch: Any) -> Any:
    """The target in a batch, or ``None``."""
    return _split(batch)[1]


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with one input, a tuple of them, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def output_tensor(output: Any) -> Any:
    """The prediction in a model's output: ``.logits``, the first entry of a tuple, or the output itself."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return logits
    return output[0] if isinstance(output, tuple | list) and output else output


def default_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for floating ones.

    Args:
        output: ``(B, C)``, ``(B, N, C)`` or ``(B, C, ...)`` scores, or predictions of the target's shape.
        target: ``(B,)`` or ``(B, N)`` or ``(B, ...)`` classes, or values.

    Raises:
        ValueError: the shapes or types fit neither.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        kinds = f"{type(output).__name__} and {type(target).__name__}"
        raise ValueError(f"loss=None: no default loss for {kinds}; give loss= or compute_loss=.")
    if target.is_floating_point():
        if output.shape == target.shape:
            return F.mse_loss(output, target)
    elif target.dtype != torch.bool:
        if output.ndim > 1 and output.shape[:-1] == target.shape:
            return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))
        if output.ndim > 1 and (output.shape[0], *output.shape[2:]) == tuple(target.shape):
            return F.cross_entropy(output, target)
    shapes = f"output {tuple(output.shape)} and target {tuple(target.shape)} ({target.dtype})"
    raise ValueError(f"loss=None: no default loss for {shapes}; give loss= or compute_loss=.")


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in a fixed order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))


def signature(batch: Any) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of a batch's tensors: what the shapes of all states follow from."""
    return tuple((tuple(t.shape), t.dtype) for t in tensors(batch))


def nbytes(batch: Any) -> int:
    """Bytes of a batch's tensors: a slice counts for itself, not for the whole data set it was cut from."""
    spans = {
        (s._cdata, t.storage_offset()): min(t.nbytes, s.nbytes()) for t in tensors(batch) if (s := t.untyped_storage())
    }
    return sum(spans.values())


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same batch with every tensor replaced by ``function(tensor)``."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        changed = {name: mapped(value, function) for name, value in batch.items()}
        return changed if type(batch) is dict else type(batch)(changed)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, function) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **{name: mapped(getattr(batch, name), function) for name in names})
    return batch


def move(batch: Any, device: torch.device) -> Any:
    """The same batch on another device; tensors that are there already stay."""
    return mapped(batch, lambda tensor: tensor.to(device))


def batch_size(batch: Any) -> int | None:
    """Samples in a batch: the first dimension that all its tensors share; ``None`` if they share none."""
    sizes = {t.shape[0] for t in tensors(batch) if t.ndim > 0}
    return sizes.pop() if len(sizes) == 1 else None


def resized(batch: Any, count: int) -> Any:
    """The batch with ``count`` samples: its first ones, or all of them over and over.

    Raises:
        ValueError: its tensors share no first dimension.
    """
    have = _known_size(batch)
    return mapped(batch, lambda t: t if t.ndim == 0 else t[torch.arange(count, device=t.device) % have])


def split(batch: Any, parts: int) -> list[Any]:
    """The batch in ``parts`` micro-batches of nearly equal size.

    Raises:
        ValueError: it has fewer samples than that, or its tensors share no first dimension.
    """
    count = _known_size(batch)
    if not 1 <= parts <= count:
        raise ValueError(f"parts={parts}: give a whole number between 1 and {count}, the samples of the batch.")
    bounds = [count * part // parts for part in range(parts + 1)]
    return [
        mapped(batch, lambda t, a=a, b=b: t if t.ndim == 0 else t[a:b])  # type: ignore[misc]
        for a, b in pairwise(bounds)
    ]


def _known_size(batch: Any) -> int:
    size = batch_size(batch)
    if size is None:
        shapes = [tuple(t.shape) for t in tensors(batch)]
        raise ValueError(
            f"batch: its tensors {shapes} share no first dimension, so its samples cannot be told apart; give tensors "
            "that do."
        )
    return size


def as_device(device: str | torch.device) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"device={str(device)!r}: no tensor can be made there ({error}); try 'cpu'.") from error


def as_loader(data: Any, batch_size: int = 32, shuffle: bool = False, seed: int = 0) -> Iterable[Any]:
    """Batches of ``data`` that can be iterated again and again.

    Args:
        data: a DataLoader, a list or tuple of batches, or a Dataset (``batch_size`` samples a batch).
        batch_size: samples a batch, for a Dataset.
        shuffle: whether a Dataset is shuffled anew in each pass (a stream keeps its order).
        seed: seed of that order, kept apart from torch's global generator.

    Raises:
        ValueError: it is none of these, or empty.
    """
    if isinstance(data, Dataset):
        generator = torch.Generator().manual_seed(seed)
        if _is_empty(data):
            raise ValueError("data is an empty dataset: give at least one sample.")
        shuffle = shuffle and not isinstance(data, IterableDataset)
        data = DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
    if isinstance(data, Iterator | Tensor | Mapping) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise ValueError(f"data is a {kind}: give a DataLoader, a list of batches, or a Dataset.")
    if _is_empty(data):
        raise ValueError("data has no batches: give at least one.")
    return data


def take(data: Iterable[Any], count: int, device: torch.device | None = None) -> list[Any]:
    """The first ``count`` batches (fewer if there are fewer), on ``device``.

    Raises:
        ValueError: there is none.
    """
    found = []
    for batch in data:
        found.append(batch if device is None else move(batch, device))
        if len(found) >= count:
            break
    if not found:
        raise ValueError("data has no batches: give at least one.")
    return found


@contextmanager
def own_generator(loader: Any) -> Iterator[None]:
    """A loader's own generator, if it has one, brought back afterwards, so that the next pass has the same order."""
    own = getattr(loader, "generator", None)
    state = None if own is None else own.get_state()
    try:
        yield
    finally:
        if own is not None:
            own.set_state(state)


def _is_empty(data: Any) -> bool:
    """Whether it is known to have no entries (a stream has no length)."""
    try:
        return len(data) == 0
    except TypeError:
        return False


def _named(batch: Any) -> Any:
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type) and not isinstance(batch, Mapping):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return batch


def _split(batch: Any) -> tuple[Any, Any]:
    batch = _named(batch)
    if isinstance(batch, Mapping):
        name = next((n for n in TARGET_NAMES if n in batch), None)
        return {n: v for n, v in batch.items() if n != name}, None if name is None else batch[name]
    if isinstance(batch, tuple | list):
        *inputs, target = batch if len(batch) > 1 else (*batch, None)
        return inputs[0] if len(inputs) == 1 else tuple(inputs), target
    return batch, None


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _loss_of(model: nn.Module, batch: Any, loss: LossFunction | None) -> Tensor:
    inputs, target = _split(batch)
    if loss is not None:
        if target is None:
            raise ValueError(f"batch: no target in a {type(batch).__name__}; use (input, target) or compute_loss=.")
        output = call(model, inputs)
        return loss(output_tensor(output) if not isinstance(output, Tensor) else output, target)
    named = _named(batch)
    keep = isinstance(named, Mapping) and all(_takes(model, name) for name in named)
    output = call(model, named if keep else inputs)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    if target is None:
        if isinstance(output, Tensor) and output.numel() == 1:
            return output
        raise ValueError(
            f"batch: no target in a {type(batch).__name__} and the model returns no loss; give compute_loss=."
        )
    return default_loss(output_tensor(output), target)
