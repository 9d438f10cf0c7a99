"""Draw the README's picture: the operations for T = 4, h = 2 beside their memory trace.

    python benchmarks/picture.py                          # writes docs/pictures/schedule.svg
    python benchmarks/picture.py /tmp/schedule.png

The operations are the schedule's, the bytes are folded over the profile of a real four-block transformer, and the
peaks are checked against the tracker before anything is drawn.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from horizonplan import Chain, Schedule
from horizonplan.gradient import execute
from horizonplan.models import SequenceClassifier
from horizonplan.predict import Moment, memory_trace
from horizonplan.probes import LiveBytes, Profile, profile
from horizonplan.schedule import Drop, Loss, Op, Pull, Rerun, Run

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "schedule.svg"
DEPTH, HORIZON = 4, 2
INK, FAINT, PAPER = "#1f2328", "#8c959f", "#ffffff"
COLOURS = {Run: "#0969da", Rerun: "#0969da", Loss: "#bf8700", Pull: "#1a7f37", Drop: "#8c959f"}


def measured_model() -> tuple[Chain, object]:
    """A transformer whose activations outweigh its gradients, and a batch."""
    torch.manual_seed(0)
    model = SequenceClassifier(in_features=16, length=16, classes=10, width=32, depth=DEPTH)
    batch = (torch.randn(64, 16, 16), torch.randint(0, 10, (64,)))
    return Chain.from_model(model, batch), batch


def folded(chain: Chain, batch: object, costs: Profile, schedule: Schedule) -> list[Moment]:
    """The memory trace, if its peak is the one that the tracker sees."""
    ops = costs.ops(schedule)
    trace = list(memory_trace(ops, costs))
    for p in chain.parameters():
        p.grad = None
    with LiveBytes() as tracker:
        execute(chain, batch, ops)
    predicted = max(moment.peak_bytes for moment in trace)
    print(f"{schedule.windows}: predicted {predicted:,} bytes, measured {tracker.peak:,}")
    if abs(predicted - tracker.peak) > 0.001 * tracker.peak:
        raise SystemExit("the fold and the tracker disagree: nothing is drawn")
    return trace


def words(op: Op) -> str:
    """An operation in a few words."""
    if isinstance(op, Run):
        return f"Run block {op.t}"
    if isinstance(op, Loss):
        return f"Loss at x({op.end})" + (", trains the head" if op.final else "")
    if isinstance(op, Pull):
        return f"Pull block {op.t}: " + " + ".join(["weights"] * op.weights + ["input"] * op.input)
    return f"Drop x({op.state})" if isinstance(op, Drop) else f"Rerun block {op.t}"


def graphs(ops: Iterable[Op]) -> list[set[int]]:
    """The blocks whose graphs are alive after each operation."""
    alive: set[int] = set()
    after = []
    for op in ops:
        if isinstance(op, Run) and op.graph:
            alive.add(op.t)
        elif isinstance(op, Pull) and not op.keep:
            alive.discard(op.t)
        after.append(set(alive))
    return after


def draw(trace: list[Moment], exact_peak: int, path: Path) -> None:
    """One row an operation: what it is, which graphs are alive after it, and the bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "horizonplan"
    rows = len(trace)
    figure = Figure(figsize=(9.2, 5.6), facecolor=PAPER, layout="constrained")
    names, blocks, memory = figure.subplots(1, 3, sharey=True, width_ratios=(2.25, 1.0, 4.2))
    for axes in (names, blocks, memory):
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_facecolor(PAPER)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelleft=False, labelsize=10, labelcolor=INK)
    names.set(xlim=(0, 1), xticks=[])
    names.set_title("operation", loc="left", fontsize=11.5, color=INK)
    blocks.set(xlim=(-0.6, DEPTH - 0.4), xticks=range(DEPTH))
    blocks.set_title("graphs alive", fontsize=11.5, color=INK)
    blocks.set_xlabel("block", fontsize=10, color=INK)
    for row, (moment, alive) in enumerate(zip(trace, graphs(m.op for m in trace), strict=True)):
        colour = COLOURS[type(moment.op)]
        names.text(0, row, words(moment.op), va="center", fontsize=10.5, color=colour if colour != FAINT else "#6e7781")
        for t in range(DEPTH):
            face = COLOURS[Run] if t in alive else "#eaeef2"
            blocks.add_patch(Rectangle((t - 0.4, row - 0.38), 0.8, 0.76, facecolor=face))
        memory.barh(row, moment.peak_bytes / 2**20, height=0.76, color=colour, alpha=0.3)
        memory.barh(row, moment.live_bytes / 2**20, height=0.76, color=colour)
    peak = max(m.peak_bytes for m in trace) / 2**20
    for value, name in ((peak, f"peak, h = {HORIZON}"), (exact_peak / 2**20, "peak, back-propagation")):
        memory.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        text = f"{name}\n{value:.1f} MiB"
        memory.text(value * 0.992, rows - 0.55, text, ha="right", va="bottom", fontsize=10, color=INK)
    memory.set_xlim(0, exact_peak / 2**20 * 1.02)
    memory.set_title("live bytes after it (pale: peak during it)", loc="left", fontsize=11.5, color=INK)
    memory.set_xlabel("activations and gradients, MiB", fontsize=10, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(path: Path) -> None:
    chain, batch = measured_model()
    costs = profile(chain, batch, repeats=0)
    trace = folded(chain, batch, costs, Schedule.horizon(DEPTH, HORIZON))
    exact = folded(chain, batch, costs, Schedule.exact(DEPTH))
    draw(trace, max(moment.peak_bytes for moment in exact), path)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
