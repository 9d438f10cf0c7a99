"""A residual network for small images, after *Deep Residual Learning for Image Recognition*, Section 4.2.

Stem (3x3 convolution), stages of equally many blocks, head (mean over positions, one linear layer).
The first block of every stage but the first halves height and width and widens the channels, so that
states of different stages have different shapes, and the network is blocks all the way.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut without parameters.

    ``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``. Where the shape changes, the shortcut takes
    every ``stride``-th position and pads channels with zeros (the paper's option A).

    Args:
        in_channels: channels of x.
        channels: channels of the output, at least ``in_channels``.
        stride: of the first convolution; height and width shrink by it, rounded up.
        gain: initial weight of the last normalisation, the size of the residual beside the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        if channels < in_channels:
            raise ValueError(f"channels={channels}: a block cannot have fewer channels than its input ({in_channels}).")
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.constant_(self.norm2.weight, gain)
        self.stride = stride
        self.padding = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))``."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.padding))
        return F.relu(x + y)


class ResidualCNN(nn.Module):
    """Stem, ``len(channels) * blocks_per_stage`` residual blocks, head.

    ``ResidualCNN(3, (16, 32, 64), 10)`` is the ResNet-62 of *Unifying Back-Propagation and
    Forward-Forward Algorithms through Model Predictive Control* (its M3).

    Args:
        in_channels: of an image.
        channels: of each stage, never decreasing.
        blocks_per_stage: residual blocks in each stage.
        classes: scores per image.
        gain: initial weight of every block's last normalisation. Below 1 the network starts nearer to
            the identity (*Accurate, Large Minibatch SGD*, Section 5.1, starts at 0), where gradients
            of short horizons are better aligned with back-propagation's.

    >>> import torch
    >>> model = ResidualCNN(in_channels=1, channels=(4, 8, 16), blocks_per_stage=3)
    >>> len(model.blocks), model(torch.zeros(2, 1, 28, 28)).shape
    (9, torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64),
        blocks_per_stage: int = 3,
        classes: int = 10,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        width = channels[0]
        for stage, wanted in enumerate(channels):
            for place in range(blocks_per_stage):
                stride = 2 if stage > 0 and place == 0 else 1
                self.blocks.append(ResidualBlock(width, wanted, stride, gain))
                width = wanted
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, classes)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores
