"""From records to tables: grouping, ranking, and the same bytes every time."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness import records, render
from harness.errors import UserError
from harness.leaderboard import tables
from harness.packing import pack, unpack
from harness.records import Store, identify, load_all
from harness.render import frame, markdown
from harness.speeds import Timing
from harness.verdict import not_skipped, verdict

CONTEXT = {
    "data": {"card": "tiny", "image_size": 16},
    "backbone": {"name": "vit", "kwargs": {"depth": 4}},
    "dense_weights": None,
    "budget": {"epochs": 3, "adapt_epochs": 1, "max_steps": None},
    "distill": "own",
    "plan": {"device": "cpu", "dtype": "float32"},
}


def train_record(label, method, settings, seed, correct, executed=0.5e9, context=CONTEXT, revision=1):
    content = {
        "label": label,
        "method": method,
        "settings": settings,
        "seed": seed,
        "context": context,
        "revision": revision,
    }
    record_id = identify(content)
    return content | {
        "id": record_id, "kind": "train", "weights_id": "w" + record_id, "context_id": identify(context), "top1": float(np.mean(correct)),
        "top5": 1.0, "loss": 0.1, "test_images": len(correct), "correct": pack(np.asarray(correct)), "where": {"device": "CPU"},
        "cost": {"macs_dense": 1e9, "macs_theoretical": 0.5e9, "macs_executed": executed, "params": 1000, "params_nonzero": 900},
    }  # fmt: skip


def measure_record(train, batch=8, speed_up=1.5, device="CPU X"):
    key = {
        "weights_id": train["weights_id"],
        "device": device,
        "driver": "",
        "dtype": "float32",
        "mode": "eager",
        "batch": batch,
        "measure_revision": records.MEASURE_REVISION,
    }
    dense = {"p50_ms": 10.0, "warm": True, "noise": 1.1, "peak_bytes": 1000, "operations": 100}
    deployed = dense | {"p50_ms": 10.0 / speed_up, "operations": 150}
    latency = {
        "batch": batch,
        "speed_up": speed_up,
        "speed_up_interval": [speed_up - 0.1, speed_up + 0.1],
        "deployed": deployed,
        "dense": dense,
    }
    return key | {"id": identify(key), "kind": "measure", "latency": latency}


def images(share, seed=0, count=400):
    return np.random.default_rng(seed).random(count) < share


def fill(results, seeds=(0, 1, 2), benchmark="b"):
    """dense+ at 80 %, a method 30 points below it, and one that is the same."""
    store = Store(results, benchmark)
    for seed in seeds:
        reference = images(0.8, seed)
        rows = [
            train_record(
                "dense", "dense", {"continued": False}, seed, reference & images(0.97, seed + 50), executed=1e9
            ),
            train_record("dense+", "dense", {"continued": True}, seed, reference, executed=1e9),
            train_record("worse", "m", {"rate": 0.5}, seed, reference & images(0.6, seed + 90)),
            train_record("same", "m", {"rate": 0.9}, seed, reference, executed=0.9e9),
        ]
        for row in rows:
            store.write(row)
            store.write(measure_record(row))
            store.write(measure_record(row, batch=1, speed_up=0.9))
    return store


def test_rows_are_ranked_and_compared_with_dense_plus(tmp_path):
    fill(tmp_path)
    (table,) = tables(tmp_path)
    assert [row.label for row in table.rows][-1] == "worse"
    rows = {row.label: row for row in table.rows}
    assert rows["dense+"].is_reference
    assert rows["dense+"].difference is None
    assert rows["same"].difference == 0
    assert rows["same"].p_value == 1
    low, high = rows["worse"].difference_interval
    assert low < rows["worse"].difference < high < -0.2
    assert rows["worse"].p_value < 0.05
    assert [rows[name].pareto for name in ("same", "dense+", "worse", "dense")] == [True, False, True, False]
    assert [timing.batch for timing in table.timings] == [1, 8]
    assert rows["worse"].speeds[Timing("float32", 8, "eager")].speed_up == 1.5
    assert rows["worse"].speeds[Timing("float32", 8, "eager")].realised == pytest.approx(0.75)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (2, 5, 7), (1, 3, 9, 4)])
def test_the_reference_is_the_reference_in_any_order_of_ids(tmp_path, seeds):
    fill(tmp_path, seeds=seeds)
    (table,) = tables(tmp_path)
    assert [row.label for row in table.rows if row.is_reference] == ["dense+"]


def test_nothing_is_claimed_from_two_seeds(tmp_path):
    fill(tmp_path, seeds=(0, 1))
    (table,) = tables(tmp_path)
    row = next(row for row in table.rows if row.label == "worse")
    assert row.difference < -0.2
    assert row.p_value is None
    assert f"{row.difference * 100:+.2f} †" in render.markdown([table])


def test_averaged_weights_have_a_column_where_there_are_any(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    (table,) = tables(tmp_path)
    assert "averaged weights" not in render.markdown([table])
    record = next(record for record in records_of(tmp_path) if record.get("label") == "same")
    store.write(
        record
        | {"ema_top1": 0.8765, "phases": [{"macs": 2e9, "device_hours": 0.5}, {"macs": 1e9, "device_hours": 0.25}]}
    )
    (table,) = tables(tmp_path)
    head = next(line for line in render.markdown([table]).splitlines() if line.startswith("| method"))
    line = next(line for line in render.markdown([table]).splitlines() if line.startswith("| same"))
    assert head.split("|")[4].strip() == "averaged weights %"
    assert line.split("|")[4].strip() == "87.65"
    numbers = render.frame([table]).set_index("label").loc["same"].iloc[0]
    assert (numbers["training_macs"], numbers["device_hours"]) == (3e9, 0.75)


def test_the_same_records_give_the_same_bytes(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "two", seeds=(2, 0, 1))
    assert render.markdown(tables(tmp_path / "one")) == render.markdown(tables(tmp_path / "two"))
    frames = [render.frame(tables(tmp_path / name)).to_csv() for name in ("one", "two")]
    assert frames[0] == frames[1]


def test_what_cannot_be_compared_is_in_tables_of_its_own(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    store.write(
        train_record("long", "m", {}, 0, images(0.9), context=CONTEXT | {"budget": CONTEXT["budget"] | {"epochs": 9}})
    )
    fill(tmp_path, seeds=(0,), benchmark="other")
    found = tables(tmp_path)
    assert sorted((table.benchmark, len(table.rows)) for table in found) == [("b", 1), ("b", 4), ("other", 4)]
    assert [table.benchmark for table in tables(tmp_path, "other")] == ["other"]


def test_tables_never_mix_devices(tmp_path):
    store = Store(tmp_path, "b")
    row = train_record("dense+", "dense", {"continued": True}, 0, images(0.8))
    store.write(row)
    store.write(measure_record(row, device="CPU X"))
    store.write(measure_record(row, device="GPU Y", speed_up=3.0))
    found = tables(tmp_path)
    assert [table.timed_on["device"] for table in found] == ["CPU X", "GPU Y"]
    assert [table.rows[0].speeds[Timing("float32", 8, "eager")].speed_up for table in found] == [1.5, 3.0]


def test_only_the_newest_revision_of_a_method_is_shown(tmp_path):
    store = Store(tmp_path, "b")
    store.write(train_record("m", "m", {}, 0, images(0.2), revision=1))
    store.write(train_record("m", "m", {}, 0, images(0.9), revision=2))
    (table,) = tables(tmp_path)
    assert len(table.rows) == 1
    assert table.rows[0].top1 > 0.8


def test_a_seed_counts_once(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    for record in list(records_of(tmp_path)):
        if record["kind"] == "train":
            store.write(record | {"id": "f" + record["id"][1:]})
    (table,) = tables(tmp_path)
    assert all(row.seeds == [0] and row.p_value is None for row in table.rows)


def records_of(results):
    return [record for _, record in load_all(results)]


def test_an_empty_folder_says_what_to_do(tmp_path):
    assert "run `python bench.py`" in render.markdown(tables(tmp_path))


def test_every_row_has_as_many_cells_as_the_head(tmp_path):
    store = fill(tmp_path)
    store.write(train_record("not timed", "n", {}, 0, images(0.5)))
    lines = [line for line in render.markdown(tables(tmp_path)).split("\n") if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert len({line.count("|") for line in lines}) == 1
    console = Console(width=200, record=True, file=io.StringIO())
    render.show(tables(tmp_path), console)
    assert "not timed" in console.export_text()


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_packed_images_come_back(correct):
    assert unpack(pack(np.array(correct)), len(correct)).tolist() == correct


def test_a_verdict_says_what_is_not_skipped_or_where_the_time_goes():
    masked = not_skipped(10e9, 6e9, 10e9, {})
    assert "masked, not skipped" in masked
    parts = {"theoretical": {"attention": 1e9, "mlp": 3e9}, "executed": {"attention": 3e9, "mlp": 3e9}}
    partly = not_skipped(10e9, 4e9, 6e9, parts)
    assert "attention (3.0000 G run, 1.0000 in theory)" in partly
    assert "mlp" not in partly
    assert not_skipped(10e9, 6e9, 6.05e9, {}) is None
    assert verdict(None, {"batch 1": 0.81}, None) is None
    assert "realised 0.79 at batch 1: all that is counted is skipped" in verdict(
        None, {"batch 1": 0.79, "batch 8": 0.9}, (100, 150)
    )
    assert verdict(masked, {"batch 8": 0.6}, None) == f"{masked}; realised 0.60 at batch 8"


def test_marks_and_what_is_missing(tmp_path):
    store = Store(tmp_path, "b")
    row = train_record("dense+", "dense", {"continued": True}, 0, images(0.8), executed=0.5e9)
    store.write(row)
    noisy = measure_record(row, batch=64)
    noisy["latency"]["deployed"] |= {"noise": 1.3, "warm": False}
    noisy["latency"]["batch"] = 32
    store.write(noisy)
    graph = measure_record(row, batch=64) | {
        "mode": "cudagraph",
        "id": "other",
        "latency": {"batch": 64, "unavailable": "no GPU"},
    }
    store.write(graph)
    text = markdown(tables(tmp_path))
    assert "1.50x (0.75) ? ~ (b32)" in text
    assert "latency, batch 64 cudagraph" in text
    assert "- batch 64 cudagraph, all rows: n/a, no GPU" in text
    assert "realised 0.75 at batch 64 eager" in text
    numbers = frame(tables(tmp_path))
    assert list(numbers["measured_batch"].dropna()) == [32]
    assert list(numbers["unavailable"].dropna()) == ["no GPU"]


def test_seeds_share_a_cell_by_their_median(tmp_path):
    store = Store(tmp_path, "b")
    for seed, speed_up in enumerate((1.2, 1.4, 9.0)):
        row = train_record("dense+", "dense", {"continued": True}, seed, images(0.8, seed))
        store.write(row)
        store.write(measure_record(row, speed_up=speed_up))
    (table,) = tables(tmp_path)
    assert table.rows[0].speeds[Timing("float32", 8, "eager")].speed_up == 1.4


def test_records_of_an_older_way_of_measuring_are_refused(tmp_path):
    row = train_record("dense+", "dense", {"continued": True}, 0, images(0.8))
    old = measure_record(row)
    del old["measure_revision"]
    Store(tmp_path, "b").write(old)
    with pytest.raises(UserError, match="lacks 'measure_revision'; delete it to make it again"):
        tables(tmp_path)
