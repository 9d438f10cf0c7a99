"""Models of every kind with a batch each, randomly initialised: what the memory benchmarks measure.

Every builder returns ``(model, batch)`` and draws from torch's generator. The defaults are tiny (seconds for
thousands of steps); depth, width and batch are arguments where a benchmark wants more.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import nn

from horizonplan.models import Patches, ResidualCNN, ResidualMLP, SequenceClassifier

Built = tuple[nn.Module, Any]


def tokens(rows: int = 4, length: int = 32, vocabulary: int = 100) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length))


def classes(rows: int = 4, count: int = 3) -> torch.Tensor:
    return torch.randint(0, count, (rows,))


def images(rows: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(rows, 3, size, size)


def _causal(model: Any, config: Any, ids: torch.Tensor) -> Built:
    return model(config), {"input_ids": ids, "labels": ids}


def _sizes(depth: int, width: int) -> dict[str, int]:
    sizes = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 2 * width}
    return sizes | {"num_attention_heads": 4}


def _decoder(name: str, depth: int, width: int, vocabulary: int, rows: int, length: int, **more: Any) -> Built:
    config = getattr(tf, f"{name}Config")(**_sizes(depth, width), num_key_value_heads=2, vocab_size=vocabulary, **more)
    return _causal(getattr(tf, f"{name}ForCausalLM"), config, tokens(rows, length, vocabulary))


def gpt2(depth: int = 4, width: int = 32, vocabulary: int = 100, rows: int = 4, length: int = 32) -> Built:
    sizes = {"n_layer": depth, "n_embd": width, "n_head": 4, "vocab_size": vocabulary}
    config = tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return _causal(tf.GPT2LMHeadModel, config, tokens(rows, length, vocabulary))


def llama(depth: int = 4, width: int = 32, vocabulary: int = 100, rows: int = 4, length: int = 32) -> Built:
    return _decoder("Llama", depth, width, vocabulary, rows, length)


def gemma2(depth: int = 4, width: int = 32, vocabulary: int = 100, rows: int = 4, length: int = 32) -> Built:
    return _decoder("Gemma2", depth, width, vocabulary, rows, length, head_dim=width // 4, sliding_window=4)


def bert(depth: int = 4, width: int = 32, rows: int = 4, length: int = 32) -> Built:
    config = tf.BertConfig(**_sizes(depth, width), vocab_size=100, num_labels=3)
    return tf.BertForSequenceClassification(config), {"input_ids": tokens(rows, length), "labels": classes(rows)}


def lora(depth: int = 4, width: int = 32, rows: int = 4, length: int = 32, rank: int = 4) -> Built:
    """BERT with low-rank adapters on queries and values; only they and the classifier train."""
    import peft

    model, batch = bert(depth, width, rows, length)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=rank, lora_dropout=0.1, target_modules=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an outdated way
        return peft.get_peft_model(model, config), batch


def distilbert(depth: int = 4, width: int = 32, rows: int = 4, length: int = 32) -> Built:
    sizes = {"n_layers": depth, "dim": width, "hidden_dim": 2 * width, "n_heads": 4}
    config = tf.DistilBertConfig(**sizes, vocab_size=100, num_labels=3)
    return tf.DistilBertForSequenceClassification(config), {"input_ids": tokens(rows, length), "labels": classes(rows)}


def vit(depth: int = 4, width: int = 32, rows: int = 4, patch: int = 16) -> Built:
    config = tf.ViTConfig(
        **_sizes(depth, width), image_size=64, patch_size=patch, num_labels=3, hidden_dropout_prob=0.1
    )
    return tf.ViTForImageClassification(config), {"pixel_values": images(rows), "labels": classes(rows)}


def resnet(widths: Sequence[int] = (8, 16), depths: Sequence[int] = (3, 3), rows: int = 4) -> Built:
    sizes = {"embedding_size": widths[0], "hidden_sizes": list(widths), "depths": list(depths)}
    config = tf.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    return tf.ResNetForImageClassification(config), {"pixel_values": images(rows), "labels": classes(rows)}


def convnext() -> Built:
    config = tf.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[2, 2, 3, 2], num_labels=3, drop_path_rate=0.1)
    return tf.ConvNextForImageClassification(config), {"pixel_values": images(), "labels": classes()}


def residual_mlp(depth: int = 8, width: int = 32, rows: int = 64) -> Built:
    return ResidualMLP(20, width, 3, depth), (torch.randn(rows, 20), classes(rows))


def residual_cnn(widths: Sequence[int] = (4, 8, 16), blocks_per_stage: int = 2, rows: int = 4) -> Built:
    return ResidualCNN(3, tuple(widths), blocks_per_stage), (images(rows), classes(rows))


def transformer(depth: int = 6, width: int = 32, rows: int = 4) -> Built:
    model = nn.Sequential(Patches(8), SequenceClassifier(192, length=64, classes=3, width=width, depth=depth))
    return model, (images(rows), classes(rows))


def sequential_cnn(widths: Sequence[int] = (8, 8, 16, 16), rows: int = 4) -> Built:
    layers: list[nn.Module] = []
    for wide, wider in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(wide, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)
    return nn.Sequential(*layers, *head), (images(rows), classes(rows))


class Widening(nn.Module):
    """A layer whose output is wider than its input: ``norm(gelu(W x + b))``."""

    def __init__(self, wide: int, wider: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(wide, wider), nn.LayerNorm(wider)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.gelu(self.linear(x)))


def growing_mlp(widths: Sequence[int] = (16, 24, 32, 48, 64, 96), rows: int = 64) -> Built:
    """An MLP in which every block is wider than the one before it."""
    blocks = [Widening(wide, wider) for wide, wider in zip((20, *widths), widths, strict=False)]
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(widths[-1], 3))
    return model, (torch.randn(rows, 20), classes(rows))


class MixerBlock(nn.Module):
    """Mixes positions, then channels, each with a residual MLP (MLP-Mixer, Tolstikhin et al. 2021, Eq. 1)."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = nn.Sequential(nn.Linear(positions, 2 * width), nn.GELU(), nn.Linear(2 * width, positions))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Mixer(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.ModuleList(MixerBlock(64, width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def mixer(depth: int = 6, width: int = 16, rows: int = 4) -> Built:
    return Mixer(depth, width), (images(rows), classes(rows))
