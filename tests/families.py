"""Small models of every family with a batch each, randomly initialised and in training mode."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Case:
    """A model, a batch, and what is known about them.

    ``tolerance``: how far, relative to the norm, gradients at h = T may be from ``loss.backward()``
    (0: bit for bit); ``first`` names the first block; ``kwargs`` go to ``Chain.from_model``.
    """

    model: nn.Module
    batch: Any
    depth: int
    first: str
    tolerance: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def double(self):
        self.model.double()
        self.batch = doubled(self.batch)
        return self


def doubled(batch):
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: doubled(value) for name, value in batch.items()}
    return tuple(doubled(value) for value in batch)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def ids(rows=2, length=12, vocabulary=50):
    return torch.randint(0, vocabulary, (rows, length))


def classes(rows=2, count=3):
    return torch.randint(0, count, (rows,))


def gpt2(**config):
    import transformers as tf

    config = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32, **config}
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    # its key/value cache, which a step switches off, sums in another order
    tolerance = 1e-6 if config.get("use_cache", True) else 0.0
    return Case(tf.GPT2LMHeadModel(tf.GPT2Config(**config)).train(), batch, 4, "transformer.h.0", tolerance)


def _decoder(kind, **config):
    import transformers as tf

    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = {**sizes, "num_key_value_heads": 1, "vocab_size": 50, "attention_dropout": 0.1, **config}
    batch = {"input_ids": ids()}
    batch["labels"] = batch["input_ids"]
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**config)).train()
    return Case(model, batch, 4, "model.layers.0")


def llama(**config):
    return _decoder("Llama", **config)


def gemma2(**config):
    return _decoder("Gemma2", **{"head_dim": 8, "sliding_window": 4, **config})


def bert(**config):
    import transformers as tf

    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = tf.BertForSequenceClassification(tf.BertConfig(**{**sizes, "vocab_size": 50, "num_labels": 3, **config}))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask, "labels": classes()}
    return Case(model.train(), batch, 4, "bert.encoder.layer.0")


def distilbert():
    import transformers as tf

    config = tf.DistilBertConfig(n_layers=4, dim=16, hidden_dim=24, n_heads=2, vocab_size=50, num_labels=3)
    model = tf.DistilBertForSequenceClassification(config).train()
    return Case(model, {"input_ids": ids(), "labels": classes()}, 4, "distilbert.transformer.layer.0")


def vit():
    import transformers as tf

    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = tf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": classes()}
    return Case(tf.ViTForImageClassification(config).train(), batch, 4, "vit.layers.0")


def resnet():
    import transformers as tf

    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 3], layer_type="basic", num_labels=3)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": classes(4)}
    model = tf.ResNetForImageClassification(config).train()
    return Case(model, batch, 5, "resnet.encoder.stages.0.layers.0")


def convnext():
    import transformers as tf

    config = tf.ConvNextConfig(hidden_sizes=[4, 8, 8, 12], depths=[2, 1, 2, 1], num_labels=3, drop_path_rate=0.2)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": classes()}
    # a gradient's layout, as AccumulateGrad finds it, decides in which order it is summed
    model = tf.ConvNextForImageClassification(config).train()
    return Case(model, batch, 6, "convnext.encoder.stages.0.layers.0", tolerance=1e-6)


def lora():
    import peft

    case = bert()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an outdated way
        model = peft.get_peft_model(case.model, config).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # zero as published: the gradients of lora_A would all be zero
    return Case(model, case.batch, 4, "base_model.model.bert.encoder.layer.0")


def mlp():
    layers = [nn.Linear(6, 8), nn.ReLU(inplace=True)]
    for _ in range(3):
        layers += [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)]
    return Case(nn.Sequential(*layers, nn.Linear(8, 3)), (torch.randn(4, 6), classes(4)), 7, "0")


def cnn():
    def stage(wide, wider, *more):
        return nn.Conv2d(wide, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(inplace=True), *more

    body = [*stage(3, 4), *stage(4, 4, nn.MaxPool2d(2)), *stage(4, 6), *stage(6, 6, nn.AdaptiveAvgPool2d(1))]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(6, 3))
    return Case(model, (torch.randn(4, 3, 8, 8), classes(4)), 8, "0")


class Residual(nn.Module):
    def __init__(self, width, p=0.0, norm=False):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


class ResidualMLP(nn.Module):
    def __init__(self, depth=5, width=6, p=0.2, norm=True):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Residual(width, p, norm) for _ in range(depth))
        self.head = nn.Sequential(nn.Dropout(p), nn.Linear(width, 3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def residual_mlp():
    return Case(ResidualMLP(), (torch.randn(6, 4), classes(6)), 5, "blocks.0")


class Between(nn.Module):
    """Trainable, functional and random operations between the blocks."""

    def __init__(self, width=8, p=0.1):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 12, p) for _ in range(4))
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.5) for _ in range(4))
        self.head = nn.Linear(width, 3)
        self.p = p

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = F.dropout(layer(x.transpose(0, 1)).transpose(0, 1) * 0.9, self.p, self.training) * gain
        return self.head(x.mean(1))


def between(p=0.1):
    return Case(Between(p=p), (ids(), classes()), 4, "layers.0")


class InPlace(nn.Module):
    """Overwrites its states, between blocks and inside them."""

    def __init__(self, width=8, p=0.2, shared=True):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.positions = nn.ParameterList(nn.Parameter(torch.randn(width)) for _ in range(1 if shared else 5))
        layers = (
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(p))
            for _ in range(4)
        )
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x += self.positions[0]
        for t, layer in enumerate(self.layers, start=1):
            x = layer(x)
            x *= 1.1
            x += self.positions[t % len(self.positions)]
        x += 1
        return self.head(x.relu_())


def in_place(shared=True):
    return Case(InPlace(shared=shared), (torch.randn(6, 4), classes(6)), 4, "layers.0")


def tied():
    model = ResidualMLP(p=0.1)
    for block in model.blocks[2:]:
        block.linear.weight = model.blocks[0].linear.weight
    return Case(model, (torch.randn(6, 4), classes(6)), 5, "blocks.0")


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, width))

    def forward(self, x):
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Mixer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock(4, width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def mixer():
    return Case(Mixer(), (torch.randn(2, 3, 8, 8), classes()), 3, "blocks.0")


class BasicBlock(nn.Module):
    def __init__(self, wide, wider, stride):
        super().__init__()
        self.first, self.second = nn.Conv2d(wide, wider, 3, stride, 1, bias=False), nn.Conv2d(wider, wider, 3, 1, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(wider), nn.BatchNorm2d(wider)
        self.relu = nn.ReLU(inplace=True)
        shrinks = stride > 1 or wide != wider
        self.skip = nn.Conv2d(wide, wider, 1, stride) if shrinks else None

    def forward(self, x):
        out = self.norm2(self.second(self.relu(self.norm(self.first(x)))))
        out += x if self.skip is None else self.skip(x)
        return self.relu(out)


class Stages(nn.Module):
    """A residual network as torchvision writes it: stages of blocks, each an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.stage2 = nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6, 1))
        self.stage3 = nn.Sequential(BasicBlock(6, 8, 2), BasicBlock(8, 8, 1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stage3(self.stage2(self.stage1(self.relu(self.norm(self.conv(x))))))
        return self.head(torch.flatten(self.pool(x), 1))


def stages():
    return Case(Stages(), (torch.randn(4, 3, 8, 8), classes(4)), 6, "stage1.0")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def encoder():
    return Case(Encoder(), (ids(), classes()), 3, "encoder.layers.0")


HUGGING_FACE = [gpt2, llama, gemma2, bert, distilbert, vit, resnet, convnext, lora]
PLAIN = [mlp, cnn, residual_mlp, between, in_place, tied, mixer, stages, encoder]
ALL = HUGGING_FACE + PLAIN
