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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import methods
from harness import same_results
from harness.errors import UserError
from harness.records import identify, load_all, provenance
from harness.same_results import Evidence
from harness.spec import ROOT
from methods.core.registry import is_builtin

WITHOUT = "No such option"  # what the command says in commits that cannot tell a fingerprint
MOST = 24  # settings at once: each is trained on every small backbone
Found = dict[str, Any]
Rows = dict[str, dict[str, Any]]  # settings by label


def with_recorded(method: str, rows: Rows, results: Path) -> tuple[Rows, int]:
    """These rows and those of the method's records, of this revision and settings; the most frequent first, MOST in all. And how many
    settings were left out."""
    count, labels = Counter(), dict[str, tuple[str, dict[str, Any]]]()
    for _, record in load_all(results):
        made = record.get("survey", record)
        if made.get("method") == method and "settings" in made and _is_current(method, made):
            count[identify(made["settings"])] += 1
            labels.setdefault(identify(made["settings"]), (record["label"], made["settings"]))
    known = {identify(settings) for settings in rows.values()}
    added = [labels[key] for key, _ in count.most_common() if key not in known]
    left, rows = max(len(rows) + len(added) - MOST, 0), dict(rows)
    for label, settings in added[: len(added) - left]:
        rows[label if label not in rows else f"{label} ({len(rows) + 1})"] = settings
    return rows, left


def _is_current(method: str, made: Found) -> bool:
    """Whether the code that is here would make a record of the same id: as things are, not with a file that is gone."""
    try:
        chosen = methods.create(method, **made["settings"])
    except ValueError:
        return False
    return made["revision"] == chosen.revision and made["settings"] == chosen.settings.model_dump(mode="json")


def compare_code(method: str, rows: Rows, against: str) -> tuple[bool, str]:
    """Whether the method's code in the working tree gives with these settings what it gave at a commit, and a line that says so.
    Where it does, the pair is written down. UserError where the two cannot be compared."""
    if not is_builtin(method):
        raise UserError(
            f"{method}: --same-results is for methods of this repository; a plug-in's records are kept by its code"
        )
    with _checkout(against) as (old_tree, commit), ThreadPoolExecutor(2) as threads:
        old, new = threads.map(lambda tree: _fingerprint(tree, method, rows, against), (old_tree, ROOT))
    if old["revision"] != new["revision"]:
        raise UserError(
            f"{method}: revision {old['revision']} at {against} and {new['revision']} here: results may differ, and have other records"
        )
    if old["digest"] == new["digest"]:
        return True, f"{method}: the same code as at {against} ({commit[:12]}); --against COMMIT compares with another"
    difference = first_difference(old["rows"], new["rows"])
    if difference is not None:
        return False, f"{method}: other results than at {against} ({commit[:12]}): {difference}"
    evidence = _evidence(method, old, new, commit)
    verb = "written to" if same_results.add(method, new["revision"], evidence) else "known already by"
    line = f"{method}: the same results as at {against} ({commit[:12]}), {_compared(evidence)}"
    return True, f"{line}; {verb} {same_results.FILE.relative_to(ROOT)}"


def _compared(evidence: Evidence) -> str:
    """How much was the same. What happened in no step, such as an update that comes later, was not compared."""
    events = sum(evidence.events.values())
    idle = ", ".join(label for label, count in evidence.events.items() if not count and events)
    compared = f"{len(evidence.rows)} {'combination' if len(evidence.rows) == 1 else 'combinations'} of settings"
    return f"{compared} and {events} events of training steps{f' (none with {idle})' if idle else ''}"


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


def _evidence(method: str, old: Found, new: Found, commit: str) -> Evidence:
    """UserError where no settings fit any of the backbones: then nothing was compared."""
    here = provenance()
    taken = {
        label: {name: found for name, found in row["backbones"].items() if "refused" not in found}
        for label, row in new["rows"].items()
    }
    rows = {label: row for label, row in new["rows"].items() if taken[label]}
    if not rows:
        raise UserError(f"{method}: fits none of the small backbones with these settings; --set takes others")
    return Evidence(
        digests=[old["digest"], new["digest"]],
        commits=[commit, f"{here['commit']}{'-dirty' if here['dirty'] else ''}"],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=new["versions"],
        rows={label: row["settings"] for label, row in rows.items()},
        events={label: _events(taken[label]) for label in rows},
        backbones=sorted({name for backbones in taken.values() for name in backbones}),
        results=hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    )


def _events(backbones: Found) -> int:
    return sum(len(log["events"]) for found in backbones.values() for log in found["training"])


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


def _fingerprint(tree: Path, method: str, rows: Rows, revision: str) -> Found:
    """What the code in a folder says of itself, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(tree / "bench.py"), "check", method, "--fingerprint-of", json.dumps(rows)],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    place = "here" if tree == ROOT else f"at {revision}"
    if WITHOUT in done.stderr:
        raise UserError(
            f"{method}: the code {place} cannot say what it gives (it is from before check --fingerprint-of); name a later commit"
        )
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise UserError(f"{method}: {place}: {lines[-1][:300]}")
