"""The coarse model: every ``factor``-th block of a chain, with steps so many times as long.

"Predict Globally, Correct Locally: Parallel-in-Time Optimal Control of Neural Networks", Section 3.1. The blocks of a
chain are steps of some dynamics, ``x + step * f(x, weights)``. Restriction is injection: the coarse model runs the
first block of each group of ``factor`` with the group's length as its step, and trains that block's own weights. For a
:class:`horizonplan.models.Dynamics` its ``step`` is set, to the sum of the group's; of any other block the residual,
``block(x) - x``, is multiplied (an Euler step). Prolongation interpolates weights linearly between the first blocks of
two groups. Groups end at cuts, so a cut is on the coarse grid, and states and co-states there are prolonged as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import scalar
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import handler, intercept
from horizonplan.chain.slots import Output
from horizonplan.models import Dynamics


class Coarse:
    """A chain's coarse model.

    Args:
        chain: the fine model.
        bounds: where it is cut, 0 and its depth included.
        factor: blocks in a group.
        states: x(0) and each block's output, or tensors of their shapes.

    Attributes:
        groups: first block -> blocks in its group; blocks that are left out are in none.
        pairs: of the last gradient: cut -> (state, co-state).

    Raises:
        ChainError: no two neighbouring blocks between two cuts are alike, or all that the coarse model has is frozen.
    """

    def __init__(self, chain: Chain, bounds: Sequence[int], factor: int, states: Sequence[Tensor]) -> None:
        self.chain, self.cuts = chain, tuple(bounds[1:-1])
        same = [states[t].shape == states[t + 1].shape for t in range(chain.depth)]
        self.alike = [False] * chain.depth
        for t in range(1, chain.depth):
            self.alike[t] = same[t - 1] and same[t] and _alike(chain.blocks[t - 1], chain.blocks[t])
        self.groups: dict[int, int] = {}
        for t in range(chain.depth):
            first = next(reversed(self.groups), 0)
            if t > 0 and self.alike[t] and t not in bounds and self.groups[first] < factor:
                self.groups[first] += 1
            else:
                self.groups[t] = 1
        if len(self.groups) == chain.depth:
            raise ChainError(
                f"coarse_factor={factor}: no two neighbouring blocks are alike (parameters and states of one shape), "
                "so there is no coarser model of their dynamics; set coarse_steps=0."
            )
        if not any(p.requires_grad for p in self._parameters()):
            raise ChainError(
                f"coarse_factor={factor}: no trainable parameter in the coarse model (blocks {list(self.groups)}, stem "
                "and head are frozen); set coarse_steps=0."
            )
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen: dict[int, Tensor] = {}

    def backward(self, batch: Any) -> Tensor:
        """Accumulate the coarse model's gradient and note the pairs; returns its loss, detached, shape ``()``."""
        handlers = {b: handler(self._block, t) for t, b in enumerate(self.chain.blocks)}
        self.seen = {}
        with self.chain.running(), intercept(handlers), torch.enable_grad():
            loss = scalar(self.chain.loss(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        self.pairs = {t: (x.detach(), x.grad) for t, x in self.seen.items() if x.grad is not None}
        self.seen = {}
        return loss.detach()

    @torch.no_grad()
    def prolong(self) -> None:
        """Interpolate the weights of the blocks that are left out, running statistics too; frozen ones stay."""
        firsts = [*self.groups, self.chain.depth]
        kept = {id(value) for t in self.groups for value in _values(self.chain.blocks[t])}  # tied ones as well
        for first, following in pairwise(firsts):
            size = self.groups[first]
            on = following < self.chain.depth and self.alike[following]
            here, there = _values(self.chain.blocks[first]), _values(self.chain.blocks[following if on else first])
            for j in range(1, size):
                for own, a, b in zip(_values(self.chain.blocks[first + j]), here, there, strict=True):
                    if id(own) not in kept and (own.requires_grad or not isinstance(own, nn.Parameter)):
                        own.copy_(torch.lerp(a, b, j / size) if own.is_floating_point() else a)

    def _parameters(self) -> list[nn.Parameter]:
        """The coarse model's."""
        left = {id(p) for t, b in enumerate(self.chain.blocks) if t not in self.groups for p in b.parameters()}
        kept = {id(p) for t in self.groups for p in self.chain.blocks[t].parameters()}
        return [p for p in self.chain.parameters() if id(p) in kept or id(p) not in left]

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        given = self.chain.layout.slots[t].get(args, kwargs)
        if t in self.groups:
            output = self._step(t, given, original, args, kwargs)
        else:
            known = self.chain.layout.outputs[t]
            assert known is not None
            output = Output.of(known.rebuild(given, lambda other: None))
        if output is None:
            raise ChainError(f"block {self.chain.names[t]!r} returned no tensor.")
        if t + 1 in self.cuts and output.state.requires_grad:
            self.seen[t + 1] = output.state
            output.state.retain_grad()
        return output.rebuild(output.state, lambda other: other)

    def _step(self, t: int, given: Tensor, original: Any, args: Any, kwargs: Any) -> Output | None:
        size, block = self.groups[t], self.chain.blocks[t]
        if size == 1:
            return Output.of(original(*args, **kwargs))
        if isinstance(block, Dynamics):
            rest: list[Any] = [self.chain.blocks[t + j].step for j in range(1, size)]
            step = sum((s.detach() if isinstance(s, Tensor) else s for s in rest), start=block.step)
            with _stepping(block, step):
                return Output.of(original(*args, **kwargs))
        before = given.clone() if self.chain.layout.copy_input[t] else given
        output = Output.of(original(*args, **kwargs))
        if output is None:
            return None
        return Output.of(output.rebuild(before + size * (output.state - before), lambda other: other))


@contextmanager
def _stepping(block: Dynamics, step: Any) -> Iterator[None]:
    """A block with another step for a while; its own may be a number, a buffer or a parameter."""
    owners: list[dict[str, Any]] = [block._parameters, block._buffers]
    owner = next((tensors for tensors in owners if "step" in tensors), None)
    own = block.step

    def put(value: Any) -> None:
        if owner is None:
            block.step = value
        else:
            owner["step"] = value  # an attribute that is a parameter takes parameters only

    put(step)
    try:
        yield
    finally:
        put(own)


def _values(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks have parameters and buffers of the same names and shapes, and are of one class."""
    shapes = [{n: t.shape for n, t in (*b.named_parameters(), *b.named_buffers())} for b in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1] and bool(shapes[0])
