"""Shows tables: as Markdown, as CSV, in the terminal. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from harness import freshness, surveyshown
from harness.leaderboard import Row, Table
from harness.records import write_atomically
from harness.speeds import NOISY, Timing, absences, column_names, marks
from harness.stats import LEVEL, MIN_SEEDS
from harness.surveyboard import SurveyTable
from harness.timedon import is_old, told
from harness.verdict import REALISED_LIMIT
from harness.words import macs_told, numbers_told

HEADER = """# Leaderboard

Generated from `results/` by `python bench.py leaderboard`; not edited by hand. A row is a method with its settings; rows
of one table share data, backbone, budget and recipe. Each method starts from the same dense network per seed (or, if it
trains from scratch, gets that network's budget as well) and is trained with its own losses and schedule.
"""

FOOTER = f"""
**How to read this.**
*top-1*: test accuracy of the deployed model after the last step, mean over seeds with the 95 % t-interval.
*Δ dense+*: difference in points to dense+, the dense network trained on for the same adaptation budget with the common
recipe. From {MIN_SEEDS} seeds on with a 95 % interval that allows for both sources of chance, seeds and test images, and with
a p-value (Student's t) adjusted by Holm's method for the number of trained rows in the table; `*` marks p < {LEVEL}. With
fewer seeds the difference is shown, and nothing is claimed (†). *control* (dense itself, what prunes nothing, what the
spec calls one) and *untrained* rows have an interval and no test. ‡: off the shelf, given weights and no training, the same
for every seed that was run (of one seed it is a claim about the network that this seed made): compared with dense, the network it was made from, by McNemar's exact test (adjusted for the number of such
rows) with Tango's interval; the only source of chance is the test images, so it is a claim about this network alone.
*GMACs*: multiply-adds per image, 10⁹; one multiply-add counts 1 (papers print this as "FLOPs"); matrix products and
convolutions only. *dense*: the untouched backbone. *theory*: by formula from what the method kept, all overhead included.
*run*: counted on the deployed model as it runs, by torch's dispatcher and again by fvcore, which must agree (a line says where
fvcore cannot): what is masked but not skipped shows no saving here. Where attention was chosen by measuring, a line says
which, and the most that ran counts.
Where counts depend on the image, *theory* is the mean over the whole test split and *run* over a few held-out images; ± is
the standard error over these, shown above 0.5 %. ¶: counted by an earlier rule, both over the few images that a line below names.
*latency*: median milliseconds per batch of real images; then the speed-up over the best dense network (the faster of
plain and fused attention, same dtype, batch and mode) as the median ratio of interleaved rounds, or, where the work
depends on the image, as the ratio of the mean times over the same images; then, in brackets, the share realised:
measured over theoretical speed-up, both on the images that were timed where they differ. Tables never mix devices,
torch versions, or rules of timing. dense against itself shows the noise. `?`: was not warm in time;
`~`: noisy, the 90th percentile of either network is more than {NOISY} times its median for the same work, or other
processes kept the machine busy; (b32): measured at batch 32, since memory ran out; n/a: cannot be run so, see below the
table. A row that realises less than {REALISED_LIMIT} of its theoretical
speed-up, or executes more than its formula says, has a line that says why.
*estimated*: what a model of hardware says that nobody measured; a line below says whose. It is never mixed with latency.
§: made by other code than what is here, of the same revision (the row's accuracy and counts, or this time): a line below names the rows.
◆: no other row is both at least as accurate and as cheap (GMACs run, where they depend on the image as expected for the whole
test split: more by what *theory* has more there; by the means, whatever their ±).
"""


def markdown(tables: list[Table], surveys: Sequence[SurveyTable] = ()) -> str:
    """The whole leaderboard."""
    if not tables and not surveys:
        return HEADER + "\nNo results yet: run `python bench.py`.\n"
    sections = [*map(_section, tables), *map(surveyshown.section, surveys)]
    return HEADER + "\n" + "\n".join(sections) + FOOTER + (surveyshown.FOOTER if surveys else "")


def _section(table: Table) -> str:
    notes = "".join(f"\n- {note}" for note in _notes(table))
    text = f"## {table.benchmark}: {_title(table)}\n\n{_conditions(table)}\n\n{_lines(_cells(table))}" + (
        f"{notes}\n" if notes else ""
    )
    estimates, models = _estimates(table)
    return text + (f"\n{_lines(estimates)}\n" + "".join(f"- {model}\n" for model in models) if estimates else "")


def _lines(cells: list[list[str]]) -> str:
    """A Markdown table."""
    head, *body = cells
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *body)) + "\n"


def _notes(table: Table) -> list[str]:
    """Under the table: why rows are slower than their formula, and why there are no numbers."""
    notes = [
        f"{row.label}: {line}" for row in table.rows for line in (
            numbers_told(row.numbers, row.numbers_error), *row.remarks, row.verdict, _few(row)
        ) if line
    ]  # fmt: skip
    cells = [(row.label, timing, speed) for row in table.rows for timing, speed in row.speeds.items()]
    notes += absences(cells, column_names(table.timings))
    made = [(row.label, row.method, state) for row in table.rows for state in (row.code, *row.timing_code.values())]
    return notes + freshness.notes(made)


def _few(row: Row) -> str:
    """That theory was counted before it took the whole test split."""
    return f"theory and run (¶) are means over {row.old_images} images, by an earlier rule" if row.old_images else ""


def _title(table: Table) -> str:
    data, backbone = table.context["data"], table.context["backbone"]
    return f"{backbone['name']} on {data['card']}{' (timed by an older rule)' if is_old(table.timed_on) else ''}"


def _conditions(table: Table) -> str:
    context = table.context
    budget, plan = context["budget"], context["plan"]
    limit = f", at most {budget['max_steps']} steps each" if budget["max_steps"] else ""
    sizes = ", ".join(f"{key} {value}" for key, value in context["backbone"]["kwargs"].items())
    dense = "given dense weights" if context["dense_weights"] else f"{budget['epochs']:g} epochs dense"
    text = (
        f"{context['data']['image_size']} pixels{', ' + sizes if sizes else ''}; {dense} + {budget['adapt_epochs']:g} epochs adaptation"
        f"{limit}; teacher: {context['distill']}; trained on {plan['device']} in {plan['dtype']}. "
    )
    if table.timed_on:
        kinds = [
            ", ".join(dict.fromkeys(getattr(timing, part) for timing in table.timings)) for part in ("dtype", "mode")
        ]
        text += f"{told(table.timed_on)}, {', '.join(kinds)}. "
    return text + f"`{table.context_id}`"


def _cells(table: Table) -> list[list[str]]:
    """Head and rows of a table, as text."""
    head = ["method", "seeds", "top-1 %", "Δ dense+", "GMACs dense", "theory", "run", "params M"]
    head += [f"latency, {name}" for name in column_names(table.timings).values()]
    rows = [[*_facts(row), *[_speed(row, timing) for timing in table.timings]] for row in table.rows]
    if any(row.ema_top1 is not None for row in table.rows):  # beside the raw weights' accuracy
        head.insert(3, "averaged weights %")
        for cells, row in zip(rows, table.rows, strict=True):
            cells.insert(3, f"{row.ema_top1 * 100:.2f}" if row.ema_top1 is not None else "")
    return [head, *rows]


def _estimates(table: Table) -> tuple[list[list[str]], list[str]]:
    """Head and rows of a table of what nobody measured, as text, and by whose models; empty where there is nothing of it."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.estimates))
    rows = [
        [row.label, *(f"{row.estimates[name][0]:.2f}" if name in row.estimates else "" for name in names)]
        for row in table.rows if row.estimates
    ]  # fmt: skip
    notes = list(dict.fromkeys(note for row in table.rows for _, note in row.estimates.values()))
    return ([["estimated, not measured: µs per image", *names], *rows] if rows else []), notes


def _facts(row: Row) -> list[str]:
    interval = f" ± {row.top1_interval * 100:.2f}" if row.top1_interval is not None else ""
    params = f"{row.params / 1e6:.3f}"
    if row.params_nonzero != row.params:
        params += f" ({row.params_nonzero / 1e6:.3f} non-zero)"
    return [
        row.label + (" ◆" if row.pareto else "") + freshness.mark(row.code), str(len(row.seeds)), f"{row.top1 * 100:.2f}{interval}", _difference(row),
        macs_told(row.macs_dense), *_of_images(row), params,
    ]  # fmt: skip


def _of_images(row: Row) -> list[str]:
    """The counts that may differ from image to image: theory, run."""
    mark = " ¶" if row.old_images else ""
    both = {"theoretical": row.macs_theoretical, "executed": row.macs_executed}
    return [macs_told(macs, row.macs_error.get(name, 0.0)) + mark for name, macs in both.items()]


def _difference(row: Row) -> str:
    if row.is_reference:
        return "reference"
    if row.difference is None:
        return ""
    text = f"{row.difference * 100:+.2f}"
    if row.p_value is not None and row.p_value < LEVEL:
        text += "*"
    if row.compared_with == "dense":
        text += " to dense"
    if row.difference_interval is None:
        text += " †"
    else:
        text += " [{:+.2f}, {:+.2f}]".format(*(100 * bound for bound in row.difference_interval))
    if row.p_value is None:
        return text if row.standing == "trained" else f"{text} {row.standing}"
    return f"{text} p={row.p_value:.2g}" + (" ‡" if row.test == "mcnemar" else "")


def _speed(row: Row, timing: Timing) -> str:
    speed = row.speeds.get(timing)
    if speed is None:
        return ""
    if speed.unavailable:
        return "n/a"
    return f"{speed.milliseconds:.2f} ms, {speed.speed_up:.2f}x ({speed.realised:.2f}){marks(speed, timing)}" + (
        freshness.mark(row.timing_code.get(timing, freshness.THIS))
    )


def show(tables: list[Table], console: Console, surveys: Sequence[SurveyTable] = ()) -> None:
    """The same tables in the terminal."""
    for table in tables:
        console.print(_rich(_cells(table), f"{table.benchmark}: {_title(table)}"))
        if table.timed_on:
            console.print(told(table.timed_on), markup=False, soft_wrap=True)
        for note in _notes(table):
            console.print(f"- {note}", markup=False, soft_wrap=True)
        estimates, models = _estimates(table)
        if estimates:
            console.print(_rich(estimates, None))
        for model in models:
            console.print(f"- {model}", markup=False, soft_wrap=True)
    surveyshown.show(list(surveys), console)


def _rich(cells: list[list[str]], title: str | None) -> RichTable:
    head, *body = cells
    rich = RichTable(title=title, title_justify="left")
    for index, name in enumerate(head):
        rich.add_column(escape(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in body:
        rich.add_row(*map(escape, row))
    return rich


def frame(tables: list[Table], surveys: Sequence[SurveyTable] = ()) -> pd.DataFrame:
    """One line per row and batch size, in plain numbers (MACs, milliseconds, shares)."""
    lines = []
    for table in tables:
        for row in table.rows:
            base = {
                "benchmark": table.benchmark, "context": table.context_id, "data": table.context["data"]["card"],
                "backbone": table.context["backbone"]["name"], "label": row.label, "method": row.method,
                "settings": row.settings, "seeds": len(row.seeds), "top1": row.top1, "top1_interval": row.top1_interval,
                "top5": row.top5, **_claim(row), "macs_dense": row.macs_dense,
                "macs_theoretical": row.macs_theoretical, "macs_executed": row.macs_executed, "params": row.params,
                "params_nonzero": row.params_nonzero, "pareto": row.pareto, "ema_top1": row.ema_top1,
                "training_macs": row.training_macs, "device_hours": row.device_hours, **(table.timed_on or {}),
                **{f"macs_{name}_error": error for name, error in row.macs_error.items()},
                **{f"macs_{name}_images": count for name, count in row.macs_images.items()},
                "macs_authors": row.macs_authors, **{f"report: {name}": value for name, value in row.numbers.items()},
                **{f"report: {name}, error": error for name, error in row.numbers_error.items()},
                **{f"estimated_us, {name}": value for name, (value, _) in row.estimates.items()},
                "code": freshness.public(row.code),
            }  # fmt: skip
            lines += [base | speed.numbers(timing) | _made(row, timing) for timing, speed in row.speeds.items()] or [
                base
            ]
    return pd.DataFrame(lines + surveyshown.frame_lines(list(surveys)))


def _claim(row: Row) -> dict[str, str | float | None]:
    """How a row compares, for `frame`."""
    low, high = row.difference_interval or (None, None)
    return {
        "standing": row.standing, "compared_with": None if row.is_reference else row.compared_with, "difference": row.difference,
        "difference_low": low, "difference_high": high, "p_value": row.p_value, "test": row.test,
        "degrees_of_freedom": row.freedom,
    }  # fmt: skip


def _made(row: Row, timing: Timing) -> dict[str, str]:
    return {"timing_code": freshness.public(row.timing_code.get(timing, freshness.UNRECORDED))}


def write_markdown(tables: list[Table], surveys: Sequence[SurveyTable], path: Path) -> None:
    write_atomically(path, markdown(tables, surveys).encode())


def write_csv(tables: list[Table], surveys: Sequence[SurveyTable], path: Path) -> None:
    write_atomically(path, frame(tables, surveys).to_csv(index=False, lineterminator="\n").encode())
