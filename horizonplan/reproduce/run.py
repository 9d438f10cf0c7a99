"""``reproduce``: the experiments one after another, resumable, with a page at the end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from horizonplan.reproduce import cifar, e1, e2, fig2, fig3, fig4, fig5, pretrained, style, theorem
from horizonplan.reproduce.cases import SCALES, Scale, Sources
from horizonplan.reproduce.cells import Cells
from horizonplan.reproduce.findings import Finding
from horizonplan.reproduce.lab import Lab
from horizonplan.reproduce.report import write_claims, write_report
from horizonplan.training.files import write

MODULES: tuple[Any, ...] = (theorem, e1, fig2, e2, fig3, fig4, fig5)
EXPERIMENTS = tuple(module.NAME for module in MODULES)
SETTINGS = "settings.json"
_TRAINED, _TUNED = {"fig2", "e2", "fig5"}, {"fig3", "fig4"}

Report = Callable[[str], None]


def reproduce(
    out: str | Path,
    only: Sequence[str] | None = None,
    scale: Scale = "small",
    sources: Sources | None = None,
    seeds: int | None = None,
    device: str | torch.device = "cpu",
    report: Report = lambda line: None,
) -> list[Finding]:
    """Run the paper's experiments and write pictures, tables and a page.

    What is finished in ``out`` is not computed again, so a run that was killed is simply started again.

    Args:
        out: a folder for everything; one for each scale and data.
        only: names of EXPERIMENTS; ``None``: all.
        scale: ``"small"``, minutes on two cores, or ``"paper"``, the paper's sizes.
        sources: where the user's files lie.
        seeds: runs of each method; ``None``: two or three, as the captions say.
        device: where to train.
        report: called with a line for each piece of work.

    Returns:
        What was found, in the order of the paper. The page also has what earlier runs left in ``out``.

    Raises:
        ValueError: an argument is wrong, files of the user's are missing, or ``out`` belongs to another run.
    """
    names, sources, folder = chosen(only), sources or Sources(), Path(out)
    check(names, scale, sources, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    _claim_folder(folder, scale, sources)
    steps = iter(range(1, len(names) + 1))
    at = ""

    def say(line: str) -> None:
        report(f"[{at}] {line}")

    lab = Lab(scale, sources, Cells(folder / "cells", say), seeds, torch.device(device))
    found = []
    for module in (m for m in MODULES if m.NAME in names):
        at = f"{module.NAME}, {next(steps)}/{len(names)}"
        say(module.TITLE)
        with style.applied():
            found.append(module.run(lab, folder))
        found[-1].save(folder)
    write_report(folder, _all(folder), _facts(lab))
    write_claims(folder, _all(folder))
    return found


def chosen(only: Sequence[str] | None) -> list[str]:
    """The names of the experiments asked for, each once.

    Raises:
        ValueError: there is no such experiment, or none is asked for.
    """
    names = list(dict.fromkeys(EXPERIMENTS if only is None else only))
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"only={','.join(unknown)}: choose from {', '.join(EXPERIMENTS)}.")
    if not names:
        raise ValueError(f"only='': name at least one of {', '.join(EXPERIMENTS)}.")
    return names


def check(names: Sequence[str], scale: str, sources: Sources, seeds: int | None) -> None:
    """See that everything is there before hours are spent.

    Raises:
        ValueError: something is not.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose from {', '.join(SCALES)}.")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds}: give at least 1.")
    if sources.images is not None:
        cifar.find(sources.images, 10)
    if scale == "paper":
        if sources.images is None and (needs := (_TRAINED | _TUNED) & set(names)):
            raise cifar.CifarError(
                f"data: scale 'paper' trains on CIFAR in {', '.join(sorted(needs))}; give its folder, --data FOLDER, "
                "or leave these out with --only."
            )
        if sources.images is not None and _TUNED & set(names):
            cifar.find(sources.images, 100)
            pretrained.check(sources.weights)


def _claim_folder(folder: Path, scale: str, sources: Sources) -> None:
    """Keep results of different sizes and data apart."""
    wanted = {"scale": scale, "images": "MNIST" if sources.images is None else "CIFAR"}
    path = folder / SETTINGS
    if not path.exists():
        write(path, json.dumps(wanted).encode())
    elif (kept := json.loads(path.read_text())) != wanted:
        raise ValueError(
            f"out={str(folder)!r}: it holds a run with {kept}, this one has {wanted}; give another folder."
        )


def _all(folder: Path) -> list[Finding]:
    paths = [folder / f"{name}.json" for name in EXPERIMENTS]
    return [Finding.load(path) for path in paths if path.exists()]


def _facts(lab: Lab) -> dict[str, str]:
    seconds = lab.cells.seconds()
    seeds = "as many as each case has (see the captions)" if lab.seeds is None else str(lab.seeds)
    return {
        "scale": lab.scale,
        "seeds": seeds,
        "finished": (
            f"{len(seconds)} cells, {lab.cells.computed} of them computed by the last call; all together "
            f"{sum(seconds) / 60:.1f} minutes of process time when they were computed"
        ),
        "page written on": (
            f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, device {lab.device}"
        ),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
