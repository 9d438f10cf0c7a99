"""Operation lists that exercise every kind of operation on every block, one block's graph alive at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from horizonplan.chain import Chain
from horizonplan.gradient import Step
from horizonplan.schedule import Drop, Loss, Op, Pull, Rerun, Run

Key = tuple[Any, ...]


def key_of(op: Op, fresh: bool = False, last: bool = False) -> Key:
    """What an operation's cost depends on.

    ``fresh``: a weight pull whose gradients do not exist yet; ``last``: the last pull of a block, which
    may free what the model did before it.
    """
    if isinstance(op, Pull):
        return ("pull", op.t, op.weights, op.input, op.keep, fresh and op.weights, last)
    if isinstance(op, Loss):
        return ("loss", op.end, op.final)
    return ("run", op.t, op.graph) if isinstance(op, Run) else ("rerun", op.t)  # type: ignore[union-attr]


def full_drill(chain: Chain, keeps: Sequence[bool], freshes: Sequence[bool], rerun: bool = True) -> list[Op]:
    """Every block once, and every way to pull through it; the graph is rebuilt where a pull used it up.

    ``rerun`` rebuilds every block's graph at least once. Without it nothing that a rerun needs is kept.
    """
    ops: list[Op] = []
    for t in range(chain.depth):
        pulls = [
            Pull(t, weights, wanted, keep)
            for keep in keeps
            for weights, wanted in ((True, True), (True, False), (False, True))
            if (chain.trainable[t] or not weights) and (t > 0 or chain.stem_trains or not wanted)
            for _ in (freshes if weights else [True])
        ]
        ops += [Run(t, graph=bool(pulls)), Loss(t + 1, final=False)]  # a graph that nothing pulls would stay
        for i, pull in enumerate(pulls):
            if i and trains_before(chain, t):
                ops.append(Loss(t + 1, final=False))
            ops.append(pull)
            if not pull.keep and i + 1 < len(pulls):
                ops.append(Rerun(t))
        if pulls and pulls[-1].keep:
            ops += [Loss(t + 1, final=False)] * trains_before(chain, t)
            ops.append(replace(pulls[-1], keep=False))
        if pulls and rerun:
            ops += [Rerun(t), *[Loss(t + 1, final=False)] * trains_before(chain, t), replace(pulls[-1], keep=False)]
        ops.append(Drop(t))
    return [*ops, Loss(chain.depth, final=True), Drop(chain.depth)]


def last_pulls(chain: Chain, weights: bool, wanted: bool) -> list[Op]:
    """One pull through every block that has something to train before it."""
    ops: list[Op] = []
    for t in range(chain.depth):
        legal = (chain.trainable[t] or not weights) and (t > 0 or chain.stem_trains or not wanted)
        if trains_before(chain, t) and legal:
            ops += [Run(t, graph=True), Loss(t + 1, final=False), Pull(t, weights, wanted, keep=False), Drop(t)]
        else:
            ops += [Run(t, graph=False), Drop(t)]
    return [*ops, Loss(chain.depth, final=True), Drop(chain.depth)]


def trains_before(chain: Chain, t: int) -> bool:
    """Whether a pull through block ``t`` may go on through what the model does before it."""
    return any(p.requires_grad for p in chain.layout.before[t]) or (t > 0 and chain.layout.glue)


def plain_drill(chain: Chain) -> list[Op]:
    """Every block once without a graph."""
    runs = [op for t in range(chain.depth) for op in (Run(t, graph=False), Drop(t))]
    return [*runs, Loss(chain.depth, final=True), Drop(chain.depth)]


def clear(chain: Chain) -> None:
    """Forget all gradients."""
    for p in chain.parameters():
        p.grad = None


class Driller:
    """Feeds every pull of a drill its block's cotangent, and alternates fresh and present gradients.

    A cotangent is kept for the block's next pull, except where the pull goes on through a stem: there
    it must be free to go when the engine lets go of it, so the drill has a loss before each pull.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.cotangent: Tensor | None = None
        self.pulls: dict[Key, int] = defaultdict(int)
        self.fresh = True

    def begin(self, op: Op, step: Step) -> None:
        """Give a pull its cotangent, and the gradients it should find."""
        if not isinstance(op, Pull):
            return
        if self.cotangent is not None:
            step.cotangents[op.t + 1] = self.cotangent
        if step.place == step.last_pull[op.t]:
            self.cotangent = None
        place = key_of(op)
        self.fresh = op.weights and self.pulls[place] % 2 == 0
        self.pulls[place] += 1
        if self.fresh:
            clear(self.chain)

    def arrive(self, op: Op, step: Step) -> None:
        """Nothing to do."""

    def end(self, op: Op, step: Step) -> None:
        """Keep a loss's cotangent for the pulls that follow; drop what a pull made."""
        if isinstance(op, Loss) and not op.final and not trains_before(self.chain, op.end - 1):
            self.cotangent = step.cotangents[op.end]
        if isinstance(op, Pull):
            step.cotangents.pop(op.t, None)
        if isinstance(op, Drop):
            self.cotangent = None
            step.cotangents.clear()
            if op.state < self.chain.depth:
                clear(self.chain)
