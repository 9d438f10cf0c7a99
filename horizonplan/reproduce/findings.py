"""What an experiment hands over: pictures, tables, and what of the paper's claims it found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from horizonplan.training.files import write

HOLDS, PARTLY, FAILS, OURS = "holds", "partly", "does not hold", "not in the paper"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what this run found.

    Attributes:
        says: the claim.
        where: its place in the paper.
        rule: when it holds and when partly, in words, with the limits that the code applies.
        found: our figures.
        verdict: one of HOLDS, PARTLY, FAILS; OURS for what the paper does not speak of.
    """

    says: str
    where: str
    rule: str
    found: str
    verdict: str


@dataclass(frozen=True)
class Finding:
    """The outcome of one experiment.

    Attributes:
        name: ``"fig2"``, ...
        title: of its section.
        caption: what is drawn and with which sizes, data and seeds.
        pictures: file names.
        tables: file names.
        claims: verdicts.
    """

    name: str
    title: str
    caption: str
    pictures: tuple[str, ...]
    tables: tuple[str, ...]
    claims: tuple[Claim, ...]

    def save(self, folder: Path) -> None:
        """Write it as JSON into a folder."""
        write(folder / f"{self.name}.json", json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote."""
        read = json.loads(path.read_text())
        claims = tuple(Claim(**claim) for claim in read["claims"])
        lists = {name: tuple(read[name]) for name in ("pictures", "tables")}
        return cls(name=read["name"], title=read["title"], caption=read["caption"], **lists, claims=claims)


def judge(holds: bool, partly: bool) -> str:
    """The verdict of a rule with two limits.

    >>> judge(False, True)
    'partly'
    """
    return HOLDS if holds else PARTLY if partly else FAILS


def write_table(path: Path, rows: Rows) -> str:
    """Write rows as CSV, floats with six digits; returns the file's name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write(path, text.getvalue().encode())
    return path.name
