"""Draws what a record's report says: which weights, heads, neurons and tokens were kept, and how masks moved. matplotlib is an extra."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import UserError
from harness.packing import unpack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
DPI = 150


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes ID-NAME.png for everything that the record has something of; the files. UserError where matplotlib is missing, or the record
    is none of a training, or keeps everything."""
    if record.get("kind") != "train" or "report" not in record:
        raise UserError(f"record {record.get('id')}: only a train record that did not fail can be drawn")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("visualize needs matplotlib: pip install -e '.[plot]'") from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {(error.strerror or str(error)).lower()}") from None
    for name, (wants, size, paint) in PICTURES.items():
        if wants(record):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure, record)
            title = f"{record['label']}, seed {record['seed']}: {name}"
            figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # no formula
            written.append(folder / f"{record['id']}-{name}.png")
            try:
                figure.savefig(written[-1], dpi=DPI)
            except OSError as error:
                raise UserError(f"--output {folder}: {(error.strerror or str(error)).lower()}") from None
    if not written:
        raise UserError(f"record {record['id']} ({record['label']}) keeps everything: there is nothing to draw")
    return written


# Each picture: whether the record has something of it, its size in inches, and how it is painted.


def _has_density(record: Record) -> bool:
    return bool(_weights(record))


def _density(figure: Figure, record: Record) -> None:
    """A line per kind of weight over the blocks; what is outside of the blocks as level lines."""
    axes = figure.subplots()
    lines: dict[str, dict[int, float]] = {}
    for name, share in _weights(record).items():
        inside = re.match(r"blocks\.(\d+)\.(.+)\.weight$", name)
        if inside:
            lines.setdefault(inside[2], {})[int(inside[1])] = share
        else:
            axes.axhline(share, linestyle=":", linewidth=1, color="0.5")
            axes.annotate(
                f"{name.removesuffix('.weight')} {share:.2f}", (0, share), fontsize=7, va="bottom", color="0.3"
            )
    for (kind, shares), marker in zip(sorted(lines.items()), "osD^v<>P*X" * 5, strict=False):
        axes.plot(list(shares), list(shares.values()), marker=marker, markersize=4, linewidth=1, label=kind)
    axes.set(xlabel="block", ylabel="density (share of weights kept)", ylim=(0, 1.05))
    axes.set_xticks(sorted({index for shares in lines.values() for index in shares}))
    if lines:
        axes.legend(fontsize=7, ncols=2)


def _has_heads(record: Record) -> bool:
    return "head_density" in record["report"]


def _heads(figure: Figure, record: Record) -> None:
    """Blocks x heads, the share of each head's attention entries that is kept; 0 is a dead head."""
    rows = record["report"]["head_density"]
    heads = max(len(row) for row in rows if row is not None)
    grid = np.array([[np.nan] * heads if row is None else [*row, *[np.nan] * (heads - len(row))] for row in rows])
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="head", ylabel="block", xticks=range(heads), yticks=range(len(rows)))
    figure.colorbar(image, label="attention entries kept")


def _has_neurons(record: Record) -> bool:
    return "neurons" in record["report"]


def _neurons(figure: Figure, record: Record) -> None:
    """Blocks x neurons: black is active."""
    rows = [(unpack(row["active"], row["of"]) if row else None) for row in record["report"]["neurons"]]
    most = max(len(row) for row in rows if row is not None)
    grid = np.zeros((len(rows), most))
    for index, row in enumerate(rows):
        grid[index, : most if row is None else len(row)] = True if row is None else row
    axes = figure.subplots()
    axes.imshow(grid, vmin=0, vmax=1, cmap="binary", aspect="auto", interpolation="nearest")
    axes.set(xlabel="MLP neuron (black: active)", ylabel="block", yticks=range(len(rows)))


def _has_tokens(record: Record) -> bool:
    return any(len(set(counts)) > 1 for counts in record["report"]["tokens"].values())


def _tokens(figure: Figure, record: Record) -> None:
    """Mean tokens of each block, as keys, as queries and in the MLP."""
    axes = figure.subplots()
    shown: list[list[float]] = []
    for kind, counts in record["report"]["tokens"].items():
        if counts not in shown:  # most methods have the same everywhere
            axes.step(range(len(counts)), counts, where="mid", marker="o", markersize=4, label=kind)
            shown.append(counts)
    axes.set(xlabel="block", ylabel="tokens (mean over images)", xticks=range(len(shown[0])))
    axes.set_ylim(bottom=0)
    if len(shown) > 1:
        axes.legend(fontsize=7)


def _has_updates(record: Record) -> bool:
    return bool(_updates(record))


def _updates(record: Record) -> list[Record]:
    return [event for phase in record["phases"] for event in phase.get("events", ()) if "explored" in event]


def _exploration(figure: Figure, record: Record) -> None:
    """How masks moved: the share of weights ever active beside the share that is, and what each update exchanged."""
    events = _updates(record)
    steps = [event["step"] for event in events]
    above, below = figure.subplots(2, sharex=True)
    for key, text in (("explored", "ever active so far"), ("density", "active")):
        _line(above, steps, [event[key] for event in events], text)
    above.set(ylabel="share of weights", ylim=(0, 1.05))
    for key, text in (("dropped", "dropped"), ("regrown", "of these, grown back at once")):
        _line(below, steps, [event[key] for event in events], text)
    below.set(xlabel="step", ylabel="connections or units")
    below.set_ylim(bottom=0)


def _line(axes: Axes, steps: list[int], values: list[float], text: str) -> None:
    axes.plot(steps, values, marker=".", markersize=3, linewidth=1, label=text)
    axes.legend(fontsize=7)


def _weights(record: Record) -> dict[str, float]:
    return {name: share for name, share in record["report"]["weight_density"].items() if name.endswith(".weight")}


PICTURES: dict[str, tuple[Callable[[Record], bool], tuple[float, float], Callable[[Figure, Record], None]]] = {
    "density": (_has_density, (6.4, 4.0), _density),
    "heads": (_has_heads, (5.0, 4.0), _heads),
    "neurons": (_has_neurons, (8.0, 3.0), _neurons),
    "tokens": (_has_tokens, (6.4, 3.6), _tokens),
    "exploration": (_has_updates, (6.4, 4.8), _exploration),
}
