"""What a layer saw and what the loss wants of it: inputs and gradients, caught while some method computes its gradient.

A layer's call is taken over for one gradient. Its output is computed with the weights as constants, and a *tap* is
added to it: a zero that depends on the weights. Autograd reaches the tap where it would have formed the weights'
gradient, and only there: where a horizon's pull passes through a block without training it, the tap is not asked. So
the gradient that the tap sees is the one that the weights' gradient would have been made of, whatever the method, and
with recomputing too; and the weights' gradient itself, which is not wanted, is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.layers import Layer, evaluate
from horizonplan.chain import ChainError

Forward = Callable[..., Any]


class Capture:
    """A layer's input and gradient on one batch.

    Attributes:
        input: what the layer was called with; ``None`` as long as no gradient has come.
        gradient: of the loss, in the layer's pre-activation, or in its post-activation if it has a ``follower``;
            summed over windows.
        after: the gradient in the post-activation that the present backward pass has come through.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.input: Tensor | None = None
        self.gradient: Tensor | None = None
        self.after: Tensor | None = None

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Take in one gradient.

        Raises:
            ChainError: the layer was called a second time, with something else; or the loss was taken before its
                transfer function.
        """
        name = self.layer.name
        if self.layer.follower is not None:
            if self.after is None:
                raise ChainError(
                    f"layer {name!r}: the loss that trains it is taken between it and its transfer function, so it has "
                    "no gradient after that, or the transfer function works in place on a block's input: put both in "
                    "one block, or take variant='S' or 'M'."
                )
            gradient, self.after = self.after, None
        if self.input is None or self.gradient is None:
            self.input, self.gradient = x, gradient
            return
        if self.input.data_ptr() != x.data_ptr() and not torch.equal(self.input, x):
            raise ChainError(
                f"layer {name!r} was called more than once in this forward, which it was not when the method was "
                f"prepared: leave it to the ordinary gradient, transfers={{{name!r}: None}}."
            )
        self.gradient = self.gradient + gradient

    def come_through(self, gradient: Tensor) -> None:
        """A backward pass has reached the post-activation."""
        self.after = gradient.detach()


class _Tap(torch.autograd.Function):
    """A zero of ``like``'s shape that depends on a weight, and on nothing else, and hands its gradient to a capture."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, like: Tensor, capture: Capture) -> Tensor:
        ctx.save_for_backward(x)
        ctx.capture = capture
        return like.new_zeros(()).expand(like.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.capture.add(x, gradient.detach())
        return None, None, None, None


def _zero(weight: Tensor, x: Tensor, like: Tensor, capture: Capture) -> Tensor:
    zero: Tensor = _Tap.apply(weight, x.detach(), like.detach(), capture)  # type: ignore[no-untyped-call]
    return zero


@contextmanager
def captured(layers: Iterable[Layer]) -> Iterator[dict[Layer, Capture]]:
    """Catch the layers' inputs and gradients while a method computes its gradient; theirs is left out of ``p.grad``.

    For a layer with a ``follower`` the gradient is the one in that module's output, else in the layer's own.
    """
    captures = {layer: Capture(layer) for layer in layers}
    outputs: dict[int, Capture] = {}  # by address: a state that is cut off from its graph has the same

    def call(layer: Layer, *args: Any, **kwargs: Any) -> Tensor:
        module, x = layer.module, args[0] if args else kwargs["input"]
        out = evaluate(module, x, module.weight.detach(), None if module.bias is None else module.bias.detach())
        outputs[out.data_ptr()] = captures[layer]
        return out.add_(_zero(module.weight, x, out, captures[layer]))

    def follow(original: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture = outputs.pop(x.data_ptr(), None)
        result = original(x, *args, **kwargs)
        if capture is not None and capture.layer.follower is not None and result.requires_grad:
            result.register_hook(capture.come_through)
        return result

    followers = {layer.follower for layer in captures if layer.follower is not None}
    forwards: dict[nn.Module, Forward] = {layer.module: _bound(call, layer) for layer in captures}
    with replaced(forwards | {module: _bound(follow, module.forward) for module in followers}):
        yield captures


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give modules another ``forward`` for a while; hooks fire as ever."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def _bound(function: Callable[..., Any], first: Any) -> Forward:
    return lambda *args, **kwargs: function(first, *args, **kwargs)
