"""What `list` and `show` print."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from harness.data.cards import CARD_FOLDER, load_card
from harness.spec import SPEC_FOLDER, Spec, is_survey
from harness.survey import load_survey
from harness.yamlfile import read, validate


def overview(console: Console, methods: dict[str, str]) -> None:
    """Methods (name to description), the specs in benchmarks/ and the cards in datasets/."""
    specs, surveys, cards = {}, {}, {}
    for path in sorted(SPEC_FOLDER.glob("*.yaml")):
        content, lines = read(path, "spec")
        if is_survey(content):
            surveys[path.stem] = load_survey(path).title
        else:
            specs[path.stem] = validate(Spec, content, str(path), lines).title
    for path in sorted(CARD_FOLDER.glob("*.yaml")):
        cards[path.stem] = load_card(str(path))[0].title
    for title, rows in (
        ("methods", methods),
        ("specs (benchmarks/)", specs),
        ("surveys (benchmarks/), for latency --spec", surveys),
        ("data cards (datasets/)", cards),
    ):
        console.print(title)
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            console.print(f"  {name:{width}}  {text}", markup=False, soft_wrap=True)


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
    hidden = {"correct", "untrained_correct", "raw_ms", "traceback"}
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
