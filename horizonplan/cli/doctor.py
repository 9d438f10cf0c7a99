"""``horizonplan doctor``: what is installed, which devices there are, and whether planning works on each."""

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import typer
from torch import nn

from horizonplan.cli import options as opt
from horizonplan.planner import plan_horizon
from horizonplan.probes.cuda import nvml_bytes
from horizonplan.units import format_bytes

PACKAGES = ("horizonplan", "torch", "numpy", "scipy", "nvidia-ml-py", "optuna", "fastapi", "matplotlib", "typer")
EXTRAS = {"examples": ("mlxtend", "scikit-learn"), "hugging face": ("transformers", "peft")}


def doctor(json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Show versions, extras and devices, and try to plan on each device. Exit code 0 if that works on all.

    --json prints ok, versions, extras (null: not installed) and, for each device, cpus, memory_bytes, the bytes of
    this process that NVML sees or why it sees none, and the error of planning there (null: it works).
    """
    versions = {"python": platform.python_version()} | _versions(PACKAGES)
    extras = {extra: _versions(names) for extra, names in EXTRAS.items()}
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices = {str(device): _facts(device) for device in (torch.device("cpu"), *cards)}
    ok = all(facts["error"] is None for facts in devices.values())
    if json:
        opt.print_json({"ok": ok, "versions": versions, "extras": extras, "devices": devices})
    else:
        for title, entries in {"versions": versions, **extras, **devices}.items():
            typer.echo(f"{title:14}{', '.join(_in_words(name, value) for name, value in entries.items())}")
        typer.echo("planning works" if ok else "planning fails; see the errors above")
    if not ok:
        raise typer.Exit(1)


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _facts(device: torch.device) -> dict[str, Any]:
    error = _tried(device)  # before NVML is asked, which lists a process only once it uses the card
    if device.type == "cuda":
        card, nvml = torch.cuda.get_device_properties(device), nvml_bytes(device)
        seen = {"nvml_bytes": nvml.bytes, "nvml": nvml.reason}
        return {"name": card.name, "memory_bytes": card.total_memory, **seen, "error": error}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    cards = f"{torch.cuda.device_count()} usable; torch is built {built}"
    return {"name": platform.machine(), "cpus": cpus, "memory_bytes": memory, "cuda": cards, "error": error}


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


def _in_words(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value is not None:
        return f"{name.removesuffix('_bytes')} {format_bytes(value)}"
    return f"{name} {'none' if value is None else value}"
