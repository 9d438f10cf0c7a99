"""A layer with a local loss: a linear layer or a convolution, with the transfer function that follows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.algorithms.transfer import Transfer

Weighted = nn.Linear | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with a local loss.

    Attributes:
        name: in the model.
        module: the layer.
        transfer: f.
        follower: the module that computes f, where the gradient after f is wanted.
    """

    name: str
    module: Weighted
    transfer: Transfer
    follower: nn.Module | None = None

    @property
    def features(self) -> int:
        """The dimension of the output that the weights' rows make."""
        return feature_dim(self.module)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias if there is one, frozen or not."""
        return list(self.module.parameters(recurse=False))


def evaluate(module: Weighted, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output with other weights."""
    if isinstance(module, nn.Conv2d):
        convolved: Tensor = module._conv_forward(x, weight, bias)
        return convolved
    return F.linear(x, weight, bias)


def refusal(module: nn.Module, shared: set[int]) -> str | None:
    """Why a module cannot have a local loss, as far as can be told without a forward; ``None`` if it can.

    Args:
        module: with parameters of its own.
        shared: ids of the parameters that several modules have.
    """
    plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and isinstance(module, Weighted)
    if not plain or module._parameters.keys() > {"weight", "bias"}:
        return f"{type(module).__name__} is no Linear or Conv2d"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from something else"
    if not weight.requires_grad:
        return "its weight is frozen"
    if any(id(p) in shared for p in module._parameters.values()):
        return "its weights are another module's too"
    return "its forward is replaced" if "forward" in vars(module) else None


def feature_dim(module: nn.Module) -> int:
    """The dimension of a layer's output that its weights' rows make."""
    return -3 if isinstance(module, nn.Conv2d) else -1
