"""Does changed code give the same results? Runs a method in the working tree and in a commit's, and compares to the bit."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import same_results
from harness.errors import UserError
from harness.records import provenance
from harness.same_results import Evidence
from harness.spec import ROOT
from methods.core.registry import is_builtin

WITHOUT = "No such option"  # what the command says in commits that cannot tell a fingerprint
Found = dict[str, Any]


def compare_code(method: str, sets: list[str], against: str) -> tuple[bool, str]:
    """Whether the method's code in the working tree gives what it gave at a commit, and a line that says so. Where it does, the pair
    is written down. UserError where the two cannot be compared."""
    if not is_builtin(method):
        raise UserError(
            f"{method}: --same-results is for methods of this repository; a plug-in's records are kept by its code"
        )
    with _checkout(against) as (old_tree, commit), ThreadPoolExecutor(2) as threads:
        old, new = threads.map(lambda tree: _fingerprint(tree, method, sets, against), (old_tree, ROOT))
    if old["revision"] != new["revision"]:
        raise UserError(
            f"{method}: revision {old['revision']} at {against} and {new['revision']} here: results may differ, and have other records"
        )
    if old["digest"] == new["digest"]:
        return True, f"{method}: the same code as at {against} ({commit[:12]}); --against COMMIT compares with another"
    difference = first_difference(old["rows"], new["rows"])
    if difference is not None:
        return False, f"{method}: other results than at {against} ({commit[:12]}): {difference}"
    added = same_results.add(method, new["revision"], _evidence(old, new, commit))
    verb = "written to" if added else "known already by"
    return (
        True,
        f"{method}: the same results as at {against} ({commit[:12]}), {verb} {same_results.FILE.relative_to(ROOT)}",
    )


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """What differs first, by its place; None where nothing does."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{where}: {_short(old)} there, {_short(new)} here"
    places = (first_difference(one, other, f"{where}, {key}".lstrip(", ")) for key, one, other in pairs)
    return next((place for place in places if place is not None), None)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _evidence(old: Found, new: Found, commit: str) -> Evidence:
    here = provenance()
    rows = new["rows"]
    taken = {name for row in rows.values() for name, found in row["backbones"].items() if "refused" not in found}
    return Evidence(
        digests=[old["digest"], new["digest"]],
        commits=[commit, f"{here['commit']}{'-dirty' if here['dirty'] else ''}"],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=new["versions"],
        rows={label: row["settings"] for label, row in rows.items()},
        backbones=sorted(taken),
        results=hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    )


@contextlib.contextmanager
def _checkout(revision: str) -> Iterator[tuple[Path, str]]:
    """A folder with the files of a commit, and its full name; the folder is gone afterwards."""
    commit = _git(
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        f"{revision}^{{commit}}",
        failed=f"--against {revision}: no such commit",
    )
    with tempfile.TemporaryDirectory(prefix="sparse-vit-bench-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit, failed="git cannot check a commit out")
        try:
            yield tree, commit
        finally:
            _git("worktree", "remove", "--force", str(tree), failed="git cannot remove what it checked out")


def _git(*arguments: str, failed: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--same-results needs git ({error.strerror})") from None
    if done.returncode:
        raise UserError(f"{failed}{': ' if done.stderr.strip() else ''}{' '.join(done.stderr.split())[:200]}")
    return done.stdout.strip()


def _fingerprint(tree: Path, method: str, sets: list[str], revision: str) -> Found:
    """What the code in a folder says of itself, in a process of its own."""
    options = [part for override in sets for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, str(tree / "bench.py"), "check", method, "--fingerprint", *options],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    place = "here" if tree == ROOT else f"at {revision}"
    if WITHOUT in done.stderr:
        raise UserError(
            f"{method}: the code {place} cannot say what it gives (it is from before check --fingerprint); name a later commit"
        )
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise UserError(f"{method}: {place}: {lines[-1][:300]}")
