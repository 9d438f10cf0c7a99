"""Auxiliary heads: what turns a module's output into scores for its local loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.algorithms.etf import SimplexETF

CHANNELS_SECOND = ("out_channels", "num_features", "num_channels")  # convolutions, BatchNorm, GroupNorm
CHANNELS_LAST = ("out_features", "normalized_shape")  # linear layers, LayerNorm, RMSNorm
POOLED = 4  # positions a side that the light head for images looks at


@dataclass(frozen=True)
class Place:
    """Where a head stands.

    Attributes:
        module: which module it follows, from 0.
        modules: how many there are; the last one has the model's own head.
        state: a tensor of the shape, type and device of the module's output (its values are zeros).
        output: likewise for the model's own output, whose shape a head's output should have.
        batch: a batch.
    """

    module: int
    modules: int
    state: Tensor
    output: Tensor
    batch: Any

    @property
    def channels(self) -> int:
        """Features of a position."""
        return self.state.shape[1 if self.state.ndim > 3 else -1]

    @property
    def classes(self) -> int:
        """Scores of the model."""
        return self.output.shape[-1]

    @property
    def everywhere(self) -> bool:
        """Whether the model has an output for each position of a sequence."""
        return self.output.ndim == 3

    def image(self, name: str) -> int:
        """The side of a state that is an image.

        Raises:
            ValueError: it is none.
        """
        if self.state.ndim != 4 or self.output.ndim != 2:
            raise ValueError(
                f"heads={name!r}: it classifies images of shape (B, C, H, W), and x({self.module + 1}) has shape "
                f"{tuple(self.state.shape)}; give heads='light', 'own', or a function."
            )
        return max(self.state.shape[2:])


Factory = Callable[[Place], nn.Module]


def refuse_other_axes(place: Place, block: nn.Module, name: str) -> None:
    """See that a state is ``(B, C)``, ``(B, N, D)`` or ``(B, C, H, W)``, by the layers of the block it comes from.

    Other orders have as many axes, so that a head would take positions, or samples, for features. Blocks that tell
    nothing are let pass.

    Args:
        place: where the head is to stand.
        block: the last block before it.
        name: the setting of the heads.

    Raises:
        ValueError: the block's layers have their features on another axis, or samples may be on another one.
    """
    state, layers = place.state, list(block.modules())
    what = f"heads={name!r}: x({place.module + 1}) of module {place.module}, of shape {tuple(state.shape)}, "
    remedy = "; give heads='own', or a function from a Place to a module."
    if state.shape[0] != place.output.shape[0]:
        raise ValueError(f"{what}does not have the {place.output.shape[0]} samples of the output first{remedy}")
    if state.ndim == 3 and state.shape[0] == state.shape[1] and any(_positions_first(m) for m in layers):
        raise ValueError(f"{what}may have positions first{remedy[:-1]}, or a batch of another size.")
    if state.ndim < 3 or (name == "etf" and state.ndim > 3):  # a flattened image has its features in any order
        return
    second = any(_width(m, CHANNELS_SECOND) == state.shape[1] for m in layers)
    last = any(_width(m, CHANNELS_LAST) == state.shape[-1] for m in layers)
    if (last and not second) if state.ndim > 3 else (second and not last):
        axis = "last" if state.ndim > 3 else "second"
        raise ValueError(f"{what}has its features on the {axis} axis, by the block's layers{remedy}")


def _positions_first(layer: nn.Module) -> bool:
    return getattr(layer, "batch_first", True) is False


def _width(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """Features of a layer's output, under the first of these names that it has."""
    found = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    return found[-1] if isinstance(found, tuple) else found


class _Mean(nn.Module):
    """``(B, N, D) -> (B, D)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _Norm1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return _by_running(self, x) if _alone(x) else super().forward(x)


class _Norm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _by_running(self, x) if _alone(x) else super().forward(x)


def _alone(x: Tensor) -> bool:
    """Whether a channel has one value, which has no variance (the last batch of an epoch may be of one sample)."""
    return x.numel() == x.shape[1]


def _by_running(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def light(place: Place) -> nn.Module:
    """Little work: linear for vectors, norm and linear for sequences, pooling, 1x1 convolution and linear for images.

    A sequence is averaged over its positions, padding included, unless each of them has an output.

    Raises:
        ValueError: states and outputs of other shapes.
    """
    state, output, width = place.state, place.output, place.channels
    if state.ndim == 2 and output.ndim == 2:
        return nn.Linear(width, place.classes)
    if state.ndim == 3 and output.ndim in (2, 3):
        middle = [] if place.everywhere else [_Mean()]
        return nn.Sequential(nn.LayerNorm(width), *middle, nn.Linear(width, place.classes))
    if state.ndim == 4 and output.ndim == 2:
        side = min(POOLED, *state.shape[2:])
        narrow = [nn.AdaptiveAvgPool2d(side), nn.Conv2d(width, width, 1, bias=False), _Norm2d(width), nn.ReLU()]
        return nn.Sequential(*narrow, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, place.classes))
    raise ValueError(
        f"heads='light': none for a state of shape {tuple(state.shape)} and an output of shape {tuple(output.shape)}; "
        "give heads='own', or a function from a Place to a module."
    )


def convolutional(place: Place) -> nn.Module:
    """A 3x3 convolution, means over the quarters of the image, a linear layer.

    That of "Greedy Layerwise Learning Can Scale to ImageNet" with k = 2. Vectors and sequences get :func:`light`'s.
    """
    if place.state.ndim < 4:
        return light(place)
    place.image("conv")
    width = place.channels
    layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), _Norm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, place.classes))


def mlp_sr(place: Place) -> nn.Module:
    """Spatial reduction: pooling to a quarter of the side, three 1x1 convolutions, a perceptron of three layers.

    That of "Decoupled Greedy Learning of CNNs". It may hold many times the parameters of the blocks that it trains.
    """
    side, width = math.ceil(place.image("dgl") / 4), place.channels
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(side)]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 1, bias=False), _Norm2d(width), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(4 * width, 4 * width, bias=False), _Norm1d(4 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4 * width, place.classes))


def fixed(place: Place) -> nn.Module:
    """A simplex equiangular tight frame, of single precision at least."""
    features = place.state[0].numel() if place.state.ndim == 4 else place.channels
    half = place.state.dtype in (torch.float16, torch.bfloat16)
    return SimplexETF(features, place.classes, place.everywhere, torch.float32 if half else place.state.dtype)
