"""InfoPro's local loss: classify, and keep what is needed to tell the image.

"Revisiting Locally Supervised Learning: an Alternative to End-to-end Training": the local loss is a weighted sum of a
classification loss (cross-entropy, or a contrast of classes) and of a decoder's reconstruction loss. The weights run
from one value at the first module to another at the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.algorithms.heads import Place
from horizonplan.batch import model_inputs, target_of

Measure = Callable[[Tensor, Any], Tensor]
DECODER, TEMPERATURE = 12, 0.07


@dataclass(frozen=True)
class InformationPropagation:
    """A factory of heads, for ``SGR(heads=...)``; images only.

    Args:
        reconstruct: weights of the reconstruction loss, for the first and for the last module.
        classify: likewise of the classification loss. The last module has the model's own loss alone, so its weights
            are only what the others' are interpolated to.
        contrast: contrast the classes instead of scoring them.
        width: channels of the classifier's convolution and features of its layers.
    """

    reconstruct: tuple[float, float] = (5.0, 0.0)
    classify: tuple[float, float] = (0.5, 1.0)
    contrast: bool = False
    width: int = 128

    def __call__(self, place: Place) -> nn.Module:
        """The head of one module."""
        place.image("infopro")
        images = model_inputs(place.batch)
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError("heads: InfoPro's decoder needs batches (images, labels), images of shape (B, C, H, W).")
        part = place.module / max(place.modules - 1, 1)
        weights = [a + part * (b - a) for a, b in (self.reconstruct, self.classify)]
        outputs = self.width if self.contrast else place.classes
        return _Head(place.channels, self.width, outputs, images.shape[1], weights[0], weights[1], self.contrast)


class _Head(nn.Module):
    def __init__(
        self, channels: int, width: int, outputs: int, colours: int, reconstruct: float, classify: float, contrast: bool
    ) -> None:
        super().__init__()
        self.reconstruct, self.classify, self.contrast = reconstruct, classify, contrast
        convolution = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.score = nn.Sequential(*convolution, *pooled, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
        first = [nn.Conv2d(channels, DECODER, 3, padding=1), nn.BatchNorm2d(DECODER), nn.ReLU()]
        self.decode = nn.Sequential(*first, nn.Conv2d(DECODER, colours, 3, padding=1))

    def forward(self, state: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, outputs)``."""
        scores: Tensor = self.score(state)
        return scores

    def local_loss(self, state: Tensor, batch: Any, measure: Measure) -> Tensor:
        """The weighted sum of both losses."""
        scores = self(state)
        supervised = contrast(scores, target_of(batch)) if self.contrast else measure(scores, batch)
        if not self.reconstruct:
            return self.classify * supervised
        image = in_unit_range(model_inputs(batch))
        drawn = self.decode(F.interpolate(state, image.shape[2:], mode="bilinear", align_corners=True))
        return self.classify * supervised + self.reconstruct * F.binary_cross_entropy_with_logits(drawn, image)


def in_unit_range(images: Tensor) -> Tensor:
    """Images with values from 0 to 1, whatever they were normalised by: shifted and scaled by the batch's range."""
    low, high = images.amin(), images.amax()
    return (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)


def contrast(outputs: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss: samples of one class are to lie closer than those of others.

    Args:
        outputs: ``(B, D)``.
        target: ``(B,)`` classes.
        temperature: what the cosines are divided by.

    Returns:
        The mean over the samples that have another of their class in the batch; 0 if there is none.
    """
    unit = F.normalize(outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs, dim=1)
    alone = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosines = (unit @ unit.T / temperature).masked_fill(alone, float("-inf"))
    alike = (target[:, None] == target[None, :]) & ~alone
    told = cosines.log_softmax(1).masked_fill(~alike, 0.0).sum(1)
    count = alike.sum(1)
    return -(told / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)
