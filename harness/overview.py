"""What `list`, `cost` and `show` print."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cells import expand
from harness.data.cards import CARD_FOLDER, load_card
from harness.spec import SPEC_FOLDER, Backbone, Entry, Spec
from harness.yamlfile import read, validate


def overview(console: Console, methods: dict[str, str]) -> None:
    """Methods (name to description), the specs in benchmarks/ and the cards in datasets/."""
    specs, cards = {}, {}
    for path in sorted(SPEC_FOLDER.glob("*.yaml")):
        content, lines = read(path, "spec")
        specs[path.stem] = validate(Spec, content, str(path), lines).title
    for path in sorted(CARD_FOLDER.glob("*.yaml")):
        cards[path.stem] = load_card(str(path))[0].title
    for title, rows in (("methods", methods), ("specs (benchmarks/)", specs), ("data cards (datasets/)", cards)):
        console.print(title)
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            console.print(f"  {name:{width}}  {text}", markup=False, soft_wrap=True)


def cost_rows(
    backbone: str, kwargs: dict[str, Any], entries: list[Entry], image_size: int | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A row per method and combination of settings, by label, and a line per method that the backbone refuses."""
    chosen = [row for entry in entries for row in expand(entry)]
    import torch

    from harness import cost, models
    from methods import Unsupported

    vit = models.build(
        validate(Backbone, {"name": backbone, "kwargs": kwargs}, "--set backbone"), None, image_size, seed=0
    ).eval()
    models.require_countable(vit, backbone)
    images = torch.randn(2, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, Any]] = {}
    refused: list[str] = []
    for label, method in chosen:
        try:
            sparse = method.sparsify(vit).eval()
        except Unsupported as error:
            refused.append(f"{method.name}: not on {backbone}: {error}")
            continue
        costs = cost.count(method, vit, sparse, method.deploy(sparse), images)
        rows[label] = {
            "method": method.name, "settings": method.settings.model_dump(mode="json"), "backbone": backbone,
            "macs_dense": round(costs.macs_dense), "macs_theoretical": round(costs.macs_theoretical),
            "macs_executed": round(costs.macs_executed), "params": costs.params, "params_nonzero": costs.params_nonzero,
        }  # fmt: skip
    return rows, refused


def show_costs(rows: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Rows by label, as a table for people or as a JSON list for programs."""
    if as_json:
        typer.echo(json.dumps(list(rows.values()), indent=1))
        return
    table = Table("method", "GMACs dense", "theory", "run", "params M", "kept M")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for label, row in rows.items():
        macs = [f"{row[key] / 1e9:.4f}" for key in ("macs_dense", "macs_theoretical", "macs_executed")]
        table.add_row(escape(label), *macs, *(f"{row[key] / 1e6:.3f}" for key in ("params", "params_nonzero")))
    console = Console(highlight=False)
    console.print(table)
    backbone = next((row["backbone"] for row in rows.values()), "")
    console.print(
        f"{backbone}; per image; one multiply-add = 1, of matrix products and convolutions; kept: parameters not masked to zero",
        soft_wrap=True,
    )


HEADLINE = (
    "label",
    "seed",
    "id",
    "kind",
    "method",
    "settings",
    "reason",
    "message",
    "top1",
    "top5",
    "cost",
    "batch",
    "latency",
)


def show_record(record: dict[str, Any]) -> None:
    """The facts of a record; long lists are shortened."""
    hidden = {"correct", "raw_ms", "traceback"}
    order = [*(key for key in HEADLINE if key in record), *(key for key in record if key not in HEADLINE)]
    for line in _lines({key: record[key] for key in order if key not in hidden}, ""):
        typer.echo(line)
    for line in record.get("traceback", ()):
        typer.echo(f"  {line}")


def _lines(content: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in content.items():
        if key == "raw_ms":
            lines.append(f"{indent}{key}: {len(value)} samples, {min(value):g} to {max(value):g}")
        elif key == "phases":
            for phase in value:
                last = phase["curve"][-1] if phase["curve"] else {}
                lines.append(
                    f"{indent}phase {phase['name']}: {phase['steps']} steps, {phase['images']} images, {phase['seconds']:g} s, end {last}"
                )
        elif isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")] if value else []
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines
