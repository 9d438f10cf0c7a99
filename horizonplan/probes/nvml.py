"""What the driver says about a card's memory, in one look through NVML, or the name of what stands in the way.

NVML sees the context and everything that torch's allocator has reserved; the allocator sees tensors only.
The two are recorded side by side. NVML is reached through ``nvidia-ml-py`` (module ``pynvml``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

FALLBACKS = {
    "no gpu": "torch sees no CUDA device, or NVML lists none with its UUID",
    "no library": "nvidia-ml-py is not installed",
    "no driver": "the NVIDIA driver or its library is missing, not loaded, or the two differ in version",
    "no permission": "the driver keeps these numbers from this user",
    "mig": "the card is split (MIG), and the instance that this process runs on was not found",
    "hidden process": "the driver does not show this process's memory (a container, or Windows' WDDM)",
    "not supported": "this board or this driver does not answer",
    "unified memory": "card and host share one memory, which NVML does not count apart",
    "other": "NVML failed in another way",
}

_REMEDIES = {
    "no library": "pip install nvidia-ml-py",
    "no driver": "see whether nvidia-smi works; after an update of the driver, restart the machine",
    "no permission": "ask for the right to read the card's counters, or run as a user who has it",
    "mig": "set CUDA_VISIBLE_DEVICES to the UUID of the MIG instance, as nvidia-smi -L prints it",
    "hidden process": "start the container with the host's PIDs (docker run --pid=host)",
    "not supported": "a newer driver may answer",
}

_NAMES = {  # of exceptions, by class: pynvml makes one for each error code
    "ImportError": "no library",
    "ModuleNotFoundError": "no library",
    "NVMLError_LibraryNotFound": "no driver",
    "NVMLError_DriverNotLoaded": "no driver",
    "NVMLError_LibRmVersionMismatch": "no driver",
    "NVMLError_NoPermission": "no permission",
    "NVMLError_NotSupported": "not supported",
    "NVMLError_FunctionNotFound": "not supported",
    "NVMLError_NotFound": "no gpu",
}

_NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, which pynvml hands through in some fields


@dataclass(frozen=True)
class Reading:
    """One look at a card; a number that could not be had is ``None``, and the others stand.

    Attributes:
        process_bytes: of this process: its context and everything its allocator reserves.
        used_bytes: of the whole device, all processes together.
        total_bytes: of the device.
        peak_bytes: the driver's own peak of this process since it began, where accounting mode is on.
        fallback: what stands in the way of a number, a key of ``FALLBACKS``; ``None`` if nothing does.
        reason: the same in words, with the remedy where there is one.
    """

    process_bytes: int | None
    used_bytes: int | None
    total_bytes: int | None
    peak_bytes: int | None
    fallback: str | None
    reason: str


def read(device: torch.device, pid: int | None = None) -> Reading:
    """Look at a CUDA device through NVML, once.

    The card is found by its UUID, since ``CUDA_VISIBLE_DEVICES`` renumbers torch's devices and not NVML's.
    Whatever NVML raises ends as a named fallback.

    Args:
        device: any torch device; what is no CUDA device reads as ``"no gpu"``.
        pid: the process to look for, as the driver numbers it; ``None``: this one.

    Example:
        >>> read(torch.device("cpu")).fallback
        'no gpu'
    """
    if device.type != "cuda":
        return _nothing("no gpu", f"device is {device.type}")
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return _nothing("no gpu", f"torch (built {built}) sees no CUDA device")
    card = torch.cuda.get_device_properties(device)
    pid = os.getpid() if pid is None else pid
    seen, trouble = _ask(partial(_with_nvml, partial(_look, card=card, pid=pid)))
    return seen if trouble is None else _nothing(*trouble)


def driver_version() -> str | None:
    """Version of the NVIDIA driver; ``None`` where NVML does not tell."""
    version, _ = _ask(partial(_with_nvml, lambda nvml: nvml.nvmlSystemGetDriverVersion()))
    return None if version is None else str(version)


def seen_bytes(before: Reading, after: Reading) -> tuple[int | None, str]:
    """The driver's bytes of a probe, from the readings before and after it, and how they were had.

    The driver's peak is of the whole life of the process, so it is this probe's only if the probe raised it.

    Returns:
        Bytes with ``"driver peak"``, ``"process"`` or ``"device used minus baseline"``, the first that can be had;
        or ``None`` with the name of what stands in the way.

    Example:
        >>> hidden = Reading(None, 700, 1000, None, "hidden process", "")
        >>> seen_bytes(Reading(None, 300, 1000, None, "hidden process", ""), hidden)
        (400, 'device used minus baseline')
    """
    if after.peak_bytes is not None and after.peak_bytes > (before.peak_bytes or 0):
        return after.peak_bytes, "driver peak"
    if after.process_bytes is not None:
        return after.process_bytes, "process"
    if before.used_bytes is not None and after.used_bytes is not None and after.used_bytes >= before.used_bytes:
        return after.used_bytes - before.used_bytes, "device used minus baseline"
    return None, after.fallback or before.fallback or "other"


def _with_nvml(question: Callable[[Any], T]) -> T:
    import pynvml

    pynvml.nvmlInit()
    try:
        return question(pynvml)
    finally:
        with suppress(Exception):  # the answer counts
            pynvml.nvmlShutdown()


def _nothing(fallback: str, reason: str) -> Reading:
    return Reading(None, None, None, None, fallback, reason)


def _trouble(error: Exception) -> tuple[str, str]:
    name = _NAMES.get(type(error).__name__, "other")
    return name, _with_remedy(name, f"{type(error).__name__}: {error}")


def _with_remedy(name: str, reason: str) -> str:
    return f"{reason}; {_REMEDIES[name]}" if name in _REMEDIES else reason


def _ask(query: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    """An answer, or what stands in its way: one question refused must not lose the others' answers."""
    try:
        return query(), None
    except Exception as error:  # whatever it is, there is no number, and the caller is told why
        return None, _trouble(error)


def _bytes(value: int | None) -> int | None:
    return None if value is None or value == _NOT_AVAILABLE else int(value)


def _look(nvml: Any, card: Any, pid: int) -> Reading:
    handle = _handle(nvml, str(card.uuid))
    if handle is None:
        return _nothing("mig", _with_remedy("mig", FALLBACKS["mig"]))
    memory, no_memory = _ask(partial(nvml.nvmlDeviceGetMemoryInfo, handle))
    listed, no_process = _ask(partial(nvml.nvmlDeviceGetComputeRunningProcesses, handle))
    peak, _ = _ask(partial(_peak, nvml, handle, pid))  # accounting is off unless an administrator turned it on
    process = next((_bytes(found.usedGpuMemory) for found in listed or () if found.pid == pid), None)
    if no_process is None and process is None:
        known = any(found.pid == pid for found in listed)
        why = f"NVML lists process {pid} without its bytes" if known else f"NVML lists no process {pid} on this card"
        no_process = "hidden process", _with_remedy("hidden process", why)
    if getattr(card, "is_integrated", False) or (no_memory is not None and no_memory[0] == "not supported"):
        no_memory = "unified memory", FALLBACKS["unified memory"]
        no_process = no_process and no_memory  # the board explains what else is missing
    return Reading(
        process,
        _bytes(memory.used) if memory is not None else None,
        _bytes(memory.total) if memory is not None else None,
        peak,
        *(no_process or no_memory or (None, "NVML lists this process")),
    )


def _peak(nvml: Any, handle: Any, pid: int) -> int | None:
    if nvml.nvmlDeviceGetAccountingMode(handle) != nvml.NVML_FEATURE_ENABLED:
        return None
    return _bytes(nvml.nvmlDeviceGetAccountingStats(handle, pid).maxMemoryUsage)


def _handle(nvml: Any, uuid: str) -> Any | None:
    """NVML's handle of the card or MIG instance that torch runs on; ``None`` if it is an instance and not found."""
    uuid = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError as error:
        if type(error).__name__ not in ("NVMLError_NotFound", "NVMLError_InvalidArgument"):
            raise
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    modes, _ = _ask(partial(nvml.nvmlDeviceGetMigMode, handle))  # cards that cannot be split do not answer
    if modes is None or modes[0] != nvml.NVML_FEATURE_ENABLED:
        return handle
    # A split card tells neither memory nor processes to ordinary users; its instances do.
    wanted = [f"MIG-{uuid}", *os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    prefixes = tuple(entry.strip() for entry in wanted if entry.strip().startswith("MIG-"))  # CUDA takes prefixes
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        instance, missing = _ask(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        if missing is None and nvml.nvmlDeviceGetUUID(instance).startswith(prefixes):
            return instance
    return None
