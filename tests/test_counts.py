"""Tables say over how many images counts are means, and with which error: of today's records and of older ones."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_leaderboard import images, train_record

from harness import counts, surveyshown
from harness.cost import Costs
from harness.leaderboard import tables
from harness.macs import Count
from harness.records import COUNT_REVISION, MEASURE_REVISION, Store, identify
from harness.render import frame, markdown, show
from harness.surveyboard import surveys
from harness.words import macs_told, numbers_told

OLD = {"macs_images": 8, "macs_spread": {"dense": 0, "theoretical": 40_000_000, "executed": 1_000_000}}
NEW = {
    "macs_images": {"theoretical": 2000, "executed": 8},
    "macs_error": {"theoretical": 1_500_000, "executed": 15_000_000},
    "count_revision": COUNT_REVISION,
}
FIXED = {"macs_images": 1, "macs_spread": {"dense": 0, "theoretical": 0, "executed": 0}}


def written(results, label, cost, seeds=(0, 1), report=None):
    for seed in seeds:
        record = train_record(label, "m", {"of": label}, seed, images(0.8, seed))
        record["cost"] |= cost
        Store(results, "b").write(record | {"report": report or {}})


def cells(text, label):
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_of_the_old_rule_are_marked_and_say_how_few_images(tmp_path):
    written(tmp_path, "old", OLD)
    written(tmp_path, "new", NEW)
    written(tmp_path, "fixed", FIXED)
    text = markdown(tables(tmp_path))
    assert cells(text, "old")[5:7] == ["0.5000 ± 0.015 ¶", "0.5000 ¶"]  # 40 / sqrt(7) MMACs, and less than 0.5 %
    assert cells(text, "new")[5:7] == ["0.5000", "0.5000 ± 0.015"]
    assert cells(text, "fixed")[5:7] == ["0.5000", "0.5000"]
    notes = [line for line in text.splitlines() if line.startswith("- ") and "8 images" in line]
    assert notes == ["- old: theory and run (¶) are means over 8 images, by an earlier rule"]
    out = io.StringIO()
    show(tables(tmp_path), Console(file=out, width=200))
    assert "0.5000 ± 0.015 ¶" in out.getvalue()


def test_one_old_seed_marks_the_row(tmp_path):
    written(tmp_path, "mixed", NEW, seeds=(0,))
    written(tmp_path, "mixed", OLD, seeds=(1,))
    (row,) = tables(tmp_path)[0].rows
    assert row.old_images == 8
    assert row.macs_images == {"theoretical": 8, "executed": 8}


def test_a_run_is_held_against_the_theory_of_its_own_images(tmp_path):
    """Images that happen to take more than the split's mean are no work that is not skipped."""
    more = NEW | {"macs_executed": 0.6e9, "parts": {"theoretical": {"mlp": 0.5e9}, "executed": {"mlp": 0.6e9}}}
    written(tmp_path, "by chance", more | {"theory_of_run": {"macs": 0.6e9, "parts": {"mlp": 0.6e9}}})
    written(tmp_path, "not skipped", more | {"theory_of_run": {"macs": 0.5e9, "parts": {"mlp": 0.5e9}}})
    written(tmp_path, "old", OLD | {"macs_executed": 0.6e9, "parts": more["parts"]})
    verdicts = {row.label: row.verdict for row in tables(tmp_path)[0].rows}
    assert verdicts["by chance"] is None
    for label in ("not skipped", "old"):
        assert verdicts[label] == "does not skip all: mlp (0.6000 G run, 0.5000 in theory)"


def test_the_csv_has_errors_and_images(tmp_path):
    written(tmp_path, "new", NEW)
    written(tmp_path, "old", OLD)
    found = frame(tables(tmp_path)).set_index("label")
    assert found.loc["new", ["macs_theoretical_error", "macs_executed_error"]].tolist() == [1.5e6, 1.5e7]
    assert found.loc["new", ["macs_theoretical_images", "macs_executed_images"]].tolist() == [2000, 8]
    assert found.loc["old", "macs_theoretical_error"] == pytest.approx(4e7 / 7**0.5)


def test_numbers_have_their_error(tmp_path):
    report = {"numbers": {"occupancy": 0.4112, "other": 0.5}, "numbers_error": {"occupancy": 0.0042, "other": 0.0004}}
    written(tmp_path, "new", NEW, report=report)
    written(tmp_path, "old", OLD, report={"numbers": {"occupancy": 0.4}})
    text = markdown(tables(tmp_path))
    assert "- new: occupancy 0.411 ± 0.004, other 0.500\n" in text
    assert "- old: occupancy 0.400\n" in text


@given(st.floats(1e6, 1e11), st.floats(0, 1e10))
def test_errors_are_shown_above_half_a_percent(macs, error):
    assert ("±" in macs_told(macs, error)) == (error > 0.005 * macs)
    assert macs_told(macs, error).startswith(f"{macs / 1e9:.4f}")


def test_what_records_of_all_ages_say():
    assert counts.images({}) == counts.images(FIXED) == {"theoretical": 1, "executed": 1}
    assert counts.errors({}) == counts.errors(FIXED) == {"theoretical": 0, "executed": 0}
    assert counts.images(OLD) == {"theoretical": 8, "executed": 8}
    assert counts.images(NEW) == NEW["macs_images"]
    assert counts.errors(NEW) == NEW["macs_error"]
    assert [counts.old_images(cost) for cost in ({}, FIXED, OLD, NEW)] == [None, None, 8, None]
    assert counts.old_images(NEW | {"count_revision": 1}) == 2000
    assert counts.images({"macs_images": {"executed": 8}, "macs_error": {"executed": 3}})["theoretical"] == 1
    assert numbers_told({}) == ""


def survey_record(label, facts):
    survey = {
        "backbone": {"name": "vit", "kwargs": {}}, "image_size": None, "method": label, "settings": {}, "revision": 1, "keep_rate": None,
        "macs_dense": 1e9, "macs_theoretical": 0.5e9, "macs_executed": 0.5e9, "parts": {},
    }  # fmt: skip
    key = {
        "weights_id": identify({"label": label}), "device": "CPU", "driver": "", "dtype": "float32", "mode": "eager", "batch": 1,
        "measure_revision": MEASURE_REVISION,
    }  # fmt: skip
    one = {
        "p50_ms": 10.0,
        "warm": True,
        "noise": 1.0,
        "peak_bytes": 1000,
        "operations": 100,
        "weights_bytes": 10,
    }
    latency = {"batch": 1, "speed_up": 1.5, "speed_up_interval": [1.4, 1.6], "deployed": one, "dense": one}
    return key | {"id": identify(key), "kind": "measure", "label": label, "survey": survey | facts, "latency": latency}


@pytest.mark.parametrize(
    "facts",
    [
        OLD,
        {
            "macs_images": dict.fromkeys(counts.OF_IMAGES, 8),
            "macs_error": {"theoretical": 15_118_579, "executed": 377_965},
        },
    ],
)
def test_surveys_have_the_error_of_their_random_images(facts, tmp_path):
    Store(tmp_path, "s").write(survey_record("varying", facts))
    Store(tmp_path, "s").write(survey_record("fixed", FIXED))
    (table,) = surveys(tmp_path)
    lines = {line.label: line for line in table.lines}
    assert lines["varying"].errors == pytest.approx((15_118_579, 377_965), rel=1e-5)
    text = surveyshown.section(table)
    assert "| varying | 0.5000 ± 0.015 | 0.5000 |" in text
    assert "| fixed | 0.5000 | 0.5000 |" in text
    (note,) = (line for line in text.splitlines() if "random images" in line)
    assert note.startswith("- varying: ")
    assert note.endswith("; theory and run are means over 8 random images")
    assert surveyshown.frame_lines([table])[1]["macs_theoretical_error"] in (0, pytest.approx(15_118_579, rel=1e-6))


def test_rows_of_one_label_are_held_against_their_own_theory(tmp_path):
    """A spec may keep a label while a setting is changed."""
    for keep, macs in (("much", 0.8e9), ("little", 0.4e9)):
        for seed in (0, 1):
            record = train_record("mine", "m", {"keep": keep}, seed, images(0.8, seed))
            record["cost"] |= NEW | {"macs_theoretical": macs, "macs_executed": macs}
            Store(tmp_path, "b").write(record)
    assert [row.verdict for row in tables(tmp_path)[0].rows] == [None, None]


def test_the_cheapest_row_is_so_on_the_whole_split(tmp_path):
    """The few images that were run happened to take less than the others in one row, and more in the other."""
    same = {"macs_executed": 0.5e9, "theory_of_run": {"macs": 0.5e9, "parts": {}}}
    written(tmp_path, "lucky", NEW | same | {"macs_theoretical": 0.6e9})
    written(tmp_path, "unlucky", NEW | same | {"macs_theoretical": 0.4e9})
    assert {row.label: row.pareto for row in tables(tmp_path)[0].rows} == {"lucky": False, "unlucky": True}


def test_one_image_that_was_run_has_the_error_of_one():
    """It tells nothing of others, but theory of the whole split does."""
    split = Count(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) * 1e6, {}, [])
    one = Count(split.each[:1], {}, [])
    costs = Costs(one, split, one, 1, 1, 1, theory_of_run=one).record()
    assert costs["macs_error"]["executed"] == round(split.spread) > 1e6
    assert costs["macs_error"]["theoretical"] == round(split.spread / 3**0.5)
    fixed = Costs(one, one, one, 1, 1, 1).record()
    assert fixed["macs_error"] == {"theoretical": 0, "executed": 0}
