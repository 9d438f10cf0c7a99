"""Cards that are described rather than present, and what cannot be predicted about a card.

A *simulated* card runs a model on fake tensors with CUDA's rules and allocates nothing; an *emulated* one runs it on
the CPU under a budget of bytes. Neither has what a real card takes besides tensors:

    margin = context + workspaces + ceil(overhead * predicted)

A calibration holds these three: assumed, or measured once on the card itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch

from horizonplan.probes.card import Observed, observe
from horizonplan.probes.isolated import isolated
from horizonplan.probes.nvml import FALLBACKS, Reading, driver_version, read, seen_bytes
from horizonplan.units import parse_bytes

SCHEMA_VERSION = 1
_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Card:
    """A card that is described.

    Attributes:
        kind: ``"simulated"`` (fake tensors, CUDA's rules) or ``"emulated"`` (on the CPU, under a budget).
        memory_bytes: its memory.
    """

    kind: Literal["simulated", "emulated"]
    memory_bytes: int


def check_calibration(calibration: object) -> None:
    """See that it is one.

    Raises:
        ValueError: it is something else, the name of a file, say.
    """
    if not isinstance(calibration, Calibration):
        raise ValueError(f"calibration={calibration!r}: give a Calibration, such as Calibration.load('card.json').")


def parse_device(device: str | torch.device | None) -> Card | None:
    """A described card, or ``None`` for anything else: a real device, or none given.

    Raises:
        ValueError: the card has no memory, or what is given for it is no size.

    Example:
        >>> parse_device("simulated:24GiB"), parse_device("cuda:1")
        (Card(kind='simulated', memory_bytes=25769803776), None)
        >>> parse_device("emulated:lots")
        Traceback (most recent call last):
        ValueError: device='emulated:lots': 'lots' is not a size; write 'emulated:24GiB' or 'emulated:512MB'
    """
    kind, _, size = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("simulated", "emulated"):
        return None
    try:
        return Card(cast(Literal["simulated", "emulated"], kind), parse_bytes(size))
    except ValueError:
        message = f"device={device!r}: {size!r} is not a size; write '{kind}:24GiB' or '{kind}:512MB'"
    raise ValueError(message)


@dataclass(frozen=True)
class Calibration:
    """What a card takes besides tensors.

    Attributes:
        card: its name; ``"assumed"`` for no card in particular.
        memory_bytes: its memory.
        context_bytes: of a process that has only begun to use it.
        workspace_bytes: what libraries (cuBLAS, cuDNN) take on first use and keep. What an operator takes and gives
            back while it runs is not in it.
        overhead: reserved over allocated bytes, less one: the allocator's rounding and fragmentation.
        source: ``"assumed"`` or ``"measured"``.
        driver: version of the NVIDIA driver.
        torch_version: measured with it.
        date: of the measurement, in UTC, as YYYY-MM-DD.
    """

    card: str
    memory_bytes: int | None
    context_bytes: int
    workspace_bytes: int
    overhead: float
    source: Literal["assumed", "measured"]
    driver: str | None = None
    torch_version: str | None = None
    date: str | None = None

    def margin_bytes(self, predicted_bytes: int) -> int:
        """Bytes to leave free beside a predicted peak.

        Example:
            >>> ASSUMED.margin_bytes(2**30) / 2**20
            637.44...
        """
        return self.context_bytes + self.workspace_bytes + math.ceil(self.overhead * predicted_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON-ready values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Restore a calibration from ``to_dict``'s values.

        Raises:
            ValueError: the data are no calibration, or one of a newer horizonplan.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int) or version < 1:
            raise ValueError(
                "calibration: no schema_version in it, so this is no calibration; make one with "
                "horizonplan doctor --calibrate."
            )
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"calibration: schema_version={version} is newer than this horizonplan reads ({SCHEMA_VERSION}); "
                "upgrade it."
            )
        try:
            made = cls(**{field.name: data[field.name] for field in fields(cls)})
            sizes = made.context_bytes, made.workspace_bytes
            if not (all(isinstance(size, int) and size >= 0 for size in sizes) and 0 <= made.overhead < math.inf):
                raise ValueError(f"context_bytes, workspace_bytes = {sizes}, overhead = {made.overhead}")
            if made.source not in ("assumed", "measured"):
                raise ValueError(f"source = {made.source!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"calibration: the data are damaged ({type(error).__name__}: {error}); calibrate again."
            ) from error
        return made

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no calibration, or of a newer horizonplan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"calibration: {path} is no JSON file ({error}); calibrate again.") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


ASSUMED = Calibration(
    card="assumed",
    memory_bytes=None,
    context_bytes=512 * 2**20,
    workspace_bytes=64 * 2**20,
    overhead=0.06,
    source="assumed",
)
"""What to reckon with where no card was calibrated. These are assumptions, not measurements: no card was asked."""


def calibrate(device: str | torch.device) -> Calibration:
    """Measure a CUDA card's context, workspaces and overhead in a fresh process; takes about a minute.

    Where NVML hides this process, the whole device's bytes count, less those before: let nothing else use the card.

    Args:
        device: a real CUDA device with some 2 GiB free.

    Raises:
        ValueError: the device is no CUDA card that torch sees, or NVML shows no bytes of it.
        IsolationError: the process could not be started, failed, was killed or took longer than ten minutes.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"device='{device}': calibrating needs a CUDA card that torch sees, and this is none; run it where the "
            "card is, and bring the record here."
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    before = read(device)  # without the process to come
    seen = isolated(observe, str(device), timeout_seconds=_TIMEOUT_SECONDS).value
    made = calibration_of(before, seen)
    today = datetime.now(UTC).date().isoformat()
    return replace(made, driver=driver_version(), torch_version=torch.__version__, date=today)


def calibration_of(before: Reading, seen: Observed) -> Calibration:
    """The arithmetic of a calibration; non-torch bytes are the driver's less the allocator's reserved ones.

    Args:
        before: NVML's reading before the process began.
        seen: what the process saw.

    Raises:
        ValueError: NVML shows no bytes of the process, nor of the device.
    """
    first, how = seen_bytes(before, replace(seen.first, peak_bytes=None))  # as it was then, no peak
    worked, _ = seen_bytes(before, replace(seen.worked, peak_bytes=None))
    if first is None or worked is None:
        reason = FALLBACKS.get(how, how)
        raise ValueError(f"device: NVML shows no bytes of {seen.card}, so there is nothing to calibrate by ({reason}).")
    context = max(0, first - seen.first_reserved_bytes)
    loaded = max(0, worked - seen.worked_reserved_bytes - context)
    return Calibration(
        card=seen.card,
        memory_bytes=seen.memory_bytes,
        context_bytes=context,
        workspace_bytes=loaded + seen.kept_bytes,
        overhead=max(0.0, *(reserved / allocated - 1 for reserved, allocated in seen.peaks)),
        source="measured",
    )
