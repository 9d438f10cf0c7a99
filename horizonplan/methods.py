"""Other training methods beside the table: measured as black boxes, shown and judged, never chosen.

SGR, LoCo, plain local learning and methods that own their step are no horizons and strides of one gradient, so nothing
about them is predicted: a step's bytes, seconds and FLOPs are those of real steps on the largest batch, auxiliary heads
and graphs of second derivatives included, and the rate is that of a short real run. A row's horizon is that of the
method's longest window or module, 1 where it has neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise

from horizonplan import probes
from horizonplan.algorithms import SGR, Algorithm, Windows, short_name
from horizonplan.candidates import with_memory, with_rate
from horizonplan.choice import Judge
from horizonplan.contest import Rollouts
from horizonplan.decide import Decision
from horizonplan.frugal import Frugal
from horizonplan.objective import evaluate
from horizonplan.probes.memory import OUT_OF_MEMORY, Value, attempt
from horizonplan.probes.method import method_losses
from horizonplan.probes.rate import rate_sample
from horizonplan.probes.runs import Runs, Stream
from horizonplan.probes.sample import Sample
from horizonplan.probing import Probing
from horizonplan.rows import Row

REPEATS = 5  # of the clock
NEW_HEADS = (
    "has auxiliary heads of {} parameters, which begin untrained: a short run shows less of its rate than a longer "
    "training. Give more rollout_steps to see."
)


def check_methods(methods: object) -> None:
    """See that these are methods, each of another name.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(methods, list | tuple):
        raise ValueError(
            f"methods={methods!r}: give a list of methods such as [horizonplan.algorithms.SGR(modules=3)]."
        )
    for i, method in enumerate(methods):
        if not isinstance(method, Algorithm):
            raise ValueError(f"methods[{i}]={method!r}: give a method such as horizonplan.algorithms.SGR(modules=3).")
    names = [short_name(method) for method in methods]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"methods: {twice} is there twice; give each once, and functions in it names of their own.")


def with_methods(
    decision: Decision,
    methods: Sequence[Algorithm],
    probing: Probing,
    judge: Judge,
    stream: Stream,
    steps: int,
    seed: int,
) -> Decision:
    """The decision with a row for each method; the choice and the other rows stay as they are.

    Args:
        decision: the table and the choice.
        methods: the methods. They are copied, so that what they prepare for this model is dropped.
        probing: where measurements are made.
        judge: what was asked for.
        stream: the data, as the other short runs have seen them.
        steps: of each short run; 0: rates stay unmeasured.
        seed: of the short runs.
    """
    probing.spent["methods"] = 0.0
    notes: list[str] = []
    found = [(method, _costs(probing, judge, method, notes)) for method in methods]
    there = [(method, row) for method, row in found if row is not None]
    samples = _rates(probing, there, stream, steps, seed, notes) if there and steps else {}
    rows = [with_rate(row, samples.get(row.algorithm)) for _, row in there]
    judged = evaluate(rows, judge.objective, judge.price(decision.rows)) if rows else ()
    return replace(
        decision,
        rows=(*decision.rows, *judged),
        notes=(*decision.notes, *notes),
        rolled=(*decision.rolled, *samples.values()),
    )


def _costs(probing: Probing, judge: Judge, method: Algorithm, notes: list[str]) -> Row | None:
    """A method's row without its rate; ``None``, and a note, where it does not fit or refuses the model."""
    own, name = copy(method), short_name(method)
    measure = partial(probes.method, probing.chain, [probing.biggest], own, probing.optimizer, REPEATS)
    samples = _tried(measure, probing, f"{name} is not in the table", notes)
    if samples is None:
        return None
    memory = samples[0]
    if memory.source == OUT_OF_MEMORY:
        notes.append(f"{name} is not in the table: it ran out of memory ({memory.detail['message']}).")
        return None
    if heads := memory.detail["extra_parameters"]:
        notes.append(f"{name} {NEW_HEADS.format(heads)}")
    flops = memory.detail["flops"]
    probing.spent["methods"] += flops * memory.detail["steps"] / probing.bp_flops
    horizon, stride = _windows(own, probing.chain.depth)
    row = Row(
        algorithm=name,
        horizon=horizon,
        stride=stride,
        memory_bytes=0,
        reference=True,
        flops=flops or None,
        step_seconds=samples[1].value,
        step_seconds_source="measured",
    )
    return judge.room.holds(with_memory(row, memory))


def _rates(
    probing: Probing,
    there: Sequence[tuple[Algorithm, Row]],
    stream: Stream,
    steps: int,
    seed: int,
    notes: list[str],
) -> dict[str, Sample]:
    """The rates of short runs, by name, all compared with one run of back-propagation."""
    compared = probing.raced(lambda way: _exact(probing, stream, steps, seed, way))
    if compared is None:
        return {}
    start, exact = compared
    batches = [stream.batch(stream.place(i)) for i in range(steps)]
    found = {}
    for method, row in there:
        run = partial(method_losses, probing.chain, batches, copy(method), probing.optimizer, seed)
        losses = _tried(run, probing, f"{row.algorithm} has no rate", notes)
        if losses is None:
            continue
        taken = sum(map(math.isfinite, losses))
        probing.spent["methods"] += taken * (row.flops or 0) / probing.bp_flops
        sample = rate_sample((row.horizon, row.stride), losses, exact, start)
        found[row.algorithm] = replace(sample, detail={"method": row.algorithm, **sample.detail})
        if math.isnan(sample.value):
            notes.append(f"{row.algorithm} has no rate: {sample.detail['why']}.")
    return found


def _exact(probing: Probing, stream: Stream, steps: int, seed: int, way: Frugal) -> tuple[list[float], list[float]]:
    """Losses of the initial weights on the last quarter's batches, and of a run of back-propagation."""
    runs = Runs(probing.chain, stream, probing.optimizer, seed, way.recompute, way.micro_batches, room_bytes=0)
    track = Rollouts(probing, runs, way)
    try:
        return list(track.start(steps, 0)), list(track.advance(None, steps, 0))
    finally:
        probing.spent["methods"] += track.spent


def _tried(call: Callable[[], Value], probing: Probing, what: str, notes: list[str]) -> Value | None:
    """What a measurement returns; ``None``, and a note, where memory runs out or the method refuses the model."""
    try:
        found, message = attempt(call, probing.chain.device)
    except (RuntimeError, ValueError, TypeError) as error:
        notes.append(f"{what}: {' '.join(str(error).split())}")
        return None
    if message is not None:
        notes.append(f"{what}: it ran out of memory ({message}).")
    return found


def _windows(method: Algorithm, depth: int) -> tuple[int, int]:
    """How far a prepared method's gradients look and how far apart its windows are; 1, 1 where it has no windows."""
    if isinstance(method, Windows):
        schedule = method.schedule(depth)
        first = schedule.windows[0]
        return schedule.longest, first.stop - first.first
    if isinstance(method, SGR):
        longest = max(b - a for a, b in pairwise(method.bounds))
        return longest, longest
    return 1, 1
