"""A convolutional network without shortcuts, for small images: the PlainNet and VGG of the local-learning papers.

Stem (3x3 convolution), stages of equally many blocks, head (mean over positions, one linear layer). A block is a 3x3
convolution with an activation, so that a chain of them has no back-propagation inside a block. The deeper such a
network, the harder for back-propagation ("Deep Residual Learning for Image Recognition", Figure 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PlainCNN(nn.Module):
    """Stem, ``len(channels) * blocks_per_stage`` blocks ``relu(norm(conv(x)))``, head.

    The first block of every stage but the first halves height and width.

    Args:
        in_channels: of an image.
        channels: of each stage.
        blocks_per_stage: blocks in each stage.
        classes: scores per image.
        norm: whether blocks have a batch normalisation.
        head: from the last state, ``(B, C, H, W)``, to the scores; ``None``: mean and linear layer.

    >>> import torch
    >>> PlainCNN(1, (4, 8), 3)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64),
        blocks_per_stage: int = 3,
        classes: int = 10,
        norm: bool = True,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = _block(in_channels, channels[0], 1, norm)
        self.blocks = nn.ModuleList()
        width = channels[0]
        for stage, wanted in enumerate(channels):
            for place in range(blocks_per_stage):
                self.blocks.append(_block(width, wanted, 2 if stage > 0 and place == 0 else 1, norm))
                width = wanted
        mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
        self.head = mean if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, classes)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


def _block(in_channels: int, channels: int, stride: int, norm: bool) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=not norm)
    return nn.Sequential(convolution, *([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU())
