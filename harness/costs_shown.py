"""What `cost` prints: multiply-adds and parameters of methods on a backbone, without training."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cells import expand
from harness.spec import Backbone, Entry
from harness.words import counters_told, macs_told, numbers_told
from harness.yamlfile import validate

if TYPE_CHECKING:
    from harness.cost import Costs

SHORT = {"embedding": "embed", "projections": "proj", "attention": "attn", "overhead": "extra"}
KEEP_RATE = 0.7  # of what an untrained model decides image by image, as in `latency`
COUNTS = {"dense": "dense", "theoretical": "theory", "executed": "run"}


def cost_rows(
    backbone: str,
    kwargs: dict[str, Any],
    entries: list[Entry],
    image_size: int | None,
    also: list[str] | tuple[str, ...] = (),
    images: int = 2,
    counters: bool = False,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A row per method and combination of settings, by label, and a line per method that the backbone refuses. counters:
    also what common counters say."""
    chosen = [row for entry in entries for row in expand(entry)]
    import torch

    from harness import cost, models
    from harness.counters import compare_counters
    from harness.executed import CountersDisagree
    from harness.operations import UncountedOperation, check_names
    from harness.summary import authors, estimates, numbers, numbers_error
    from methods import Unsupported

    named = check_names(also)
    vit = models.build(
        validate(Backbone, {"name": backbone, "kwargs": kwargs}, "--set backbone"), None, image_size, seed=0
    ).eval()
    models.require_countable(vit, backbone)
    noise = torch.randn(images, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, Any]] = {}
    refused: list[str] = []
    for label, method in chosen:
        torch.manual_seed(0)  # what a method draws does not depend on the rows before it
        try:
            sparse = method.sparsify(vit).eval()
        except Unsupported as error:
            refused.append(f"{method.name}: not on {backbone}: {error}")
            continue
        method.calibrate(sparse, noise, KEEP_RATE)
        deployed = method.deploy(sparse)
        try:
            costs = cost.count(method, vit, sparse, deployed, noise, named)
        except (UncountedOperation, CountersDisagree) as error:
            refused.append(f"{label}: {error}")
            continue
        seen = noise if costs.executed.spread else noise[:1]
        report = method.report(sparse, noise)
        rows[label] = _row(method, backbone, costs) | {
            "convention": convention(sorted(named)), "remarks": [*report.remarks, *counters_told(costs.record())],
            "estimates": estimates(report), "numbers": numbers(report), "numbers_error": numbers_error(report),
            "authors": authors(report), **({"common_counters": compare_counters(deployed, seen)} if counters else {}),
        }  # fmt: skip
    return rows, refused


def _row(method: Any, backbone: str, costs: Costs) -> dict[str, Any]:
    record = costs.record()
    totals = {
        key: record.pop(key)
        for key in ("macs_dense", "macs_theoretical", "macs_executed", "params", "params_nonzero", "params_theoretical")
    }
    whole = {key: round(value) if value is not None else None for key, value in totals.items()}
    return (
        {"method": method.name, "settings": method.settings.model_dump(mode="json"), "backbone": backbone}
        | whole
        | record
    )


def convention(also: list[str]) -> str:
    """What counts, in words."""
    from harness.operations import ALSO

    more = ", ".join(f"{name} {ALSO[name]} per element" for name in also)
    return "one multiply-add = 1, of matrix products and convolutions" + (f"; and {more}" if more else "")


def show_costs(rows: dict[str, dict[str, Any]], as_json: bool, by: str | None = None, authors: bool = False) -> None:
    """Rows by label, as tables for people or as a JSON list for programs. by: "part" or "block" shows where it goes; authors: also how the methods' authors
    count, where that differs."""
    if as_json:
        typer.echo(json.dumps(list(rows.values()), indent=1))
        return
    console = Console(highlight=False)
    models = list(dict.fromkeys(one["name"] for row in rows.values() for one in row["estimates"]))
    table = _table(
        "method",
        "GMACs\ndense",
        "\ntheory",
        "\nrun",
        "params\ntheory",
        "\nrun",
        "\n≠ 0",
        *(f"{name}\nestimate, µs" for name in models),
    )
    for label, row in rows.items():
        errors = row["macs_error"]
        macs = [
            "n/a" if row[f"macs_{name}"] is None else macs_told(row[f"macs_{name}"], errors.get(name, 0))
            for name in COUNTS
        ]
        table.add_row(
            escape(label),
            *macs,
            *(f"{row[key] / 1e6:.3f}" for key in ("params_theoretical", "params", "params_nonzero")),
            *(_estimate(row, name) for name in models),
        )
    console.print(table)
    for label, row in rows.items():
        if by == "part":
            console.print(_by_part(label, row))
        elif by == "block":
            console.print(_by_block(label, row))
        if authors and row["authors"]:
            console.print(_by_authors(label, row["authors"]))
        if "common_counters" in row:
            console.print(_by_counters(label, row["common_counters"]))
    notes = {
        f"{label}: {numbers_told(row['numbers'], row['numbers_error'])}": None
        for label, row in rows.items()
        if row["numbers"]
    }
    notes |= {f"{label}: {line}": None for label, row in rows.items() for line in row["remarks"]}
    if authors:
        notes |= {
            f"{label}, by its authors: {row['authors']['note']}": None for label, row in rows.items() if row["authors"]
        }
    notes |= {f"{label}, {one['name']}: {one['note']}": None for label, row in rows.items() for one in row["estimates"]}
    for note in notes:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    for row in list(rows.values())[:1]:
        console.print(
            f"{row['backbone']}; per image; {row['convention']}; theory: as papers count, run: of the deployed model; parameters in millions",
            soft_wrap=True,
        )


def _estimate(row: dict[str, Any], name: str) -> str:
    return next((f"{one['microseconds']:.1f}" for one in row["estimates"] if one["name"] == name), "")


def _by_authors(label: str, count: dict[str, Any]) -> Table:
    """GMACs of each part and all as the method's authors count."""
    table = _table(f"{escape(label)}, as its authors count", "GMACs", *count["parts"])
    table.add_row("", _giga(count["macs"]), *map(_giga, count["parts"].values()))
    return table


def _by_counters(label: str, counters: list[dict[str, Any]]) -> Table:
    """GMACs by each common counter, and what makes the difference to ours."""
    from harness.counters import reasons

    table = Table(f"{escape(label)}, counted by", "GMACs", "why")
    for row in counters:
        table.add_row(row["name"], _giga(row["macs"]), escape("\n".join(reasons(row))))
    return table


def _by_part(label: str, row: dict[str, Any]) -> Table:
    """GMACs of each part: a line for dense, theory and run."""
    parts = list(dict.fromkeys(name for counted in row["parts"].values() for name in counted))
    table = _table(escape(label), *(SHORT.get(part, part) for part in parts))
    for name, counted in row["parts"].items():
        table.add_row(COUNTS[name], *(_giga(counted.get(part, 0)) for part in parts))
    return table


def _by_block(label: str, row: dict[str, Any]) -> Table:
    """GMACs of each block's parts as theory / run where they differ, else once."""
    blocks = {name: row["blocks"].get(name, row["blocks"]["executed"]) for name in ("theoretical", "executed")}
    parts = list(dict.fromkeys(name for found in blocks.values() for block in found for name in block))
    table = _table(f"{escape(label)}, block", *(SHORT.get(part, part) for part in parts))
    for index, (theory, run) in enumerate(itertools.zip_longest(*blocks.values(), fillvalue={})):
        cells = []
        for part in parts:
            both = dict.fromkeys((_giga(theory.get(part, 0)), _giga(run.get(part, 0))))
            cells.append(" / ".join(both))
        table.add_row(str(index), *cells)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, *others)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:  # a long label is broken into lines, numbers never are
        column.justify, column.no_wrap = "right", True
    return table


def _giga(macs: float | None) -> str:
    return "n/a" if macs is None else f"{macs / 1e9:.4f}"
