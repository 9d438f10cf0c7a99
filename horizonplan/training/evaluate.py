"""Validation: mean loss, accuracy where targets are classes, and the user's metrics, in one forward a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from horizonplan.batch import ComputeLoss, batch_size, move, output_tensor, take, target_of
from horizonplan.chain.calls import quiet, training_mode
from horizonplan.probes.budget import each
from horizonplan.training.random_state import Isolated
from horizonplan.training.team import Team


class Accumulating(Protocol):
    """A metric that sees all batches before it has a value, as those of torchmetrics are."""

    def update(self, output: Any, target: Any) -> Any:
        """See a batch."""

    def compute(self) -> Any:
        """The value."""

    def reset(self) -> Any:
        """Forget all batches."""


_END = object()  # of the batches
Metric = Callable[[Any, Any], Any] | Accumulating


def check_metrics(metrics: object, world: int = 1) -> None:
    """See that they are a mapping of names to metrics that so many processes can compute together.

    Raises:
        ValueError: they are not.
    """
    if isinstance(metrics, Mapping) and (kinds := [m.__name__ for m in metrics.values() if isinstance(m, type)]):
        raise ValueError(f"metrics: {kinds[0]} is a class; give an object, {kinds[0]}(...).")
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"metrics={metrics!r}: give a mapping of names to functions (output, target) -> number.")
    for name, metric in metrics.items():
        if not _accumulates(metric) and not callable(metric):
            raise ValueError(
                f"metrics[{name!r}]={metric!r}: give a function (output, target) -> number, or an object with update, "
                "compute and reset."
            )
        if world > 1 and _accumulates(metric) and not callable(getattr(metric, "sync", None)):
            raise ValueError(
                f"metrics[{name!r}]={metric!r}: each of {world} processes shows it other batches, and it has no method "
                "sync to bring them together, as those of torchmetrics have; give such an object, or a function."
            )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    compute_loss: ComputeLoss,
    device: torch.device,
    metrics: Mapping[str, Metric] | None = None,
    team: Team | None = None,
) -> dict[str, float]:
    """Evaluate a model in eval mode; its mode is restored.

    Args:
        model: the model.
        data: batches; of a team, each process takes every so many of them (all, of a loader whose sampler has
            ``num_replicas``). What the loader draws from global generators is the same on all.
        compute_loss: ``(model, batch) -> loss``.
        device: where to move batches to.
        metrics: name -> ``(output, target) -> number``, or an object with ``update(output, target)``, ``compute()``
            and ``reset()``, such as those of torchmetrics; in a team with ``sync()``, too, and its ``compute()`` gives
            the value over all processes. The output is the logits where the model's output has any.
        team: processes that evaluate together.

    Returns:
        ``loss`` and the functions' numbers, means over batches weighted by their samples; ``accuracy`` in
        [0, 1] where the targets are integers and the model returns scores with one class dimension more, last or
        second; and the objects' values.

    Raises:
        ValueError: there are no batches; a metric returns no number, or the loss was computed without calling the
            model, so that there is no output.
    """
    metrics, team = metrics or {}, team or Team()
    check_metrics(metrics, team.world)
    totals = dict.fromkeys(["loss", *(name for name, metric in metrics.items() if not _accumulates(metric))], 0.0)
    samples, hits, counted = 0, 0, 0
    for metric in metrics.values():
        if _accumulates(metric):
            metric.reset()  # type: ignore[union-attr]
    with training_mode(model, False):
        for batch in _share(data, team):
            batch = move(batch, device)
            loss, output = _forward(model, batch, compute_loss)
            target = target_of(batch)
            size = len(target) if isinstance(target, Tensor) and target.ndim else batch_size(batch) or 1
            samples += size
            totals["loss"] += loss * size
            for name, value in _measured(metrics, output, target).items():
                totals[name] += value * size
            right, total = _hits(output, target)
            hits, counted = hits + right, counted + total
    *sums, samples, hits, counted = team.sum(*totals.values(), samples, hits, counted)  # type: ignore[assignment]
    if samples == 0:
        raise ValueError("val_data has no batches: give at least one, or val_data=None.")
    found = {name: total / samples for name, total in zip(totals, sums, strict=True)}
    accuracy = {"accuracy": hits / counted} if counted else {}
    late = {name: float(m.compute()) for name, m in metrics.items() if _accumulates(m)}  # type: ignore[union-attr]
    return {"loss": found.pop("loss")} | accuracy | found | late


def rehearsed(
    model: nn.Module,
    data: Iterable[Any],
    compute_loss: ComputeLoss,
    device: torch.device,
    metrics: Mapping[str, Metric] | None,
) -> tuple[str, ...]:
    """The names of what :func:`evaluate` will measure, seen by doing it on one batch; nothing is changed by it."""
    with Isolated(0).drawing(), quiet(model):
        return tuple(evaluate(model, take(data, 1), compute_loss, device, metrics))


def _share(data: Iterable[Any], team: Team) -> Iterator[Any]:
    """This process's batches. What they draw is the same on all processes, and apart from what training draws."""
    sampler, batch_sampler = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    parts = data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)
    shared = any(hasattr(part, "num_replicas") for part in parts)
    if isinstance(data, list | tuple):
        yield from data[team.rank :: team.world]
        return
    batches, isolated, number = each(data), Isolated(0), 0
    while True:
        with isolated.drawing():
            batch = next(batches, _END)
        if batch is _END:
            return
        if shared or number % team.world == team.rank:
            yield batch
        number += 1


def _forward(model: nn.Module, batch: Any, compute_loss: ComputeLoss) -> tuple[float, Any]:
    """The loss on a batch, and what the model returned on the way (``None`` if it was not called)."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        loss = compute_loss(model, batch).item()
    finally:
        handle.remove()
    return loss, output_tensor(seen[-1]) if seen else None


def _measured(metrics: Mapping[str, Metric], output: Any, target: Any) -> dict[str, float]:
    """The functions' numbers on a batch; the objects see it."""
    if metrics and output is None:
        raise ValueError("metrics: the loss was computed without calling the model, so there is no output; call it.")
    found = {}
    for name, metric in metrics.items():
        if _accumulates(metric):
            metric.update(output, target)  # type: ignore[union-attr]
            continue
        value = metric(output, target)  # type: ignore[operator]
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"metrics[{name!r}] returned {shape}: let it return one number.") from error
    return found


def _accumulates(metric: object) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def _hits(scores: Any, target: Any) -> tuple[int, int]:
    """Right guesses and how many there were; 0 of 0 where there are no classes."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool or target.ndim != 1:
        return 0, 0
    if not isinstance(scores, Tensor) or scores.ndim != target.ndim + 1 or not scores.is_floating_point():
        return 0, 0
    axis = -1 if scores.shape[:-1] == target.shape else 1
    guesses = scores.argmax(axis)
    if guesses.shape != target.shape:
        return 0, 0
    valid = target >= 0
    return int((guesses == target)[valid].sum()), int(valid.sum())
