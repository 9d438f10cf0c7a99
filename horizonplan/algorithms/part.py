"""One part of a chain, run by itself inside the model's own forward.

The stem runs in every part (without a graph, and without a trace in running statistics and random numbers, where it is
not the part's own); blocks before the part hand on what they get; x(first) comes from elsewhere; after the part's last
block the rest of the forward is left. What runs between two blocks belongs to the second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.partition import bounds_of
from horizonplan.algorithms.trial import Trial, copies
from horizonplan.batch import scalar
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import BufferLog, handler, intercept, rng_devices, scratch_buffers
from horizonplan.chain.slots import Output
from horizonplan.chain.trace import standin


class _Left(BaseException):
    """The part's last block has run."""


class Part:
    """Blocks ``first..stop - 1`` of a chain, with the stem if they are the first and the head if they are the last.

    Args:
        chain: the chain, once run (:func:`horizonplan.algorithms.trial.trial`).
        first: the part's first block.
        stop: the block after its last one.
        states: x(0) and each block's output, or tensors of their shapes.
        pulls: whether the gradient in x(first) is wanted.

    Attributes:
        leaf: x(first) of the last run, which gets its gradient; ``None`` for the first part.
        standins: what stands for the stem's outputs in a head-only evaluation; see :meth:`Chain.loss_at`.
        outputs: the structure of the blocks' outputs.
    """

    def __init__(self, chain: Chain, first: int, stop: int, states: Sequence[Tensor], pulls: bool = True) -> None:
        self.chain, self.first, self.stop, self.pulls = chain, first, stop, pulls
        shapes = [tuple(s.shape[1:]) for s in states]
        self.reshaped = {t: shapes[t + 1] for t in range(max(0, first - 1)) if shapes[t] != shapes[t + 1]}
        self.devices = rng_devices(chain.model)
        inside = {m for block in chain.blocks for m in block.modules()}
        self.outside = [m for m in chain.model.modules() if m not in inside]
        self.leaf: Tensor | None = None
        self.standins: dict[nn.Module, list[Any]] = {}
        self.outputs: list[Output | None] = list(chain.layout.outputs)
        self.ran: dict[nn.Module, int] = {}  # modules outside the blocks: the block that they ran before
        self.moved: dict[nn.Module, int] = {}  # the same of modules whose buffers the model's own forward changes

    @property
    def last(self) -> bool:
        """Whether the part has the head."""
        return self.stop == self.chain.depth

    def parameters(self) -> list[nn.Parameter]:
        """What the part trains; each once."""
        layout = self.chain.layout
        found = [p for t in range(self.first, self.stop) for p in (*layout.before[t], *layout.block[t])]
        found += layout.head if self.last else []
        return list({id(p): p for p in found}.values())

    def modules(self) -> list[nn.Module]:
        """The modules whose buffers the part moves; of those outside the blocks, what has run by now."""
        blocks = self.chain.blocks
        inside = {m for block in blocks for m in block.modules()}
        outer = self.moved | {m: place for top, place in self.ran.items() for m in top.modules()}
        found = [m for block in blocks[self.first : self.stop] for m in block.modules()]
        found += [m for m, place in outer.items() if self.first <= place < self.stop]
        rest = [m for m in self.chain.model.modules() if m not in inside and m not in outer]
        return found + (rest if self.last else [])

    def run(self, batch: Any, receive: Callable[[], Tensor]) -> Tensor:
        """Run the part with a graph.

        Args:
            batch: the batch.
            receive: gives x(first); called late, so that what runs before it need not wait. Not called by the first
                part.

        Returns:
            x(stop), or the loss (shape ``()``) if the part is the last.

        Raises:
            ChainError: the model does not call its blocks once each and in turn.
        """
        chain = self.chain
        self.receive, self.turn, self.leaf, self.standins = receive, 0, None, {}
        self.state: Tensor | None = None
        handlers = {b: handler(self._block, t) for t, b in enumerate(chain.blocks)}
        handlers |= {m: handler(self._outer, m) for m in chain.layout.outer}
        try:
            with ExitStack() as self.before, chain.running(), intercept(handlers), torch.enable_grad():
                if self.first > 0:
                    self.before.enter_context(torch.random.fork_rng(devices=self.devices))
                    self.before.enter_context(scratch_buffers(self.outside))
                    self.before.enter_context(torch.no_grad())
                self.log = BufferLog(self.outside)
                loss = scalar(chain.loss(batch))
        except _Left:
            assert self.state is not None
            state, self.state = self.state, None
            return state
        if self.turn != chain.depth:
            raise ChainError(f"block {chain.names[self.turn]!r} was not called in this forward.")
        return loss

    def _outer(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.ran[module] = self.turn
        if self.turn == 0:
            self.standins.setdefault(module, []).append(standin(result, self.chain.nan))
        return result

    def _note(self) -> None:
        """Note the modules outside the blocks whose buffers have changed by now."""
        changed = {id(owner) for owner, _, _ in self.log.changed()}
        for module in self.outside if changed else []:
            if id(module._buffers) in changed:
                self.moved.setdefault(module, self.turn)

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        if t != self.turn:
            raise ChainError(
                f"block {self.chain.names[t]!r} was called out of turn: blocks must run once each and in order in "
                "every forward (no layer drop, no checkpointing around blocks)."
            )
        self._note()
        self.turn += 1
        if t < self.first:
            return self._passed(t, self.chain.layout.slots[t].get(args, kwargs))
        result = original(*args, **kwargs)
        if t + 1 < self.stop or self.last:
            return result
        output = Output.of(result)
        assert output is not None  # the chain was traced
        self.outputs[t], self.state = output.skeleton(), output.state
        raise _Left

    def _passed(self, t: int, state: Tensor) -> Any:
        """What block ``t``, which is before the part, returns in it."""
        if t + 1 < self.first:
            shape = self.reshaped.get(t)
            passed = state if shape is None else state.new_zeros((state.shape[0], *shape))
        else:
            self.leaf = self.receive().requires_grad_(self.pulls)
            self.before.close()  # from here on the part's own forward
            self.log = BufferLog(self.outside)
            passed = self.leaf.clone() if copies(self.chain, self.first) else self.leaf
        known = self.chain.layout.outputs[t]
        assert known is not None
        return known.rebuild(passed, lambda other: None)


def cut(chain: Chain, found: Trial, parts: int, split: str | Sequence[int], pulls: bool = True) -> list[Part]:
    """Cut a chain into parts that train apart.

    Args:
        chain: the chain.
        found: what is known of it.
        parts: how many.
        split: where; see :func:`horizonplan.algorithms.partition.bounds_of`.
        pulls: whether the gradients at the cuts are wanted.

    Raises:
        ValueError: there are not so many blocks, or no such split.
        ChainError: a parameter, or running statistics, are used in two parts.
    """
    if parts > chain.depth:
        raise ValueError(f"parts={parts}: the chain has {chain.depth} blocks; give at most that many.")
    bounds = bounds_of(found, parts, split, second_order=False)
    states = (found.entry, *found.states)
    made = [Part(chain, first, stop, states, pulls) for first, stop in pairwise(bounds)]
    _refuse_shared(made)
    return made


def check_layers(parts: int, split: str | Sequence[int], time_limit: float) -> None:
    """See that what all methods that share layers are told makes sense.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ValueError(f"parts={parts!r}: give a whole number >= 1.")
    if isinstance(split, str) and split not in ("blocks", "memory"):
        raise ValueError(f"split={split!r}: give 'blocks', 'memory', or a list of first blocks.")
    if not isinstance(time_limit, int | float) or not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit={time_limit!r}: give a number of seconds > 0.")


def _refuse_shared(parts: list[Part]) -> None:
    """See that no parameter is trained by two parts.

    Raises:
        ChainError: one is, or all of the blocks' are by the last part, in the loss.
    """
    names = {id(p): name for name, p in parts[0].chain.model.named_parameters()}
    layout = parts[0].chain.layout
    head, blocks = {id(p) for p in layout.head}, {id(p) for block in layout.block for p in block}
    if len(parts) > 1 and blocks and blocks <= head:
        raise ChainError(
            "the loss uses the weights of all blocks, as a penalty on them does, but only the last part has the loss: "
            "leave the penalty out of it and give the optimizer a weight_decay."
        )
    seen: dict[int, int] = {}
    for number, part in enumerate(parts):
        for p in part.parameters():
            if seen.setdefault(id(p), number) != number and p.requires_grad:
                raise ChainError(
                    f"{names[id(p)]!r} is used in parts {seen[id(p)]} and {number}, which train apart: cut elsewhere "
                    "(split=), untie it, or freeze it."
                )
    _refuse_shared_statistics(parts)


def _refuse_shared_statistics(parts: list[Part]) -> None:
    """See that no normalisation in the blocks keeps the running statistics of two parts.

    Raises:
        ChainError: one does.
    """
    chain, seen = parts[0].chain, dict[int, int]()
    names = {m: name for name, m in chain.model.named_modules()}
    for number, part in enumerate(parts):
        for module in (m for block in chain.blocks[part.first : part.stop] for m in block.modules()):
            statistics = module._buffers.get("running_mean")
            if statistics is not None and seen.setdefault(id(statistics), number) != number:
                raise ChainError(
                    f"the running statistics of {names[module]!r} are used in parts {seen[id(statistics)]} and "
                    f"{number}, which train apart: cut elsewhere (split=), or give each block its own."
                )
