"""What may be planned beside the paper's family: in parts, recomputed, in bf16, and the other methods' windows.

A batch's gradient can be accumulated over micro-batches, exact ones and windows can be recomputed, forwards can run
in bf16, and LoCo has windows of its own. Memory, FLOPs and seconds of all of them are folds over a profile: of the
batch, of a micro-batch, or of the batch under autocast. What is known of the rate is said, and no more:

- accumulated back-propagation is exact where the batch's loss is the mean of its micro-batches' losses, weighted by
  their samples, and no layer couples the samples of a batch. Else its rate is not known;
- windows have the same gradient whether they are recomputed or not, and so the same rate;
- bf16 rounds: what that does to the rate nobody has measured, so it is not known. Nor is LoCo's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from horizonplan.batch import batch_size, resized
from horizonplan.candidates import folded, schedule_of
from horizonplan.chain import Chain
from horizonplan.precision import autocast
from horizonplan.predict import accumulated_bytes, step_bytes, step_seconds
from horizonplan.probes.child import out_of_memory
from horizonplan.probes.pieces import check_pieces
from horizonplan.probes.profile import Profile, retimed
from horizonplan.probes.steady import Optimize
from horizonplan.rows import Row

ROUNDS = 3  # of timing
WORTHWHILE = 0.95  # of the memory of what is simpler: what needs more than that is not in the table
STAGES = (3, 5)  # of LoCo, as the paper has it

Measure = Callable[[Any], Profile]


@dataclass(frozen=True)
class Alternatives:
    """What was profiled besides the batch itself.

    Attributes:
        pieces: profiles of the largest of so many micro-batches.
        in_bf16: profile of the batch under autocast; None: the model does not run under it.
        exact_in_parts: whether accumulating gives the exact gradient.
        notes: what to tell.
    """

    pieces: Mapping[int, Profile] = field(default_factory=dict)
    in_bf16: Profile | None = None
    exact_in_parts: bool = True
    notes: tuple[str, ...] = ()

    def timed(
        self, chain: Chain, batch: Any, whole: Profile, optimizer: Optimize | None
    ) -> tuple[Profile, Alternatives]:
        """The batch's profile and these, with seconds that were measured in turn."""
        samples = batch_size(batch) or 1
        subjects: list[tuple[Any, Profile, Callable[[], AbstractContextManager[object]]]]
        subjects = [(batch, whole, nullcontext)]
        subjects += [(resized(batch, -(-samples // n)), piece, nullcontext) for n, piece in self.pieces.items()]
        if self.in_bf16 is not None:
            subjects.append((batch, self.in_bf16, partial(autocast, "bf16", chain.device)))
        whole, *others = retimed(chain, subjects, optimizer, ROUNDS)
        pieces = dict(zip(self.pieces, others, strict=False))
        return whole, replace(self, pieces=pieces, in_bf16=None if self.in_bf16 is None else others[-1])

    def rows(self, whole: Profile, family: Sequence[Row]) -> tuple[Row, ...]:
        """The rows beside a table of the paper's family; what a smaller exact row makes pointless is left out.

        Args:
            whole: profile of the batch.
            family: the table: horizons, strides, back-propagation with and without recomputation.
        """
        depth = whole.depth
        exact = [row for row in family if row.horizon == depth]
        parts = [row for plain in exact for row in self._in_parts(plain, whole)]
        disjoint = [row for row in family if row.stride == row.horizon > 1 and not row.recompute]
        again = [row for plain in disjoint for row in _again(plain, whole)]
        low = [row for plain in (*exact, *disjoint) for row in self._rounded(plain)]
        others = list(_loco(whole, {(row.horizon, row.stride) for row in family}))
        extra = [*parts, *again, *low, *others]
        return tuple(row for row in extra if not _pointless(row, [*exact, *parts, *low], depth))

    def _in_parts(self, plain: Row, whole: Profile) -> Iterator[Row]:
        """An exact row accumulated over more and more micro-batches, as long as that saves memory."""
        before = step_bytes(schedule_of(plain, whole.depth), whole)
        for count, piece in sorted(self.pieces.items()):
            schedule = schedule_of(plain, whole.depth)
            needed = accumulated_bytes(schedule, whole, piece)
            if needed > WORTHWHILE * before:
                return
            before, one = needed, step_seconds(schedule, piece)
            seconds = None if one is None else count * (one - piece.update_seconds) + whole.update_seconds
            known = self.exact_in_parts
            yield replace(
                plain,
                micro_batches=count,
                memory_bytes=needed,
                memory_source="predicted",
                nvml_bytes=None,
                cosine=1.0 if known else None,
                cosine_source="derived" if known else "unmeasured",
                rate=1.0 if known else None,
                rate_source="derived" if known else "unmeasured",
                reference=False,
                step_seconds=seconds,
                step_seconds_source="unmeasured" if seconds is None else "predicted",
            )

    def _rounded(self, plain: Row) -> Iterator[Row]:
        if self.in_bf16 is not None:
            unknown = replace(plain, precision="bf16", cosine=None, cosine_stderr=None, cosine_source="unmeasured")
            unknown = replace(unknown, rate=None, rate_stderr=None, rate_source="unmeasured", reference=False)
            yield folded(unknown, self.in_bf16)


def alternatives(chain: Chain, batch: Any, measure: Measure, others: Iterable[Any] | None) -> Alternatives:
    """Profile micro-batches of 1/2, 1/4, ... of a batch, and the batch under bf16.

    Args:
        chain: the model, on the device to measure on.
        batch: the batch on that device.
        measure: makes a profile of a batch.
        others: batches, on that device, on which is tested whether the loss is a mean over samples; ``None``: it
            cannot be tested, because nothing has values.
    """
    samples, notes, pieces = batch_size(batch), [], {}
    counts = [] if samples is None else [2**i for i in range(1, samples.bit_length()) if 2**i <= samples]
    if samples is None:
        notes.append("No micro-batches are in the table: the tensors of a batch share no first dimension.")
    for count in counts:
        assert samples is not None
        found, message = _tried(lambda size: measure(resized(batch, size)), -(-samples // count))
        if found is None:
            notes.append(f"Back-propagation in {count} micro-batches is not in the table: {message}")
            break
        pieces[count] = found
    why = _inexact(chain, others, list(pieces)) if pieces else None
    if why is not None:
        word = "is not" if others is not None else "may not be"
        notes.append(f"Accumulating over micro-batches {word} the exact gradient, and its rate is unknown: {why}")
    low, message = _tried(lambda one: _under_bf16(chain, one, measure), batch)
    if low is None:
        notes.append(f"bf16 is not in the table: the model does not run under it ({message})")
    return Alternatives(pieces, low, why is None, tuple(notes))


def _under_bf16(chain: Chain, batch: Any, measure: Measure) -> Profile:
    with autocast("bf16", chain.device):
        return measure(batch)


def _tried(call: Callable[[Any], Profile], value: Any) -> tuple[Profile | None, str]:
    """What a call returns, or ``None`` and why the model cannot do it."""
    try:
        return call(value), ""
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        return None, " ".join(str(error).split())


def _inexact(chain: Chain, batches: Iterable[Any] | None, counts: Sequence[int]) -> str | None:
    """Why the gradient in parts is another one; ``None`` where the loss is the mean of the parts' losses."""
    if batches is None:
        return "there are no values, so whether the loss is a mean over samples could not be tested."
    try:
        for batch in batches:
            size = batch_size(batch) or 1
            for count in dict.fromkeys([counts[0], counts[-1]]):
                check_pieces(chain, batch, min(count, size))
    except ValueError as error:
        return str(error)
    return None


def _again(plain: Row, whole: Profile) -> list[Row]:
    """Disjoint windows recomputed, if that saves memory: every block or every square root of the window's length."""
    distances = dict.fromkeys([1, max(1, round(math.sqrt(plain.horizon)))])
    found = min((folded(replace(plain, recompute=k), whole) for k in distances), key=lambda row: row.memory_bytes)
    return [found] if found.memory_bytes <= WORTHWHILE * plain.memory_bytes else []


def _loco(profile: Profile, pairs: set[tuple[int, int]]) -> Iterator[Row]:
    """LoCo's windows where they are no horizon and stride of the table; for comparison: nothing measures their rate."""
    for stages in STAGES:
        if stages >= profile.depth:
            continue
        row = Row(algorithm=f"LoCo {stages}", horizon=profile.depth, memory_bytes=0)
        schedule = schedule_of(row, profile.depth)
        first = schedule.windows[0]
        if schedule.pair not in pairs:
            yield folded(replace(row, horizon=schedule.longest, stride=first.stop - first.first), profile)


def _pointless(row: Row, exact: Iterable[Row], depth: int) -> bool:
    """Whether an exact row of the same precision, in no more parts, needs no more memory and no more FLOPs."""
    if row.flops is None or row.algorithm != "horizon":
        return False
    for other in exact:
        same = other.horizon == depth and other.precision == row.precision and other is not row
        if not same or other.flops is None or other.micro_batches > row.micro_batches:
            continue
        fewer = (other.memory_bytes, other.flops) != (row.memory_bytes, row.flops)
        if fewer and other.memory_bytes <= row.memory_bytes and other.flops <= row.flops:
            return True
    return False
