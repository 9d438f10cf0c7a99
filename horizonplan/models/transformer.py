"""Small pre-norm Transformers: a classifier of sequences (or of images, as patches) and a character GPT.

    x <- x + attention(norm(x)),    x <- x + mlp(norm(x))

is one block (*On Layer Normalization in the Transformer Architecture*, Figure 1b; *Attention Is All
You Need*). The embedding with its learned positions is the stem; the last norm and layer are the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each beside a shortcut.

    Args:
        width: features of a position, a multiple of ``heads``.
        heads: attention heads.
        causal: whether a position sees itself and earlier ones only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}; choose one that does.")
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, width) -> (B, N, width)``."""
        x = x + self._attention(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        return x + y

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, features)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class _Positions(nn.Module):
    """Add a learned vector to each position: ``(B, N, width) -> (B, N, width)``, N at most ``length``."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        length = len(self.weight)
        if x.shape[1] > length:
            raise ValueError(f"a sequence of {x.shape[1]} positions is longer than the model's {length}.")
        return x + self.weight[: x.shape[1]]


class Patches(nn.Module):
    """Cut images into square patches, without parameters.

    Args:
        size: side of a patch in pixels; pixels beyond the last whole patch are left out.

    >>> Patches(7)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 16, 49])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, patches, C * size**2)``, patches row by row."""
        return F.unfold(x, self.size, stride=self.size).transpose(1, 2)


class SequenceClassifier(nn.Module):
    """Classify sequences of vectors; ``nn.Sequential(Patches(7), SequenceClassifier(...))`` classifies images.

    Args:
        in_features: features of each vector.
        length: vectors in the longest sequence.
        classes: scores per sequence.
        width: features of a position inside.
        depth: T, blocks.
        heads: attention heads; must divide ``width``.

    >>> SequenceClassifier(49, length=16, classes=10, width=32, depth=4)(torch.zeros(2, 16, 49)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, in_features: int, length: int, classes: int, width: int = 64, depth: int = 8, heads: int = 4
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(in_features, width), _Positions(length, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, in_features) -> (B, classes)``, from the mean over positions."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(dim=1))
        return scores


class CharacterGPT(nn.Module):
    """Predict each next token from the ones before it.

    Args:
        vocab: kinds of token.
        width: features of a position.
        depth: T, blocks.
        heads: attention heads; must divide ``width``.
        context: the most tokens it can see.

    >>> CharacterGPT(65, width=32, depth=4, heads=4, context=16)(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 65])
    """

    def __init__(self, vocab: int, width: int = 128, depth: int = 8, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Embedding(vocab, width), _Positions(context, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N)`` int64, N at most ``context`` ``-> (B, N, vocab)`` scores of the token that follows each."""
        x = self.stem(tokens)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores
