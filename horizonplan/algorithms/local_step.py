"""One step of local learning inside the model's own forward: a module's activations are freed before the next runs.

The model runs as it always does; the calls of its blocks are taken over. After a module's last block its local loss
is taken and its gradients are accumulated; the model goes on with the module's output as a new leaf.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from horizonplan.algorithms.etf import SimplexETF
from horizonplan.algorithms.modules import Modules
from horizonplan.algorithms.reconcile import Scale, distance, refuse_once, split_scale
from horizonplan.algorithms.trial import copies, hollow
from horizonplan.batch import scalar, target_of
from horizonplan.chain import ChainError
from horizonplan.chain.calls import Ambient, handler, intercept
from horizonplan.chain.slots import Output
from horizonplan.chain.trace import Shapes, standin
from horizonplan.gradient.sums import Sums


class LocalStep:
    """One step.

    Args:
        modules: the chain, cut.
        batch: the batch.
        weight: of the regulariser.
        normalize: see :func:`horizonplan.algorithms.reconcile.distance`.
        scale: factor on the gradient.
        backward: whether to accumulate gradients, or only to measure the losses.
        first: whether to see that the model's operators can be differentiated twice.

    Attributes:
        losses: the local losses of the modules that ran with a graph, the terminal one last; detached.
        terms: the regulariser of each module but the first, without its weight; detached.
    """

    def __init__(
        self,
        modules: Modules,
        batch: Any,
        weight: float,
        normalize: bool,
        scale: Scale = 1.0,
        backward: bool = True,
        first: bool = False,
    ) -> None:
        self.modules, self.chain, self.batch = modules, modules.chain, batch
        self.weight, self.normalize, self.backward = weight, normalize, backward
        self.scale, self.first = scale, first
        self.inner, self.outer = split_scale(scale)
        self.losses: list[Tensor] = []
        self.terms: list[Tensor] = []
        self.turn = 0
        self.leaf: Tensor | None = None  # the present module's input
        self.delta: Tensor | None = None  # the gradient of the loss before in it, times ``inner``
        self.ambient = Ambient()
        self.standins: dict[nn.Module, list[Any]] = {}
        self.outputs: list[Output | None] = list(self.chain.layout.outputs)
        self.seen: list[Tensor | None] = [None]
        self.shapes: Shapes | None = None
        self.sums = Sums(self.chain, modules.ops() if backward else [])
        self.places = 0

    def run(self) -> Tensor:
        """Run the model's forward with the modules' updates inside it; returns the terminal loss, detached."""
        chain = self.chain
        handlers = {b: handler(self._block, t) for t, b in enumerate(chain.blocks)}
        if any(head is None for head in self.modules.heads):
            handlers |= {m: handler(self._outer, m) for m in chain.layout.outer}
        with ExitStack() as self.stack, chain.running(), self.sums:
            with intercept(handlers), torch.set_grad_enabled(self.backward):
                loss = scalar(chain.loss(self.batch))
            if self.turn != chain.depth:
                raise ChainError(f"block {chain.names[self.turn]!r} was not called in this forward.")
            return self._finish(loss)

    def _outer(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self.turn == 0:
            self.standins.setdefault(module, []).append(standin(result, self.chain.nan))
        return result

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        if t != self.turn:
            raise ChainError(
                f"block {self.chain.names[t]!r} was called out of turn: blocks must run once each and in order in "
                "every forward (no layer drop, no checkpointing around blocks)."
            )
        k = self.modules.of(t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.modules.trains(k)):
            result = original(*args, **kwargs)
        output = Output.of(result)
        if output is None:
            raise ChainError(f"block {self.chain.names[t]!r} returned no tensor.")
        self.outputs[t] = output.skeleton()
        self.seen.append(hollow(output.state))
        self.turn += 1
        if t + 1 not in self.modules.bounds[1:-1]:
            return result
        state, rest = output.state, output.detached()
        del result, output
        leaf = self._end(k, state)
        del state
        return rest.rebuild(leaf.clone() if copies(self.chain, t + 1) else leaf, lambda other: other)

    def _end(self, k: int, state: Tensor) -> Tensor:
        """Module k's update; returns the leaf to go on with."""
        if self.modules.trains(k) and self.backward:
            if self.delta is None:
                self._plain(k, state)
            else:
                self._reconciled(k, state)
        elif self.modules.trains(k):
            self.losses.append(self._loss(k, state).detach())
        self.leaf = state.detach().requires_grad_(self.modules.second_order and self.backward)
        if self.modules.second_order and self.backward and k == 0:  # fused attention has no second derivative
            self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._deliver(k)
        return self.leaf

    def _loss(self, k: int, state: Tensor) -> Tensor:
        head = self.modules.heads[k]
        if isinstance(head, SimplexETF):
            with Ambient.off():
                return head.loss_and_gradient(state.detach(), target_of(self.batch))[0]
        if head is not None:
            return self.modules.local_loss(k, state, self.batch)
        with self.ambient.restored():
            if self.shapes is None:
                self.shapes = self.chain.shapes_for(self.batch, self.seen)
            given = state if state.requires_grad else state.detach().requires_grad_()
            return scalar(self.chain.loss_at(given, self.batch, self.standins, self.shapes, self.outputs))

    def _plain(self, k: int, state: Tensor) -> None:
        """The local loss alone; the head's graph is freed before the module's is pulled through."""
        head = self.modules.heads[k]
        if isinstance(head, SimplexETF):
            with Ambient.off(), torch.no_grad():
                loss, delta = head.loss_and_gradient(state.detach(), target_of(self.batch))
                delta = (delta * self.scale).to(state.dtype)
        else:
            z = state.detach().requires_grad_()
            loss = self._loss(k, z)
            with Ambient.off():
                torch.autograd.backward(loss * self.scale, inputs=[z, *_trained(head)])
            if z.grad is None:
                raise ChainError(f"the local loss of module {k} does not depend on its output: its head must read it.")
            delta = z.grad
        self.losses.append(loss.detach())
        with Ambient.off():
            if (wanted := self._inputs(k)) and state.requires_grad:
                torch.autograd.backward(state, delta, inputs=wanted)
            self._keep(delta)

    def _reconciled(self, k: int, state: Tensor) -> None:
        """The local loss and the regulariser (Eq. 5), by differentiating the gradient in the module's input."""
        head = self.modules.heads[k]
        assert self.leaf is not None
        if isinstance(head, SimplexETF):
            with Ambient.off():
                loss, delta = head.loss_and_gradient(state, target_of(self.batch))
                delta = (delta * self.inner).to(state.dtype)
                (now,) = torch.autograd.grad(state, self.leaf, delta, create_graph=True)
            roots: tuple[Tensor, Any] = (state, delta.detach() * self.outer)
        else:
            loss = self._loss(k, state)
            with Ambient.off():
                scaled = loss * self.inner
                delta, now = torch.autograd.grad(scaled, [state, self.leaf], create_graph=True)
            roots = (scaled, torch.ones_like(scaled) * self.outer)
        self.losses.append(loss.detach())
        self._pull(*roots, now, [*self._inputs(k), *_trained(head)])
        with Ambient.off():
            self._keep(delta.detach())

    def _finish(self, loss: Tensor) -> Tensor:
        """The last module's update: its loss is the terminal one."""
        last = len(self.modules) - 1
        self.losses.append(loss.detach())
        with Ambient.off():
            if self.backward and self.modules.trains(last):
                wanted = self._inputs(last)
                scaled = loss * self.inner
                if self.delta is not None and self.leaf is not None:
                    (now,) = torch.autograd.grad(scaled, self.leaf, create_graph=True)
                    self._pull(scaled, torch.ones_like(scaled) * self.outer, now, wanted)
                elif wanted and loss.requires_grad:
                    torch.autograd.backward(scaled * self.outer, inputs=wanted)
        self._deliver(last)
        return loss.detach()

    def _pull(self, root: Tensor, seed: Tensor, now: Tensor, wanted: list[Tensor]) -> None:
        """Accumulate the gradients of a scaled loss and of the regulariser, at once."""
        assert self.delta is not None
        with Ambient.off():
            if self.first:
                refuse_once(now)
            term = distance(now, self.delta, self.normalize, self.inner)
            self.delta = None  # of no use any more
            self.terms.append(term.detach())
            if wanted:
                push = self.weight * self.scale * torch.ones_like(term)
                roots, seeds = ([root, term], [seed, push]) if term.requires_grad else ([root], [seed])
                torch.autograd.backward(roots, seeds, inputs=wanted)

    def _inputs(self, k: int) -> list[Tensor]:
        return self.sums.inputs(self.modules.parameters(k))

    def _keep(self, delta: Tensor) -> None:
        """Keep the gradient in a module's own output for the next one; ``delta`` carries ``scale``."""
        self.delta = delta if self.modules.second_order else None

    def _deliver(self, k: int) -> None:
        """Hand over the sums over uses that are complete after module k."""
        if not self.modules.trains(k) or not self.backward:
            return
        for _ in range(len(self.modules.blocks(k)) + (k == len(self.modules) - 1)):
            self.sums.deliver(self.places)
            self.places += 1


def _trained(head: nn.Module | None) -> list[Tensor]:
    return [] if head is None else [p for p in head.parameters() if p.requires_grad]
