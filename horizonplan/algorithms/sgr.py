"""Local learning with reconciled gradients, and the plain kinds of local learning, which are its special cases.

"Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation": a chain is cut into
gradient-isolated modules. Module k minimises its own loss plus ``weight`` times the distance between the gradient of
that loss in its input and the gradient that the module before had in its output, a constant (Eq. 5). All modules are
trained on every batch; what a module has computed is freed before the next one runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.base import GradientMethod
from horizonplan.algorithms.etf import SimplexETF, classification
from horizonplan.algorithms.heads import Factory, Place, convolutional, fixed, light, mlp_sr, refuse_other_axes
from horizonplan.algorithms.infopro import InformationPropagation
from horizonplan.algorithms.local_step import LocalStep
from horizonplan.algorithms.modules import Modules
from horizonplan.algorithms.naming import in_words
from horizonplan.algorithms.partition import SPLITS, bounds_of
from horizonplan.algorithms.trial import Trial, trial
from horizonplan.batch import LossFunction, output_tensor, target_of
from horizonplan.chain import Chain, ChainError

HEADS: dict[str, Factory] = {
    "light": light,
    "conv": convolutional,
    "dgl": mlp_sr,
    "infopro": InformationPropagation(),
    "etf": fixed,
}
OWN = "own"
LOSS_TOLERANCE = 1e-3


@dataclass(repr=False, eq=False)
class SGR(GradientMethod):
    """Successive gradient reconciliation over ``modules`` modules.

    Auxiliary heads are made by :meth:`prepare`, which has to be called first and whose result has to be trained along
    (the trainer does both, and keeps the heads in its checkpoints).

    Args:
        modules: K.
        weight: of the regulariser; 0: plain local learning, without the graph of second derivatives.
        normalize: compare the gradients' directions (Algorithm 1), not the gradients themselves (Eq. 6); see
            :func:`horizonplan.algorithms.reconcile.distance` for the reductions.
        heads: ``"light"``; ``"conv"`` (3x3 convolution and linear); ``"dgl"`` (a perceptron after spatial reduction);
            ``"infopro"`` (with a decoder); ``"etf"``: a fixed frame, whose gradient is a formula, for BP-free learning;
            ``"own"``: the model's own head, on a projection where shapes differ, and trained by the terminal loss
            only; or a function from a :class:`Place` to a module.
        loss: the local losses, ``(head's output, target) -> scalar``, which need not be supervised ones; ``None``: the
            loss of the model.
        split: where to cut: ``"memory"``, ``"blocks"``, ``"resolution"``, or a list of first blocks; see
            :func:`horizonplan.algorithms.partition.bounds_of`.
        only: train this module only (from 0), for layer-wise phases; needs ``weight=0``.

    Attributes:
        local_losses: of the last step, one a module that was trained, the terminal one last. Detached, unscaled.
        terms: the regularisers of the last step, one a module but the first, without their weight.

    Raises:
        ValueError: bad arguments.

    >>> SGR(modules=3)
    SGR(modules=3, weight=1.0, normalize=True, heads='light', loss=None, split='memory', only=None)
    """

    modules: int
    weight: float = 1.0
    normalize: bool = True
    heads: str | Factory = "light"
    loss: LossFunction | None = None
    split: str | Sequence[int] = "memory"
    only: int | None = None

    def __post_init__(self) -> None:
        self._check()
        self._ready: Modules | None = None
        self._shapes: list[torch.Size] = []  # of each block's output, without the batch
        self.local_losses: tuple[Tensor, ...] = ()
        self.terms: tuple[Tensor, ...] = ()

    def __repr__(self) -> str:
        told = [f"{f.name}={in_words(getattr(self, f.name))}" for f in fields(self)]
        return f"{type(self).__name__}({', '.join(told)})"

    def prepare(self, chain: Chain, batch: Any) -> nn.Module | None:
        """Cut the chain and make the auxiliary heads, which are to be trained along; ``None`` if there are none.

        One trial forward. Weights of heads come from torch's generator.

        Raises:
            ValueError: the chain cannot be cut so, there is no such head for its states, or the local losses would
                be other ones than the model's own.
        """
        found = trial(chain, batch)
        bounds = bounds_of(found, self.modules, self.split, self.weight > 0)
        made: list[nn.Module | None] = [None] * (self.modules - 1)
        if self.heads != OWN:
            for k in range(self.modules - 1):
                if self.only in (None, k):
                    made[k] = self._head(chain, k, found, bounds, batch)
        second_order = self.weight > 0 and self.modules > 1
        self.local_losses, self.terms = (), ()
        self._shapes = [state.shape[1:] for state in found.states]
        self._ready = Modules(chain, bounds, made, self.loss, second_order, self.only, not isinstance(self.heads, str))
        kept = [head for head in made if head is not None]
        frames = [isinstance(head, SimplexETF) for head in kept]
        if any(frames):
            self._see_frames(found, batch)
        if self.loss is None and not all(frames):
            self._see_loss(found, batch)
        return nn.ModuleList(kept) if kept else None

    @property
    def bounds(self) -> tuple[int, ...]:
        """Module k holds blocks ``bounds[k]..bounds[k + 1] - 1``; known once prepared."""
        return self.parts().bounds

    def backward(self, chain: Chain, batch: Any, scale: float | Tensor = 1.0) -> Tensor:
        """Accumulate every module's gradient, each freed before the next module runs.

        After an error, gradients that were ``None`` are ``None`` again.

        Raises:
            ValueError: not prepared for this chain, or nothing is trainable.
            ChainError: blocks run out of turn, or an operator has no second derivative.
        """
        modules = self.parts(chain)
        trained = [*chain.parameters(), *(p for head in modules.heads if head is not None for p in head.parameters())]
        if not any(p.requires_grad for p in chain.parameters()):
            raise ValueError("model: no parameter requires a gradient; unfreeze one before training.")
        torch.clear_autocast_cache()  # an optimiser may have changed the weights behind it
        fresh = [p for p in trained if p.grad is None]
        step = LocalStep(modules, batch, self.weight, self.normalize, scale, first=not self.local_losses)
        try:
            loss = step.run()
        except BaseException as error:
            for p in fresh:
                p.grad = None
            if isinstance(error, RuntimeError) and (missing := _second_derivative(error)):
                raise ChainError(f"weight={self.weight}: {missing}; set weight=0, or do without it.") from error
            raise
        self.local_losses, self.terms = tuple(step.losses), tuple(step.terms)
        return loss

    def losses_on(self, chain: Chain, batch: Any) -> list[float]:
        """The local losses on a batch, the terminal one last; nothing is trained, but running statistics move.

        Raises:
            ValueError: not prepared for this chain.
        """
        step = LocalStep(self.parts(chain), batch, 0.0, self.normalize, backward=False)
        step.run()
        return [loss.item() for loss in step.losses]

    def state_dict(self) -> dict[str, Any]:
        """Where the chain is cut (the heads are kept by who trains them)."""
        return {"bounds": list(self.bounds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the chain as it was; a split balanced in memory depends on the size of the batch it was found with.

        Raises:
            ValueError: the heads are not made for states there, or another split was asked for.
        """
        then, now = tuple(state.get("bounds", ())), self.bounds
        if then == now:
            return
        fits = (len(then), then[-1:]) == (len(now), now[-1:]) and all(
            self._shapes[a - 1] == self._shapes[b - 1] for a, b in zip(then, now, strict=True)
        )
        if self.split != "memory" or not fits:
            raise ValueError(
                f"split: modules began at {list(then)} and do at {list(now)} now; resume with the model and a first "
                "batch of the size that the run began with."
            )
        self._ready = replace(self.parts(), bounds=then)

    def parts(self, chain: Chain | None = None) -> Modules:
        """The modules and their heads.

        Raises:
            ValueError: not prepared, or for another chain.
        """
        if self._ready is None or (chain is not None and self._ready.chain is not chain):
            raise ValueError(
                f"{type(self).__name__}: it has to know the chain first: heads = prepare(chain, batch), and give their "
                "parameters to the optimizer too."
            )
        return self._ready

    def _head(self, chain: Chain, k: int, found: Trial, bounds: tuple[int, ...], batch: Any) -> nn.Module:
        if found.output is None:
            raise ValueError(f"heads={in_words(self.heads)}: the model was not called for the loss; give heads='own'.")
        state = found.states[bounds[k + 1] - 1]
        factory = HEADS[self.heads] if isinstance(self.heads, str) else self.heads
        place = Place(k, self.modules, state, found.output, batch)
        if isinstance(self.heads, str):
            refuse_other_axes(place, chain.blocks[bounds[k + 1] - 1], self.heads)
        head = factory(place)
        if not isinstance(head, nn.Module):
            raise ValueError(f"heads: {in_words(factory)} made a {type(head).__name__}; let it return a module.")
        if isinstance(head, SimplexETF):
            return head.to(state.device)
        return head.to(state.device, next((p.dtype for p in chain.parameters() if p.is_floating_point()), state.dtype))

    def _see_loss(self, found: Trial, batch: Any) -> None:
        """A model may compute its loss inside, in a way that its output does not tell."""
        assert self._ready is not None
        with torch.no_grad():
            measured = self._ready.measure(output_tensor(found.result), batch)
        if not torch.allclose(measured, found.loss, rtol=LOSS_TOLERANCE, equal_nan=True):
            raise ValueError(
                f"loss: the model's is {found.loss.item():.6g}, but {measured.item():.6g} when taken from its output; "
                "give the local losses' function, loss=, or heads='own'."
            )

    def _see_frames(self, found: Trial, batch: Any) -> None:
        """A frame's gradient is that of the cross-entropy, which has to be the model's loss too."""
        assert self._ready is not None
        if self.loss is not None:
            raise ValueError("loss: frames have a loss of their own; leave it out, or take other heads.")
        output, target = output_tensor(found.result).detach().requires_grad_(), target_of(batch)
        with torch.enable_grad():
            own = classification(output, target)
            try:
                model = self._ready.measure(output, batch)
            except ValueError as error:
                if not isinstance(error.__cause__, AttributeError):
                    raise
                model = found.loss  # it reads more of the model than its output
        alike = torch.allclose(own.double(), found.loss.double(), rtol=LOSS_TOLERANCE, equal_nan=True)
        if alike and model.requires_grad:  # a smoothed loss may be as large, but has another slope
            ours, theirs = (torch.autograd.grad(loss, output)[0].double() for loss in (own, model))
            alike = bool((ours - theirs).abs().max() <= LOSS_TOLERANCE * ours.abs().max())
        if not alike:
            raise ValueError(
                f"heads='etf': a frame's loss is the cross-entropy with the batch's target, {own.item():.6g} at the "
                f"model's output, and the model's, {found.loss.item():.6g}, is another function; take other heads."
            )

    def _check(self) -> None:
        if not _whole(self.modules, 1):
            raise ValueError(f"modules={self.modules!r}: give a whole number >= 1.")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight!r}: give a number >= 0.")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize={self.normalize!r}: give True or False.")
        named, ready = isinstance(self.heads, str), isinstance(self.heads, nn.Module)
        if (named and self.heads not in (*HEADS, OWN)) or ready or not (named or callable(self.heads)):
            raise ValueError(f"heads={self.heads!r}: give {', '.join(map(repr, (*HEADS, OWN)))}, or a function.")
        listed = isinstance(self.split, list | tuple) and all(_whole(block, 1) for block in self.split)
        if not listed and self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: give {', '.join(map(repr, SPLITS))}, or a list of first blocks.")
        if self.only is not None and not (_whole(self.only, 0) and self.only < self.modules):
            raise ValueError(f"only={self.only!r}: give a module from 0 to {self.modules - 1}, or None.")
        if self.only is not None and self.weight:
            raise ValueError(f"only={self.only}: one module has none to agree with; set weight=0.")
        if isinstance(self.loss, type) or not (self.loss is None or callable(self.loss)):
            raise ValueError(f"loss={in_words(self.loss)}: give a function (head's output, target) -> scalar, or None.")
        if self.loss is not None and self.heads in ("etf", OWN):
            raise ValueError(f"loss: heads={self.heads!r} have a loss of their own; leave it out, or take other heads.")


def _second_derivative(error: RuntimeError) -> str:
    """What has no second derivative, if that is the error."""
    message = str(error).splitlines()[0]
    if "double backward" in message or "donated buffers" in message:
        return "compiled blocks have no second derivative"
    return message if "is not implemented" in message else ""


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
