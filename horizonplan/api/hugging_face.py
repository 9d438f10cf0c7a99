"""Hugging Face's models that a job may ask for: a configuration's name, and numbers for it, bounded one by one.

They are made by ``AutoModel*.from_config`` with random weights, so nothing is fetched. No string reaches the library.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from horizonplan.api.schemas import WHOLE, Finite, Strict

Depth = Annotated[int, Field(ge=2, le=256), WHOLE]
Width = Annotated[int, Field(ge=1, le=16_384), WHOLE]
Features = Annotated[int, Field(ge=1, le=65_536), WHOLE]
Heads = Annotated[int, Field(ge=1, le=256), WHOLE]
Length = Annotated[int, Field(ge=1, le=8192), WHOLE]
Classes = Annotated[int, Field(ge=2, le=65_536), WHOLE]
Vocabulary = Annotated[int, Field(ge=2, le=262_144), WHOLE]
Dropout = Annotated[Finite, Field(ge=0, lt=1)]


class Gpt2Numbers(Strict):
    """Of `GPT2Config`."""

    vocab_size: Vocabulary = 50_257
    n_positions: Length = 1024
    n_embd: Width = 768
    n_layer: Depth = 12
    n_head: Heads = 12
    resid_pdrop: Dropout = 0.1
    embd_pdrop: Dropout = 0.1
    attn_pdrop: Dropout = 0.1
    tie_word_embeddings: bool = True


class LlamaNumbers(Strict):
    """Of `LlamaConfig` and `Qwen2Config`."""

    vocab_size: Vocabulary = 32_000
    hidden_size: Width = 2048
    intermediate_size: Features = 5632
    num_hidden_layers: Depth = 22
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads = 4
    max_position_embeddings: Length = 2048
    attention_dropout: Dropout = 0.0
    tie_word_embeddings: bool = False


class BertNumbers(Strict):
    """Of `BertConfig`."""

    vocab_size: Vocabulary = 30_522
    hidden_size: Width = 768
    intermediate_size: Features = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    max_position_embeddings: Length = 512
    hidden_dropout_prob: Dropout = 0.1
    attention_probs_dropout_prob: Dropout = 0.1
    num_labels: Classes = 2


class VitNumbers(Strict):
    """Of `ViTConfig`."""

    hidden_size: Width = 768
    intermediate_size: Features = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    image_size: Annotated[int, Field(ge=1, le=1024), WHOLE] = 224
    patch_size: Annotated[int, Field(ge=1, le=1024), WHOLE] = 16
    num_channels: Annotated[int, Field(ge=1, le=64), WHOLE] = 3
    hidden_dropout_prob: Dropout = 0.0
    attention_probs_dropout_prob: Dropout = 0.0
    num_labels: Classes = 1000


class Gpt2(Strict):
    """A GPT-2 that predicts each next token."""

    kind: Literal["GPT2Config"]
    numbers: Gpt2Numbers = Field(default=Gpt2Numbers())
    length: Length = Field(128, description="Tokens of a sample.")

    def model(self) -> nn.Module:
        """The network."""
        return _made("AutoModelForCausalLM", self.kind, self.numbers, bos_token_id=0, eos_token_id=0)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random tokens, which are their own labels."""
        return _tokens(self.numbers.vocab_size, (size, self.length), generator)

    def sample_numbers(self) -> int:
        """Numbers of one sample: of a state, or of its scores."""
        return self.length * max(self.numbers.n_embd, self.numbers.vocab_size)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        if self.length > self.numbers.n_positions:
            return "length", f"{self.length} tokens are more than numbers.n_positions={self.numbers.n_positions}"
        return _heads("n_head", self.numbers.n_head, "n_embd", self.numbers.n_embd)


class Llama(Strict):
    """A Llama or Qwen2 that predicts each next token."""

    kind: Literal["LlamaConfig", "Qwen2Config"]
    numbers: LlamaNumbers = Field(default=LlamaNumbers())
    length: Length = Field(128, description="Tokens of a sample.")

    def model(self) -> nn.Module:
        """The network."""
        return _made("AutoModelForCausalLM", self.kind, self.numbers, bos_token_id=0, eos_token_id=0)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random tokens, which are their own labels."""
        return _tokens(self.numbers.vocab_size, (size, self.length), generator)

    def sample_numbers(self) -> int:
        """Numbers of one sample: of a state, or of its scores."""
        return self.length * max(self.numbers.intermediate_size, self.numbers.vocab_size)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        numbers = self.numbers
        if self.length > numbers.max_position_embeddings:
            most = numbers.max_position_embeddings
            return "length", f"{self.length} tokens are more than numbers.max_position_embeddings={most}"
        if numbers.num_attention_heads % numbers.num_key_value_heads:
            message = f"{numbers.num_key_value_heads} does not divide num_attention_heads={numbers.num_attention_heads}"
            return "numbers.num_key_value_heads", message
        if numbers.hidden_size % (2 * numbers.num_attention_heads):  # positions are pairs of features of a head
            message = f"twice {numbers.num_attention_heads} does not divide hidden_size={numbers.hidden_size}"
            return "numbers.num_attention_heads", message
        return None


class Bert(Strict):
    """A BERT that puts token sequences into classes."""

    kind: Literal["BertConfig"]
    numbers: BertNumbers = Field(default=BertNumbers())
    length: Length = Field(128, description="Tokens of a sample.")

    def model(self) -> nn.Module:
        """The network."""
        return _made("AutoModelForSequenceClassification", self.kind, self.numbers)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random tokens and classes."""
        ids = _tokens(self.numbers.vocab_size, (size, self.length), generator)["input_ids"]
        return {"input_ids": ids, "labels": torch.randint(0, self.numbers.num_labels, (size,), generator=generator)}

    def sample_numbers(self) -> int:
        """Numbers of one sample: of the largest state."""
        return self.length * max(self.numbers.hidden_size, self.numbers.intermediate_size)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        if self.length > self.numbers.max_position_embeddings:
            most = self.numbers.max_position_embeddings
            return "length", f"{self.length} tokens are more than numbers.max_position_embeddings={most}"
        return _heads("num_attention_heads", self.numbers.num_attention_heads, "hidden_size", self.numbers.hidden_size)


class Vit(Strict):
    """A ViT that puts images into classes."""

    kind: Literal["ViTConfig"]
    numbers: VitNumbers = Field(default=VitNumbers())

    def model(self) -> nn.Module:
        """The network."""
        return _made("AutoModelForImageClassification", self.kind, self.numbers)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random images and classes."""
        numbers = self.numbers
        images = torch.randn(size, numbers.num_channels, numbers.image_size, numbers.image_size, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(0, numbers.num_labels, (size,), generator=generator)}

    def sample_numbers(self) -> int:
        """Numbers of one sample: of its input, or of the largest state."""
        numbers = self.numbers
        patches = (numbers.image_size // numbers.patch_size) ** 2
        return max(numbers.num_channels * numbers.image_size**2, patches * numbers.intermediate_size)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        numbers = self.numbers
        if numbers.image_size % numbers.patch_size:
            return "numbers.patch_size", f"{numbers.patch_size} does not divide image_size={numbers.image_size}"
        return _heads("num_attention_heads", numbers.num_attention_heads, "hidden_size", numbers.hidden_size)


HuggingFace = Gpt2 | Llama | Bert | Vit


def _made(auto: str, config: str, numbers: Strict, **more: int) -> nn.Module:
    import transformers

    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**numbers.model_dump(), **more))
    assert isinstance(model, nn.Module)
    return model


def _tokens(vocabulary: int, shape: tuple[int, int], generator: Generator) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return {"input_ids": ids, "labels": ids}


def _heads(name: str, heads: int, width_name: str, width: int) -> tuple[str, str] | None:
    return (f"numbers.{name}", f"{heads} does not divide {width_name}={width}") if width % heads else None
