"""Co-activation memories, and linear layers fitted to them by block-coordinate descent (AM-mem).

"Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", Eq. 7 and Algorithm 2.3: all activations a
and codes c so far are kept as ``A = sum a a^T`` and ``B = sum c a^T``, and the layer's weights minimise
``Tr(W^T W A) - 2 Tr(W^T B)``, column after column. A bias is a column whose activation is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.algorithms.code_layers import RECURRENT, cell_weights
from horizonplan.chain import ChainError

LONGEST = 0.2  # of a column's length: one step (docs/log.md has what happens without)


def coordinate_descent(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One sweep over the columns: ``W_j += (B_j - W A_j) / A_jj``, each with the columns before it as they are now.

    All at once, by a triangular system: column j of the new W solves
    ``sum_{i <= j} new_i A_ij = B_j - sum_{i > j} old_i A_ij``. A column whose input has been silent stays.

    Args:
        weight: ``(M, D)``.
        a: ``(D, D)``, symmetric and positive semi-definite.
        b: ``(M, D)``.

    Returns:
        The new weights, ``(M, D)``.
    """
    diagonal = a.diagonal()
    silent = diagonal <= torch.finfo(a.dtype).tiny  # descent does not depend on the columns' scales
    upper, rest = torch.triu(a), b - weight @ torch.tril(a, -1)
    upper[:, silent] = 0
    upper[silent, silent] = 1
    rest = torch.where(silent, weight, rest)
    solved: Tensor = torch.linalg.solve_triangular(upper, rest, upper=True, left=False)
    return solved


class Memory(nn.Module):
    """The memories of one layer, in single precision at least.

    Args:
        layer: ``Linear``, ``Conv1d``, ``Conv2d``, ``RNN`` or ``RNNCell``.
        name: in the model, for errors.

    Raises:
        ChainError: the layer is not linear in its weights, has no unfolding, or is frozen in part.
    """

    a: Tensor
    b: Tensor

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        _check(layer, name)
        weight = _weight(layer)
        outputs, inputs = weight.shape
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("a", weight.new_zeros(inputs, inputs, dtype=kind))
        self.register_buffer("b", weight.new_zeros(outputs, inputs, dtype=kind))

    def add(self, inputs: Tensor, codes: Tensor) -> None:
        """Remember rows ``(N, D)`` of inputs and ``(N, M)`` of codes (``updateMemory``)."""
        inputs, codes = inputs.to(self.a.dtype), codes.to(self.a.dtype)
        self.a += inputs.T @ inputs
        self.b += codes.T @ inputs

    def forget(self, decay: float) -> None:
        """Multiply what is remembered."""
        self.a *= decay
        self.b *= decay

    def fitted(self, layer: nn.Module) -> Tensor:
        """The layer's weights and bias after one sweep over their columns, for :func:`write`.

        No column moves further than ``LONGEST`` of its length, or of the columns' usual one. An input that has hardly
        been active yet asks for a step without bounds, which is right for what was seen and wrong for what comes. The
        bound is relative, so that inputs of any scale are fitted, in more sweeps.
        """
        weight = _weight(layer).to(self.a.dtype)
        step = coordinate_descent(weight, self.a, self.b) - weight
        lengths = weight.norm(dim=0)
        room = LONGEST * torch.maximum(lengths, lengths.square().mean().sqrt())
        moved: Tensor = weight + step * (room / step.norm(dim=0).clamp_min(torch.finfo(step.dtype).tiny)).clamp(max=1.0)
        return moved

    def finite(self) -> bool:
        """Whether all that is remembered is."""
        return bool(torch.isfinite(self.a).all() and torch.isfinite(self.b).all())


def rows(layer: nn.Module, arguments: tuple[Tensor, ...], code: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer read and its code as the rows of a linear system, ``(N, D)`` and ``(N, M)``.

    Convolutions are unfolded: a row for each position.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        flat = isinstance(layer, nn.Conv1d)
        sizes = [(0, *s) if flat and k == "padding" else (1, *s) if flat else s for k, s in _geometry(layer).items()]
        x = arguments[0].unsqueeze(-2) if flat else arguments[0]
        inputs = F.unfold(x, *sizes).transpose(1, 2).flatten(0, 1)
        codes = code.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        inputs = torch.cat(arguments, -1).flatten(0, -2)
        codes = code.flatten(0, -2)
    biased = _bias(layer) is not None
    return (torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if biased else inputs), codes


def _geometry(layer: nn.Conv1d | nn.Conv2d) -> dict[str, tuple[int, ...]]:
    assert not isinstance(layer.padding, str)
    return {
        "kernel_size": layer.kernel_size,
        "dilation": layer.dilation,
        "padding": layer.padding,
        "stride": layer.stride,
    }


def _bias(layer: nn.Module) -> Tensor | None:
    if isinstance(layer, RECURRENT):
        _, _, b_x, b_h = cell_weights(layer)
        return None if b_x is None or b_h is None else b_x + b_h
    return layer._parameters.get("bias")


def _weight(layer: nn.Module) -> Tensor:
    """``(M, D)``, the bias as the last column."""
    with torch.no_grad():
        if isinstance(layer, RECURRENT):
            weight = torch.cat(cell_weights(layer)[:2], 1)
        else:
            weight = layer.get_parameter("weight").flatten(1)
        bias = _bias(layer)
        return weight.clone() if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


def write(layer: nn.Module, weight: Tensor) -> None:
    """Set a layer's weights and bias, ``(M, D)``."""
    with torch.no_grad():
        if isinstance(layer, RECURRENT):
            w_x, w_h, b_x, b_h = cell_weights(layer)
            w_x.copy_(weight[:, : w_x.shape[1]])
            w_h.copy_(weight[:, w_x.shape[1] : w_x.shape[1] + w_h.shape[1]])
            if b_x is not None and b_h is not None:
                b_x.copy_(weight[:, -1] - b_h)
            return
        own, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        own.copy_(weight[:, : own[0].numel()].reshape(own.shape))
        if bias is not None:
            bias.copy_(weight[:, -1])


def _check(layer: nn.Module, name: str) -> None:
    way_out = "take memory=False"
    if isinstance(layer, nn.Conv3d):
        raise ChainError(f"memory=True: {name!r} is a Conv3d, for which torch has no unfolding; {way_out}.")
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        simple = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if not simple:
            raise ChainError(
                f"memory=True: {name!r} has groups={layer.groups}, padding={layer.padding!r}, padding_mode="
                f"{layer.padding_mode!r}; its unfolding needs one group and a number of zeros, or {way_out}."
            )
    if not isinstance(layer, RECURRENT):
        plain = type(layer).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
        if not plain or layer._parameters.keys() != {"weight", "bias"}:
            raise ChainError(f"memory=True: {name!r} computes its output or weights in a way of its own; {way_out}.")
    trained = {p.requires_grad for p in layer.parameters()}
    if trained == {True, False}:
        raise ChainError(f"memory=True: {name!r} is frozen in part; freeze all of it or nothing, or {way_out}.")
