"""``horizonplan doctor``: what is installed, which devices there are, and whether planning works on each."""

import os
import platform
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from typer import Option

from horizonplan import devices
from horizonplan.cli import options as opt
from horizonplan.planner import plan_horizon
from horizonplan.probes import nvml
from horizonplan.units import format_bytes

PACKAGES = ("horizonplan", "torch", "numpy", "scipy", "nvidia-ml-py", "optuna", "fastapi", "matplotlib", "typer")
CALIBRATE = "Measure what the CUDA card in use takes besides tensors, and write the record (see --out). About a minute."
EXTRAS = {"examples": ("mlxtend", "scikit-learn"), "hugging face": ("transformers", "peft")}


def doctor(
    calibrate: Annotated[bool, Option("--calibrate", help=CALIBRATE)] = False,
    out: Annotated[Path | None, Option(help="Where --calibrate writes. Default: calibration.json here.")] = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show versions, extras and devices, and try to plan on each device. Exit code 0 if that works on all.

    --json prints ok, versions, extras (null: not installed); for each device, its name, memory_bytes and the error of
    planning there (null: it works); for each card, what NVML reads: process_bytes (this process), used_bytes (all),
    total_bytes, peak_bytes, and, where a number is missing (null), the name, meaning and reason of what hides it;
    and the calibration record (null without --calibrate).

    Example: horizonplan doctor --calibrate --out calibration.json
    """
    measured = _calibrated(out or Path("calibration.json")) if calibrate else None
    if out is not None and not calibrate:
        raise typer.BadParameter("--out goes with --calibrate")
    versions = {"python": platform.python_version()} | _versions(PACKAGES)
    extras = {extra: _versions(names) for extra, names in EXTRAS.items()}
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    examined = {str(device): _facts(device) for device in (torch.device("cpu"), *cards)}
    readings = {str(card): _reading(card) for card in cards or [torch.device("cuda")]}  # no card: that is said
    ok = all(facts["error"] is None for facts in examined.values())
    if json:
        found = {"versions": versions, "extras": extras, "devices": examined, "nvml": readings}
        opt.print_json({"ok": ok, **found, "calibration": measured})
    else:
        seen = {f"nvml {card}": _known(reading) for card, reading in readings.items()}
        seen |= {"calibration": _known(measured)} if measured else {}
        for title, entries in {"versions": versions, **extras, **examined, **seen}.items():
            typer.echo(f"{title:14}{', '.join(_in_words(name, value) for name, value in entries.items())}")
        typer.echo("planning works" if ok else "planning fails; see the errors above")
    if not ok:
        raise typer.Exit(1)


def _calibrated(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} for {path.name}; make it first")
    made = devices.calibrate("cuda")
    made.save(path)
    return made.to_dict() | {"path": str(path)}


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _facts(device: torch.device) -> dict[str, Any]:
    error = _tried(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {"name": card.name, "memory_bytes": card.total_memory, "error": error}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    cards = f"{torch.cuda.device_count()} usable; torch is built {built}"
    return {"name": platform.machine(), "cpus": cpus, "memory_bytes": memory, "cuda": cards, "error": error}


def _reading(card: torch.device) -> dict[str, Any]:
    """What NVML reads, after planning: it lists a process only once that uses the card."""
    seen = nvml.read(card)
    return asdict(seen) | {"meaning": nvml.FALLBACKS[seen.fallback] if seen.fallback else None}


def _tried(device: torch.device) -> str | None:
    """Plan for four linear layers; return the error, if there is one."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan_horizon(model, [(torch.ones(4, 8), torch.zeros(4, 8))], rollout_steps=0, device=device, progress=False)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _in_words(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value is not None:
        return f"{name.removesuffix('_bytes')} {format_bytes(value)}"
    return f"{name} {'none' if value is None else value}"
