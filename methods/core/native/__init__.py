"""Kernels in C++ that torch does not have, compiled when they are first wanted. Without a compiler whoever wants one is told so."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-ffast-math", "-std=c++17", "-fPIC", "-c")
OPTIONAL = (
    ("-fopenmp", "-march=native", "-mprefer-vector-width=512"),
    ("-fopenmp", "-march=native"),
    ("-march=native",),
    (),
)  # not every compiler and processor knows them


class NoKernel(RuntimeError):
    """A kernel cannot be had here; the message is the reason, for people."""


@lru_cache
def listed_attention() -> ctypes._CFuncPtr:
    """`listed_attention` of listed_attention.cpp. NoKernel where it cannot be compiled."""
    try:
        function = ctypes.CDLL(str(_compiled("listed_attention"))).listed_attention
    except OSError as error:
        raise NoKernel(f"the compiled kernel cannot be loaded: {error}") from None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + [ctypes.c_float, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def _compiled(name: str) -> Path:
    """The kernel's library, from the user's cache or made now. Its name tells source, flags, compiler and processor apart: home folders are shared."""
    compiler = next(
        (found for word in (os.environ.get("CXX"), "c++", "g++", "clang++") if word and (found := shutil.which(word))),
        None,
    )
    if compiler is None:
        raise NoKernel("a C++ compiler is needed (c++, g++, clang++ or what CXX names), and none was found")
    source = FOLDER / f"{name}.cpp"
    told = (source.read_bytes(), repr((FLAGS, OPTIONAL, compiler)).encode(), _processor())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-vit-bench"
    path = folder / f"{name}-{hashlib.sha256(b'/'.join(told)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # a home that cannot be written to: compiled for this process alone
        scratch = Path(tempfile.mkdtemp())
        path = scratch / path.name
    made = scratch / "made.so"
    try:
        _compile(compiler, source, made)
        made.replace(path)
    finally:
        if scratch != path.parent:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _compile(compiler: str, source: Path, made: Path) -> None:
    """Compiles and links apart: linked with -ffast-math, a library makes the whole process round tiny numbers to zero."""
    for more in OPTIONAL:
        part = made.with_suffix(".o")
        for command in (
            [*FLAGS, *more, str(source), "-o", str(part)],
            ["-shared", *(flag for flag in more if flag == "-fopenmp"), str(part), "-o", str(made)],
        ):
            done = subprocess.run([compiler, *command], capture_output=True, text=True)
            if done.returncode:
                break
        else:
            return
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    raise NoKernel(f"{compiler} cannot compile {source.name}: {lines[0][:160]}")


def _processor() -> bytes:
    try:
        flags = next(
            (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))),
            "",
        )
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()} {flags}".encode()
