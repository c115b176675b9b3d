"""Records: JSON files that are written once, whole, and are the only source of the leaderboard. No torch here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.hidden import hidden_part
from harness.packing import bits
from harness.spec import ROOT

ENGINE_REVISION = 2  # raised whenever a change of the harness changes training results
COUNT_REVISION = 2  # raised whenever what multiply-adds are averaged over changes: stored with counts, in no id. 1: theory over `measure.images` images
MEASURE_REVISION = 4  # raised whenever a change of the harness changes how latency is measured
REQUIRED = {  # what the leaderboard reads of a record, by its kind
    "train": ("label", "seed", "method", "settings", "revision", "weights_id", "context", "context_id", "top1", "top5", "correct",
              "test_images", "cost"),
    "measure": ("weights_id", "device", "driver", "dtype", "mode", "batch", "latency", "measure_revision"),
    "roofline": ("device", "driver", "dtype", "gemm_tflops", "copy_gbs"),
    "failure": ("reason", "message"),
}  # fmt: skip
ROUNDED = 1e-6  # by which a share in a record may differ from the exact one
STALE = 3600.0  # seconds after which nobody can still be writing a file
RETRIED = {"crash", "memory", "timeout"}  # failures that may go away by themselves


def identify(content: dict[str, Any]) -> str:
    """The id of what is described: 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Which code ran: commit and whether the tree was dirty; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # New files count (a method that is not committed yet); what a run itself writes does not.
    status = git("status", "--porcelain", "--", ".", ":!leaderboard.md", ":!results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status) if status is not None else None}


def write_atomically(path: Path, *data: bytes | memoryview) -> None:
    """Writes the pieces of data one after the other. The file is either whole or not there, whatever happens. UserError where it
    cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from error


def _write(path: Path, data: tuple[bytes | memoryview, ...]) -> None:
    if path.is_dir():
        raise IsADirectoryError(None, "is a directory")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        _tidy(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _tidy(path: Path) -> None:
    """Removes what processes left behind that were killed while they wrote this file."""
    for left in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last through a loss of power, where the system has folders that can be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Store:
    """The records of one benchmark: results/NAME/*.json; checkpoints of all benchmarks lie in results/checkpoints/."""

    results: Path
    benchmark: str

    @property
    def folder(self) -> Path:
        return self.results / self.benchmark

    def checkpoint(self, train_id: str) -> Path:
        return self.results / "checkpoints" / f"{train_id}.pt"

    def snapshots(self, weights_id: str) -> Path:
        """Folder with the states of a training that is under way."""
        return self.results / "checkpoints" / weights_id

    @property
    def artifacts(self) -> Path:
        """Folder with what phases made for several cells."""
        return self.results / "checkpoints" / "artifacts"

    def log(self, weights_id: str) -> Path:
        """The log of a training."""
        return self.results / "logs" / f"{weights_id}.jsonl"

    def read(self, record_id: str) -> dict[str, Any] | None:
        """The record of that id, or None."""
        path = self.folder / f"{record_id}.json"
        return load(path) if path.exists() else None

    def write(self, record: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{record['id']}.json", _dump(record))

    def prepare(self) -> None:
        """UserError, before anything is trained, where records could not be written."""
        probe = self.folder / ".writable"
        write_atomically(probe, b"")
        probe.unlink()

    def failures(self, record_id: str) -> list[dict[str, Any]]:
        """Earlier attempts that failed, oldest first."""
        paths = self.folder.glob(f"{record_id}.attempt*.json")
        return [load(path) for path in sorted(paths, key=_attempt_number)]

    def fail(self, record_id: str, reason: str, message: str, **content: Any) -> Path:
        """Writes ID.attemptN.json with the next N."""
        path = self.folder / f"{record_id}.attempt{len(self.failures(record_id)) + 1}.json"
        record = {"id": record_id, "kind": "failure", "reason": reason, "message": message, **content}
        write_atomically(path, _dump(record))
        return path

    def forget(self, record_id: str, weights_id: str) -> None:
        """Removes a train record, its checkpoint, and the state of a training under way."""
        (self.folder / f"{record_id}.json").unlink(missing_ok=True)
        self.checkpoint(weights_id).unlink(missing_ok=True)
        shutil.rmtree(self.snapshots(weights_id), ignore_errors=True)

    def forget_failures(self, record_id: str) -> None:
        """A cell that succeeded, or is to be tried afresh, has no failed attempts any more."""
        for path in self.folder.glob(f"{record_id}.attempt*.json"):
            path.unlink()


def _attempt_number(path: Path) -> int:
    number = path.name.split(".attempt")[-1].removesuffix(".json")
    return int(number) if number.isdigit() else 0


def load(path: Path) -> dict[str, Any]:
    """A record. UserError for a file that is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"record {path}: {(error.strerror or str(error)).lower()}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"record {path}: not valid JSON ({error}); delete it to make it again") from None
    if not isinstance(record, dict) or record.get("kind") not in REQUIRED or "id" not in record:
        raise UserError(f"record {path}: has no id and kind, so it is no record of this project")
    missing = [key for key in REQUIRED[record["kind"]] if key not in record]
    if missing:
        raise UserError(f"record {path}: lacks {missing[0]!r}; delete it to make it again")
    wrong = _wrong_accuracy(record) if record["kind"] == "train" else None
    if wrong is not None:
        raise UserError(f"record {path}: {wrong}; it was changed or damaged: delete it to make it again")
    return record


def _wrong_accuracy(record: dict[str, Any]) -> str | None:
    """What does not fit together in a train record's accuracies, beginning with the key at fault; None where all
    does."""
    images, shares = record["test_images"], {key: record[key] for key in ("top1", "top5")}
    shares |= {key: record[key] for key in ("val_top1", "ema_top1", "untrained_top1") if record.get(key) is not None}
    if type(images) is not int or images < 1:
        return f"test_images {images!r} is no number of images"
    wrong = next((key for key, share in shares.items() if type(share) not in (int, float) or not 0 <= share <= 1), None)
    if wrong is not None:
        return f"{wrong} {shares[wrong]!r} is no share from 0 to 1"
    if shares["top5"] < shares["top1"] - ROUNDED:
        return f"top5 {shares['top5']} is below top1 {shares['top1']}"
    pairs = [("top1", "correct")]
    pairs += [("untrained_top1", "untrained_correct")] if record.get("untrained_correct") is not None else []
    return next(filter(None, (_mismatch(record, shares, *pair) for pair in pairs)), None)


def _mismatch(record: dict[str, Any], shares: dict[str, float], key: str, packed: str) -> str | None:
    """What is wrong with the images that were right, or with their share."""
    try:
        found = bits(record[packed], record["test_images"]).mean()
    except ValueError as error:
        return f"{packed}: {error}"
    if key not in shares or abs(found - shares[key]) > ROUNDED:
        return f"{key} {shares.get(key)} is not the share of images in {packed}, {found:.6f}"
    return None


def load_all(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(benchmark, record) of all records, in a fixed order."""
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name != "checkpoints" and not hidden_part(path.relative_to(results)):
            yield path.parent.name, load(path)


def find(results: Path, name: str) -> Path:
    """The file of a record from its path, its id, or the beginning of its id."""
    if Path(name).suffix == ".json" and Path(name).exists():
        return Path(name)
    found = sorted(results.glob(f"*/{name}*.json")) if name and "/" not in name and "*" not in name else []
    whole = [path for path in found if ".attempt" not in path.name] or found
    if not whole:
        raise UserError(f"no record {name!r} in {results}; the ids are the file names there")
    if len({path.name for path in whole}) > 1:
        raise UserError(
            f"{len(whole)} records begin with {name!r}; give more digits: {', '.join(path.stem for path in whole[:5])}"
        )
    return whole[0]


def _dump(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
