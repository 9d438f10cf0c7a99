"""``reproduce``: the experiments one after another, resumable, with a page at the end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from horizonplan.reproduce import cifar, e1, e2, fig2, fig3, fig4, fig5, pretrained, style, theorem, verses
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
        seeds: runs of each method, and draws of the theorem; ``None``: as many as each case has (captions say).
        device: where to train.
        report: called with a line for each piece of work.

    Returns:
        What was found, in the order of the paper. The page also has what earlier runs left in ``out``.

    Raises:
        ValueError: an argument is wrong, there is no such device, files of the user's are missing, or ``out`` belongs
            to another run.
    """
    names, sources, folder = chosen(only), sources or Sources(), Path(out)
    place = usable(device)
    check(names, scale, sources, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    _claim_folder(folder, _identity(names, scale, sources, place))
    steps = iter(range(1, len(names) + 1))
    at = ""

    def say(line: str) -> None:
        report(f"[{at}] {line}")

    lab = Lab(scale, sources, Cells(folder / "cells", say), seeds, place)
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
    trained, tuned = _TRAINED & set(names), _TUNED & set(names)
    if sources.images is not None and (trained or (tuned and scale == "small")):
        cifar.find(sources.images, 10)
    if scale == "small" and tuned and sources.text is not None and (reason := verses.missing(sources.text)):
        raise verses.TextError(f"text={str(sources.text)!r}: {reason}, or leave {', '.join(sorted(tuned))} out (only).")
    if scale == "paper":
        if sources.images is None and (needs := trained | tuned):
            raise cifar.CifarError(
                f"data: scale 'paper' trains on CIFAR in {', '.join(sorted(needs))}; give its folder, --data FOLDER, "
                "or leave these out with --only."
            )
        if sources.images is not None and tuned:
            cifar.find(sources.images, 100)
            pretrained.check(sources.weights)


def usable(device: str | torch.device) -> torch.device:
    """The device, tried with one number.

    Raises:
        ValueError: there is no such device, or nothing can be computed on it.
    """
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r}: {reason}; `horizonplan doctor` lists what there is.") from error
    return found


def _identity(names: Sequence[str], scale: str, sources: Sources, device: torch.device) -> dict[str, str]:
    """What a folder's results must have in common: scale, device, and the user's files as far as they are used."""
    trained, tuned = _TRAINED & set(names), _TUNED & set(names)
    found = {"scale": scale, "device": device.type}
    if trained or (tuned and scale == "small"):
        found["images"] = "MNIST" if sources.images is None else f"CIFAR-10 {cifar.origin(sources.images, 10)}"
    if scale == "small" and tuned and (text := verses.origin(sources.text)):
        found["text"] = text
    if scale == "paper" and tuned and sources.images is not None:
        found["CIFAR-100"] = cifar.origin(sources.images, 100)
        found |= {name: pretrained.origin(sources.weights, name) for name in (pretrained.RESNET, pretrained.VIT)}
    return found


def _claim_folder(folder: Path, wanted: dict[str, str]) -> None:
    """Keep results of different sizes, devices and data apart; what no run has used yet is free."""
    path = folder / SETTINGS
    try:
        kept = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"out={str(folder)!r}: {SETTINGS} in it is damaged ({error}); give another folder.") from error
    if others := {name: value for name, value in kept.items() if wanted.get(name, value) != value}:
        raise ValueError(
            f"out={str(folder)!r}: it holds a run with {others}, this one has "
            f"{ {name: wanted[name] for name in others} }; give another folder."
        )
    write(path, json.dumps(kept | wanted).encode())


def _all(folder: Path) -> list[Finding]:
    paths = [folder / f"{name}.json" for name in EXPERIMENTS]
    return [Finding.load(path) for path in paths if path.exists()]


def _facts(lab: Lab) -> dict[str, str]:
    seconds = lab.cells.seconds()
    return {
        "scale": lab.scale,
        "finished": (
            f"{len(seconds)} cells, {lab.cells.computed} of them computed by the last call; all together "
            f"{sum(seconds) / 60:.1f} minutes of process time when they were computed"
        ),
        "page written on": (
            f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, device {lab.device}"
        ),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
