"""Runs and times calls on a device: clocks, CUDA graphs, memory, numeric precision."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from harness.errors import UserError

CACHES = 2  # rotated inputs exceed the GPU's L2 cache that many times


class NotAvailable(RuntimeError):
    """A way of running that this device or model cannot do; the message is the reason, for people."""


def use(device: torch.device) -> None:
    """Makes it the current device of this process: streams, events and graph captures go by that."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, call: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds that a call took: by the wall clock, from an idle device until it is idle again; and between two events on the
    device's stream (None on the CPU). Waiting for the device to be idle is not part of it."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started, None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started, begin.elapsed_time(end) / 1e3


def record_graph(device: torch.device, model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """`model` as a CUDA graph for inputs of this shape; a call copies its input in and replays. NotAvailable elsewhere."""
    if device.type != "cuda":
        raise NotAvailable("CUDA graphs need an NVIDIA GPU")
    inside = images.clone()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # allocations and kernel choices happen before the capture
        for _ in range(3):
            model(inside)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = model(inside)
    except RuntimeError as error:
        for cause in (error, error.__context__):  # leaving a capture that ran out of memory raises another error
            if cause is not None and is_out_of_memory(cause):
                raise cause from None
        raise NotAvailable(f"cannot be captured: {str(error).splitlines()[0][:120]}") from error

    def replay(images: Tensor) -> Tensor:
        inside.copy_(images)
        graph.replay()
        return output

    replay.model = model  # the graph reads its weights: they must live as long
    return replay


@contextlib.contextmanager
def precision(device: torch.device, dtype: str) -> Iterator[None]:
    """Float32 products in full precision, or rounded to TensorFloat-32 where that is what is measured."""
    if dtype == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise NotAvailable("tf32 needs an NVIDIA GPU of the Ampere generation or later")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def cache_size(device: torch.device) -> int:
    """Bytes of the GPU's L2 cache; 0 on the CPU, whose caches new images pass through anyway."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def cold_inputs(batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches, and after them copies of all of them, again and again, until they exceed the cache CACHES times. To
    be used in turn: so every batch is used equally often, and each is out of the cache by then, as a served model's
    input is."""
    missing = CACHES * cache_size(batches[0].device)
    passes = 1 + missing // max(sum(batch.nbytes for batch in batches), 1)
    return [*batches, *(batch.clone() for _ in range(passes - 1) for batch in batches)]


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident memory


def peak_memory(device: torch.device) -> int | None:
    """Bytes allocated at most since the last reset; on the CPU the process's resident memory, None where the system does
    not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def require_compiler(device: torch.device) -> None:
    """UserError where torch.compile lacks a C++ compiler for the CPU."""
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise UserError("compile: true needs a C++ compiler on the CPU, and none was found")


@contextlib.contextmanager
def compiled_blocks(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """The model's transformer blocks compiled, if wanted: blocks that are alike share what is compiled (those with drop path are
    not). NotAvailable where there are none."""
    blocks = [module for module in model.modules() if isinstance(module, Block)] if wanted else []
    if wanted and not blocks:
        raise NotAvailable("compile: the model has none of timm's blocks")
    for block in blocks:
        block.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=4 * len(blocks) + 8) if wanted else contextlib.nullcontext():
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what is evaluated, counted and deployed is not compiled


def peak_of(device: torch.device, call: Callable[[], object]) -> int:
    """Bytes that a call needs at most besides what is allocated before it. On the CPU: of torch's tensors, without what
    kernels keep for themselves."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        reset_peak_memory(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from harness.device.observe import Observer

    with Observer() as seen:
        call()
    return seen.peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might help."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in words)


def release(device: torch.device) -> None:
    """Gives back memory that is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
