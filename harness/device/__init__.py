"""The device layer, the one place that knows CUDA: which device, which dtype and attention kernel to train with, names.

`execution` runs and times calls, `sensors` asks the machine how it is doing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import nn

from harness.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """Where and how cells are trained: part of a train record's identity, so a rule and not a measurement decides."""

    device: torch.device
    dtype: str  # of autocast; float32: none
    fused_attention: bool
    compiled: bool = False  # by torch.compile, block by block

    @property
    def identity(self) -> dict[str, Any]:
        attention = "fused" if self.fused_attention else "plain"
        return {
            "device": self.device.type, "dtype": self.dtype, "attention": attention, "compiled": self.compiled,
        }  # fmt: skip

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])


def plan(device: str, dtype: str, compiled: bool = False) -> Plan:
    """The plan for a device name ("auto", "cpu", "cuda", "cuda:1") and a dtype ("auto" or a name).

    CPUs train with plain attention, in bfloat16 where they multiply it in hardware tiles (AMX) and in float32 elsewhere:
    a 96-wide ViT trained 2.7 times faster that way on a CPU with AMX, and 1.4 times slower on one without. UserError for
    a device that is not there.
    """
    chosen = find(device)
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if chosen.type == "cuda" else _has_amx()
        dtype = "bfloat16" if fast else "float32"
    return Plan(chosen, dtype, chosen.type == "cuda", compiled)


def find(device: str) -> torch.device:
    """The device of that name ("auto", "cpu", "cuda", "cuda:1"). UserError where it is not there."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise UserError(f"device {device!r}: must be auto, cpu, cuda or cuda:N") from None
    if found.type not in {"cpu", "cuda"}:
        raise UserError(f"device {device!r}: only cpu and cuda are supported")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found if found.type == "cpu" else torch.device("cuda", found.index or 0)


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def set_attention(model: nn.Module, fused: bool) -> None:
    """Makes every timm attention in the model use the fused kernel, or the plain one."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def name(device: torch.device) -> str:
    """The device's name, as tables show it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def driver(device: torch.device) -> str:
    """What a measurement depends on besides the device: the CUDA version torch was built for; empty on the CPU."""
    return f"cuda {torch.version.cuda}" if device.type == "cuda" else ""


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def where(device: torch.device) -> dict[str, Any]:
    """For records: the machine, threads and packages of this process (not part of any hash)."""
    packages = {package: importlib.metadata.version(package) for package in ("torch", "timm", "fvcore")}
    packages["python"] = platform.python_version()
    return {
        "device": name(device), "driver": driver(device), "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None, "packages": packages,
    }  # fmt: skip
