"""Rehearses other processors on this one: `make test-rounding`.

Libraries choose instructions by what the processor has, and so sum in other orders elsewhere. Each of them can be told to pretend: torch's own loops
(ATEN_CPU_CAPABILITY), MKL's matrix products (MKL_CBWR fixes the order, MKL_ENABLE_INSTRUCTIONS limits the instructions), oneDNN's (ONEDNN_MAX_CPU_ISA)
and the benchmark's kernels (SPARSE_VIT_BENCH_MARCH). The tests marked `rounding` must pass under all of these; pytest's arguments may follow, such as
-m "not long" for the whole suite.
"""

from __future__ import annotations

import platform
import sys

from matrix import Case, run_all

OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "SPARSE_VIT_BENCH_MARCH": "x86-64-v2",
}
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "SPARSE_VIT_BENCH_MARCH": "x86-64-v3",
}
SETTINGS = [
    *({name: value} for settings in (OLD, AVX2) for name, value in settings.items()),
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"OMP_NUM_THREADS": "1"},
    AVX2,
    OLD,
]


def main(arguments: list[str]) -> int:
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"the settings are those of x86-64 processors; this one is {platform.machine()}")
        return 1
    wanted = ["-m", "rounding and not long", *arguments]  # a second -m takes the place of the first
    return run_all(
        Case(" ".join(f"{name}={value}" for name, value in settings.items()), sys.executable, wanted, settings)
        for settings in SETTINGS
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
