"""What the machine says about itself while it is measured: clocks, load, throttling, power, energy.

NVIDIA's management library (nvidia-ml-py, optional) is asked for what torch does not know. Whatever cannot be found out is
None or said in words; nothing here stops a measurement.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.device import allocator
from harness.device.execution import synchronize

ENERGY_SECONDS = 5.0  # a window shorter than this is mostly the counter's own resolution
IDLE_SECONDS = 2.0
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CGROUP = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))


class Watch:
    """A context around a measurement; afterwards `conditions` says how the machine was during it. others_cores: how many cores
    other processes kept busy."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.conditions = device, dict[str, Any]()

    def __enter__(self) -> Watch:
        self._before, self._own, self._started = _counters(), time.process_time(), time.perf_counter()
        self.conditions["load_before"] = _load()
        return self

    def __exit__(self, *_: object) -> None:
        after = _counters()
        changed = {key: round(after[key] - value, 3) for key, value in self._before.items() if key in after}
        busy, own = changed.pop("busy_seconds", None), time.process_time() - self._own
        if busy is not None:
            changed["others_cores"] = round(max(busy - own, 0.0) / (time.perf_counter() - self._started), 3)
        self.conditions |= {
            "load_after": _load(),
            "threads": torch.get_num_threads(),
            "governor": _text(GOVERNOR),
            "allocator": allocator.described(),
        } | changed

    def look(self) -> None:
        """Asks the GPU, while it is still warm from work."""
        if self.device.type == "cuda":
            self.conditions["gpu"] = gpu_state(self.device)


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _counters() -> dict[str, float]:
    """Seconds since some start: throttled by the container's quota, stolen by the hypervisor, and busy with anything."""
    found = {}
    for path in CGROUP:
        fields = dict(line.split(maxsplit=1) for line in (_text(path) or "").splitlines() if " " in line)
        for name, unit in (("throttled_usec", 1e6), ("throttled_time", 1e9)):
            if name in fields:
                found["throttled_seconds"] = int(fields[name]) / unit
    first = (_text(Path("/proc/stat")) or "").split("\n")[0].split()
    if len(first) > 8 and first[0] == "cpu":
        ticks = os.sysconf("SC_CLK_TCK")
        found["stolen_seconds"] = int(first[8]) / ticks
        found["busy_seconds"] = sum(int(first[i]) for i in (1, 2, 3, 6, 7)) / ticks
    return found


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return None


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Temperature, clocks, power and why the clocks are held back, at this moment; {"unknown": reason} without NVML."""
    try:
        nvml, handle = _nvml(device)
    except RuntimeError as error:
        return {"unknown": str(error)}
    ask: dict[str, Callable[[], Any]] = {
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "throttle_reasons": lambda: hex(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    state = {}
    for name, question in ask.items():
        with contextlib.suppress(nvml.NVMLError, AttributeError):  # not every GPU and version tells everything
            state[name] = question()
    return state


class EnergyMeter:
    """Energy of a whole GPU from its own counter. RuntimeError, with the reason, where there is none that could be
    attributed to this process's work."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError("energy is read from NVIDIA GPUs only")
        self.device = device
        self._nvml, self._handle = _nvml(device)
        with contextlib.suppress(self._nvml.NVMLError):
            if self._nvml.nvmlDeviceGetMigMode(self._handle)[0]:
                raise RuntimeError("the GPU is partitioned (MIG): its counter covers other tenants, too")
        try:
            self._joules()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"the GPU has no energy counter ({error})") from None

    def _joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def idle_watts(self) -> float:
        """Power while nothing runs."""
        synchronize(self.device)
        started, before = time.perf_counter(), self._joules()
        time.sleep(IDLE_SECONDS)
        return (self._joules() - before) / (time.perf_counter() - started)

    def per_call(self, call: Callable[[], object], seconds: float = ENERGY_SECONDS) -> tuple[float, int]:
        """Joules per call, back to back for at least that many seconds, and how many calls that were."""
        calls = 0
        synchronize(self.device)
        started, before = time.perf_counter(), self._joules()
        while time.perf_counter() - started < seconds:
            call()
            calls += 1
            if calls % 8 == 0:  # or the host would run far ahead of the device
                synchronize(self.device)
        synchronize(self.device)
        return (self._joules() - before) / calls, calls


def _nvml(device: torch.device) -> tuple[Any, Any]:
    """The library and this device's handle, found by its UUID since the two count differently under CUDA_VISIBLE_DEVICES."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise RuntimeError("nvidia-ml-py is not installed (pip install nvidia-ml-py)") from None
    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except nvml.NVMLError as error:
        raise RuntimeError(f"NVML: {error}") from None
