"""Shows surveys: as Markdown, in the terminal, as CSV lines. No torch here."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from harness import freshness
from harness.speeds import absences, marks
from harness.surveyboard import Line, SurveyTable
from harness.timedon import is_old, told
from harness.words import macs_told

FOOTER = """
**Surveys.** Untrained networks on random images: how fast a method is does not depend on what it has learned, as long
as it keeps as much. A line is a method under one batch size, dtype and mode; *speed-up*, *realised* and the marks are
as above. *ms* is the median call; *images/s* goes by the mean time of the images where these differ in the work they
take. Counts that depend on the image are means over a few random ones, with their standard error where it is above
0.5 %. *MB*: peak memory of weights and one eager forward. *J/image*: energy of the whole GPU, idle power included. *of
products*, *of copies*: the share of the device's own measured speed at large matrix products and copies that the line
reaches by the multiply-adds it executes
and by reading its weights once.
"""


def section(table: SurveyTable) -> str:
    """A table in Markdown."""
    head, *body = _cells(table)
    align = ["---", "---", *["---:"] * (len(head) - 2)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, align, *body)]
    found = notes(table)
    below = "\n" + "\n".join(f"- {note}" for note in found) + "\n" if found else ""
    return f"## {_title(table)}\n\n{_conditions(table)}\n\n" + "\n".join(lines) + "\n" + below


def _title(table: SurveyTable) -> str:
    sizes = "".join(f", {key} {value}" for key, value in table.backbone["kwargs"].items())
    pixels = f" at {table.image_size} pixels" if table.image_size else ""
    old = ", timed by an older rule" if is_old(table.timed_on) else ""
    return f"{table.benchmark}: {table.backbone['name']}{sizes}{pixels}, untrained{old}"


def _conditions(table: SurveyTable) -> str:
    text = f"{told(table.timed_on)}; synthetic images."
    for dtype, limit in sorted(table.limits.items()):
        text += f" Limits in {dtype}: {limit['gemm_tflops']:.3g} TFLOP/s, {limit['copy_gbs']:.4g} GB/s."
    return text


def notes(table: SurveyTable) -> list[str]:
    """Why rows are slower than their formula, and why there are no numbers."""
    found = [f"{label}: {line}" for label, line in table.verdicts.items()]
    cells = [(line.label, line.timing, line.speed) for line in table.lines]
    made = freshness.notes((line.label, line.method, line.code) for line in table.lines)
    return found + absences(cells, table.names) + made


def _cells(table: SurveyTable) -> list[list[str]]:
    with_energy = any(line.speed.joules is not None for line in table.lines)
    with_limits = any(line.of_products is not None for line in table.lines)
    head = ["conditions", "method", "GMACs theory", "run", "ms", "images/s", "speed-up", "realised", "MB"]
    head += ["J/image"] if with_energy else []
    head += ["of products", "of copies"] if with_limits else []
    return [head, *[_line(line, with_energy, with_limits) for line in table.lines]]


def _line(line: Line, with_energy: bool, with_limits: bool) -> list[str]:
    speed, timing = line.speed, line.timing
    cells = [
        f"batch {timing.batch} {timing.dtype} {timing.mode}",
        line.label,
        *map(macs_told, line.macs[1:], line.errors),
    ]
    if speed.unavailable:
        return cells + ["n/a"] * (5 + with_energy + 2 * with_limits)
    cells += [
        f"{speed.milliseconds:.2f}{marks(speed, timing)}{freshness.mark(line.code)}",
        f"{line.images_per_second:.1f}",
        f"{speed.speed_up:.2f}x ± {speed.half_width:.2f}",
    ]
    cells += [f"{speed.realised:.2f}", f"{speed.peak_bytes / 1e6:.1f}" if speed.peak_bytes else "n/a"]
    if with_energy:
        cells.append("n/a" if speed.joules is None else f"{speed.joules:.3g}")
    if with_limits:
        cells += ["n/a" if share is None else f"{share:.1%}" for share in (line.of_products, line.of_copies)]
    return cells


def show(tables: list[SurveyTable], console: Console) -> None:
    """The same in the terminal."""
    for table in tables:
        head, *body = _cells(table)
        rich = RichTable(title=_title(table), title_justify="left")
        for index, name in enumerate(head):
            rich.add_column(escape(name), justify="left" if index < 2 else "right", overflow="fold")
        last = ""
        for cells in body:
            if last and cells[0] != last:
                rich.add_section()
            rich.add_row("" if cells[0] == last else escape(cells[0]), *map(escape, cells[1:]))
            last = cells[0]
        console.print(rich)
        console.print(_conditions(table), markup=False, soft_wrap=True)
        for note in notes(table):
            console.print(f"- {note}", markup=False, soft_wrap=True)


def frame_lines(tables: list[SurveyTable]) -> list[dict[str, Any]]:
    """Plain numbers for CSV."""
    return [
        {
            "benchmark": table.benchmark, "backbone": table.backbone["name"], "image_size": table.image_size, "label": line.label,
            "macs_dense": line.macs[0], "macs_theoretical": line.macs[1], "macs_executed": line.macs[2],
            "macs_theoretical_error": line.errors[0], "macs_executed_error": line.errors[1], **table.timed_on,
            **line.speed.numbers(line.timing), "of_products": line.of_products, "of_copies": line.of_copies,
            "timing_code": freshness.public(line.code),
        }
        for table in tables for line in table.lines
    ]  # fmt: skip
