"""A method's report as a record holds it: means over the images, a number per block; patterns packed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

import methods
from harness.macs import standard_error
from harness.packing import pack, squeeze
from harness.tally import Totals, scattered

MOST_ENTRIES = 2**21  # of averaged attention maps, a byte each; larger ones stay in the checkpoint


def summary(
    report: methods.Report, grid: tuple[int, int] | None = None, totals: Totals | None = None
) -> dict[str, Any]:
    """What pictures, tables and `show` know of the report. grid: the rows and columns of patches, for the kept ones. totals: of a whole split, for what is
    a mean over images; None: over the report's own."""
    errors = totals.errors if totals else _errors(report)
    report = totals.in_place_of(report) if totals else report
    return {
        "tokens": {
            kind: [_mean(getattr(block, kind)) for block in report.blocks] for kind in ("keys", "queries", "mlp")
        },
        "attention_density": [_mean(block.attention_density) if block.attention_density is not None else 1.0 for block in report.blocks],
        **_units(report),
        **_attention([block.attention for block in report.blocks]),
        "weight_density": {name: round(density, 6) for name, density in report.weight_density.items()},
        "overhead_macs": {extra.name: _mean(extra.macs) for extra in report.overhead},
        **({"remarks": list(report.remarks)} if report.remarks else {}),
        **({"estimates": estimates(report)} if report.estimates else {}),
        **({"numbers": numbers(report), "numbers_error": _numbers_error(report, errors)} if report.numbers else {}),
        **({"authors": authors(report) | {"macs_error": round(errors["authors"], 3)}} if report.authors else {}),
        **_tokens(report, grid),
    }  # fmt: skip


def numbers(report: methods.Report) -> dict[str, float]:
    """What else a paper reports of its model, means over the images."""
    return {name: round(float(value.double().mean()), 4) for name, value in report.numbers.items()}


def numbers_error(report: methods.Report) -> dict[str, float]:
    """The standard errors of these means."""
    return _numbers_error(report, _errors(report))


def _numbers_error(report: methods.Report, errors: dict[str, float]) -> dict[str, float]:
    return {name: round(errors[f"numbers.{name}"], 6) for name in report.numbers}


def _errors(report: methods.Report) -> dict[str, float]:
    return {place: standard_error(value) for place, value in scattered(report).items()}


def authors(report: methods.Report) -> dict[str, Any] | None:
    """The authors' own count, means over the images; None where there is none."""
    count = report.authors
    if count is None:
        return None
    return {
        "macs": _mean(count.macs),
        "parts": {name: _mean(macs) for name, macs in count.parts.items()},
        "note": count.note,
    }


def estimates(report: methods.Report) -> list[dict[str, Any]]:
    """What models of hardware say, by the names of their columns."""
    return [
        {"name": one.name, "cycles": one.cycles, "microseconds": round(one.microseconds, 3), "note": one.note}
        for one in report.estimates
    ]


def _mean(tensor: Tensor) -> float:
    return round(float(tensor.double().mean()), 3)


def _units(report: methods.Report) -> dict[str, Any]:
    """Per block, where a report has them: the attention density of each head, and the MLP's active neurons, packed."""
    blocks = report.blocks
    found: dict[str, Any] = {}
    if any(block.attention_density is not None or block.active_heads is not None for block in blocks):
        found["head_density"] = [_of_heads(block) for block in blocks]
    if any(block.active_neurons is not None for block in blocks):
        found["neurons"] = [
            {"of": len(block.active_neurons), "active": pack(block.active_neurons.cpu().numpy())}
            if block.active_neurons is not None
            else None
            for block in blocks
        ]
    return found


def _tokens(report: methods.Report, grid: tuple[int, int] | None) -> dict[str, Any]:
    """Which patches entered each block, for each image that was looked at: bits [blocks, images, patches]."""
    kept = [block.kept for block in report.blocks]
    images = max((len(ids) for ids in kept if ids is not None), default=0)
    if not images or grid is None:
        return {}
    bits = np.ones((len(kept), images, grid[0] * grid[1]), dtype=bool)
    for block, ids in zip(bits, kept, strict=True):
        if ids is not None:
            block[:] = False
            for one, found in zip(block, ids.expand(images, -1).cpu().numpy(), strict=True):
                one[found[found >= 0]] = True
    return {"kept_patches": {"shape": [*bits.shape[:2], *grid], "bits": squeeze(np.packbits(bits))}}


def _of_heads(block: methods.BlockReport) -> list[float] | None:
    active = 1.0 if block.active_heads is None else block.active_heads.double()
    if block.attention_density is not None:
        return [round(share, 4) for share in (block.attention_density.double().mean(dim=0) * active).tolist()]
    return None if block.active_heads is None else active.tolist()


def _attention(patterns: list[methods.FixedAttention | None]) -> dict[str, Any]:
    """Fixed masks [blocks, heads, queries, keys], where every block has one: bits; what they were made from: bytes, see `_maps`."""
    if not patterns or None in patterns:
        return {}
    kept = _stacked([one.kept for one in patterns])
    found: dict[str, Any] = {"shape": list(kept.shape), "kept": squeeze(np.packbits(kept))}
    if all(one.label is not None for one in patterns):
        found["label"] = squeeze(_stacked([one.label for one in patterns]).astype(np.int16))
        found["global_tokens"] = _stacked([one.global_tokens for one in patterns]).tolist()
    if all(one.average is not None for one in patterns) and kept.size <= MOST_ENTRIES:
        found["average"] = squeeze(_maps(_stacked([one.average for one in patterns])))
    return {"attention": found}


def _maps(average: np.ndarray) -> np.ndarray:
    """Bytes: the square root of attention, 255 for the head's largest; for pictures."""
    largest = average.max(axis=(-2, -1), keepdims=True)
    return np.round(255 * np.sqrt(average / np.where(largest > 0, largest, 1))).astype(np.uint8)


def _stacked(tensors: list[Tensor]) -> np.ndarray:
    return np.stack([tensor.cpu().numpy() for tensor in tensors])
