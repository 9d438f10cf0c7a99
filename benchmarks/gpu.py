"""Predicted against measured memory on one card: the allocator, NVML, the fold, fake tensors, and step times.

    python benchmarks/gpu.py --out gpu.json                  # on a machine with a CUDA card, under 8 minutes
    python benchmarks/gpu.py --minutes 20 --device cuda:1
    python benchmarks/gpu.py --device cpu --tiny             # a dry run: tiny models, no card

Three models with random weights, ViT-B/16, ResNet-50 and GPT-2 medium, train in fp32 with AdamW. Their batches fit a
24 GiB card under back-propagation; where they do not, they are halved until they do. For back-propagation, for
back-propagation that checkpoints every block, and for four (h, s), a table and a JSON file have

- the measured peak (``probes.memory``, each row in a process of its own) beside the allocator's reserved bytes and
  NVML's bytes of the process;
- two predictions of the peak: folded over a profile that was measured on the card, and under fake tensors, for which
  no card is needed (``horizonplan.fits``); their errors are in per cent of the measured peak, negative ones are
  underestimates. The fake tensors' peak with the calibrated margin is compared with NVML's bytes likewise;
- seconds of a step (``probes.time``, all rows in turn) and their ratio to back-propagation's. Checkpointed
  back-propagation is timed after the others. (T, T) is back-propagation too: its ratio shows the clock's noise.

What the time does not allow is written down as skipped, what runs out of memory or fails as just that.

What the dry run predicts under fake tensors are a card's bytes: where a model has dropout, the CPU's are others.

On a GPU: let nothing else use the card while this runs, neither a desktop nor another process; where the driver hides
processes (containers), NVML's bytes are the whole device's less those before. Install ``.[test]`` with a CUDA build of
torch, and give the file to whoever asks how far the predictions are off: it names the card, the driver, the versions
and what was calibrated, and ``benchmarks/gpu_table.py`` prints it again. ``make test-gpu`` checks the same code for
right and wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import transformers as tf
from gpu_table import MEASURED, TIME_UP, shown, skipped, summary
from torch import nn

from horizonplan import Chain, Schedule, fits, probes
from horizonplan.batch import move
from horizonplan.devices import ASSUMED, Calibration, calibrate
from horizonplan.predict import step_bytes, step_seconds
from horizonplan.probes.budget import available_bytes
from horizonplan.probes.isolated import IsolationError
from horizonplan.probes.memory import OUT_OF_MEMORY, attempt
from horizonplan.probes.nvml import driver_version, read

CARD_MEMORY = "24GiB"  # of the card that the dry run imagines
CHILD_SECONDS, STAGE_SECONDS = 20.0, 30.0  # what a probe in a child, or another stage, is expected to take
CHILD_LIMIT_SECONDS = 120.0
REPEATS = 3

Way = tuple[int, int, int]  # horizon, stride, recompute


@dataclass(frozen=True)
class Case:
    """A model, how to make a batch of so many samples, and how many to begin with."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    samples: int


class Clock:
    """What is left of the time."""

    def __init__(self, minutes: float) -> None:
        self.start, self.limit = monotonic(), 60 * minutes

    @property
    def spent(self) -> float:
        return monotonic() - self.start

    def allows(self, seconds: float) -> bool:
        return self.spent + seconds <= self.limit


def images(side: int, classes: int, count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, side, side), "labels": torch.randint(0, classes, (count,))}


def texts(vocab: int, length: int, count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocab, (count, length))
    return {"input_ids": ids, "labels": ids.clone()}


def vit(**sizes: Any) -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes))


def resnet(**sizes: Any) -> nn.Module:
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes))


def gpt2(**sizes: Any) -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def cases(tiny: bool) -> list[Case]:
    """The models by size; tiny ones of the same classes for a dry run."""
    if tiny:
        small = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        patches = {"image_size": 32, "patch_size": 8}
        stages = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 3}
        decoder = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 100}
        return [
            Case("tiny ViT", partial(vit, **small, **patches, num_labels=3), partial(images, 32, 3), 8),
            Case("tiny ResNet", partial(resnet, **stages), partial(images, 32, 3), 8),
            Case("tiny GPT-2", partial(gpt2, **decoder), partial(texts, 100, 32), 8),
        ]
    medium = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
    return [
        Case("ViT-B/16", partial(vit, num_labels=1000), partial(images, 224, 1000), 64),
        Case("ResNet-50", partial(resnet, num_labels=1000), partial(images, 224, 1000), 128),
        Case("GPT-2 medium", partial(gpt2, **medium), partial(texts, 50257, 512), 4),
    ]


def ways(depth: int) -> list[Way]:
    """Back-propagation first, since it decides on the batch's size."""
    quarter, half = max(1, depth // 4), max(1, depth // 2)
    shorter = [(1, 1, 0), (quarter, quarter, 0), (half, 1, 0), (half, half, 0)]
    return list(dict.fromkeys([(depth, 1, 0), (depth, 1, 1), *shorter]))


def name_of(way: Way, depth: int) -> str:
    h, s, k = way
    exact = "BP, checkpoint every block" if k else "BP"
    return exact if (h, s) == (depth, 1) else f"h={h}, s={s}"


def percent(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else round((predicted / measured - 1) * 100, 3)


def failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def circumstances(place: torch.device) -> dict[str, Any]:
    """The card, and the versions of everything."""
    seen = read(place)
    card: dict[str, Any] = {"device": str(place), "name": platform.processor() or "cpu", "memory_bytes": None}
    if place.type == "cuda":
        found = torch.cuda.get_device_properties(place)
        card |= {"name": found.name, "memory_bytes": found.total_memory, "capability": [found.major, found.minor]}
    return {
        "card": card | {"free_bytes": available_bytes(place), "driver": driver_version()},
        "nvml": {"used_bytes": seen.used_bytes, "fallback": seen.fallback, "reason": seen.reason},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": tf.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "settings": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
        },
    }


def calibrated(place: torch.device, clock: Clock) -> tuple[Calibration, str]:
    """What the card takes besides tensors, and whether that was measured, or why not."""
    if place.type != "cuda":
        return ASSUMED, "assumed: no card"
    if not clock.allows(STAGE_SECONDS):
        return ASSUMED, TIME_UP
    try:
        return calibrate(place), MEASURED
    except (ValueError, IsolationError) as error:
        return ASSUMED, failed(error)


def fitting_samples(case: Case, model: nn.Module, room: int | str, calibration: Calibration) -> int:
    """The batch size, halved until back-propagation fits by prediction."""
    samples = case.samples
    while samples > 1 and not fits(model, case.batch(samples), room, calibration=calibration).ok:
        samples //= 2
    return samples


def measured(chain: Chain, batch: Any, way: Way, clock: Clock, isolated: bool) -> dict[str, Any]:
    """The measured part of a row; its status says whether and why not."""
    h, s, k = way
    chain.model.to(batch["labels"].device)  # a probe that failed may have left it on the host
    if not clock.allows(CHILD_SECONDS if isolated else 0.0):
        return {"status": TIME_UP}
    begin = monotonic()
    try:
        limits: dict[str, Any] = {"in_children": isolated, "timeout_seconds": CHILD_LIMIT_SECONDS}
        (sample,) = probes.memory(chain, [batch], [h], [s], recompute=k, **limits)
    except Exception as error:  # whatever a card that nobody has seen yet may raise: the other rows count
        return {"status": failed(error), "probe_seconds": round(monotonic() - begin, 2)}
    detail, found = dict(sample.detail), {"status": MEASURED, "probe_seconds": round(monotonic() - begin, 2)}
    if math.isnan(sample.value):
        late = "no result after timeout_seconds" in detail["message"]
        return found | {"status": TIME_UP if late else OUT_OF_MEMORY, "message": detail["message"]}
    found |= {"allocated_bytes": round(sample.value), "isolated": isolated and "in_process" not in detail}
    kept = ("base_bytes", "reserved_bytes", "alloc_retries", "nvml_bytes", "nvml", "nvml_fallback", "in_process")
    return found | {name: detail.get(name) for name in kept}


def begun(
    case: Case, model: nn.Module, samples: int, place: torch.device, clock: Clock
) -> tuple[Chain, Any, int, dict[str, Any]]:
    """Chain, batch, its size and the row of back-propagation, the batch halved until that does not run out."""
    while True:
        batch = move(case.batch(samples), place)
        chain, message = attempt(partial(Chain.from_model, model, batch), place)
        exact: dict[str, Any] = {"status": OUT_OF_MEMORY, "message": message}
        if chain is not None:
            exact = measured(chain, batch, (chain.depth, 1, 0), clock, isolated=True)
        if chain is not None and (exact["status"] != OUT_OF_MEMORY or samples == 1):
            return chain, batch, samples, exact
        if samples == 1:
            raise torch.OutOfMemoryError(f"{case.name}: not even one sample fits ({message})")
        samples //= 2


def folded(rows: Sequence[dict[str, Any]], chain: Chain, batch: Any, clock: Clock) -> str:
    """Predict every row by the fold over a profile measured here; whether there is one."""
    if not clock.allows(STAGE_SECONDS / 2):
        return TIME_UP
    costs, message = attempt(lambda: probes.profile(chain, batch, summed=False), chain.device)
    if costs is None:
        return f"{OUT_OF_MEMORY}: {message}"
    for row in rows:
        schedule = Schedule.horizon(chain.depth, row["horizon"], row["stride"], row["recompute"])
        row |= {"fold_bytes": step_bytes(schedule, costs), "fold_seconds": step_seconds(schedule, costs)}
    return MEASURED


def faked(rows: Sequence[dict[str, Any]], model: nn.Module, batch: Any, calibration: Calibration, clock: Clock) -> None:
    """Predict every row under fake tensors; model and batch are on the host, and no card takes part."""
    for row in rows:
        if clock.allows(0.0):
            way = {name: row[name] for name in ("horizon", "stride", "recompute")}
            told = fits(model, batch, CARD_MEMORY, **way, calibration=calibration)
            row |= {"fake_bytes": told.predicted_bytes, "device_bytes": told.predicted_bytes + told.margin_bytes}


def with_errors(rows: Sequence[dict[str, Any]]) -> None:
    """Errors of the predictions: of tensors' bytes, and of what the driver counts."""
    for row in rows:
        for kind, peak in (("fold", "allocated_bytes"), ("fake", "allocated_bytes"), ("device", "nvml_bytes")):
            row.setdefault(f"{kind}_bytes", None)
            row[f"{kind}_error_percent"] = percent(row[f"{kind}_bytes"], row.get(peak))


def timed(chain: Chain, batch: Any, expected_seconds: float, clock: Clock) -> dict[str, Any]:
    """Seconds of every row's step, and ratios to back-propagation's."""
    if not clock.allows(expected_seconds):
        return {"status": TIME_UP, "rows": []}
    depth = chain.depth
    horizons = list(dict.fromkeys(h for h, _, k in ways(depth) if not k))

    def run() -> dict[Way, probes.Sample]:
        plain = probes.time(chain, [batch], horizons, (1, "horizon"), repeats=REPEATS)
        checkpointed = probes.time(chain, [batch], [depth], repeats=REPEATS, recompute=1)
        found = {(s.horizon, s.stride, 0): s for s in plain}
        return found | {(s.horizon, s.stride, 1): s for s in checkpointed}

    found, message = attempt(run, chain.device)
    if found is None:
        return {"status": f"{OUT_OF_MEMORY}: {message}", "rows": []}
    exact, rows = found[depth, 1, 0].value, []
    for (h, s, k), sample in found.items():
        timing = {"seconds": sample.value, "stderr": sample.stderr, "ratio": round(sample.value / exact, 4)}
        rows.append({"horizon": h, "stride": s, "recompute": k, **timing})
    return {"status": MEASURED, "rows": rows}


def compare(case: Case, place: torch.device, calibration: Calibration, clock: Clock) -> dict[str, Any]:
    """Everything about one model."""
    told: dict[str, Any] = {"name": case.name, "asked_samples": case.samples, "rows": [], "times": {"rows": []}}
    if not clock.allows(STAGE_SECONDS if place.type == "cuda" else 0.0):
        return told | {"status": TIME_UP}
    begin = clock.spent
    torch.manual_seed(0)
    model = case.build().train()
    samples = fitting_samples(case, model, available_bytes(place) or CARD_MEMORY, calibration)
    model.to(place)
    chain, batch, samples, exact = begun(case, model, samples, place, clock)
    for way in ways(chain.depth):
        # a dry run shows that children work by one of them; a card is measured by nothing else
        found = exact if way == (chain.depth, 1, 0) else measured(chain, batch, way, clock, place.type == "cuda")
        h, s, k = way
        told["rows"].append({"name": name_of(way, chain.depth), "horizon": h, "stride": s, "recompute": k, **found})
    told |= {"samples": samples, "depth": chain.depth, "parameters": sum(p.numel() for p in model.parameters())}
    told["profile"] = folded(told["rows"], chain, batch, clock)
    expected = 10 + 2 * (REPEATS + 1) * sum(row.get("fold_seconds") or 0.0 for row in told["rows"])
    told["times"] = timed(chain, batch, expected if place.type == "cuda" else 0.0, clock)
    faked(told["rows"], model.to("cpu"), move(batch, torch.device("cpu")), calibration, clock)
    with_errors(told["rows"])
    return told | {"status": MEASURED, "seconds": round(clock.spent - begin, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the file after each model, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file (gpu.json)")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the rest is skipped (8)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu for a dry run")
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    given = parser.parse_args(arguments)
    place = torch.device(given.device)
    if place.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; for a dry run without one give --device cpu --tiny")
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    tf.logging.set_verbosity_error()
    clock = Clock(given.minutes)
    report: dict[str, Any] = {"schema_version": 1, "minutes": given.minutes, "tiny": given.tiny, **circumstances(place)}
    calibration, how = calibrated(place, clock)
    report |= {"calibration": calibration.to_dict(), "calibration_status": how, "models": []}
    for case in cases(given.tiny):
        try:
            found = compare(case, place, calibration, clock)
        except Exception as error:  # the other models count
            found = {"name": case.name, "status": failed(error), "rows": [], "times": {"rows": []}}
        gc.collect()
        torch.cuda.empty_cache()
        report["models"].append(found)
        report |= {"summary": summary(report["models"]), "skipped": skipped(report["models"])}
        report["seconds"] = round(clock.spent, 1)
        given.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"{report['seconds']:.0f} s: {case.name}: {found['status']}", file=sys.stderr, flush=True)
    print(shown(report))


if __name__ == "__main__":
    main()
