"""Runs the tests again and again in different surroundings, a line for each as it ends, and a summary."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """name: for people; python: the interpreter; environment: set on top of this process's; arguments: of pytest."""

    name: str
    python: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def run_all(cases: Iterable[Case]) -> int:
    """An exit status: 0 where every case passed. A case that fails shows pytest's last lines; the others run all the same."""
    results = {case.name: _run(case) for case in cases}
    failed = [name for name, passed in results.items() if not passed]
    print(
        f"\n{len(results) - len(failed)} of {len(results)} passed" + "".join(f"\n  failed: {name}" for name in failed)
    )
    return 1 if failed or not results else 0


def _run(case: Case) -> bool:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:  # what one torch has compiled for one processor is not for another
        done = subprocess.run(
            [case.python, "-m", "pytest", "-rf", "--tb=line", "--show-capture=no", *case.arguments],
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache} | case.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["pytest said nothing"]
    word = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
    print(f"{case.name}: {word} in {time.monotonic() - start:.0f} s: {lines[-1].strip()}", flush=True)
    if done.returncode:
        print("\n".join(f"  {line}" for line in lines[-30:]), flush=True)
    return done.returncode == 0
