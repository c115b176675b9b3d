"""What the leaderboard says of a difference: claimed, only shown, or doubted, by what kind of row it is."""

import copy
from pathlib import Path

import numpy as np
import pytest
from test_leaderboard import CONTEXT, train_record

from harness import render, stats
from harness.leaderboard import tables
from harness.packing import pack
from harness.records import Store

COMMITTED = Path(__file__).resolve().parent.parent / "results"
TRAINED = [{"name": "train", "kind": "train", "steps": 10}]
GIVEN = CONTEXT | {"dense_weights": "0123"}
IMAGES = 2000
FIXED = np.random.default_rng(99).random(IMAGES) < 0.8  # the answers of dense weights that are given


def changed(correct, lost=0, won=0, seed=0):
    """With so many answers changed."""
    generator, changed = np.random.default_rng(seed), correct.copy()
    changed[generator.choice(np.flatnonzero(correct), lost, replace=False)] = False
    changed[generator.choice(np.flatnonzero(~correct), won, replace=False)] = True
    return changed


def reference(seed):
    return np.random.default_rng(seed).random(IMAGES) < 0.8


def add(results, label, correct_of, seeds=(0, 1, 2), theory=0.5e9, context=CONTEXT, phases=TRAINED, method="m", **more):
    """A row; correct_of: seed to answers."""
    settings = more.pop("settings", {"label": label})
    for seed in seeds:
        record = train_record(label, method, settings, seed, correct_of(seed), context=context)
        record["cost"]["macs_theoretical"] = theory
        Store(results, "b").write(
            record | {"phases": phases} | {k: v(seed) if callable(v) else v for k, v in more.items()}
        )


def fill(results, seeds=(0, 1, 2), context=CONTEXT, dense=lambda seed: changed(reference(seed), lost=20)):
    given = context["dense_weights"]
    add(results, "dense", dense, seeds, 1e9, context, [] if given else TRAINED, "dense", settings={"continued": False})
    add(results, "dense+", reference, seeds, 1e9, context, TRAINED, "dense", settings={"continued": True})


def rows_of(results):
    (table,) = tables(results)
    return {row.label: row for row in table.rows}


def line_of(results, label):
    """The row's cell of differences in the leaderboard."""
    text = render.markdown(tables(results))
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return line.split("|")[4].strip()


def test_the_committed_seeds_support_no_claim():
    (table,) = tables(COMMITTED, "fashion-reference")
    assert not [row.label for row in table.rows if row.p_value is not None and row.p_value < 0.05]
    assert "* [" not in render.markdown([table]).split("**How to read")[0]
    standing = {row.label: row.standing for row in table.rows}
    assert {label for label, kind in standing.items() if kind == "control"} == {"dense", "dense, both budgets"}
    assert {label for label, kind in standing.items() if kind == "untrained"} == {"manual top-k 0.6, untrained"}
    assert sum(row.p_value is not None for row in table.rows) == len(table.rows) - 4


def test_a_large_loss_is_claimed_and_adjusted_for_trained_rows_alone(tmp_path):
    fill(tmp_path)
    add(tmp_path, "worse", lambda seed: changed(reference(seed), lost=300, seed=5))
    alone = rows_of(tmp_path)["worse"]
    table = np.array([changed(reference(seed), lost=300, seed=5).astype(int) - reference(seed) for seed in range(3)])
    assert alone.p_value == stats.crossed(table).p_value
    assert alone.difference_interval == stats.crossed(table).interval
    assert "* [" in line_of(tmp_path, "worse")
    add(tmp_path, "same", reference)
    assert rows_of(tmp_path)["worse"].p_value == pytest.approx(2 * alone.p_value)
    assert rows_of(tmp_path)["same"].p_value == 1
    for more in (
        {"control": True},  # a spec calls it one
        {"theory": 1e9},  # it prunes nothing
        {"phases": [{"name": "set", "kind": "transform", "steps": 0}]},  # nothing was trained
        {"phases": []},
    ):
        add(tmp_path, "another", reference, **more)
        rows = rows_of(tmp_path)
        assert rows["worse"].p_value == pytest.approx(2 * alone.p_value)
        assert rows["another"].p_value is None
        assert rows["another"].difference_interval is not None
        assert line_of(tmp_path, "another").endswith(("] control", "] untrained"))


def test_two_seeds_show_and_do_not_claim(tmp_path):
    fill(tmp_path, seeds=(0, 1))
    add(tmp_path, "worse", lambda seed: changed(reference(seed), lost=300), seeds=(0, 1))
    assert line_of(tmp_path, "worse") == "-15.00 †"
    assert rows_of(tmp_path)["worse"].p_value is None


def test_off_the_shelf_rows_are_claimed_for_their_network(tmp_path):
    fill(tmp_path, seeds=(0,), context=GIVEN, dense=lambda seed: FIXED)
    add(tmp_path, "pruned", lambda seed: changed(FIXED, lost=60, won=20), (0,), context=GIVEN, phases=[])
    row = rows_of(tmp_path)["pruned"]
    assert (row.compared_with, row.test, row.freedom) == ("dense", "mcnemar", None)
    assert row.difference == pytest.approx(-0.02)
    assert row.difference_interval == stats.paired_interval(20, 60, IMAGES)
    assert line_of(tmp_path, "pruned") == "-2.00* to dense [-2.93, -1.15] p=8.6e-06 ‡"
    assert "McNemar's exact test" in render.markdown(tables(tmp_path))
    add(tmp_path, "nearly", lambda seed: changed(FIXED, lost=6, won=4), (0,), context=GIVEN, phases=[])
    assert rows_of(tmp_path)["pruned"].p_value == pytest.approx(2 * row.p_value)  # of two rows off the shelf
    assert rows_of(tmp_path)["nearly"].p_value > 0.5


def test_seeds_without_randomness_add_nothing(tmp_path):
    fill(tmp_path, context=GIVEN, dense=lambda seed: FIXED)
    add(tmp_path, "pruned", lambda seed: changed(FIXED, lost=60, won=20), context=GIVEN, phases=[])
    add(tmp_path, "lucky", lambda seed: changed(FIXED, lost=60, won=20, seed=seed), context=GIVEN, phases=[])
    add(tmp_path, "trained", lambda seed: changed(FIXED, lost=60, won=20), context=GIVEN)
    rows = rows_of(tmp_path)
    assert rows["pruned"].difference_interval == stats.paired_interval(20, 60, IMAGES)
    assert (rows["lucky"].test, rows["lucky"].p_value) == ("crossed", None)  # random tokens: seeds differ
    assert (rows["trained"].test, rows["trained"].compared_with) == ("crossed", "dense+")


def test_untrained_rows_of_dense_networks_trained_here_have_their_chance_too(tmp_path):
    fill(tmp_path)
    add(tmp_path, "pruned", lambda seed: changed(reference(seed), lost=300), phases=[])
    row = rows_of(tmp_path)["pruned"]
    assert (row.standing, row.test, row.compared_with, row.p_value) == ("untrained", "crossed", "dense+", None)


def test_one_dense_network_trained_here_is_no_given_one(tmp_path):
    fill(tmp_path, seeds=(0,))
    add(tmp_path, "pruned", lambda seed: changed(reference(seed), lost=300), seeds=(0,), phases=[])
    assert line_of(tmp_path, "pruned") == "-15.00 † untrained"


def test_numbers_say_what_was_tested(tmp_path):
    fill(tmp_path)
    add(tmp_path, "worse", lambda seed: changed(reference(seed), lost=300))
    numbers = render.frame(tables(tmp_path)).set_index("label")
    row, worse = rows_of(tmp_path)["worse"], numbers.loc["worse"]
    assert (worse["difference_low"], worse["difference_high"]) == row.difference_interval
    assert (worse["p_value"], worse["degrees_of_freedom"], worse["test"]) == (row.p_value, row.freedom, "crossed")
    assert list(numbers.loc[["dense", "dense+", "worse"], "standing"]) == ["control", "reference", "trained"]


def remarks(results, label):
    return [line for line in rows_of(results)[label].remarks if "chance" in line]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_sparse_row_far_above_dense_plus_is_doubted(tmp_path, seeds):
    fill(tmp_path, seeds)
    add(tmp_path, "above", lambda seed: changed(reference(seed), won=200), seeds)
    add(tmp_path, "a little", lambda seed: changed(reference(seed), won=19), seeds)
    add(tmp_path, "by chance", lambda seed: changed(reference(seed), won=323, lost=300, seed=seed), seeds)
    add(tmp_path, "not sparse", lambda seed: changed(reference(seed), won=200), seeds, theory=1e9)
    (line,) = remarks(tmp_path, "above")
    assert "sparse, but 10.00 points above dense+" in line
    assert f"- above: {line}" in render.markdown(tables(tmp_path))
    assert not [
        remarks(tmp_path, label) for label in ("a little", "by chance", "not sparse") if remarks(tmp_path, label)
    ]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_row_that_training_made_worse_is_doubted(tmp_path, seeds):
    fill(tmp_path, seeds)

    def before(lost=0, won=0):
        answers = lambda seed: changed(changed(reference(seed), lost=100), lost, won, seed + 7)  # noqa: E731
        return {
            "untrained_correct": lambda seed: pack(answers(seed)),
            "untrained_top1": lambda seed: float(answers(seed).mean()),
        }

    def after(seed):
        return changed(reference(seed), lost=100)

    add(tmp_path, "worse", after, seeds, **before(won=100))
    add(tmp_path, "better", after, seeds, **before(lost=100))
    add(tmp_path, "by chance", after, seeds, **before(lost=95, won=100))
    add(tmp_path, "unknown", after, seeds, untrained_correct=None, untrained_top1=None)
    (line,) = remarks(tmp_path, "worse")
    share = np.mean([after(seed).mean() for seed in seeds])
    assert f"before (off the shelf), {100 * share:.2f} % after" in line
    assert not [remarks(tmp_path, label) for label in ("better", "by chance", "unknown") if remarks(tmp_path, label)]


def test_dense_plus_is_doubted_as_well(tmp_path):
    fill(tmp_path, seeds=(0,))
    correct = changed(reference(0), won=100)
    more = {
        "untrained_correct": pack(correct),
        "untrained_top1": float(correct.mean()),
        "settings": {"continued": True},
    }
    add(tmp_path, "dense+", reference, (0,), 1e9, CONTEXT, copy.deepcopy(TRAINED), "dense", **more)
    (line,) = remarks(tmp_path, "dense+")
    assert line.startswith("training made it worse")


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
def test_a_test_split_of_one_image_shows_and_claims_nothing(tmp_path, seeds):
    one = np.ones(1, dtype=bool)
    add(tmp_path, "dense+", lambda seed: ~one, seeds, 1e9, method="dense", settings={"continued": True})
    add(tmp_path, "sparse", lambda seed: one, seeds, untrained_correct=pack(~one), untrained_top1=0.0)
    row = rows_of(tmp_path)["sparse"]
    assert (row.difference, row.p_value) == (1.0, None)
    assert line_of(tmp_path, "sparse") == "+100.00 †"


def test_intervals_end_at_a_hundred_points():
    table = np.ones((3, 50), dtype=np.int8)
    table[:, 0] = 0
    low, high = stats.crossed(table).interval
    assert -1 <= low < 0.98 < high == 1
