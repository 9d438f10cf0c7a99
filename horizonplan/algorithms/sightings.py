"""What becomes of layers' outputs: one forward, watched, shows which transfer function each is given to.

Modules and functions are seen alike: ``nn.Tanh()(a)``, ``torch.tanh(a)``, ``a.tanh_()``. Where an output goes into
something else (a norm, a sum, a pooling, another layer, the loss), into several operations or into none, its transfer
function is the linear one. An activation that is not the gradient of a known convex function (GELU, say) is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from horizonplan.algorithms.layers import Weighted
from horizonplan.algorithms.transfer import (
    ARCTAN,
    LINEAR,
    RELU,
    SIGMOID,
    TANH,
    Transfer,
    elu,
    leaky_relu,
    softmax,
    softplus,
)
from horizonplan.batch import tensors
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet

# Elementwise activations, and softmax's relatives, that are no gradient of a known convex function.
_OTHERS = """gelu silu mish hardswish hardsigmoid hardtanh relu6 selu celu prelu rrelu logsigmoid log_sigmoid
log_softmax softmin gumbel_softmax softsign tanhshrink hardshrink softshrink threshold glu"""
OTHERS = frozenset(_OTHERS.split())


@dataclass
class Sight:
    """What a trial forward showed of one layer.

    Attributes:
        consumers: the transfer function of each operation that its output went into; ``None`` for an activation
            that is none; :data:`LINEAR` for anything else.
        result: what the first of them made of it.
        follower: the module that got the output and gave this result.
    """

    consumers: list[Transfer | None] = field(default_factory=list)
    result: Tensor | None = None
    follower: nn.Module | None = None

    @property
    def transfer(self) -> Transfer | None:
        """What follows the layer; the linear function where it is nothing, or several things."""
        return self.consumers[0] if len(self.consumers) == 1 else LINEAR


def sightings(chain: Chain, batch: Any, names: Mapping[Weighted, str]) -> tuple[dict[Weighted, Sight], Counter[str]]:
    """Run the model once without a graph, and watch some layers.

    Returns:
        What became of each layer's output, in the order of their calls; and how often each name was called.
    """
    watch = _Watch(names)
    with chain.running(), quiet(chain.model), torch.no_grad():
        hooks = [m.register_forward_hook(watch.called, prepend=True) for m in names]
        plain = [m for m in chain.model.modules() if not m._parameters and not m._modules]
        hooks += [m.register_forward_hook(watch.passed) for m in plain]
        try:
            with watch:
                chain.loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
    return watch.seen, watch.calls


class _Watch(TorchFunctionMode):
    """Notes which function each layer's output is given to."""

    def __init__(self, names: Mapping[Weighted, str]) -> None:
        super().__init__()
        self.names = names
        self.seen: dict[Weighted, Sight] = {}
        self.calls: Counter[str] = Counter()
        self.outputs: dict[int, tuple[Weighted, Tensor]] = {}
        self.overwritten: set[int] = set()

    def called(self, module: Weighted, args: Any, output: Tensor) -> None:
        self.seen[module] = Sight()
        self.calls[self.names[module]] += 1
        self.outputs[id(output)] = module, output

    def passed(self, module: nn.Module, args: Any, output: Any) -> None:
        layer, _ = self.outputs.get(id(args[0]) if args else 0, (None, None))
        if layer is not None and output is self.seen[layer].result is not None:
            self.seen[layer].follower = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ids = {id(a) for a in tensors((args, kwargs))} & self.outputs.keys() - self.overwritten
        given = [self.outputs[i][0] for i in ids]
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            for layer in given:
                sight = self.seen[layer]
                sight.consumers.append(transfer_of(func, args, kwargs))
                sight.result = result if sight.result is None else sight.result
            self.overwritten |= {id(result)} & ids  # by an operation in place
        return result


def transfer_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Transfer | None:
    """The transfer function that a call of torch is; ``None``: an activation that is none; else the linear one."""
    name = getattr(function, "__name__", "").removesuffix("_")
    if name in OTHERS:
        return None
    known = _CALLS.get(name)
    if known is None:
        return LINEAR
    try:
        return known(*args, **kwargs)
    except (TypeError, ValueError):  # a form of it that is not monotone, or has another meaning
        return None


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Transfer:
    return leaky_relu(negative_slope)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, inplace: bool = False) -> Transfer:
    if float(scale) != 1:
        raise ValueError(f"scale={scale}")
    return elu(alpha)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Transfer:
    return softplus(beta, threshold)


def _softmax(x: Tensor, dim: int | None = None, *rest: Any, **named: Any) -> Transfer:
    if dim is None:  # torch's implicit dimension
        dim = 0 if x.dim() in (0, 1, 3) else 1
    return softmax(dim)


def _plain(transfer: Transfer, *args: Any, **kwargs: Any) -> Transfer:
    return transfer


_CALLS: dict[str, Callable[..., Transfer]] = {
    "relu": partial(_plain, RELU),
    "tanh": partial(_plain, TANH),
    "sigmoid": partial(_plain, SIGMOID),
    "special_expit": partial(_plain, SIGMOID),
    "atan": partial(_plain, ARCTAN),
    "arctan": partial(_plain, ARCTAN),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "softmax": _softmax,
}
