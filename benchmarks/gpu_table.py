"""The table of a file that ``benchmarks/gpu.py`` wrote, its summary, and what is not there.

python benchmarks/gpu_table.py gpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.units import format_bytes

TARGETS = {"median": 3.0, "worst": 8.0}  # per cent of the measured peak
MEASURED, TIME_UP = "measured", "skipped: the time was up"
KINDS = {"fold": "fold", "fake": "fake tensors", "device": "fake tensors + margin, of NVML's bytes"}


def summary(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error of each prediction, beside the targets."""
    told: dict[str, Any] = {"targets_percent": TARGETS}
    for kind in KINDS:
        every = [row.get(f"{kind}_error_percent") for model in models for row in model["rows"]]
        errors = [error for error in every if error is not None]
        told[kind] = {"rows": len(errors), "missing": len(every) - len(errors)}
        told[kind] |= dict.fromkeys(("median", "worst", "ok"))
        if errors:
            median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
            good = median <= TARGETS["median"] and abs(worst) <= TARGETS["worst"]
            told[kind] |= {"median": round(median, 3), "worst": worst, "ok": good}
    return told


def skipped(models: Sequence[dict[str, Any]]) -> list[str]:
    """What is not there, and why: one line each."""
    lines = []
    for model in models:
        stages = {"everything": model["status"], "profile": model.get("profile", MEASURED)}
        stages["times"] = model["times"].get("status", MEASURED)
        stages |= {row["name"]: row["status"] for row in model["rows"]}
        stages |= {f"{row['name']}, fake tensors": TIME_UP for row in model["rows"] if row["fake_bytes"] is None}
        lines += [f"{model['name']}: {stage}: {status}" for stage, status in stages.items() if status != MEASURED]
    return lines


def size(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def off(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1f} %"


def shown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ("model", "", "allocated", "reserved", "NVML", "fold", "off", "fake", "off", "+ margin", "off", "time/BP")
    lines: list[tuple[str, ...]] = [head]
    for model in report["models"]:
        ratios = {(t["horizon"], t["stride"], t["recompute"]): t["ratio"] for t in model["times"]["rows"]}
        for row in model["rows"]:
            ratio = ratios.get((row["horizon"], row["stride"], row["recompute"]))
            cells = [size(row.get(name)) for name in ("allocated_bytes", "reserved_bytes", "nvml_bytes")]
            for kind in KINDS:
                cells += [size(row[f"{kind}_bytes"]), off(row[f"{kind}_error_percent"])]
            label = f"{model['name']}, {model['samples']} samples"
            lines.append((label, row["name"], *cells, "-" if ratio is None else f"{ratio:.2f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    told = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for kind, name in KINDS.items():
        found = report["summary"][kind]
        verdict = {True: "within the targets", False: "misses the targets", None: "nothing to compare"}[found["ok"]]
        median, worst = off(found["median"]).lstrip("+"), off(found["worst"])
        told.append(
            f"{name}: median {median}, worst {worst}, {found['rows']} rows, {found['missing']} missing: {verdict}"
        )
    told += [f"not there: {line}" for line in report["skipped"]]
    return "\n".join(told)


if __name__ == "__main__":
    print(shown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
