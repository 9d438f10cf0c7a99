"""Train a model with a plan or an algorithm: optimiser, validation, progress, a JSON-lines log."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.algorithms import Algorithm, BackPropagation, Fixed
from horizonplan.batch import ComputeLoss, LossFunction, as_device, as_loader, batch_size, move, resolve_loss
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices, seeded, training_mode
from horizonplan.chain.chain import refuse_wrappers
from horizonplan.devices import parse_device
from horizonplan.plan import Plan
from horizonplan.probes.budget import Budget, each, taken
from horizonplan.probes.steady import check_optimizer, optimizer_for, standing_bytes
from horizonplan.probes.tracker import LiveBytes
from horizonplan.progress import Progress, reporter
from horizonplan.projection import Projection
from horizonplan.training.evaluate import evaluate

WATCHED_STEP = 1


@dataclass(frozen=True)
class Result:
    """What a training run left behind, besides the model.

    Attributes:
        history: one dict a step: ``epoch``, ``step`` (from 0), ``loss``.
        final_loss: mean training loss over the last epoch.
        val_metrics: ``loss`` and perhaps ``accuracy`` on the validation data after the last epoch.
        validations: one dict an epoch: ``epoch`` and its metrics.
        peak_bytes: peak bytes of a step. On CPU those of the second step, tracked; on CUDA the allocator's.
        step_seconds: median seconds of a step, the first two left out.
        seconds: wall time of the training loop, validation left out.
    """

    history: tuple[dict[str, Any], ...]
    final_loss: float
    val_metrics: dict[str, float] = field(default_factory=dict)
    validations: tuple[dict[str, Any], ...] = ()
    peak_bytes: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0


def train(
    model: nn.Module,
    data: Any,
    *,
    plan: Plan | None = None,
    algorithm: Algorithm | None = None,
    epochs: int = 1,
    val_data: Any = None,
    optimizer: Callable[[Any], Optimizer] | Optimizer | None = None,
    run_dir: str | Path | None = None,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    projection: Projection | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> Result:
    """Train ``model`` in place.

    Args:
        model: the model the plan was made for, or any chain for an algorithm.
        data: a DataLoader, a list of batches, or a Dataset (32 samples a batch, shuffled anew each epoch).
        plan: what to train with; excludes ``algorithm``.
        algorithm: an :class:`horizonplan.algorithms.Algorithm`; with neither, back-propagation.
        epochs: passes over the data.
        val_data: as ``data``, evaluated in eval mode after each epoch.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer over this model's parameters, or ``None``
            for ``AdamW(lr=1e-3)``.
        run_dir: a directory for ``log.jsonl``, ``plan.json`` and the final weights ``model.pt``.
        loss: as for :func:`horizonplan.plan_horizon`.
        compute_loss: likewise.
        projection: likewise.
        blocks: as for :func:`horizonplan.plan_horizon`; a plan brings its own.
        device: where to train; ``None``: where the model is; ``"emulated:40MiB"``: on the CPU, which runs out of
            memory as a card of that size would.
        seed: of a Dataset's order and of torch's generator during the run.
        progress: as for :func:`horizonplan.plan_horizon`, a stage an epoch.

    Raises:
        ValueError: bad arguments, empty data, a model the plan was not made for.
        torch.OutOfMemoryError: a step does not fit the device.
        FloatingPointError: a loss is not finite; the weights are those before that step.
    """
    if plan is not None and algorithm is not None:
        raise ValueError("plan and algorithm are both given: give one.")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}: give a Plan, e.g. Plan.load(path).")
    if algorithm is not None and not isinstance(algorithm, Algorithm):
        raise ValueError(f"algorithm={algorithm!r}: give an Algorithm such as horizonplan.algorithms.Horizon(3).")
    if plan is not None and blocks is not None:
        raise ValueError(f"blocks={blocks!r}: a plan brings its own blocks; leave it out.")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs={epochs!r}: give a whole number >= 1.")
    refuse_wrappers(model)
    compute = resolve_loss(loss, compute_loss)
    card = parse_device(device)
    if card is not None and card.kind == "simulated":
        raise ValueError(f"device={device!r}: nothing runs on a simulated device; give an emulated or a real one.")
    place = _place(model, device if card is None else "cpu")
    loader = as_loader(data, shuffle=True, seed=seed)
    with (
        seeded(seed, rng_devices(model)),
        training_mode(model),
        nullcontext() if card is None else Budget(card.memory_bytes) as budget,
    ):
        first = move(taken(loader, 1)[0], place)
        val_loader = None if val_data is None else as_loader(val_data, batch_size=batch_size(first) or 32)
        if budget is not None:
            budget.hold(list(model.parameters()), list(model.buffers()), batch=first)
        if plan is not None:
            chain = plan.chain(model, first, loss, compute_loss, projection)
            method: Algorithm = Fixed(plan.schedule)
        else:
            chain = Chain.from_model(model, first, blocks, loss, compute_loss, projection)
            method = BackPropagation() if algorithm is None else algorithm
        extra = method.prepare(chain, first)
        made = _optimizer(optimizer, [*model.parameters(), *(extra.parameters() if extra is not None else [])])
        with _log(run_dir, plan) as log:
            result = _loop(_Run(chain, method, made, place, log), loader, val_loader, epochs, compute, progress)
        if run_dir is not None:
            torch.save(model.state_dict(), Path(run_dir) / "model.pt")
    return result


@dataclass
class _Run:
    chain: Chain
    method: Algorithm
    optimizer: Optimizer
    place: torch.device
    log: Callable[[dict[str, Any]], None]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def step(self, batch: Any) -> float:
        """One step; the second one (and the first, until then) is watched by the tracker on CPU."""
        count, cuda = len(self.seconds), self.place.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.place)
        start = time.perf_counter()
        if count <= WATCHED_STEP and not cuda:
            loss = self._watched(batch)
        else:
            loss = self.method.step(self.chain, batch, self.optimizer).item()
        self.seconds.append(time.perf_counter() - start)
        if cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.place)
        return loss

    def _watched(self, batch: Any) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        base = standing_bytes(self.chain, self.optimizer, batch)
        with LiveBytes() as tracker:
            loss = self.method.step(self.chain, batch, self.optimizer).item()
        self.peak_bytes = base + tracker.peak
        return loss


def _loop(
    run: _Run,
    loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    epochs: int,
    compute: ComputeLoss,
    progress: Progress,
) -> Result:
    history: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    report, spent = reporter(progress, epochs), 0.0
    if run.place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.place)
    model = run.chain.model
    for epoch in range(epochs):
        losses = []
        started = time.perf_counter()
        for batch in each(loader):
            try:
                losses.append(run.step(move(batch, run.place)))
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch}, step {len(history)}: {error}") from error
            history.append({"epoch": epoch, "step": len(history), "loss": losses[-1]})
            run.log({"event": "step", **history[-1], "seconds": run.seconds[-1]})
        if not losses:
            raise ValueError("data has no batches: give at least one.")
        spent += time.perf_counter() - started
        message = f"epoch {epoch}: loss {statistics.fmean(losses):.4f}"
        if val_loader is not None:
            metrics = evaluate(model, val_loader, compute, run.place)
            validations.append({"epoch": epoch, **metrics})
            run.log({"event": "validation", **validations[-1]})
            message += "".join(f", validation {name} {value:.4f}" for name, value in metrics.items())
        report(message)
    run.optimizer.zero_grad(set_to_none=True)
    report(None)
    warm = run.seconds[WATCHED_STEP + 1 :] or run.seconds
    return Result(
        history=tuple(history),
        final_loss=statistics.fmean(losses),
        val_metrics={k: v for k, v in validations[-1].items() if k != "epoch"} if validations else {},
        validations=tuple(validations),
        peak_bytes=run.peak_bytes,
        step_seconds=statistics.median(warm),
        seconds=spent,
    )


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is not None:
        model.to(as_device(device))
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _optimizer(optimizer: Callable[[Any], Optimizer] | Optimizer | None, parameters: list[nn.Parameter]) -> Optimizer:
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter requires a gradient; unfreeze one before training.")
    if isinstance(optimizer, Optimizer):
        check_optimizer(optimizer, trainable, optimizer)
        return optimizer
    return optimizer_for(trainable, optimizer)


@contextmanager
def _log(run_dir: str | Path | None, plan: Plan | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if run_dir is None:
        yield lambda event: None
        return
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if plan is not None:
        plan.save(folder / "plan.json")
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:

        def write(event: dict[str, Any]) -> None:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")
            file.flush()

        yield write
