"""The suite of benchmarks/perf still runs: every piece once, untimed, with its own checks."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
def test_every_piece_runs():
    command = "-m pytest benchmarks/perf --benchmark-disable --device cpu -p no:cacheprovider"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
