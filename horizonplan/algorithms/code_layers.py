"""Which modules of a model have a code, and what a recurrent cell predicts for it.

A code stands for the output of a linear layer before the nonlinearity ("Beyond Backprop: Online Alternating
Minimization with Auxiliary Variables", Section 2), for that of its normalisation where one follows at once, and for a
recurrent layer's pre-activation at each time step (Eq. 17).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from horizonplan.chain import ChainError

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.RNN, nn.RNNCell)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NONLINEAR = (nn.PReLU,)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def code_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose outputs are codes, with their names.

    Raises:
        ChainError: some of the weights are in a module of another kind, or in a recurrent one of more than one layer.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        own = any(p is not None for p in module._parameters.values())
        if own and not isinstance(module, (*LINEAR, *RECURRENT, *NORMS, *NONLINEAR)):
            raise ChainError(
                f"model: {name!r} is a {kind}, which alternating minimisation has no code for; it takes Linear and "
                "Conv layers, RNN and RNNCell, normalisations and PReLU. Train this model with another algorithm."
            )
        if isinstance(module, RECURRENT):
            _check_recurrent(module, name)
    return {m: name for name, m in model.named_modules() if isinstance(m, (*LINEAR, *RECURRENT))}


def _check_recurrent(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.RNN) and (module.num_layers > 1 or module.bidirectional):
        raise ChainError(
            f"model: {name!r} is an RNN with num_layers={module.num_layers}, bidirectional={module.bidirectional}; "
            "give one RNN for each layer, in one direction."
        )
    known = {f"{kind}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for suffix in ("", "_l0")}
    if type(module).forward not in {nn.RNN.forward, nn.RNNCell.forward} or not module._parameters.keys() <= known:
        raise ChainError(
            f"model: {name!r} ({type(module).__name__}) computes its time steps or weights in a way of its own; give a "
            "plain RNN or RNNCell."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ChainError(
            f"model: {name!r} ({type(module).__name__}) has forward hooks, which would not be called, since it is run "
            "step by step; remove them."
        )


def cell_weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A recurrent module's weights and biases, of its input and of its hidden state."""
    suffix = "_l0" if isinstance(module, nn.RNN) else ""
    biases = module._parameters.get(f"bias_ih{suffix}"), module._parameters.get(f"bias_hh{suffix}")
    return module.get_parameter(f"weight_ih{suffix}"), module.get_parameter(f"weight_hh{suffix}"), *biases


def cell(module: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
    """Eq. 17: the pre-activation of one time step.

    Args:
        module: an ``RNN`` or ``RNNCell``.
        x: ``(B, D)``, the input.
        hidden: ``(B, H)``, the hidden state before.

    Returns:
        Shape ``(B, H)``.
    """
    w_x, w_h, b_x, b_h = cell_weights(module)
    return F.linear(x, w_x, b_x) + F.linear(hidden, w_h, b_h)


def activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A recurrent module's nonlinearity."""
    return _ACTIVATIONS[str(module.nonlinearity)]
