"""Kernels in C++ that torch does not have, compiled when they are first wanted. Without a compiler whoever wants one is told so.

They are compiled for this machine's processor. The environment variable SPARSE_VIT_BENCH_MARCH names another level, in the words of the compiler's
-march ("x86-64-v2" has vectors of 128 bits, "x86-64-v3" of 256): for seeing what other processors compute. It is read when a process first wants a
kernel, and libraries of different levels lie side by side in the cache."""

from __future__ import annotations

import contextlib
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
FLAGS = ("-O3", "-ffast-math", "-fno-finite-math-only", "-std=c++17", "-fPIC", "-c")  # what is no number must show
MARCH = "SPARSE_VIT_BENCH_MARCH"


class NoKernel(RuntimeError):
    """A kernel cannot be had here; the message is the reason, for people."""


def optional_flags() -> tuple[tuple[str, ...], ...]:
    """Flags that not every compiler and processor knows, the best first. A level that was asked for is had or refused: nothing else stands in."""
    if level := os.environ.get(MARCH):
        return ("-fopenmp", f"-march={level}"), (f"-march={level}",)
    return (
        ("-fopenmp", "-march=native", "-mprefer-vector-width=512"),
        ("-fopenmp", "-march=native"),
        ("-march=native",),
        (),
    )


# Arguments: so many pointers, so many whole numbers of 64 bits, and others.
ARGUMENTS = {
    "listed_attention": (4, 4, (ctypes.c_float, ctypes.c_int)),
    "scored_attention": (3, 4, (ctypes.c_float, ctypes.c_int, ctypes.c_int)),
    "packed_attention": (6, 5, (ctypes.c_float, ctypes.c_int)),
    "walk_back": (4, 4, (ctypes.c_int,)),
}


def listed_attention() -> ctypes._CFuncPtr:
    """`listed_attention` of listed_attention.cpp. NoKernel where it cannot be compiled."""
    return _kernel("listed_attention")


def scored_attention() -> ctypes._CFuncPtr:
    """`scored_attention` of scored_attention.cpp. NoKernel where it cannot be compiled."""
    return _kernel("scored_attention")


def packed_attention() -> ctypes._CFuncPtr:
    """`packed_attention` of packed_attention.cpp. NoKernel where it cannot be compiled."""
    return _kernel("packed_attention")


def walk_back() -> ctypes._CFuncPtr:
    """`walk_back` of walk_back.cpp. NoKernel where it cannot be compiled."""
    return _kernel("walk_back")


def _kernel(name: str) -> ctypes._CFuncPtr:
    found = _made_once(name)
    if isinstance(found, NoKernel):
        raise NoKernel(str(found))
    return found


@lru_cache
def _made_once(name: str) -> ctypes._CFuncPtr | NoKernel:
    """The function of NAME.cpp, or why there is none: what failed once in a process is not tried at every call."""
    try:
        function = getattr(_library(name), name)
    except NoKernel as reason:
        return reason
    pointers, numbers, others = ARGUMENTS[name]
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers + list(others)
    function.restype = ctypes.c_int
    return function


def _library(name: str) -> ctypes.CDLL:
    """The kernel's library, from the user's cache or made now. Its name tells source, flags, compiler and processor apart: home folders are shared."""
    compiler = next(
        (found for word in (os.environ.get("CXX"), "c++", "g++", "clang++") if word and (found := shutil.which(word))),
        None,
    )
    if compiler is None:
        raise NoKernel("a C++ compiler is needed (c++, g++, clang++ or what CXX names), and none was found")
    source = FOLDER / f"{name}.cpp"
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    told = (
        source.read_bytes(),
        (FOLDER / "rows.h").read_bytes(),
        repr((FLAGS, optional_flags(), compiler)).encode(),
        version,
        _processor(),
    )
    file = f"{name}-{hashlib.sha256(b'/'.join(told)).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-vit-bench"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder))
    except (OSError, RuntimeError):  # no home, or one that cannot be written to: compiled for this process alone
        folder = scratch = Path(tempfile.mkdtemp())
    try:
        with contextlib.suppress(OSError):  # not there, or of a machine with other libraries
            return ctypes.CDLL(str(folder / file))
        library = _compile(compiler, source, scratch / file)
        (scratch / file).replace(folder / file)
        return library
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compile(compiler: str, source: Path, made: Path) -> ctypes.CDLL:
    """Compiles and links apart: linked with -ffast-math, a library makes the whole process round tiny numbers to zero."""
    part, reason = made.with_suffix(".o"), "no message"
    for more in optional_flags():
        for command in (
            [*FLAGS, *more, str(source), "-o", str(part)],
            ["-shared", *(flag for flag in more if flag == "-fopenmp"), str(part), "-o", str(made)],
        ):
            done = subprocess.run([compiler, *command], capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                reason = (lines or [reason])[0]
                break
        else:
            try:
                return ctypes.CDLL(str(made))
            except OSError as error:
                reason = str(error)
    raise NoKernel(f"{compiler} cannot compile {source.name}: {reason[:160]}")


def _processor() -> bytes:
    try:
        flags = next(
            (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))),
            "",
        )
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()} {flags}".encode()
