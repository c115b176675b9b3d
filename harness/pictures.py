"""Draws what a record's report says: which weights, heads, neurons, tokens and attention entries were kept, and how masks moved. matplotlib is an extra."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import tokenpictures
from harness.errors import UserError
from harness.packing import unpack, unsqueeze
from harness.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
DPI = 150


def draw(record: Record, folder: Path, photos: np.ndarray | None = None) -> list[Path]:
    """Writes ID-NAME.png for everything that the record has something of; the files. photos: the images that it looked at, float [n, H, W, 3] in 0..1. UserError where matplotlib is missing, or the record
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
    record = record | {"photos": photos}
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


def write_masks(record: Record, path: Path) -> None:
    """The record's fixed attention as a .npy file, True where an entry is pruned. UserError where it has none."""
    if "attention" not in record.get("report", {}):
        raise UserError(
            f"record {record.get('id')} ({record.get('label')}): no attention masks, the same for all images, are in it"
        )
    if path.suffix != ".npy":
        raise UserError(f"--output {path}: must end in .npy")
    content = io.BytesIO()
    np.save(content, ~kept_entries(record))
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"--output {path}: {(error.strerror or str(error)).lower()}") from None


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


def _has_attention(record: Record) -> bool:
    return "attention" in record["report"]


def _has_maps(record: Record) -> bool:
    return "average" in record["report"].get("attention", {})


def _has_order(record: Record) -> bool:
    return "label" in record["report"].get("attention", {})


def _maps(figure: Figure, record: Record) -> None:
    """Averaged attention of every head, brighter is more (square root, each head's largest is white)."""
    found = record["report"]["attention"]
    maps = unsqueeze(found["average"], np.uint8, tuple(found["shape"]))
    _panels(figure, maps, "inferno", 255)


def _masks(figure: Figure, record: Record) -> None:
    """The entries of every head that are kept, black; rows are queries, columns keys."""
    _panels(figure, kept_entries(record), "binary", 1)


def _reordered(figure: Figure, record: Record) -> None:
    """The same with each head's tokens in their new order: left of the line the columns that are dense, right of it the sparser part."""
    columns = record["report"]["attention"]["global_tokens"]
    _panels(figure, _in_order(record), "binary", 1, columns)


def _in_order(record: Record) -> np.ndarray:
    found = record["report"]["attention"]
    blocks, heads, tokens, _ = found["shape"]
    places = unsqueeze(found["label"], np.int16, (blocks, heads, tokens)).argsort(axis=-1)
    kept = np.take_along_axis(kept_entries(record), places[..., :, None], axis=2)
    return np.take_along_axis(kept, places[..., None, :], axis=3)


def kept_entries(record: Record) -> np.ndarray:
    """bool [blocks, heads, queries, keys] of a record whose attention is fixed."""
    found = record["report"]["attention"]
    count = int(np.prod(found["shape"]))
    return np.unpackbits(unsqueeze(found["kept"], np.uint8), count=count).reshape(found["shape"]).astype(bool)


def _panels(figure: Figure, grids: np.ndarray, colours: str, most: float, lines: list[list[int]] | None = None) -> None:
    """A small picture for every block (down) and head (across) of grids [blocks, heads, N, N]."""
    blocks, heads = grids.shape[:2]
    side = max(0.8, 4.0 / max(blocks, heads))
    figure.set_size_inches(max(side * heads + 0.6, 4.0), side * blocks * 1.08 + 0.6)
    axes = figure.subplots(blocks, heads, squeeze=False)
    for block in range(blocks):
        for head in range(heads):
            one = axes[block, head]
            one.imshow(grids[block, head], cmap=colours, vmin=0, vmax=most, interpolation="antialiased")
            one.set(xticks=[], yticks=[])
            if lines is not None:
                one.axvline(lines[block][head] - 0.5, color="tab:red", linewidth=0.8)
            if head == 0:
                one.set_ylabel(f"block {block}", fontsize=6)
            if block == 0:
                one.set_title(f"head {head}", fontsize=6)


def _split(figure: Figure, record: Record) -> None:
    """How many of each block's entries are kept: in dense columns, and in the sparser part beside them."""
    kept, columns = _in_order(record), record["report"]["attention"]["global_tokens"]
    blocks, heads, tokens, _ = kept.shape
    dense = [sum(kept[b, h, :, : columns[b][h]].sum() for h in range(heads)) for b in range(blocks)]
    whole = heads * tokens**2
    rest = kept.sum(axis=(1, 2, 3)) - dense
    axes = figure.subplots()
    axes.bar(range(blocks), np.array(dense) / whole, label="in global columns (denser part)", color="tab:red")
    axes.bar(
        range(blocks), rest / whole, bottom=np.array(dense) / whole, label="elsewhere (sparser part)", color="0.35"
    )
    axes.set(xlabel="block", ylabel="share of attention entries kept", xticks=range(blocks))
    axes.legend(fontsize=7)


def _weights(record: Record) -> dict[str, float]:
    return {name: share for name, share in record["report"]["weight_density"].items() if name.endswith(".weight")}


PICTURES: dict[str, tuple[Callable[[Record], bool], tuple[float, float], Callable[[Figure, Record], None]]] = {
    "density": (_has_density, (6.4, 4.0), _density),
    "heads": (_has_heads, (5.0, 4.0), _heads),
    "neurons": (_has_neurons, (8.0, 3.0), _neurons),
    "tokens": (_has_tokens, (6.4, 3.6), _tokens),
    "patches": (tokenpictures.has_dropped, (4.0, 4.0), tokenpictures.paint),
    "exploration": (_has_updates, (6.4, 4.8), _exploration),
    "attention": (_has_maps, (4.0, 4.0), _maps),
    "masks": (_has_attention, (4.0, 4.0), _masks),
    "reordered": (_has_order, (4.0, 4.0), _reordered),
    "split": (_has_order, (6.4, 3.6), _split),
}
