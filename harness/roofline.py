"""What a device can do at most: products per second and bytes per second, measured, in one dtype."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from harness import device as devices
from harness.device import DTYPES
from harness.device.execution import NotAvailable, precision, timed, use

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # of square matrices
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes
TRIALS = 10


def key(device: torch.device, dtype: str) -> dict[str, Any]:
    """What determines the id of a roofline's record."""
    return {
        "kind": "roofline", "device": devices.name(device), "driver": devices.driver(device),
        "torch": str(torch.__version__), "dtype": dtype,
    }  # fmt: skip


@torch.inference_mode()
def measure(argument: tuple[str, str, int]) -> Iterator[dict[str, Any]]:
    """(device, dtype, threads) to one row: gemm_tflops (a multiply-add is two operations here, as in data sheets), of the best
    size; copy_gbs (bytes read plus bytes written)."""
    name, dtype, threads = argument
    torch.set_num_threads(threads)
    device = torch.device(name)
    use(device)
    try:
        with precision(device, dtype):
            yield {
                "gemm_tflops": round(_products(device, DTYPES[dtype]) / 1e12, 4),
                "copy_gbs": round(_copies(device) / 1e9, 2),
            }
    except NotAvailable as error:
        yield {"gemm_tflops": None, "copy_gbs": None, "unavailable": str(error)}


def _products(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for size in SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        best = max(best, 2 * size**3 / _seconds(device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    return best


def _copies(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _seconds(device: torch.device, call: Any) -> float:
    """The median, after three calls to get warm."""
    for _ in range(3):
        call()
    times = [timed(device, call) for _ in range(TRIALS)]
    return statistics.median(wall if inside is None else inside for wall, inside in times)
