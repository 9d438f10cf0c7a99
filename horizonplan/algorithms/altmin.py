"""Online alternating minimisation over codes and weights: AM-Adam and AM-mem.

"Beyond Backprop: Online Alternating Minimization with Auxiliary Variables". The output of each layer but the last, a
*code*, becomes a variable of its own, tied to the layer below by a quadratic term (Eq. 3)::

    loss(output layer(c_L)) + mu sum_l |c_l - W_l sigma(c_(l-1))|^2

On each batch (Algorithm 2.1) codes are set by a forward, then moved from the top down, then all layers are fitted to
them, each by itself: the error passes through one layer at a time, and through activations that have no derivative.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from horizonplan.algorithms.base import Algorithm, gradient_norm, not_finite
from horizonplan.algorithms.coactivation import Memory, rows, write
from horizonplan.algorithms.code_gains import measured_gains, rate
from horizonplan.algorithms.code_layers import NONLINEAR, NORMS, code_layers
from horizonplan.algorithms.code_links import Links, find_links
from horizonplan.algorithms.code_pass import CodePass
from horizonplan.algorithms.code_sweep import Sweep
from horizonplan.algorithms.mean_loss import refuse_sum
from horizonplan.algorithms.penalty import Penalty
from horizonplan.batch import signature
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import ENTRY, quiet

KEPT_LINKS = 32
TRIALS = 8  # the first ones' moves may be far too long, and tell the curvature where codes do not come to


@dataclass(eq=False)
class AlternatingMinimization(Algorithm):
    """Alternating minimisation, on mini-batches or, as offline, on one batch of all the data.

    Networks are chains of ``Linear`` and ``Conv`` layers (normalised or not) and one-layer ``RNN`` or ``RNNCell``,
    with any activations; a sign and the like must stand right before a linear layer. Others are refused. The loss has
    to be a mean over samples. Running statistics move once a batch, in the forward.

    Args:
        memory: fit hidden layers to co-activation memories of all batches so far by block-coordinate descent
            (AM-mem), not to the present batch with the optimiser (AM-Adam with Adam). All that are not frozen are,
            whether the optimiser was given them or not. The output layer is always trained by the optimiser.
        proximal: keep each code near the layer below (second term of Eqs. 4 and 5). The authors' code leaves it
            without effect; so do the first step on a code, at which its slope is zero, and hence ``code_steps=1``.
        mu: the weight of the quadratic terms; a number, or a :class:`Penalty` that grows. Codes move little where it
            is large, and the weights' gradient then tends to back-propagation's (with ``code_steps=1``).
        code_steps: steps of gradient descent on each code.
        code_lr: their rate, on Eqs. 4 and 5 divided by mu; ``None``: for each layer the best one for Eqs. 4 and 5
            along its slope, from how much the layer above magnified the last batch's moves, and how the loss bent
            (:mod:`horizonplan.algorithms.code_gains`). A number is the same for all layers, and is to be lowered where
            weights are large.
        weight_steps: the optimiser's steps a batch, and sweeps over the columns with ``memory``.
        decay: of the memories, a batch; 1: all batches count the same.

    Raises:
        ValueError: bad arguments.

    >>> AlternatingMinimization()
    AlternatingMinimization(memory=False, proximal=True, mu=1.0, code_steps=1, code_lr=None, weight_steps=1, decay=1.0)
    """

    honours: ClassVar[frozenset[str]] = frozenset({"nonfinite"})
    whole: ClassVar[bool] = True

    memory: bool = False
    proximal: bool = True
    mu: float | Penalty = 1.0
    code_steps: int = 1
    code_lr: float | None = None
    weight_steps: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        self._check()
        self._chain: Chain | None = None
        self._steps = 0
        self._layers: dict[nn.Module, str] = {}
        self._gains: dict[nn.Module, Tensor] = {}
        self._memories: dict[nn.Module, Memory] = {}

    def prepare(self, chain: Chain, batch: Any) -> nn.Module | None:
        """See that the model is a chain of layers, and make the memories, whose buffers a run keeps.

        Some trial forwards, which change nothing.

        Returns:
            The memories; ``None`` without.

        Raises:
            ChainError: the method has no codes for such a model.
            ValueError: the loss is a sum over samples.
        """
        self._layers = code_layers(chain.model)
        self._links: dict[Any, Links] = {}
        self._chain, self._steps = chain, 0
        self._parameters, self._modules = list(chain.parameters()), dict(chain.model.named_modules())
        self._links_of(batch)
        refuse_sum(chain, batch)
        self._gains = self._first_gains(batch)
        self._memories = {}
        return self._remember(self._links_of(batch)) if self.memory else None

    def _first_gains(self, batch: Any) -> dict[nn.Module, Tensor]:
        """Of steps that are not made, each at the rates of the one before."""
        assert self._chain is not None
        self._gains = dict.fromkeys(self._layers, torch.ones((), device=self._chain.device))
        if self.code_lr is not None:
            return self._gains
        with quiet(self._chain.model):
            for _ in range(TRIALS):
                sweep = self._sweep(batch, self._mu())
                sweep.encode()
                sweep.move()
                run, loss = sweep.again(None)
                assert loss is not None
                self._gains = measured_gains(sweep, run, loss, self._gains)
        return self._gains

    def _remember(self, links: Links) -> nn.Module:
        """Make the memories."""
        for name, module in self._modules.items():
            own = any(p is not None and p.requires_grad for p in module._parameters.values())
            if own and isinstance(module, (*NORMS, *NONLINEAR)):
                raise ChainError(
                    f"memory=True: {name!r} is a {type(module).__name__}, whose weights no memory fits; freeze them, "
                    "leave it out, or take memory=False."
                )
        if links.normed - links.outputs:
            name = self._layers[links.modules[min(links.normed)]]
            raise ChainError(f"memory=True: {name!r} is normalised, and so not linear; take memory=False.")
        for layer in dict.fromkeys(links.modules[i] for i in links.coded):
            if any(p.requires_grad for p in layer.parameters()):
                self._alone(layer)
                self._memories[layer] = Memory(layer, self._layers[layer])
        return nn.ModuleList(self._memories.values())

    def _alone(self, layer: nn.Module) -> None:
        """See that no other module has a parameter of the layer, which its memory alone would overwrite.

        Raises:
            ChainError: one has.
        """
        own = {id(p) for p in layer.parameters()}
        for name, module in self._modules.items():
            if module is not layer and any(id(p) in own for p in module._parameters.values()):
                raise ChainError(
                    f"memory=True: {self._layers[layer]!r} shares weights with {name!r}, and each memory would fit "
                    "them to its own codes only; untie them, or take memory=False."
                )

    def step(self, chain: Chain, batch: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        """Encode, move the codes, fit the layers (Algorithm 2.1); returns the forward's loss.

        Where the loss, a gradient, a memory or the weights fitted to it would not be finite nothing is updated,
        running statistics included, and what is returned is not finite either. Where that comes up in a later one of
        ``weight_steps`` the earlier ones stay.

        Raises:
            ValueError: not prepared for this chain, or autocast or a compiled module is in use.
            ChainError: the batch is of another kind, and the model no chain on it.
        """
        self._see(chain)
        sweep = self._sweep(batch, self._mu())
        self._remembered(sweep.links)
        before = [(buffer, buffer.clone()) for buffer in chain.model.buffers()]
        loss = sweep.encode()
        made = self._turns(sweep, optimizer) if torch.isfinite(loss) else 0
        if made:
            self._steps += 1
        else:
            for buffer, value in before:
                buffer.copy_(value)
        return loss if made == self.weight_steps else loss * math.nan

    def _turns(self, sweep: Sweep, optimizer: torch.optim.Optimizer) -> int:
        """Move the codes and fit the layers; returns how many of ``weight_steps`` were finite."""
        with sweep.rest():
            sweep.move()
            for turn in range(self.weight_steps):
                if not self._fit(sweep, optimizer, first=turn == 0):
                    return turn
        return self.weight_steps

    def _mu(self) -> float:
        return self.mu(self._steps) if isinstance(self.mu, Penalty) else float(self.mu)

    def _sweep(self, batch: Any, mu: float) -> Sweep:
        chain, links = self._chain, self._links_of(batch)
        assert chain is not None
        rates = {m: rate(self._gains[m]) if self.code_lr is None else self.code_lr for m in self._layers}
        return Sweep(chain, self._layers, links, batch, mu, rates, self.code_steps, self.proximal)

    def _fit(self, sweep: Sweep, optimizer: torch.optim.Optimizer, first: bool) -> bool:
        """Algorithm 2.3: every layer on its own codes; ``False`` if something is not finite, and nothing was done."""
        links = sweep.links
        self._clear(optimizer)
        run, loss = sweep.again(set(range(len(links.modules))) - links.orphans if first else None)
        assert loss is not None
        if first:  # weights are as in the encoding
            run.predictions |= sweep.unmoved
            gains = measured_gains(sweep, run, loss, self._gains)
        terms, cotangents = [loss], [torch.ones_like(loss)]
        for i in [] if self.memory else links.coded:
            distance = run.predictions[i].detach() - sweep.codes[i]
            terms.append(run.predictions[i])
            cotangents.append((2 * sweep.mu / sweep.samples) * distance)
        trained = [(t, c) for t, c in zip(terms, cotangents, strict=True) if t.requires_grad]
        if trained:
            torch.autograd.backward([t for t, _ in trained], [c for _, c in trained])
        memories = self._ahead(sweep, run) if first else dict(self._memories)
        weights = {layer: memory.fitted(layer) for layer, memory in memories.items()}
        finite = all(m.finite() and bool(torch.isfinite(weights[layer]).all()) for layer, m in memories.items())
        if not finite or not_finite(loss.detach(), gradient_norm(optimizer)):
            self._clear(optimizer)
            return False
        optimizer.step()
        if first:
            self._gains = gains
        for layer, memory in memories.items():
            self._memories[layer].load_state_dict(memory.state_dict())
            write(layer, weights[layer])
        return True

    @torch.no_grad()
    def _ahead(self, sweep: Sweep, run: CodePass) -> dict[nn.Module, Memory]:
        """Copies of the memories that have this batch in them."""
        found = {layer: copy.deepcopy(memory) for layer, memory in self._memories.items()}
        for memory in found.values():
            memory.forget(self.decay)
        for i in self._remembered(sweep.links):
            layer = sweep.links.modules[i]
            found[layer].add(*rows(layer, run.arguments[i], sweep.codes[i]))
        return found

    def _clear(self, optimizer: torch.optim.Optimizer) -> None:
        for p in self._parameters:
            p.grad = None
        optimizer.zero_grad(set_to_none=True)

    def _remembered(self, links: Links) -> list[int]:
        """The calls whose layer has a memory.

        Raises:
            ChainError: a layer with weights to fit has none.
        """
        for layer in {links.modules[i] for i in links.coded if self.memory} - self._memories.keys():
            if any(p.requires_grad for p in layer.parameters()):
                raise ChainError(
                    f"memory=True: {self._layers[layer]!r} has no memory, since the batch given to prepare did not "
                    "call it; give prepare a batch that calls all layers, or take memory=False."
                )
        return [i for i in links.coded if links.modules[i] in self._memories]

    def state_dict(self) -> dict[str, Any]:
        """The batches that mu has grown with, and the layers' gains.

        The memories are kept by who keeps what :meth:`prepare` returned.
        """
        gains = {self._layers[m]: gain.cpu() for m, gain in self._gains.items()}
        return {"steps": self._steps, "gains": gains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: not prepared yet, or for a model of other layers.
        """
        if self._chain is None:
            raise ValueError("load_state_dict: the method has to know the chain first; call prepare(chain, batch).")
        if state["gains"].keys() != set(self._layers.values()):
            raise ValueError(
                f"load_state_dict: the state is of layers {sorted(state['gains'])}, the model has "
                f"{sorted(self._layers.values())}; give a state of the same model."
            )
        self._steps = int(state["steps"])
        self._gains = {m: state["gains"][name].to(self._gains[m].device) for m, name in self._layers.items()}

    def _links_of(self, batch: Any) -> Links:
        """The links on batches of these shapes, found once."""
        key = signature(batch)
        if key not in self._links:
            assert self._chain is not None
            self._links[key] = find_links(self._chain, self._layers, batch)
            if len(self._links) > KEPT_LINKS:
                self._links.pop(next(iter(self._links)))
        return self._links[key]

    def _see(self, chain: Chain) -> None:
        """That a step can be made on this chain."""
        if self._chain is not chain:
            raise ValueError(
                f"{type(self).__name__}: it has to know the chain first: prepare(chain, batch), once, then step."
            )
        for name, module in self._modules.items():
            if vars(module).get(ENTRY) is not None:
                raise ValueError(
                    f"compile: {name!r} is compiled, and alternating minimisation takes over its layers' calls; leave "
                    "compile out."
                )
        if torch.is_autocast_enabled(chain.device.type):
            raise ValueError("precision: alternating minimisation computes in the weights' own; leave autocast out.")

    def _check(self) -> None:
        for name in ("memory", "proximal"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False.")
        for name in ("code_steps", "weight_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number >= 1.")
        for name, number in {"mu": self.mu, "code_lr": self.code_lr}.items():
            fits = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
            other = isinstance(number, Penalty) if name == "mu" else number is None
            if not fits and not other:
                raise ValueError(f"{name}={number!r}: give a number > 0, or {'a Penalty' if name == 'mu' else None}.")
        if not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: give a number > 0 and <= 1.")
        if self.decay < 1 and not self.memory:
            raise ValueError(f"decay={self.decay}: there is no memory to decay; set memory=True, or leave it out.")
