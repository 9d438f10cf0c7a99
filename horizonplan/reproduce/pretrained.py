"""ResNet-50 and ViT-B/16 with a head of 100 classes, from weights that the user has (Hugging Face's form).

Nothing is downloaded: the folder given holds ``resnet-50`` and ``vit-base-patch16-224``, each with its ``config.json``
and weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.reproduce.origin import fingerprint

CLASSES, SIDE, RANK = 100, 224, 8
RESNET, VIT = "resnet-50", "vit-base-patch16-224"
QUERY_AND_VALUE = r".*\.(query|value|q_proj|v_proj)"  # their names differ between models and versions
EXTRA = "pip install 'horizonplan[hugging-face]'"


class WeightsError(ValueError):
    """The pre-trained weights are not there."""


class Enlarged(nn.Module):
    """A classifier of Hugging Face's, given small images, which are enlarged to what it was trained on.

    Args:
        classifier: returns an output with ``logits``.
        side: height and width that it wants.
    """

    def __init__(self, classifier: nn.Module, side: int = SIDE) -> None:
        super().__init__()
        self.classifier, self.side = classifier, side

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to scores ``(B, classes)``."""
        large = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        scores: Tensor = self.classifier(pixel_values=large).logits
        return scores


def resnet50(folder: Path | None) -> nn.Module:
    """ResNet-50, all of it to be trained.

    Raises:
        WeightsError: the folder is not given or has no such weights.
        ImportError: transformers is not installed.
    """
    return in_full(_load(folder, RESNET))


def vit(folder: Path | None) -> nn.Module:
    """ViT-B/16 with LoRA on query and value; the head is trained, too.

    Raises:
        WeightsError: the folder is not given or has no such weights.
        ImportError: transformers or peft is not installed.
    """
    return by_adapters(_load(folder, VIT))


def in_full(classifier: nn.Module) -> nn.Module:
    """A classifier of Hugging Face's for small images, all of it to be trained."""
    return Enlarged(classifier)


def by_adapters(classifier: nn.Module) -> nn.Module:
    """A classifier of Hugging Face's for small images, frozen but for LoRA and its head.

    Raises:
        ImportError: peft is not installed.
    """
    return Enlarged(with_lora(classifier, trained=["classifier"]))


def with_lora(model: nn.Module, trained: list[str]) -> nn.Module:
    """The model, frozen, with LoRA of rank 8 on query and value; what ``trained`` names is trained whole.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {EXTRA}.") from error
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=QUERY_AND_VALUE, modules_to_save=trained or None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an outdated way
        made: Any = peft.get_peft_model(model, config)
    inner: nn.Module = made.base_model.model
    return inner


def origin(folder: Path | None, name: str) -> str:
    """The fingerprint of one network's files.

    Raises:
        WeightsError: they are not there.
    """
    return fingerprint(check(folder) / name)


def check(folder: Path | None) -> Path:
    """See that both models' files are in the folder, without reading the weights.

    Raises:
        WeightsError: they are not.
    """
    wanted = f"give --weights FOLDER, one that holds {RESNET} and {VIT} as Hugging Face keeps them"
    if folder is None:
        raise WeightsError(f"weights: scale 'paper' fine-tunes pre-trained networks; {wanted}.")
    for name in (RESNET, VIT):
        if not (folder / name / "config.json").is_file():
            raise WeightsError(f"weights={str(folder)!r}: there is no {name}/config.json in it; {wanted}.")
    return folder


def _load(folder: Path | None, name: str) -> nn.Module:
    folder = check(folder)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"weights: {name} needs transformers: {EXTRA}.") from error
    loaded: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        folder / name, num_labels=CLASSES, ignore_mismatched_sizes=True, local_files_only=True
    )
    return loaded
