"""Find out how a model calls its blocks, and refuse what is no chain, with the place and the ways out.

Two trial forwards. The first, without a graph, counts calls and notes shapes and in-place changes.
The second cuts the graph at every state and walks what autograd recorded on each side of the cut:
the parameters reached there belong to that block, to what runs before it, to the stem or to the
head; a node older than the cut means that information flows around the state, so that a truncated
gradient would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from horizonplan.chain.calls import finite, handler, intercept, quiet
from horizonplan.chain.slots import Output, Slot, candidates

WAYS_OUT = (
    "Ways out: name other blocks (blocks='layers.*' or a list), put what belongs together into one module, "
    "or build Chain(stem, blocks, head, loss) by hand."
)


class ChainError(ValueError):
    """The model is no chain of blocks; the message names the place and the ways out."""


@dataclass(frozen=True)
class Shapes:
    """The states' shapes, and place-holders for the outer modules' outputs, for one batch signature."""

    states: tuple[tuple[int, ...], ...]
    standins: dict[nn.Module, list[Any]]


@dataclass
class Layout:
    """Where everything is in a model's forward.

    ``before[0]`` holds the stem's parameters, ``before[t]`` those of what runs between blocks
    ``t-1`` and ``t``. ``outer`` are the outermost modules called before the last block (stem and in
    between); an intermediate head does not run them. ``copy_input[t]``: block ``t`` overwrites its
    input (``None``: not known yet); ``copy_state[t]``: the model overwrites ``x(t)`` before block ``t``.
    ``dtype`` is the states', ``finite`` tells whether the loss was;
    ``dense``: place-holders must be writable, because the model overwrites them. ``first`` is a real x(1)
    for the first trial. ``unplaced``: ids of frozen parameters that the trace could not place. ``traced``:
    a chain built by hand is not, until its first step has seen what its head and loss read.
    """

    slots: list[Slot]
    block: list[list[nn.Parameter]]
    before: list[list[nn.Parameter]]
    head: list[nn.Parameter]
    shared: list[nn.Parameter]
    outer: list[nn.Module]
    outputs: list[Output | None]
    copy_input: list[bool | None]
    copy_state: list[bool]
    glue: bool = False
    shapes: dict[Any, Shapes] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    finite: bool = True
    dense: bool = False
    first: Tensor | None = None
    unplaced: frozenset[int] = frozenset()
    traced: bool = True

    def group(self, t: int) -> list[nn.Parameter]:
        """Block ``t``'s parameters with those of what runs before it, the stem's excepted."""
        return [*self.block[t], *(self.before[t] if t > 0 else [])]

    def learn_head(self, loss: Tensor, known: set[int]) -> None:
        """The first step of a chain built by hand: a callable head or loss may read parameters of its own.

        Args:
            loss: the terminal loss, whose graph ends at the last state.
            known: ids of tensors that are no parameters of the head.
        """
        known = known | {id(p) for p in self.head}
        self.head += [leaf for leaf, _ in walk(loss, 0) if isinstance(leaf, nn.Parameter) and id(leaf) not in known]
        self.shared = repeated([*self.block, *self.before, self.head])
        self.traced = True

    @property
    def uniform(self) -> bool:
        """Whether all states after the first have one shape in every batch seen."""
        return all(len(set(shapes.states[1:])) == 1 for shapes in self.shapes.values())


def standin(value: Any, nan: Callable[[Tensor], Tensor]) -> Any:
    """A stem output's place-holder: floating tensors become zero-stride NaN, so that a leak shows."""
    output = Output.of(value)
    if output is None:
        return value

    def fill(leaf: Tensor) -> Tensor:
        return nan(leaf).expand(leaf.shape) if leaf.is_floating_point() else leaf

    return output.rebuild(fill(output.state), fill)


def trace(model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str], run: Callable[[], Tensor]) -> Layout:
    """Trace one forward of ``run`` (model and loss on a batch) and lay the model out around ``blocks``.

    Raises:
        ChainError: a block is never or repeatedly called, or information flows around a state.
        ValueError: the model rejects the batch, or the loss is no scalar.
    """
    survey = _Survey(model, blocks, names)
    survey.forward(run)
    graph = _GraphWalk(model, blocks, names, survey)
    graph.forward(run)
    return graph.layout()


def record_shapes(
    model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str], run: Callable[[], Tensor]
) -> Shapes:
    """Shapes for another batch signature, by one forward without a graph."""
    survey = _Survey(model, blocks, names)
    survey.forward(run)
    return survey.shapes()


class _Survey:
    """First pass: order of calls, outer modules, shapes, in-place changes."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str]) -> None:
        self.model, self.blocks, self.names = model, blocks, names
        inside = {m for block in blocks for m in block.modules()}
        ancestors = {m for m in model.modules() if any(b in set(m.modules()) for b in blocks)} - inside
        self.watched = [m for m in model.modules() if m not in inside and m not in ancestors]
        self.called: list[int] = []
        self.outer: dict[nn.Module, int] = {}
        self.standins: dict[nn.Module, list[Any]] = {}
        self.states: list[tuple[int, ...]] = []
        self.last: tuple[Tensor, int] | None = None
        self.outputs: list[Output | None] = [None] * len(blocks)
        self.copy_input = [False] * len(blocks)
        self.copy_state = [False] * (len(blocks) + 1)
        self.busy = False

    def forward(self, run: Callable[[], Tensor]) -> None:
        handlers = {m: handler(self._outer, m) for m in self.watched}
        handlers |= {b: handler(self._block, t) for t, b in enumerate(self.blocks)}
        with quiet(self.model), torch.no_grad(), intercept(handlers):
            run()
        self._note_version(len(self.called))
        self.last = None
        missing = [name for t, name in enumerate(self.names) if t not in self.called]
        if missing:
            raise ChainError(
                f"blocks {missing} are never called in the model's forward (through module(...)). {WAYS_OUT}"
            )

    def shapes(self) -> Shapes:
        return Shapes(tuple(self.states), self.standins)

    def _outer(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self.busy or len(self.called) == len(self.blocks):
            return original(*args, **kwargs)
        self.busy = True
        try:
            result = original(*args, **kwargs)
        finally:
            self.busy = False
        self.outer.setdefault(module, len(self.called))
        self.standins.setdefault(module, []).append(standin(result, _fresh_nan))
        return result

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        if t in self.called:
            raise ChainError(
                f"block {self.names[t]!r} runs more than once in one forward: one module cannot be two blocks. "
                f"{WAYS_OUT}"
            )
        if t != len(self.called):
            raise ChainError(
                f"block {self.names[t]!r} runs in place {len(self.called)}, but is listed in place {t}: "
                "list the blocks in the order in which they run (layers skipped at random are no chain)."
            )
        slots = candidates(args, kwargs)
        if not slots:
            raise ChainError(f"block {self.names[t]!r} gets no tensor among its arguments. {WAYS_OUT}")
        if t == 0:
            self.states.append(tuple(slots[0].get(args, kwargs).shape))
        self._note_version(t)
        given = [slot.get(args, kwargs) for slot in slots]
        before, self.busy = [tensor._version for tensor in given], True
        result = original(*args, **kwargs)
        self.busy = False
        self.copy_input[t] = before != [tensor._version for tensor in given]
        output = Output.of(result)
        if output is None:
            raise ChainError(f"block {self.names[t]!r} returns no tensor (a {type(result).__name__}). {WAYS_OUT}")
        self.called.append(t)
        self.outputs[t] = output.skeleton()
        self.states.append(tuple(output.state.shape))
        self.last = (output.state, output.state._version)
        return result

    def _note_version(self, t: int) -> None:
        if self.last is not None:
            state, version = self.last
            self.copy_state[t] = state._version != version


class _GraphWalk:
    """Second pass: cut at the states, and see which parameters are reached on each side of each cut."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str], survey: _Survey) -> None:
        self.model, self.blocks, self.names, self.survey = model, blocks, names, survey
        depth = len(blocks)
        self.parameter_names = {id(p): n for n, p in model.named_parameters()}
        self.slots: list[Slot] = []
        self.uses: list[list[nn.Parameter]] = [[] for _ in range(depth)]
        self.before: list[list[nn.Parameter]] = [[] for _ in range(depth)]
        self.head: list[nn.Parameter] = []
        self.places: dict[int, tuple[TensorWeakRef, str]] = {}  # weak: a deep model's states need not fit together
        self.leaf: Tensor | None = None
        self.first: Tensor | None = None
        self.mark = 0
        self.glue = False

    def forward(self, run: Callable[[], Tensor]) -> None:
        handlers = {b: handler(self._block, t) for t, b in enumerate(self.blocks)}
        with quiet(self.model), torch.enable_grad(), intercept(handlers):
            loss = run()
            last = self.leaf
            assert last is not None
            reached, self.head = self._reach(loss, self.mark, "the head and loss", allowed=last)
            self.dtype, self.finite = last.dtype, finite(loss) is True
        if not reached:
            raise ChainError(
                f"the loss does not depend on the output of the last block {self.names[-1]!r} "
                f"(or is computed under no_grad). {WAYS_OUT}"
            )

    def layout(self) -> Layout:
        survey, depth = self.survey, len(self.blocks)
        owned = [_union(list(block.parameters()), used) for block, used in zip(self.blocks, self.uses, strict=True)]
        before = [
            _union(reached, [p for m, place in survey.outer.items() if place == t for p in m.parameters()])
            for t, reached in enumerate(self.before)
        ]
        known = {id(p) for group in (*owned, *before) for p in group}
        head = _union(self.head, [p for p in self.model.parameters() if id(p) not in known])
        used = [*self.uses, *self.before, self.head]
        reached = {id(p) for p in self.head}
        unplaced = {id(p) for p in head if id(p) not in reached and not p.requires_grad}
        return Layout(
            slots=self.slots,
            block=owned,
            before=before,
            head=head,
            shared=repeated(used),
            outer=list(survey.outer),
            outputs=survey.outputs,
            copy_input=list(survey.copy_input),
            copy_state=survey.copy_state[: depth + 1],
            glue=self.glue,
            dtype=self.dtype,
            finite=self.finite,
            first=self.first,
            unplaced=frozenset(unplaced),
        )

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        slot = self._slot(t, args, kwargs)
        given = slot.get(args, kwargs)
        for other in candidates(args, kwargs):
            value = other.get(args, kwargs)
            if other != slot and value.requires_grad and value.grad_fn is not None:
                raise ChainError(
                    f"block {self.names[t]!r} takes a second tensor that needs a gradient (argument {other.key!r}): "
                    f"its gradient would be cut with the state's. {WAYS_OUT}"
                )
        if t > 0:
            reached, self.before[t] = self._reach(
                given, self.mark, f"what runs before block {self.names[t]!r}", self.leaf
            )
            if not reached:
                raise ChainError(
                    f"block {self.names[t]!r} does not take the output of block {self.names[t - 1]!r}. {WAYS_OUT}"
                )
            self.glue |= given is not self.leaf
        else:
            _, self.before[0] = self._reach(given, 0, "the stem", None)
        self.slots.append(slot)
        xin = given.detach()
        if xin.is_floating_point():
            xin.requires_grad_()
            self.places[id(xin)] = (TensorWeakRef(xin), f"the input of block {self.names[t]!r}")
        start = _mark()
        feed = xin.clone() if self.survey.copy_input[t] else xin
        args, kwargs = slot.put(feed, args, kwargs)
        output = Output.of(original(*args, **kwargs))
        assert output is not None
        allowed = xin if xin.requires_grad else None
        reached, self.uses[t] = self._reach(output.state, start, f"block {self.names[t]!r}", allowed)
        if t > 0 and not reached:
            raise ChainError(
                f"block {self.names[t]!r}: its output does not depend on its input (or it runs under no_grad). "
                f"{WAYS_OUT}"
            )
        if not output.state.is_floating_point():
            raise ChainError(
                f"block {self.names[t]!r} returns {output.state.dtype}: states must be floating. {WAYS_OUT}"
            )
        leaf = output.state.detach().requires_grad_()
        self.places[id(leaf)] = (TensorWeakRef(leaf), f"the output of block {self.names[t]!r}")
        self.leaf = leaf
        self.first = leaf.detach().clone() if t == 0 else self.first
        self.mark = _mark()
        given = leaf.clone() if self.survey.copy_state[t + 1] else leaf
        return output.rebuild(given, lambda other: self._extra(t, other))

    def _slot(self, t: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
        found = candidates(args, kwargs)
        differentiable = [s for s in found if (v := s.get(args, kwargs)).requires_grad and v.grad_fn is not None]
        handed_on = [s for s in found if s.get(args, kwargs) is self.leaf]
        return (handed_on or differentiable or found)[0]

    def _extra(self, t: int, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        extra = tensor.detach().requires_grad_()
        self.places[id(extra)] = (
            TensorWeakRef(extra),
            f"another output of block {self.names[t]!r} than its first tensor",
        )
        return extra

    def _reach(self, tensor: Tensor, since: int, who: str, allowed: Tensor | None) -> tuple[bool, list[nn.Parameter]]:
        """Whether ``allowed`` is reached from ``tensor``, and the parameters that are; refuses anything else."""
        reached, parameters = tensor is allowed, []
        for leaf, node in walk(tensor, since):
            if leaf is None:
                raise ChainError(
                    f"{who} reads a tensor that was computed before it ({node}) and is not the state handed on: "
                    f"the model is no chain there (a skip connection, or one tensor shared by many blocks). {WAYS_OUT}"
                )
            if leaf is allowed:
                reached = True
            elif id(leaf) in self.places and self.places[id(leaf)][0]() is leaf:
                raise ChainError(
                    f"{who} also reads {self.places[id(leaf)][1]}: the model is no chain there. {WAYS_OUT}"
                )
            else:
                parameters.append(leaf)
        return reached, parameters  # type: ignore[return-value]


def repeated(groups: Iterable[Iterable[nn.Parameter]]) -> list[nn.Parameter]:
    """Parameters that are in more than one group: their gradient is a sum over uses."""
    seen: dict[int, int] = {}
    found: dict[int, nn.Parameter] = {}
    for group in groups:
        for p in {id(p): p for p in group}.values():
            seen[id(p)] = seen.get(id(p), 0) + 1
            if seen[id(p)] > 1:
                found[id(p)] = p
    return list(found.values())


def _union(first: Iterable[nn.Parameter], second: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in (*first, *second)}.values())


def _fresh_nan(like: Tensor) -> Tensor:
    return like.new_full((), float("nan"))


def _mark() -> int:
    """The number of an autograd node made now: nodes made later have larger ones."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    return node._sequence_nr()


def walk(tensor: Tensor, since: int) -> list[tuple[Tensor | None, str]]:
    """Leaves that a tensor's graph reaches, and (as ``None``) nodes older than ``since``."""
    if tensor.grad_fn is None:
        return [(tensor, "")] if tensor.requires_grad else []
    found: list[tuple[Tensor | None, str]] = []
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append((node.variable, ""))
        elif node.name().startswith("CheckpointFunctionBackward"):
            raise ChainError(
                "the model checkpoints with use_reentrant=True, which cannot pull single gradients: "
                "switch it off (gradient_checkpointing_disable()) and use recompute=1 instead."
            )
        elif node._sequence_nr() < since:
            found.append((None, node.name()))
        else:
            stack += [next_node for next_node, _ in node.next_functions if next_node is not None]
    return found
