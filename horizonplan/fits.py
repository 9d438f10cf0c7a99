"""Whether a training step fits a card that is not there: peak bytes predicted under fake tensors.

The step itself runs, operator by operator, on tensors that have shapes and no values
(:mod:`horizonplan.probes.simulation`): parameters, gradients, optimiser state and its temporaries,
activations and the temporaries between operators are counted to the byte. What no operator shows
(the CUDA context, library workspaces, the allocator's rounding) is a margin, assumed or calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.batch import ComputeLoss, LossFunction, batch_size, nbytes, resized, resolve_loss
from horizonplan.chain import Chain
from horizonplan.chain.calls import training_mode
from horizonplan.chain.chain import checked_run, refuse_wrappers
from horizonplan.devices import ASSUMED, Calibration, check_calibration
from horizonplan.probes.memory import step
from horizonplan.probes.simulation import Simulation, SimulationError, all_at_once, simulated
from horizonplan.probes.steady import Optimize, make_state, optimizer_for, restored
from horizonplan.probes.tracker import LiveBytes, own_bytes
from horizonplan.projection import Projection
from horizonplan.schedule import Schedule
from horizonplan.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class Fits:
    """The verdict, and what it was made from. All sizes in bytes.

    Attributes:
        ok: whether predicted and margin together are within the card's memory.
        predicted_bytes: peak of one training step at steady state.
        margin_bytes: what cannot be predicted: context, workspaces, fragmentation.
        device_bytes: the card's memory.
        batch_size: samples of the batch; ``None`` where its tensors share no first dimension.
        depth: blocks T; ``None`` for plain back-propagation, which needs no blocks.
        horizon: h; for back-propagation the depth, or ``None`` if it is plain.
        stride: s.
        recompute: activation checkpointing every so many blocks.
        parameter_bytes: parameters and buffers.
        optimizer_bytes: optimiser state.
        batch_bytes: the batch.
        how: ``"fake tensors"``, or ``"a run on the CPU"`` where the model's flow depends on values.
        margin_source: ``"assumed"``, or the calibrated card's name.
    """

    ok: bool
    predicted_bytes: int
    margin_bytes: int
    device_bytes: int
    batch_size: int | None
    depth: int | None
    horizon: int | None
    stride: int
    recompute: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    how: str
    margin_source: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def explain(self) -> str:
        """The verdict in plain words."""
        needed = self.predicted_bytes + self.margin_bytes
        exact = self.horizon is None or self.horizon == self.depth
        what = "back-propagation" if exact else f"horizon {self.horizon} of {self.depth}, stride {self.stride}"
        what += f", checkpointed every {self.recompute} blocks" if self.recompute else ""
        rest = self.predicted_bytes - self.parameter_bytes - self.optimizer_bytes - self.batch_bytes
        parts = {
            "parameters and buffers": self.parameter_bytes,
            "optimiser state": self.optimizer_bytes,
            "batch": self.batch_bytes,
            "gradients, activations and temporaries at the peak": rest,
            f"margin for what cannot be predicted ({self.margin_source})": self.margin_bytes,
        }
        verdict = "fits" if self.ok else f"does not fit: {format_bytes(needed - self.device_bytes)} too much for"
        size = {None: "an unknown number of samples", 1: "1 sample"}.get(self.batch_size, f"{self.batch_size} samples")
        lines = [f"{what}, {size} a batch: predicted from {self.how}"]
        lines += [f"  {format_bytes(size):>10}  {name}" for name, size in parts.items()]
        return "\n".join([*lines, f"  {format_bytes(needed):>10}  in all; {verdict} {format_bytes(self.device_bytes)}"])


@dataclass(frozen=True)
class Sweep:
    """Batch sizes tried, and the largest that fits (0: not even one sample does).

    Attributes:
        largest: the largest number of samples that fits.
        smallest_too_large: the smallest that was seen not to fit; ``None`` if ``limit`` samples still fit.
        tried: a verdict for each size tried, by size.
    """

    largest: int
    smallest_too_large: int | None
    tried: tuple[Fits, ...]


def fits(
    model: nn.Module,
    batch: Any,
    device_memory: int | str,
    horizon: int | None = None,
    *,
    stride: int = 1,
    recompute: int = 0,
    optimizer: Optimize | None = None,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    projection: Projection | None = None,
    calibration: Calibration = ASSUMED,
) -> Fits:
    """Predict the peak bytes of a training step on a CUDA card, and whether it fits there.

    Nothing of the model's size is allocated, and no card is needed. A model whose flow depends on
    values is run where it is instead, if it has values; its operators may then keep other bytes than
    CUDA's do.

    Args:
        model: any chain of blocks, on any device; ``meta`` will do. Without ``horizon`` and
            ``recompute`` any module at all.
        batch: a batch as in training, on any device; only its shapes matter.
        device_memory: the card's memory, bytes or ``"24GiB"``.
        horizon: h, 1..T; ``None``: back-propagation by ``loss.backward()``. h = T is the same by
            :func:`horizonplan.train`, which may keep a few states more, and so is ``None`` with ``blocks``.
        stride: s, 1..horizon.
        recompute: activation checkpointing every so many blocks; 0: none.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer, or ``None`` for AdamW.
        loss: as for :func:`horizonplan.plan_horizon`.
        compute_loss: likewise.
        blocks: likewise.
        projection: likewise.
        calibration: what the context, the libraries and the allocator take; see :class:`horizonplan.Calibration`.

    Raises:
        SimulationError: the flow depends on values, and the model has none (it is on ``meta``).
        ChainError: the model is no chain, and a horizon was asked for.
        ValueError: bad arguments, or the model rejects the batch.

    >>> verdict = fits(nn.Linear(1024, 1024), (torch.ones(8, 1024), torch.ones(8, 1024)), "1GiB")
    >>> verdict.ok, verdict.optimizer_bytes >= 2 * verdict.parameter_bytes
    (True, True)
    """
    check_calibration(calibration)
    asked = _Asked(model, horizon, stride, recompute, optimizer, loss, compute_loss, blocks, projection)
    memory = parse_bytes(device_memory, "device_memory")
    return asked.answer(batch, lambda trial: trial(batch, memory, calibration))


def sweep(
    model: nn.Module,
    batch: Any,
    device_memory: int | str,
    horizon: int | None = None,
    *,
    limit: int = 65536,
    stride: int = 1,
    recompute: int = 0,
    optimizer: Optimize | None = None,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    projection: Projection | None = None,
    calibration: Calibration = ASSUMED,
) -> Sweep:
    """Find the largest batch size that fits: double or halve from the batch given, then bisect.

    Args:
        model: as for :func:`fits`, and so are all arguments that are not listed.
        batch: a batch whose tensors share their first dimension, the samples.
        device_memory: likewise.
        horizon: likewise.
        limit: the largest size to try.
        stride: likewise.
        recompute: likewise.
        optimizer: likewise.
        loss: likewise.
        compute_loss: likewise.
        blocks: likewise.
        projection: likewise.
        calibration: likewise.

    Raises:
        ValueError: as for :func:`fits`; or the batch has no number of samples.
    """
    start, memory = batch_size(batch), parse_bytes(device_memory, "device_memory")
    if start is None:
        raise ValueError("batch: its tensors share no first dimension, so there is no batch size to search over.")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit={limit!r}: give a whole number of samples >= 1.")
    check_calibration(calibration)
    asked = _Asked(model, horizon, stride, recompute, optimizer, loss, compute_loss, blocks, projection)

    def search(trial: Trial) -> Sweep:
        tried: dict[int, Fits] = {}

        def good(size: int) -> bool:
            if size not in tried:
                tried[size] = trial(batch if size == start else resized(batch, size), memory, calibration)
            return tried[size].ok

        low, high = 0, min(start, limit)
        while good(high) and high < limit:
            low, high = high, min(2 * high, limit)
        while high - low > 1 and not good(high):
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        whole, every = good(high), tuple(tried[size] for size in sorted(tried))
        return Sweep(high if whole else low, None if whole else high, every)

    return asked.answer(batch, search)


FAKE, REAL = "fake tensors", "a run on the CPU"

Trial = Callable[[Any, int, Calibration], Fits]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Asked:
    """A step that somebody asks about."""

    model: nn.Module
    horizon: int | None
    stride: int
    recompute: int
    optimizer: Optimize | None
    loss: LossFunction | None
    compute_loss: ComputeLoss | None
    blocks: str | Sequence[str] | None
    projection: Projection | None

    def answer(self, batch: Any, use: Callable[[Trial], Answer]) -> Answer:
        """Hand ``use`` a function that predicts one step on a batch; by running it where values are needed."""
        if self.horizon is None and self.stride != 1:
            raise ValueError(f"stride={self.stride!r}: back-propagation has no windows; give a horizon too.")
        refuse_wrappers(self.model)
        plain = self.horizon is None and not self.recompute and self.blocks is None
        with training_mode(self.model):
            try:
                with simulated(self.model) as simulation:
                    chain = None if plain else self._chain(simulation.batch(batch))
                    return use(partial(self._trial, chain, partial(self._fake_step, chain, simulation), FAKE))
            except SimulationError:
                if any(p.is_meta for p in self.model.parameters()):
                    raise
            chain = None if plain else self._chain(batch)
            return use(partial(self._trial, chain, partial(self._real_step, chain), REAL))

    def _chain(self, batch: Any) -> Chain:
        return Chain.from_model(self.model, batch, self.blocks, self.loss, self.compute_loss, self.projection)

    def _schedule(self, chain: Chain) -> Schedule:
        horizon = chain.depth if self.horizon is None else self.horizon
        return Schedule.horizon(chain.depth, horizon, self.stride, self.recompute)

    def _trial(
        self,
        chain: Chain | None,
        run: Callable[[Any], tuple[int, int]],
        how: str,
        batch: Any,
        memory: int,
        calibration: Calibration,
    ) -> Fits:
        peak, standing = run(batch)
        own, data = own_bytes(list(self.model.parameters()), list(self.model.buffers())), nbytes(batch)
        margin = calibration.margin_bytes(peak)
        depth = None if chain is None else chain.depth
        return Fits(
            ok=peak + margin <= memory,
            predicted_bytes=peak,
            margin_bytes=margin,
            device_bytes=memory,
            batch_size=batch_size(batch),
            depth=depth,
            horizon=depth if self.horizon is None else self.horizon,
            stride=self.stride,
            recompute=self.recompute,
            parameter_bytes=own,
            optimizer_bytes=standing - own - data,
            batch_bytes=data,
            how=how,
            margin_source=calibration.card,
        )

    def _fake_step(self, chain: Chain | None, simulation: Simulation, batch: Any) -> tuple[int, int]:
        return self._step(chain, simulation.batch(batch), simulation.optimizer(self.optimizer))

    def _real_step(self, chain: Chain | None, batch: Any) -> tuple[int, int]:
        """The same with values, where they are needed; everything is restored."""
        with restored(self, weights=True):
            return self._step(chain, batch, lambda params: all_at_once(optimizer_for(params, self.optimizer)))

    def _step(self, chain: Chain | None, batch: Any, make: Callable[[Any], Optimizer]) -> tuple[int, int]:
        """Peak bytes of a step, and the bytes alive when it begins."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("model: no parameter requires a gradient; unfreeze one.")
        made = make(parameters)
        run: Callable[[], object] = partial(self._plain, batch, made)
        if chain is None:
            make_state(made)
        else:  # brings the state, and all else that outlives a step
            step(chain, batch, Schedule.horizon(chain.depth, 1), made)
            made.zero_grad(set_to_none=True)
            run = partial(step, chain, batch, self._schedule(chain), made)
        standing = own_bytes(list(self.model.parameters()), list(self.model.buffers()), dict(made.state))
        standing += nbytes(batch)
        with LiveBytes() as tracker:
            run()
        made.zero_grad(set_to_none=True)
        return standing + tracker.peak, standing

    def _plain(self, batch: Any, optimizer: Optimizer) -> None:
        compute = resolve_loss(self.loss, self.compute_loss)
        torch.autograd.backward(checked_run(self.model, batch, compute)())
        optimizer.step()
