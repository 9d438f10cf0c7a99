"""The gradient engine: execute a schedule's operations inside the model's own forward.

The model runs as it always does; its calls of the blocks are taken over. A block's call is a *turn*:
the block runs once on a state that is cut off from the graph before it, then the operations that
the schedule has at this point (losses, pulls, reruns, drops) are done, and the model goes on with
the new state. No graph longer than a window is ever built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from horizonplan.batch import scalar
from horizonplan.chain import Chain
from horizonplan.chain.calls import Ambient, BufferLog, Buffers, handler, intercept, rng_devices, scratch_buffers
from horizonplan.chain.slots import Output
from horizonplan.chain.trace import ChainError, Shapes, standin
from horizonplan.gradient.sums import Sums
from horizonplan.schedule import Drop, Loss, Op, Pull, Rerun, Run


class Observer(Protocol):
    """Told when operations begin and end (:mod:`horizonplan.probes`)."""

    def begin(self, op: Op, step: Step) -> None:
        """Before an operation; for ``Run`` and the final ``Loss``, when the turn before has ended."""

    def arrive(self, op: Op, step: Step) -> None:
        """Halfway: at a ``Run``'s block, between a ``Pull``'s block and what is before it, after the final forward."""

    def end(self, op: Op, step: Step) -> None:
        """After an operation."""


def execute(
    chain: Chain,
    batch: Any,
    ops: Iterable[Op],
    scale: float | Tensor = 1.0,
    observer: Observer | None = None,
    gather: bool = True,
) -> Tensor:
    """Execute a list of operations on one batch; see :func:`horizon_backward`.

    ``gather=False`` accumulates every partial gradient of a parameter at once (hooks then fire each time).
    After an error, gradients that were ``None`` are ``None`` again; to one that was there, finished windows may
    have added.
    """
    parameters = list(chain.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter requires a gradient; unfreeze one before training.")
    if any(id(p) in chain.layout.unplaced for p in trainable):
        raise ChainError("a parameter was frozen when the chain was built and is not any more: build the chain again.")
    torch.clear_autocast_cache()  # an optimiser may have changed the weights behind it
    step = Step(chain, batch, list(ops), scale, observer, gather)
    fresh = [p for p in parameters if p.grad is None]
    try:
        return step.run()
    except BaseException:
        for p in fresh:
            p.grad = None
        raise


@dataclass
class Segment:
    """One block's live graph: from its input leaf to its output."""

    xin: Tensor
    out: Tensor


@dataclass
class Arrival:
    """What the model does between x(t) and block ``t`` (or the stem): from ``leaf`` (``None`` for the stem)."""

    leaf: Tensor | None
    given: Tensor


@dataclass
class Call:
    """How the model called a block: what a rerun needs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: list[Tensor]
    ambient: Ambient
    buffers: Buffers


class Step:
    """One execution. ``states[t]`` is x(t) as handed to the model, ``cotangents[t]`` its gradient, once known."""

    def __init__(
        self,
        chain: Chain,
        batch: Any,
        ops: list[Op],
        scale: float | Tensor,
        observer: Observer | None,
        gather: bool,
    ) -> None:
        self.chain, self.batch, self.scale, self.observer = chain, batch, scale, observer
        self.layout = chain.layout
        self.ops, self.place = ops, 0
        self.states: dict[int, Tensor] = {}
        self.arrivals: dict[int, Arrival] = {}
        self.segments: dict[int, Segment] = {}
        self.cotangents: dict[int, Tensor] = {}
        self.calls: dict[int, Call] = {}
        self.original: dict[int, Any] = {}
        self.standins: dict[nn.Module, list[Any]] = {}
        self.outputs: list[Output | None] = list(self.layout.outputs)
        self.shapes: Shapes | None = None
        self.pulled = {op.t for op in ops if isinstance(op, Pull)}
        self.last_rerun = {op.t: place for place, op in enumerate(ops) if isinstance(op, Rerun)}
        self.last_pull = {op.t: place for place, op in enumerate(ops) if isinstance(op, Pull)}
        self.heads = any(isinstance(op, Loss) and not op.final for op in ops)
        self.ambient = Ambient()
        self.devices = rng_devices(chain.model) if self.last_rerun else []
        self.sums = Sums(chain, ops if gather else [])

    def run(self) -> Tensor:
        """Run the model's forward with the operations inside it; returns the terminal loss, detached."""
        chain = self.chain
        handlers = {b: handler(self._turn, t) for t, b in enumerate(chain.blocks)}
        if self.heads:
            handlers |= {m: handler(self._outer, m) for m in self.layout.outer}
        with chain.running(), self.sums:
            self._begin()
            with intercept(handlers), torch.enable_grad():
                self.loss = chain.loss(self.batch)
            if not isinstance(self._op, Loss):
                raise ChainError(f"block {chain.names[getattr(self._op, 't', 0)]!r} was not called in this forward.")
            if self.observer is not None:
                self.observer.arrive(self._op, self)
            return self._finish()

    @property
    def _op(self) -> Op | None:
        return self.ops[self.place] if self.place < len(self.ops) else None

    def _begin(self) -> None:
        if self.observer is not None and self._op is not None:
            self.observer.begin(self._op, self)

    def _done(self) -> None:
        """The present operation is over: deliver gradients that are complete, go on to the next."""
        self.sums.deliver(self.place)
        op = self._op
        self.place += 1
        if self.observer is not None and op is not None:
            self.observer.end(op, self)
        self._begin()

    def _turn(self, t: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = self._op
        if not isinstance(op, Run) or op.t != t:
            raise ChainError(
                f"block {self.chain.names[t]!r} was called out of turn: blocks must run once each and in order in "
                "every forward (no layer drop; checkpointing around blocks: switch it off, use recompute=1)."
            )
        if self.observer is not None:
            self.observer.arrive(op, self)
        state, output = self._run(op, original, args, kwargs)
        if t + 1 in self.pulled or t + 1 == self.chain.depth:
            state.requires_grad_()
        self.states[t + 1] = state
        self._done()
        while (op := self._op) is not None and not isinstance(op, Run) and not (isinstance(op, Loss) and op.final):
            self._do(op)
            self._done()
        given = state.clone() if self.layout.copy_state[t + 1] else state
        return output.rebuild(given, lambda other: other)

    def _outer(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if isinstance(self._op, Run) and self._op.t == 0:
            self.standins.setdefault(module, []).append(standin(result, self.chain.nan))
        return result

    def _run(self, op: Run, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Output]:
        """Run a block in its turn; returns the new state, cut off, and the rest of the output."""
        t, slot = op.t, self.layout.slots[op.t]
        arrived = slot.get(args, kwargs)
        if t == 0:
            self.states[0] = arrived.detach()
            if not self.layout.traced and arrived.requires_grad and not self.chain.stem_trains:
                raise ChainError("stem: it trains parameters that the chain cannot see; give it as an nn.Module.")
        if t in self.pulled and (t == 0 or arrived is not self.states[t]):
            self.arrivals[t] = Arrival(self.states[t] if t > 0 else None, arrived)
        self.original[t] = original
        if t in self.last_rerun:
            rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]
            self.calls[t] = Call(*slot.put(None, args, kwargs), rng, Ambient(), [])
            log = BufferLog(self.chain.blocks[t].modules())
        xin = self._leaf(t, arrived) if op.graph else arrived.detach()
        del arrived
        args, kwargs = slot.put(None, args, kwargs)
        result = self._forward(t, original, xin, args, kwargs, op.graph)
        if t in self.calls:
            self.calls[t].buffers = log.changed()
        output = Output.of(result)
        if output is None:
            raise ChainError(f"block {self.chain.names[t]!r} returned no tensor.")
        if op.graph:
            self.segments[t] = Segment(xin, output.state)
        self.outputs[t] = output.skeleton()
        return output.state.detach(), output.detached()

    def _leaf(self, t: int, arrived: Tensor) -> Tensor:
        """The block's input as a leaf: x(t) itself, or a cut where the model did something before the block."""
        if t > 0 and arrived is self.states[t] and arrived.is_leaf:
            return arrived
        xin = arrived.detach()
        return xin.requires_grad_() if xin.is_floating_point() and (t > 0 or self.chain.stem_trains) else xin

    def _forward(self, t: int, original: Any, xin: Tensor, args: Any, kwargs: Any, graph: bool) -> Any:
        """Run block ``t`` on ``xin``; on a copy where the block overwrites its input."""
        slot, copies = self.layout.slots[t], self.layout.copy_input
        with torch.set_grad_enabled(graph), nullcontext() if graph else Ambient().restored(cache=False):
            if copies[t] is None:
                return self._first_forward(t, original, xin, args, kwargs)
            args, kwargs = slot.put(xin.clone() if copies[t] else xin, args, kwargs)
            return original(*args, **kwargs)

    def _first_forward(self, t: int, original: Any, xin: Tensor, args: Any, kwargs: Any) -> Any:
        """The first run ever of a block in a chain built by hand: find out whether it overwrites its input."""
        slot, copies = self.layout.slots[t], self.layout.copy_input
        rng, log = torch.get_rng_state(), BufferLog(self.chain.blocks[t].modules())
        leaf = torch.is_grad_enabled() and xin.requires_grad
        given = xin if leaf else xin.clone()
        version = given._version
        try:
            given_args, given_kwargs = slot.put(given, args, kwargs)
            result = original(*given_args, **given_kwargs)
            copies[t] = given._version != version
            return result
        except RuntimeError as error:
            if not leaf or "leaf Variable that requires grad" not in str(error):
                raise
        copies[t] = True
        torch.set_rng_state(rng)
        for owner, name, buffer in log.changed():
            owner[name].copy_(buffer)  # type: ignore[union-attr]
        args, kwargs = slot.put(xin.clone(), args, kwargs)
        return original(*args, **kwargs)

    def _do(self, op: Op) -> None:
        if isinstance(op, Loss):
            self._intermediate(op)
        elif isinstance(op, Rerun):
            self._rerun(op.t)
        elif isinstance(op, Pull):
            with Ambient.off():
                self._pull(op)
        elif isinstance(op, Drop):
            self.states.pop(op.state, None)

    def _intermediate(self, op: Loss) -> None:
        z = self.states[op.end].detach().requires_grad_()
        with self.ambient.restored():
            if self.shapes is None:
                self.shapes = self.chain.shapes_for(self.batch, [self.states.get(t) for t in range(op.end + 1)])
            loss = self.chain.loss_at(z, self.batch, self.standins, self.shapes, self.outputs)
        self._backward_loss(scalar(loss), [z])
        self._keep_cotangent(op.end, z)

    def _finish(self) -> Tensor:
        """The final loss and what follows; nothing holds on to the loss's graph."""
        op, loss = self._op, scalar(self.loss)
        del self.loss
        assert isinstance(op, Loss)
        depth = self.chain.depth
        with Ambient.off():
            state = self.states[depth]
            if not self.layout.traced:
                self.layout.learn_head(loss, {id(p) for p in (*self.sums.alias.values(), state)})
            pulls = depth - 1 in self.pulled
            wanted = [*self.sums.inputs(self.layout.head), *([state] if pulls else [])]
            if wanted and loss.requires_grad:
                self._backward_loss(loss, wanted)
            result = loss.detach()
            del loss, wanted
            if pulls:
                self._keep_cotangent(depth, state)
            del state
            self._done()
            while (rest := self._op) is not None:
                self._do(rest)
                self._done()
        return result

    def _backward_loss(self, loss: Tensor, inputs: Sequence[Tensor]) -> None:
        with Ambient.off():
            scaled = loss if isinstance(self.scale, float | int) and self.scale == 1 else loss * self.scale
            torch.autograd.backward(scaled, inputs=list(inputs))

    def _keep_cotangent(self, t: int, leaf: Tensor) -> None:
        if leaf.grad is None:
            raise ChainError(f"the loss at x({t}) does not depend on the state: the head must read it.")
        self.cotangents[t], leaf.grad = leaf.grad, None

    def _rerun(self, t: int) -> None:
        call = self.calls.pop(t) if self.place == self.last_rerun[t] else self.calls[t]
        if t in self.arrivals:
            source = self.arrivals[t].given
        elif t - 1 in self.segments:
            source = self.segments[t - 1].out
        else:
            source = self.states[t]
        xin = source.detach()
        if t > 0 or self.chain.stem_trains:
            xin.requires_grad_(xin.is_floating_point())
        block = self.chain.blocks[t]
        with (
            torch.random.fork_rng(devices=self.devices),
            scratch_buffers(block.modules(), call.buffers),
            torch.enable_grad(),
        ):
            torch.set_rng_state(call.rng[0])
            for device, state in zip(self.devices, call.rng[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            with call.ambient.restored(cache=False):
                result = self._forward(t, self.original[t], xin, call.args, call.kwargs, graph=True)
        output = Output.of(result)
        assert output is not None
        self.segments[t] = Segment(xin, output.state)

    def _pull(self, op: Pull) -> None:
        t = op.t
        segment = self.segments[t] if op.keep else self.segments.pop(t)
        last = self.place == self.last_pull[t]
        arrival = self.arrivals.pop(t, None) if last else self.arrivals.get(t)
        trains_before = op.weights if t > 0 else op.input
        before = self.sums.inputs(self.layout.before[t]) if trains_before and arrival is not None else []
        if arrival is not None and arrival.leaf is not None and op.input:
            before.append(arrival.leaf)
        wanted = self.sums.inputs(self.layout.block[t]) if op.weights else []
        if segment.xin.requires_grad and (before or op.input):
            wanted.append(segment.xin)
        cotangent = self.cotangents.pop(t + 1)
        if wanted and segment.out.requires_grad:
            torch.autograd.backward(segment.out, cotangent, inputs=wanted, retain_graph=op.keep)
        xin = segment.xin
        del segment, cotangent, wanted
        if arrival is not None and before and arrival.given.requires_grad:
            if self.observer is not None:
                self.observer.arrive(op, self)
            through, xin.grad = xin.grad, None
            torch.autograd.backward(arrival.given, through, inputs=before, retain_graph=not last)
            xin = arrival.leaf if arrival.leaf is not None else xin
        if op.input and t > 0:
            self._keep_cotangent(t, xin)
