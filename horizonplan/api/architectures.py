"""What a job may ask for: networks of ours by their sizes, Hugging Face's by name and numbers, an operator's by id.

Sizes are bounded one by one here; ``check`` bounds what they come to together. The data are random batches of the
shapes that the sizes give.
"""

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from horizonplan.api.hugging_face import Classes, Depth, Features, Heads, HuggingFace, Length, Vocabulary, Width
from horizonplan.api.job_settings import JobSettings
from horizonplan.api.schemas import WHOLE, Accuracy, CostIn, Finite, Memory, ObjectiveIn, Strict
from horizonplan.measured import MeasurementError
from horizonplan.models import CharacterGPT, ResidualCNN, ResidualMLP, SequenceClassifier

MOST_NUMBERS = 2**28  # of the largest tensor that a batch brings with it, as far as sizes tell
RANDOM_DATA = "The data were random numbers of the shapes asked for: cosines and rates are not those of real data."


class ResidualMlp(Strict):
    """A residual network of fully connected layers: vectors into classes."""

    kind: Literal["residual-mlp"]
    in_features: Features = 64
    width: Width = 32
    classes: Classes = 10
    depth: Depth = 12

    def model(self) -> nn.Module:
        """The network."""
        return ResidualMLP(self.in_features, self.width, self.classes, self.depth)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random vectors and classes."""
        return torch.randn(size, self.in_features, generator=generator), _classes(self.classes, (size,), generator)

    def sample_numbers(self) -> int:
        """Numbers of one sample."""
        return self.in_features

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        return None


class ResidualCnn(Strict):
    """A residual network of 3 x 3 convolutions: square images into classes."""

    kind: Literal["residual-cnn"]
    in_channels: Annotated[int, Field(ge=1, le=64), WHOLE] = 1
    image_size: Annotated[int, Field(ge=4, le=1024), WHOLE] = 28
    channels: Annotated[list[Annotated[int, Field(ge=1, le=4096), WHOLE]], Field(min_length=1, max_length=6)] = Field(
        default=[16, 32, 64], description="Of each stage, never decreasing."
    )
    blocks_per_stage: Annotated[int, Field(ge=1, le=64), WHOLE] = 3
    classes: Classes = 10

    def model(self) -> nn.Module:
        """The network."""
        return ResidualCNN(self.in_channels, self.channels, self.blocks_per_stage, self.classes)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random images and classes."""
        shape = (size, self.in_channels, self.image_size, self.image_size)
        return torch.randn(shape, generator=generator), _classes(self.classes, (size,), generator)

    def sample_numbers(self) -> int:
        """Numbers of one sample: of its input, or of the first stage's output."""
        return max(self.in_channels, self.channels[0]) * self.image_size**2

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        if any(later < earlier for earlier, later in pairwise(self.channels)):
            return "channels", "a stage cannot have fewer channels than the one before"
        if len(self.channels) * self.blocks_per_stage < 2:
            return "blocks_per_stage", "the network has one block; give it two or more"
        return None


class Transformer(Strict):
    """A pre-norm Transformer: sequences of vectors into classes."""

    kind: Literal["transformer"]
    in_features: Features = 49
    length: Length = 16
    classes: Classes = 10
    width: Width = 64
    depth: Depth = 8
    heads: Heads = 4

    def model(self) -> nn.Module:
        """The network."""
        return SequenceClassifier(self.in_features, self.length, self.classes, self.width, self.depth, self.heads)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random sequences and classes."""
        inputs = torch.randn(size, self.length, self.in_features, generator=generator)
        return inputs, _classes(self.classes, (size,), generator)

    def sample_numbers(self) -> int:
        """Numbers of one sample: of its input, or of a state."""
        return self.length * max(self.in_features, self.width)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        return ("heads", f"{self.heads} does not divide width={self.width}") if self.width % self.heads else None


class CharacterGpt(Strict):
    """A GPT that predicts each next token."""

    kind: Literal["character-gpt"]
    vocab: Vocabulary = 65
    context: Length = 128
    width: Width = 128
    depth: Depth = 8
    heads: Heads = 4

    def model(self) -> nn.Module:
        """The network."""
        return CharacterGPT(self.vocab, self.width, self.depth, self.heads, self.context)

    def batch(self, size: int, generator: Generator) -> Any:
        """Random tokens, and the ones that follow."""
        tokens = _classes(self.vocab, (size, self.context + 1), generator)
        return tokens[:, :-1], tokens[:, 1:]

    def sample_numbers(self) -> int:
        """Numbers of one sample: of a state, or of its scores."""
        return self.context * max(self.width, self.vocab)

    def complaint(self) -> tuple[str, str] | None:
        """Field and message of sizes that do not go together."""
        return ("heads", f"{self.heads} does not divide width={self.width}") if self.width % self.heads else None


class RegisteredModel(Strict):
    """A model of the operator's, with data of its own."""

    kind: Literal["registered"]
    id: Annotated[str, Field(min_length=1, max_length=100)]


Architecture = Annotated[
    ResidualMlp | ResidualCnn | Transformer | CharacterGpt | HuggingFace | RegisteredModel, Field(discriminator="kind")
]


class Options(Strict):
    """How much is measured; see `plan_horizon`."""

    horizons: (
        Annotated[
            list[Annotated[int, Field(ge=1, le=1024), WHOLE]],
            Field(min_length=1, max_length=32, json_schema_extra={"uniqueItems": True}),
        ]
        | None
    ) = Field(None, description="Where to measure first; null: four, spread over 1..T.")
    batches: Annotated[int, Field(ge=1, le=32), WHOLE] = Field(4, description="For the cosines.")
    rollout_steps: Annotated[int, Field(ge=0, le=500), WHOLE] | None = Field(
        None, description="Of each short run. null: 50 with a registered model's data, none with random data."
    )
    probe_steps: Annotated[Finite, Field(ge=0, le=1000)] = Field(
        60.0, description="What probing may cost, in steps of back-propagation, short runs apart."
    )


class JobRequest(Strict):
    """A network to measure, and an objective to choose by."""

    architecture: Architecture
    batch_size: Annotated[int, Field(ge=1, le=65_536), WHOLE] | None = Field(
        None, description="null: 32, or what a registered model's data have."
    )
    objective: ObjectiveIn = Field(default=Accuracy(kind="accuracy", epsilon=0.1))
    cost: CostIn = Field(default=CostIn())
    device: Annotated[str, Field(pattern=r"^(cpu|simulated:[1-9][0-9]{0,5}(MiB|GiB))$")] = Field(
        "cpu", description="`cpu`; or `simulated:24GiB`, a CUDA card that is not there: memory is predicted."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31), WHOLE] = 0
    options: Options = Field(default=Options())

    @property
    def simulated(self) -> bool:
        """Whether nothing is measured, and nothing allocated for the model."""
        return self.device != "cpu"


def check(asked: JobRequest, settings: JobSettings) -> None:
    """See that the parts of a request go together, and that the service takes it.

    Raises:
        MeasurementError: they do not, or it does not; its ``field`` says where.
    """
    if asked.simulated and not isinstance(asked.objective, Memory):
        message = "nothing is measured on a simulated card, so there are no rates; ask for kind 'memory', or device cpu"
        raise MeasurementError("objective.kind", message)
    if asked.options.horizons is not None and len(set(asked.options.horizons)) < len(asked.options.horizons):
        raise MeasurementError("options.horizons", "one of them is given twice; give each once")
    architecture = asked.architecture
    if isinstance(architecture, RegisteredModel):
        if architecture.id not in settings.models:
            known = ", ".join(map(repr, sorted(settings.models))) or "none at all"
            raise MeasurementError("architecture.id", f"no model of this id is registered here; there is {known}")
        return
    if (complaint := architecture.complaint()) is not None:
        raise MeasurementError(f"architecture.{complaint[0]}", complaint[1])
    samples = asked.batch_size or 32
    if samples * architecture.sample_numbers() > MOST_NUMBERS:
        message = f"{samples} samples of {architecture.sample_numbers()} numbers are more than {MOST_NUMBERS} a batch"
        raise MeasurementError("batch_size", f"{message}; ask for fewer, or for smaller ones")
    if isinstance(architecture, HuggingFace):
        if importlib.util.find_spec("transformers") is None:
            raise MeasurementError("architecture.kind", "Hugging Face's models are not installed here")
    else:
        check_parameters(asked, settings)  # Hugging Face's library is too slow to load for a request


def check_parameters(asked: JobRequest, settings: JobSettings) -> None:
    """See that a model's parameters are not too many: they are counted on ``meta``, where none is allocated.

    Raises:
        MeasurementError: they are.
    """
    assert not isinstance(asked.architecture, RegisteredModel)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in asked.architecture.model().parameters())
    most = settings.max_simulated_parameters if asked.simulated else settings.max_parameters
    if count > most:
        message = f"{count} parameters; this service takes at most {most} on {asked.device}"
        raise MeasurementError("architecture", message)


def random_batches(make: Callable[[int, Generator], Any], size: int, count: int, seed: int) -> list[Any]:
    """Batches of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [make(size, generator) for _ in range(count)]


def _classes(count: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(0, count, shape, generator=generator)
