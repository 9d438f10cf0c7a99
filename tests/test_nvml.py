"""A reading gives what NVML gives and names what it does not, whatever NVML does.

There is no card here: a fake ``pynvml`` answers, raising the exceptions of the real one, and torch is
told of cards by their UUIDs. The last test looks at a real card where there is one.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import pynvml as real
import pytest
import torch

from horizonplan.probes.nvml import FALLBACKS, Reading, driver_version, read, seen_bytes

ME, SENTINEL = os.getpid(), 2**64 - 1
CUDA = torch.device("cuda", 0)


def error(code):
    """NVML's error as pynvml raises it."""
    return real.NVMLError(getattr(real, f"NVML_ERROR_{code}"))


def answer(value):
    """A stored answer, raised if it is an exception."""
    if isinstance(value, Exception):
        raise value
    return value


def card(uuid="GPU-a", used=700, total=1000, processes=((ME, 500),), peak=None, mig=None, **more):
    """What NVML answers about one card; any answer may be an exception. ``mig``: its instances, None: not split."""
    return SimpleNamespace(uuid=uuid, used=used, total=total, processes=processes, peak=peak, mig=mig, **more)


class FakeNVML(ModuleType):
    """The part of pynvml that is used, over some cards."""

    NVMLError = real.NVMLError
    NVML_FEATURE_ENABLED = real.NVML_FEATURE_ENABLED

    def __init__(self, cards, init=None):
        super().__init__("pynvml")
        self.cards, self.init, self.open = cards, init, 0

    def nvmlInit(self):
        answer(self.init)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        instances = [instance for card in self.cards for instance in card.mig or () if instance is not None]
        found = [card for card in (*self.cards, *instances) if card.uuid == uuid]
        return found[0] if found else answer(error("NOT_FOUND"))

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetMigMode(self, handle):
        return [1, 1] if handle.mig is not None else answer(error("NOT_SUPPORTED"))

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return len(handle.mig)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        return handle.mig[index] or answer(error("NOT_FOUND"))

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=answer(handle.used), total=handle.total)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in answer(handle.processes)]

    def nvmlDeviceGetAccountingMode(self, handle):
        answer(handle.peak)
        return int(handle.peak is not None)

    def nvmlDeviceGetAccountingStats(self, handle, pid):
        return SimpleNamespace(maxMemoryUsage=handle.peak) if pid == ME else answer(error("NOT_FOUND"))


@pytest.fixture
def nvml(monkeypatch):
    """Install a fake NVML over some cards, of which torch sees those named; it must be shut after each reading."""
    fakes = []

    def install(*cards, visible=None, integrated=False, **options):
        fake = FakeNVML(cards, **options)
        fakes.append(fake)
        uuids = [c.uuid.removeprefix("GPU-") for c in cards] if visible is None else visible
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(uuid=uuids[torch.device(device).index or 0], is_integrated=integrated),
        )
        return fake

    yield install
    assert all(fake.open == 0 for fake in fakes), "nvmlInit without nvmlShutdown"


def test_reading_has_all_numbers(nvml):
    nvml(card(processes=((1, 9), (ME, 500)), peak=600))
    assert read(CUDA) == Reading(500, 700, 1000, 600, None, "NVML lists this process")
    assert read(CUDA, pid=1).process_bytes == 9


def test_card_is_found_by_uuid_whatever_torch_calls_it(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    nvml(card("GPU-first", used=1), card("GPU-second", used=2), visible=["second", "first"])
    assert [read(torch.device("cuda", i)).used_bytes for i in (0, 1)] == [2, 1]
    assert read(torch.device("cuda")).used_bytes == 2


NOTHING = {  # what keeps NVML from starting, or from knowing the card
    "LIBRARY_NOT_FOUND": "no driver",
    "DRIVER_NOT_LOADED": "no driver",
    "LIB_RM_VERSION_MISMATCH": "no driver",
    "NO_PERMISSION": "no permission",
    "FUNCTION_NOT_FOUND": "not supported",
    "UNKNOWN": "other",
}


@pytest.mark.parametrize(("code", "fallback"), NOTHING.items(), ids=NOTHING)
def test_nvml_that_does_not_start_is_named(nvml, code, fallback):
    nvml(card(), init=error(code))
    seen = read(CUDA)
    assert seen == Reading(None, None, None, None, fallback, seen.reason)
    assert "NVMLError_" in seen.reason


def test_missing_library_is_named_with_the_remedy(nvml, monkeypatch):
    nvml(card())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    seen = read(CUDA)
    assert seen.fallback == "no library"
    assert "pip install nvidia-ml-py" in seen.reason


def test_no_gpu_is_named(nvml, monkeypatch):
    nvml(card(), visible=["unknown-to-nvml"])
    assert read(CUDA).fallback == "no gpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read(CUDA).fallback == "no gpu"
    assert read(torch.device("cpu")) == Reading(None, None, None, None, "no gpu", "device is cpu")


@pytest.mark.parametrize(
    "processes",
    [((ME + 1, 500),), (), ((ME, None),), ((ME, SENTINEL),)],
    ids=["other PIDs", "none listed", "WDDM", "sentinel"],
)
def test_hidden_process_keeps_the_device_s_bytes(nvml, processes):
    nvml(card(processes=processes))
    seen = read(CUDA)
    assert seen == Reading(None, 700, 1000, None, "hidden process", seen.reason)
    assert str(ME) in seen.reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"processes": error("NO_PERMISSION")}, Reading(None, 700, 1000, None, "no permission", "")),
        ({"processes": error("NOT_SUPPORTED")}, Reading(None, 700, 1000, None, "not supported", "")),
        ({"processes": OSError("gone")}, Reading(None, 700, 1000, None, "other", "")),
        ({"used": error("NO_PERMISSION")}, Reading(500, None, None, None, "no permission", "")),
        ({"used": error("GPU_IS_LOST"), "peak": 600}, Reading(500, None, None, 600, "other", "")),
        ({"used": SENTINEL}, Reading(500, None, 1000, None, None, "")),
        ({"peak": error("NOT_SUPPORTED")}, Reading(500, 700, 1000, None, None, "")),
        ({"peak": SENTINEL}, Reading(500, 700, 1000, None, None, "")),
    ],
)
def test_one_refusal_loses_no_other_number(nvml, given, expected):
    nvml(card(**given))
    seen = read(CUDA)
    assert seen == Reading(*(getattr(expected, n) for n in list(vars(expected))[:-1]), seen.reason)


def test_unified_memory_is_named(nvml):
    nvml(card(used=error("NOT_SUPPORTED"), processes=error("NOT_SUPPORTED")))
    assert read(CUDA).fallback == "unified memory"
    nvml(card(), integrated=True)
    seen = read(CUDA)
    assert (seen.fallback, seen.process_bytes, seen.used_bytes) == ("unified memory", 500, 700)


def split(*instances):
    """A card in MIG mode: it refuses ordinary users; its instances answer. ``None``: a place without one."""
    return card("GPU-whole", used=error("NO_PERMISSION"), processes=error("NO_PERMISSION"), mig=instances)


def test_mig_instance_is_found_where_torch_names_it(nvml):
    whole = split(None, card("MIG-1", used=1), card("MIG-2", used=2))
    for named in ("MIG-2", "2"):
        nvml(whole, visible=[named])
        assert (read(CUDA).used_bytes, read(CUDA).fallback) == (2, None)


def test_mig_instance_is_found_where_the_environment_names_it(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-beef")  # the beginning of a UUID, as CUDA allows
    nvml(split(None, card("MIG-1", used=1), card("MIG-beef-2", used=2)), visible=["whole"])
    assert (read(CUDA).used_bytes, read(CUDA).fallback) == (2, None)


@pytest.mark.parametrize("visible", [None, "0", "MIG-other"])
def test_mig_instance_that_is_not_found_is_named(nvml, monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml(split(card("MIG-1")), visible=["whole"])
    seen = read(CUDA)
    assert seen == Reading(None, None, None, None, "mig", seen.reason)
    assert "CUDA_VISIBLE_DEVICES" in seen.reason


def test_shutdown_that_fails_hides_nothing(nvml, monkeypatch):
    fake = nvml(card())
    monkeypatch.setattr(fake, "nvmlShutdown", lambda: (FakeNVML.nvmlShutdown(fake), answer(error("UNKNOWN"))))
    assert read(CUDA).process_bytes == 500


def test_driver_tells_its_version_or_nothing(nvml):
    nvml()
    assert driver_version() == "580.1"
    nvml(init=error("DRIVER_NOT_LOADED"))
    assert driver_version() is None


def test_every_fallback_has_a_meaning():
    assert set(FALLBACKS) == {
        *("no gpu", "no library", "no driver", "no permission", "mig", "hidden process"),
        *("not supported", "unified memory", "other"),
    }


def reading(process=None, used=None, peak=None, fallback=None):
    return Reading(process, used, 1000, peak, fallback, "")


@pytest.mark.parametrize(
    ("before", "after", "seen"),
    [
        (reading(400, 600), reading(500, 700, 900), (900, "driver peak")),
        (reading(400, 600, 800), reading(500, 700, 900), (900, "driver peak")),
        (reading(400, 600, 900), reading(500, 700, 900), (500, "process")),  # the peak is of an earlier moment
        (reading(400, 600), reading(500, 700), (500, "process")),
        (reading(None, 600), reading(None, 700), (100, "device used minus baseline")),
        (reading(None, 600), reading(None, 500, fallback="hidden process"), (None, "hidden process")),
        (reading(), reading(None, 700, fallback="no permission"), (None, "no permission")),
        (reading(fallback="no gpu"), reading(fallback="no gpu"), (None, "no gpu")),
    ],
)
def test_bytes_of_a_probe_are_the_best_that_can_be_had(before, after, seen):
    assert seen_bytes(before, after) == seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_is_read():
    device = torch.device("cuda", torch.cuda.current_device())
    kept = torch.ones(2**26, device=device)  # 256 MiB
    torch.cuda.synchronize(device)
    seen = read(device)
    assert seen.fallback in {None, *FALLBACKS}
    if seen.fallback is None:
        assert kept.nbytes < seen.process_bytes <= seen.used_bytes <= seen.total_bytes
