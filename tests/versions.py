"""Runs the tests with every minor release of torch from the oldest that pyproject.toml allows to the newest on the index: `make test-versions`.

Each has an environment of its own, .venvs/torch-X.Y, which is kept. The oldest also has the oldest timm that is allowed, the others the newest.
VERSIONS="2.10 2.13" names some; pytest's arguments may follow.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

from matrix import ROOT, Case, run_all


def main(arguments: list[str]) -> int:
    named = os.environ.get("VERSIONS", "").split()
    versions = {minor: release for minor, release in newest_of_each(available("torch"), declared("torch")).items()}
    if unknown := [minor for minor in named if minor not in versions]:
        print(
            f"torch {', '.join(unknown)}: not on the index, or older than {declared('torch')}; there are {', '.join(versions)}"
        )
        return 1
    return run_all(
        case(minor, versions[minor], arguments, minor == next(iter(versions))) for minor in named or versions
    )


def case(minor: str, torch: str, arguments: list[str], oldest: bool) -> Case:
    """The environment is made here, when it is this version's turn."""
    python = environment(minor, torch, f"timm=={declared('timm')}" if oldest else "timm")
    told = "import torch, torchvision, timm; print('torch', torch.__version__, 'torchvision', torchvision.__version__, 'timm', timm.__version__)"
    name = (
        subprocess.run([python, "-c", told], capture_output=True, text=True).stdout.strip()
        or f"torch {torch} (cannot be imported)"
    )
    return Case(name, str(python), ["-m", "not long", *arguments])


def environment(minor: str, torch: str, timm: str) -> Path:
    """The interpreter of .venvs/torch-MINOR, made or brought up to date. Every torchvision pins its torch, so the installer finds the one that goes with
    it. Where there is none, or another thing cannot be installed, it says so, and the tests cannot run there."""
    folder = ROOT / ".venvs" / f"torch-{minor}"
    python = folder / "bin" / "python"
    wanted = [f"torch=={torch}", "torchvision", timm, "-e", f"{ROOT}[test]"]
    print(f"torch {minor}: installing {' '.join(wanted[:3])}", file=sys.stderr, flush=True)
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--quiet", "--allow-existing", "--python", sys.executable, folder], check=True)
        command = ["uv", "pip", "install", "--quiet", "--upgrade", "--python", python, *wanted]
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *wanted]
    if subprocess.run(command).returncode:  # an earlier run's packages must not pass for what was asked for
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    return python


def declared(package: str) -> str:
    """The oldest release that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (
        re.fullmatch(rf"{package}>=([\d.]+)", line)
        for line in project["dependencies"]
        if line.startswith(f"{package}>=")
    )
    return found[1]


def available(package: str) -> list[str]:
    """All final releases on the index, newest first."""
    pip = (
        [sys.executable, "-m", "pip"] if find_spec("pip") else ["uv", "tool", "run", "pip"]
    )  # uv's environments have none
    command = [*pip, "index", "versions", package, "--disable-pip-version-check"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in told.splitlines() if line.startswith("Available versions:"))
    return line.removeprefix("Available versions:").replace(",", " ").split()


def newest_of_each(releases: list[str], oldest: str) -> dict[str, str]:
    """The newest patch of every minor release from `oldest` on, by minor release, oldest first. Builds with a local label, such as +cpu, are others'."""
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for release in releases:
        if re.fullmatch(r"\d+(\.\d+)+", release):
            numbers = tuple(map(int, release.split(".")))
            found[numbers[:2]] = max(numbers, found.get(numbers[:2], ()))
    start = tuple(map(int, oldest.split(".")))[:2]
    return {".".join(map(str, minor)): ".".join(map(str, found[minor])) for minor in sorted(found) if minor >= start}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
