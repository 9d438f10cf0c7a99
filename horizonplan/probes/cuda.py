"""What CUDA's allocator and NVML say about this process's memory; ``None`` where they say nothing.

NVML sees the context and everything the allocator has reserved; the allocator sees tensors only.
The two are recorded side by side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceBytes:
    """NVML's bytes of this process, or why there are none."""

    bytes: int | None
    reason: str


def nvml_bytes(device: torch.device) -> DeviceBytes:
    """Bytes of this process on a CUDA device as NVML counts them; the device is matched by its UUID."""
    if device.type != "cuda":
        return DeviceBytes(None, f"device is {device.type}")
    try:
        import pynvml
    except ImportError:
        return DeviceBytes(None, "nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return DeviceBytes(None, f"NVML: {error}")
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                used = process.usedGpuMemory
                return DeviceBytes(used, "NVML process bytes" if used is not None else "NVML hides process bytes here")
        return DeviceBytes(None, "NVML lists no process with this PID (a container?)")
    except pynvml.NVMLError as error:
        return DeviceBytes(None, f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()
