"""A plan in plain words: the table as text, the choice, what else there was, and what to distrust."""

from collections.abc import Mapping, Sequence

from horizonplan.cost import Cost, describe, nodes_of
from horizonplan.horizons import HeldOut
from horizonplan.objective import Objective
from horizonplan.rows import Row
from horizonplan.savings import savings
from horizonplan.units import format_bytes, format_count, format_seconds

MARKS = {"measured": "m", "fitted": "f", "predicted": "p", "derived": "d", "unmeasured": "-"}
NEARLY = 1.25
WORTHWHILE = 0.02
FEWER = 3  # steps down the ladder that are told
HEADINGS = ("", "candidate", "memory", "cosine", "rate", "cost", "objective", "feasible", "time/step", "FLOPs")


def name_of(row: Row, depth: int) -> str:
    """A row's everyday name."""
    how = f", in {row.micro_batches} micro-batches" if row.micro_batches > 1 else ""
    how += f", {row.precision}" if row.precision != "fp32" else ""
    if row.algorithm == "horizon" and row.horizon == depth:
        return (f"BP, checkpoint every {row.recompute}" if row.recompute else "BP (back-propagation)") + how
    how = (f", recompute {row.recompute}" if row.recompute else "") + how
    if row.algorithm != "horizon":
        return row.algorithm + how
    kind = "disjoint windows" if row.stride == row.horizon and row.horizon > 1 else f"stride {row.stride}"
    return f"h={row.horizon}, {kind}{how}"


def depth_of(rows: Sequence[Row]) -> int:
    """Blocks of the model a table is about: its largest horizon, which is back-propagation's."""
    return max(row.horizon for row in rows)


def cells(row: Row, depth: int) -> tuple[str, ...]:
    """A row as text; the letter behind a number is its source (see ``MARKS``)."""
    cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
    if row.cosine_stderr:
        cosine += f"±{row.cosine_stderr:.3f}"
    return (
        name_of(row, depth) + (" (reference)" if row.reference else ""),
        f"{format_bytes(row.memory_bytes)} {MARKS[row.memory_source]}",
        f"{cosine} {MARKS[row.cosine_source]}".replace("- -", "-"),
        "-" if row.rate is None else f"{row.rate:.3f} {MARKS[row.rate_source]}",
        "-" if row.cost is None else f"{row.cost:.3f}",
        "-" if row.objective is None else f"{row.objective:.3f}",
        "yes" if row.feasible else "no",
        "-" if row.step_seconds is None else f"{format_seconds(row.step_seconds)} {MARKS[row.step_seconds_source]}",
        "-" if row.flops is None else format_count(row.flops),
    )


def text_table(rows: Sequence[Row], chosen: Row) -> str:
    """All rows in columns; an arrow points at the chosen one."""
    depth = depth_of(rows)
    lines = [HEADINGS, *(("->" if row == chosen else "", *cells(row, depth)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def explain(rows: Sequence[Row], chosen: Row, objective: Objective, cost: Cost, notes: Sequence[str]) -> str:
    """The table, its legend, the choice, the references that beat it, and the notes."""
    legend = "m measured, f fitted, p predicted by folding the schedule over the profile, d derived, - not measured"
    paragraphs = [text_table(rows, chosen), legend, _choice(rows, chosen, objective, cost)]
    paragraphs += [*_beaten(rows, chosen), *_beaten_by_methods(rows, chosen), *_fewer_nodes(rows, chosen, cost)]
    paragraphs += [f"Note: {note}" for note in notes]
    return "\n\n".join(paragraphs)


def probing_in_words(steps: Mapping[str, float], seconds: float) -> str:
    """What probing cost, in steps of back-propagation, stage by stage."""
    stages = ", ".join(f"{stage} {price:.0f}" for stage, price in steps.items())
    return f"Probing took {format_seconds(seconds)}, in steps of back-propagation: {stages}."


def tested_in_words(held_out: Sequence[HeldOut], verified: bool, measured: bool, missed: Sequence[str]) -> str:
    """Whether what was predicted of a held-out horizon came out, and what a run of the choice itself has missed."""
    if missed:
        return f"Not verified: a run of the first choice missed its {' and '.join(missed)}."
    if not held_out and not verified:
        return f"Not verified: {'nothing could be held out' if measured else 'nothing was measured'}."
    if not held_out:
        return "Verified: every horizon was measured."
    shown = {"memory": format_bytes, "cosine": "{:.3f}".format}
    tests = [
        f"{test.quantity} {shown[test.quantity](test.measured)} "
        f"{'in' if test.ok else 'outside'} {shown[test.quantity](test.low)}..{shown[test.quantity](test.high)}"
        for test in held_out
    ]
    word = "Verified" if verified else "Not verified"
    return f"{word}: h={held_out[0].horizon} was predicted first and measured then: {', '.join(tests)}."


def _choice(rows: Sequence[Row], chosen: Row, objective: Objective, cost: Cost) -> str:
    depth = depth_of(rows)
    exact = next(row for row in rows if row.horizon == depth and row.plain)
    saved = 1 - chosen.memory_bytes / exact.memory_bytes
    words = [
        f"Asked for {objective.describe()}; the cost of memory is {describe(cost)}.",
        f"Train with {name_of(chosen, depth)}:",
    ]
    if not chosen.feasible:
        words[1] = f"What was measured does not meet that; the best of what was tried is {name_of(chosen, depth)}:"
    if chosen == exact:
        words.append(f"the whole network in one window, {format_bytes(chosen.memory_bytes)} a step.")
        return " ".join(words)
    words.append(
        f"{format_bytes(chosen.memory_bytes)} a step ({MARKS_IN_WORDS[chosen.memory_source]}), "
        f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} than back-propagation's "
        f"{format_bytes(exact.memory_bytes)}."
    )
    if chosen.horizon < depth and saved < WORTHWHILE:
        words.append("Horizons save next to nothing here: weights, optimiser or head need the memory.")
    if chosen.exact:
        truncated = any(row.horizon < depth and row.feasible and not row.reference for row in rows)
        than = "none of the truncated candidates is better by this objective" if truncated else WITHOUT_TRUNCATION
        words.append(f"Its gradient is exact: {_saver(chosen)} wins, and {than}.")
    elif chosen.rate is None:
        words.append("How fast its loss falls is not known: no run has measured it.")
    else:
        words.append(
            f"Its loss falls at {chosen.rate:.2f} times back-propagation's rate ({MARKS_IN_WORDS[chosen.rate_source]})."
        )
    if chosen.step_seconds and exact.step_seconds:
        words.append(f"A step takes {chosen.step_seconds / exact.step_seconds:.2f} times as long.")
    return " ".join(words)


def _saver(chosen: Row) -> str:
    """What keeps an exact gradient's memory small."""
    ways = ["activation checkpointing"] * bool(chosen.recompute) + ["accumulation"] * (chosen.micro_batches > 1)
    return " with ".join(ways)


WITHOUT_TRUNCATION = "no truncated candidate is feasible"
MARKS_IN_WORDS = {
    "measured": "measured",
    "fitted": "fitted",
    "predicted": "predicted",
    "derived": "derived from the cosine",
    "unmeasured": "not measured",
}


def _beaten(rows: Sequence[Row], chosen: Row) -> list[str]:
    """References that are better than the choice, or exact and faster for little more memory, said plainly."""
    depth = depth_of(rows)
    rows = [row for row in rows if row.algorithm == "horizon"]
    exact = [row for row in rows if row.horizon == depth and row != chosen]
    references = [row for row in rows if row.reference and row.rate is not None]
    references += [row for row in exact if not row.reference and _no_larger(row, chosen)]
    if better := [row for row in references if _beats(row, chosen)]:
        best = min(better, key=lambda row: (row.step_seconds or 0.0, row.memory_bytes))
        compared = f"{name_of(best, depth)} needs {_compared(best, chosen, depth)}"
        if not best.reference and not _faster(best, chosen):
            return [f"Smaller, if you have the time: {compared}."]
        advice = 'Use it unless it is too slow for you (candidates="all" lets it win).' if best.recompute else "Use it."
        return [f"A reference beats this choice: {compared}. {advice}"]
    near = [row for row in references if row.horizon == depth and _faster(row, chosen) and _nearly(row, chosen)]
    if near and chosen.horizon < depth:
        best = min(near, key=lambda row: row.memory_bytes)
        return [f"Nearly as small: {name_of(best, depth)} needs {_compared(best, chosen, depth)}."]
    return []


def _beaten_by_methods(rows: Sequence[Row], chosen: Row) -> list[str]:
    """Other methods that are better than the choice."""
    depth, told = depth_of(rows), []
    for row in rows:
        if row.reference and row.algorithm != "horizon" and row.rate is not None and _beats(row, chosen):
            rates = f"a rate of {row.rate:.2f}"
            rates += "" if chosen.rate is None else f" instead of {chosen.rate:.2f}"
            told.append(
                f"Another method beats this choice in a short run: {row.algorithm} needs "
                f"{_compared(row, chosen, depth)}, with {rates}. A plan does not choose it: give train(algorithm=...)."
            )
    return told


def _fewer_nodes(rows: Sequence[Row], chosen: Row, cost: Cost) -> list[str]:
    """Where fewer or cheaper nodes suffice, and what it takes."""
    depth, now, told = depth_of(rows), nodes_of(cost, chosen.memory_bytes), []
    for saving in savings(rows, chosen, cost)[:FEWER]:
        row = saving.row
        assert now is not None
        words = f"{saving.nodes} x {saving.node} instead of {now[0]} x {now[1]} with {name_of(row, depth)}"
        if row.rate is not None and chosen.rate is not None:
            words += f": rate {chosen.rate:.2f} -> {row.rate:.2f}"
        if row.step_seconds and chosen.step_seconds:
            words += f", {row.step_seconds / chosen.step_seconds:.2f} times the time per step"
        told.append(f"{words}, {saving.cost:g} saved.")
    return [" ".join(["Cheaper nodes suffice:", *told])] if told else []


def _beats(row: Row, chosen: Row) -> bool:
    """Whether a reference meets the objective better, or needs less and trains no slower a step."""
    if row.feasible and row.objective is not None and chosen.objective is not None and row.objective < chosen.objective:
        return True
    smaller = row.memory_bytes < chosen.memory_bytes
    no_worse = chosen.rate is not None and row.rate is not None and row.rate >= chosen.rate
    return no_worse and (smaller or (_no_larger(row, chosen) and _faster(row, chosen)))


def _no_larger(row: Row, chosen: Row) -> bool:
    return row.memory_bytes <= chosen.memory_bytes


def _faster(row: Row, chosen: Row) -> bool:
    return row.step_seconds is not None and chosen.step_seconds is not None and row.step_seconds < chosen.step_seconds


def _nearly(row: Row, chosen: Row) -> bool:
    return row.memory_bytes <= NEARLY * chosen.memory_bytes


def _compared(row: Row, chosen: Row, depth: int) -> str:
    words = f"{format_bytes(row.memory_bytes)} instead of {format_bytes(chosen.memory_bytes)}"
    if row.algorithm == "horizon" and row.horizon == depth:
        words += ", with the exact gradient"
    if row.step_seconds and chosen.step_seconds:
        words += f", at {row.step_seconds / chosen.step_seconds:.2f} times the time per step"
    return words
