"""LocoProp: several local steps for each gradient.

"LocoProp: Enhancing BackProp via Local Loss Optimization": some gradient method (back-propagation, a horizon's) gives
every layer the loss's gradient in its pre-activations. From it the layer makes a target, and takes some steps towards
it on a local loss, with its input held fixed, apart from all other layers. The first of these steps is the plain
method's; the others get more out of the same gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.algorithms.base import Algorithm, GradientMethod, gradient_norm, not_finite
from horizonplan.algorithms.layers import Layer
from horizonplan.algorithms.local_problem import VARIANTS, Descent, plain_descent
from horizonplan.algorithms.rmsprop import RMSProp
from horizonplan.algorithms.sgr import SGR
from horizonplan.algorithms.taps import captured
from horizonplan.algorithms.transfer import Transfer
from horizonplan.algorithms.treated import Transfers, Treated, treat
from horizonplan.algorithms.windows import BackPropagation, Windows
from horizonplan.batch import batch_size
from horizonplan.chain import Chain
from horizonplan.chain.calls import ENTRY, Ambient

Inner = Callable[[Any], Optimizer]
BATCH = "batch"
NOTED = "locoprop_lr"


@dataclass(repr=False, eq=False)
class LocoProp(Algorithm):
    """LocoProp around a gradient method.

    Linear layers and convolutions take local steps with optimisers of their own (``inner``), whose state persists.
    What else is trained (norms, embeddings, biases of their own, auxiliary heads) takes the ordinary gradient with the
    optimizer that :meth:`step` is given. A weight or bias is trained only if that optimizer holds it, and where the
    weight is frozen or not held the bias takes the ordinary gradient. A schedule of the optimizer's learning rate
    scales the inner ones by the same factor, relative to the initial rate (``OneCycleLR``: to its ``max_lr``).

    Args:
        variant: ``"S"`` squared loss of pre-activations, ``"M"`` matching loss, ``"PocoS"``, ``"PocoM"``: the
            variants on post-activations.
        iterations: local steps for each gradient; the learning rate of step j is ``max(1 - j / 10, .25)`` times the
            inner optimiser's.
        gamma: step size of the activations; ``"batch"``: the number of samples in the batch. If the loss is a mean
            over samples, and a sum over a sample's outputs, targets are then a step of size 1 on each sample's own
            loss. A mean over D outputs too (torch's default for binary cross-entropy, tokens) makes that 1 / D; give
            gamma = samples times D.
        inner: ``callable(params) -> Optimizer``, called once a layer: :class:`RMSProp`, or one of ``torch.optim``. Give
            its settings by ``functools.partial``: a resumed run compares them, which it cannot inside a lambda.
        source: the method whose gradient is taken.
        transfers: layer name, or pattern of names -> its transfer function (a name such as ``"tanh"``, or a
            :class:`Transfer`), for layers that what follows does not tell; ``None``: the ordinary gradient for them.
        anchored: every local step starts from the old weights (the paper's Eq. 4), with a constant learning rate;
            needs plain ``torch.optim.SGD`` inside. ``False``: Algorithms 1 to 4.
        damping: for S, natural-gradient targets (Proposition 1) with this much added to the Fisher matrix's diagonal,
            as in K-FAC; in units of a squared gradient of one sample's loss. ``None``: gradient targets.

    Raises:
        ValueError: bad arguments.

    >>> LocoProp("S", iterations=5, gamma=10)
    LocoProp(variant='S', iterations=5, gamma=10, inner=RMSProp, source=BackPropagation(recompute=0), transfers={}, \
anchored=False, damping=None)
    """

    variant: str = "M"
    iterations: int = 10
    gamma: float | str = BATCH
    inner: Inner = RMSProp
    source: GradientMethod = field(default_factory=BackPropagation)
    transfers: Transfers = field(default_factory=dict)
    anchored: bool = False
    damping: float | None = None

    def __post_init__(self) -> None:
        self._check()
        self._chain: Chain | None = None
        self._found = Treated((), {})
        self._inner: dict[Layer, Optimizer] = {}

    def __repr__(self) -> str:
        told = [f"{f.name}={_in_words(getattr(self, f.name))}" for f in fields(self)]
        return f"{type(self).__name__}({', '.join(told)})"

    @property
    def layers(self) -> dict[str, Transfer]:
        """The layers with a local loss, and their transfer functions; known once prepared."""
        return {layer.name: layer.transfer for layer in self._found.layers}

    @property
    def left(self) -> dict[str, str]:
        """The modules that take the ordinary gradient, and why; known once prepared."""
        return dict(self._found.left)

    def prepare(self, chain: Chain, batch: Any) -> nn.Module | None:
        """Find the layers and make their optimisers; returns the source's auxiliary heads, if it has any.

        Raises:
            ValueError: no layer can be treated, ``transfers`` fits none, ``inner`` makes no fitting optimiser, or the
                source's horizon does not fit the chain.
        """
        _refuse_compiled(chain)
        if isinstance(self.source, Windows):
            self.source.schedule(chain.depth)
        extra = self.source.prepare(chain, batch)
        self._gamma(batch)
        found = treat(chain, batch, self.variant, self.transfers)
        if not found.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in found.left.items())
            raise ValueError(f"model: LocoProp can treat none of its layers ({reasons}); take its source alone.")
        self._inner = {layer: self._optimizer(layer) for layer in found.layers}
        self._chain, self._found = chain, found
        return extra

    def step(self, chain: Chain, batch: Any, optimizer: Optimizer) -> Tensor:
        """Take the source's gradient, then the local steps of all layers and a step of ``optimizer`` on all else.

        Returns:
            The terminal loss at the old weights, shape ``()``; NaN if it, or a gradient, is not finite: then nothing
            was updated.

        Raises:
            ValueError: not prepared for this chain, or its blocks are compiled.
        """
        if self._chain is not chain:
            raise ValueError("LocoProp: it has to know the chain first: prepare(chain, batch).")
        _refuse_compiled(chain)
        descent = Descent(self.variant, self.iterations, self._gamma(batch), self.anchored, self.damping)
        factors = scheduled(optimizer)
        trained = {layer: part for layer in self._found.layers if (part := _trained(layer, factors))}
        chain.model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        with captured(trained) as captures:
            loss = self.source.backward(chain, batch)
        if not_finite(loss, gradient_norm(optimizer) + _norm(captures.values())):
            chain.model.zero_grad(set_to_none=True)
            optimizer.zero_grad(set_to_none=True)
            return torch.full_like(loss, math.nan)
        with Ambient.off():
            for layer, part in trained.items():
                seen = captures.pop(layer)
                if seen.input is not None:
                    descent.run(layer, seen, self._inner[layer], part, factors[id(layer.module.weight)])
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimisers' states, by layer, and the source's."""
        inner = {layer.name: made.state_dict() for layer, made in self._inner.items()}
        return {"inner": inner, "source": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it.

        Raises:
            ValueError: it is of other layers.
        """
        then, now = list(state["inner"]), [layer.name for layer in self._inner]
        if then != now:
            raise ValueError(f"LocoProp: the state is of layers {then}, this model's are {now}; prepare it as it was.")
        for layer, made in self._inner.items():
            made.load_state_dict(state["inner"][layer.name])
        self.source.load_state_dict(state["source"])

    def _gamma(self, batch: Any) -> float:
        if not isinstance(self.gamma, str):
            return float(self.gamma)
        size = batch_size(batch)
        if size is None:
            raise ValueError("gamma='batch': the batch's tensors share no first dimension; give a number.")
        return float(size)

    def _optimizer(self, layer: Layer) -> Optimizer:
        made: Any = self.inner(layer.parameters)
        if not isinstance(made, Optimizer):
            raise ValueError(f"inner: it made a {type(made).__name__}; give callable(params) -> Optimizer.")
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if held != {id(p) for p in layer.parameters}:
            raise ValueError(f"inner: {type(made).__name__} holds other parameters than it was given; use them.")
        needed = [p for p in inspect.signature(type(made).step).parameters.values() if p.default is p.empty]
        if [p.name for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD] != ["self"]:
            raise ValueError(f"inner: {type(made).__name__}.step needs a closure; give one that steps without.")
        if self.anchored and not plain_descent(made):
            raise ValueError(
                f"anchored=True: Eq. 4 is plain gradient descent, and inner makes {type(made).__name__}; give "
                "inner=partial(torch.optim.SGD, lr=...), without momentum and weight decay."
            )
        return made

    def _check(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r}: give {', '.join(map(repr, VARIANTS))}.")
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: give a whole number >= 1.")
        if self.gamma != BATCH and not _positive(self.gamma):
            raise ValueError(f"gamma={self.gamma!r}: give a number > 0, or {BATCH!r}.")
        if isinstance(self.inner, Optimizer) or not callable(self.inner):
            raise ValueError(f"inner={self.inner!r}: give callable(params) -> Optimizer; each layer gets one.")
        if not isinstance(self.source, GradientMethod):
            raise ValueError(f"source={self.source!r}: give a GradientMethod, Horizon(3) say.")
        if isinstance(self.source, SGR) and self.source.weight > 0:
            raise ValueError(
                f"source: the gradient of SGR with weight={self.source.weight} is not made of gradients in "
                "pre-activations; set its weight=0."
            )
        if not isinstance(self.transfers, Mapping):
            raise ValueError(f"transfers={self.transfers!r}: give a mapping of layer names; {{}} for none.")
        for name, value in self.transfers.items():
            if not isinstance(value, Transfer | str | None):
                raise ValueError(f"transfers[{name!r}]={value!r}: give a name, a Transfer, or None.")
        if self.damping is not None and not _positive(self.damping):
            raise ValueError(f"damping={self.damping!r}: give a number > 0, or None.")
        if self.damping is not None and self.variant != "S":
            raise ValueError(f"damping={self.damping}: natural targets belong to variant 'S', not {self.variant!r}.")


def scheduled(optimizer: Optimizer) -> dict[int, float]:
    """What a schedule has made of the learning rate, relative to its full one, by the id of each parameter held.

    The full one is the group's ``max_lr``, as ``OneCycleLR`` notes it, else its ``initial_lr``, as torch's other
    schedulers do. Where there is neither, the first rate seen is noted under a key of its own, so that the optimiser's
    state keeps it.
    """
    factors: dict[int, float] = {}
    for group in optimizer.param_groups:
        known = next((key for key in ("max_lr", "initial_lr") if key in group), NOTED)
        full = float(group[known] if known != NOTED else group.setdefault(NOTED, float(group["lr"])))
        factor = float(group["lr"]) / full if full else 1.0
        factors |= {id(p): factor for p in group["params"]}
    return factors


def _trained(layer: Layer, factors: Mapping[int, float]) -> list[nn.Parameter]:
    """What of a layer takes local steps: nothing if its weight is frozen or not held, else all that is held.

    Raises:
        ValueError: the schedules of its weight and bias differ.
    """
    part = [p for p in layer.parameters if p.requires_grad and id(p) in factors]
    if not any(p is layer.module.weight for p in part):
        return []
    found = [factors[id(p)] for p in part]
    if not all(math.isclose(factor, found[0]) for factor in found):
        raise ValueError(
            f"optimizer: its schedule is at {found} of the learning rates of the weight and bias of {layer.name!r}, "
            f"which step together here: give them one schedule, or transfers={{{layer.name!r}: None}}."
        )
    return part


def _norm(captures: Any) -> Tensor:
    gradients = [seen.gradient for seen in captures if seen.gradient is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def _refuse_compiled(chain: Chain) -> None:
    if any(vars(module).get(ENTRY) is not None for module in chain.model.modules()):
        raise ValueError("compile: LocoProp takes over single layers' calls, which compiled blocks hide; leave it out.")


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _in_words(value: Any) -> str:
    """A setting in words that are the same in every process: functions by their names."""
    if isinstance(value, partial):
        given = [*map(repr, value.args), *(f"{name}={v!r}" for name, v in value.keywords.items())]
        return f"{_in_words(value.func)}({', '.join(given)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {v if isinstance(v, Transfer) else repr(v)}" for k, v in value.items()) + "}"
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else str(name)
