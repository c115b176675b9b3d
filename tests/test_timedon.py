"""Tables of what was timed by different rules, under different versions of torch, or on different devices: kept apart."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_leaderboard import images, measure_record, train_record

from harness import records, render, timedon
from harness.leaderboard import tables
from harness.records import Store, identify
from harness.speeds import Timing
from harness.surveyboard import surveys

NEW, OLD = records.MEASURE_REVISION, records.MEASURE_REVISION - 1
BATCH_8 = Timing("float32", 8, "eager")


def timed(record, torch, revision, **changes):
    """A measurement under that version of torch, which revision 3 did not have in its key."""
    own = {"torch": torch} if revision > 3 else {"where": {"packages": {"torch": torch}}}
    content = record | {"measure_revision": revision, **own, **changes}
    return content | {"id": identify({key: content[key] for key in content if key != "latency"})}


def rows():
    return [
        train_record("dense+", "dense", {"continued": True}, 0, images(0.8)),
        train_record("other", "m", {}, 0, images(0.7)),
    ]


def fill(results, entries):
    """Two trained rows and measurements of them: (number of the row, torch, revision, speed-up)."""
    store, trained = Store(results, "b"), rows()
    for row in trained:
        store.write(row)
    for number, torch, revision, speed_up in entries:
        store.write(timed(measure_record(trained[number], speed_up=speed_up), torch, revision))


def speeds(table):
    return {row.label: row.speeds[BATCH_8].speed_up for row in table.rows if row.speeds}


def test_old_timings_are_shown_in_a_table_of_their_own_and_marked(tmp_path):
    fill(tmp_path, [(0, "2.14.1", 3, 1.1), (1, "2.14.1", 3, 1.2), (0, "2.14.1", NEW, 1.5)])
    new, old = tables(tmp_path)
    assert speeds(new) == {"dense+": 1.5}
    assert speeds(old) == {"dense+": 1.1, "other": 1.2}
    assert [row.label for row in new.rows] == [row.label for row in old.rows] == ["dense+", "other"]
    text = render.markdown([new, old])
    first, second = text.split("## b: vit on tiny")[1:]
    assert "Timed on CPU X, torch 2.14.1, float32" in first
    assert "older rule" not in first.split("**How to read")[0]
    assert second.startswith(" (timed by an older rule)\n")
    assert "Timed on CPU X, torch 2.14.1 (by an older rule: not all images were timed equally often" in second
    empty = next(line for line in first.splitlines() if line.startswith("| other"))
    assert empty.split("|")[-2].strip() == ""
    shown = Console(width=200, record=True, file=io.StringIO())
    render.show([new, old], shown)
    assert shown.export_text().count("Timed on CPU X, torch 2.14.1") == 2
    frame = render.frame([new, old])
    assert next(zip(frame["torch"], frame["measure_revision"], strict=True)) == ("2.14.1", NEW)


def test_versions_of_torch_are_never_mixed(tmp_path):
    fill(
        tmp_path,
        [(0, "2.9.1+cpu", NEW, 1.1), (1, "2.10.0+cpu", NEW, 1.2), (0, "2.10.0", OLD, 1.3), (1, "2.9.1", OLD, 1.4)],
    )
    found = tables(tmp_path)
    assert [(table.timed_on["torch"], speeds(table)) for table in found] == [
        ("2.10.0+cpu", {"other": 1.2}), ("2.9.1+cpu", {"dense+": 1.1}),
        ("2.10.0", {"dense+": 1.3}), ("2.9.1", {"other": 1.4}),
    ]  # fmt: skip


DEVICES, DRIVERS, VERSIONS = ["CPU X", "GPU Y"], ["", "cuda 12.8"], ["2.9.1", "2.10.0", None]
WAYS = st.tuples(*map(st.sampled_from, (DEVICES, DRIVERS, VERSIONS)), st.integers(1, NEW))


@given(st.lists(WAYS, max_size=12))
@settings(deadline=None)
def test_each_way_of_timing_has_one_table_the_newest_rule_first(ways):
    found = timedon.tables_of(
        {"device": device, "driver": driver, "measure_revision": revision, **({"torch": torch} if torch else {})}
        for device, driver, torch, revision in ways
    )
    assert sorted(len(own) for _, own in found) == sorted(ways.count(way) for way in set(ways))
    for timed_on, own in found:
        assert all(record["measure_revision"] == timed_on["measure_revision"] for record in own)
        assert all(record.get("torch") == timed_on["torch"] for record in own)
        assert ("by an older rule" in timedon.told(timed_on)) == (timed_on["measure_revision"] < NEW)
    revisions = [timed_on["measure_revision"] for timed_on, _ in found]
    assert revisions == sorted(revisions, reverse=True)


def survey_record(torch, revision, speed_up=1.5, method_revision=1, label="m"):
    survey = {
        "backbone": {"name": "vit", "kwargs": {}}, "image_size": 16, "method": label, "settings": {}, "keep_rate": None,
        "revision": method_revision, "macs_dense": 2e9, "macs_theoretical": 1e9, "macs_executed": 1e9, "parts": {},
    }  # fmt: skip
    record = measure_record({"weights_id": f"{label}{method_revision}"}, speed_up=speed_up)
    record["latency"]["deployed"]["weights_bytes"] = 1000
    return timed(record, torch, revision, label=label, survey=survey)


def roofline(torch, gemm, revision):
    own = {"torch": torch} if revision > 3 else {"where": {"packages": {"torch": torch}}}
    content = {
        "kind": "roofline",
        "device": "CPU X",
        "driver": "",
        "dtype": "float32",
        "gemm_tflops": gemm,
        "copy_gbs": 10.0,
        **own,
    }
    return content | {"id": identify(content)}


def test_surveys_do_not_mix_them_either_and_limits_go_by_the_version(tmp_path):
    store = Store(tmp_path, "latency")
    for torch, revision, speed_up in (("2.14.1", 3, 1.1), ("2.14.1", NEW, 1.2), ("2.15.0", NEW, 1.3)):
        store.write(survey_record(torch, revision, speed_up))
    store.write(roofline("2.14.1", 1.0, 3))
    store.write(roofline("2.15.0", 2.0, NEW))
    found = surveys(tmp_path)
    assert [[line.speed.speed_up for line in table.lines] for table in found] == [[1.3], [1.2], [1.1]]
    assert [table.limits["float32"]["gemm_tflops"] for table in found] == [2.0, 1.0, 1.0]
    first, second, third = render.markdown([], found).split("## latency: vit")[1:]
    assert "torch 2.15.0; synthetic images" in first
    assert "older rule" not in first + second
    assert "untrained, timed by an older rule" in third


def test_what_an_older_revision_of_a_method_left_is_not_shown_in_any_table(tmp_path):
    store = Store(tmp_path, "latency")
    store.write(survey_record("2.14.1", 3, 1.1, method_revision=1))
    store.write(survey_record("2.14.1", 3, 1.2, method_revision=1, label="other"))
    store.write(survey_record("2.14.1", NEW, 1.3, method_revision=2))
    assert [[line.label for line in table.lines] for table in surveys(tmp_path)] == [["m"], ["other"]]


@pytest.mark.parametrize(("mean", "expected"), [({}, 8 / 5e-3), ({"mean_ms": 10.0}, 8 / 10e-3)])
def test_throughput_goes_by_the_mean_time_where_a_record_has_it(tmp_path, mean, expected):
    record = survey_record("2.14.1", NEW, speed_up=2.0)
    record["latency"]["deployed"] |= mean
    Store(tmp_path, "latency").write(record)
    Store(tmp_path, "latency").write(roofline("2.14.1", 1.0, NEW))
    ((line,),) = [table.lines for table in surveys(tmp_path)]
    assert line.images_per_second == pytest.approx(expected)
    assert line.of_products == pytest.approx(2 * 1e9 * expected / 1e12)
    assert line.of_copies == pytest.approx(1000 * expected / 8 / 10e9)
    assert np.isclose(render.frame([], surveys(tmp_path))["images_per_second"].item(), expected)


def test_realised_refers_to_the_images_that_were_timed(tmp_path):
    record = survey_record("2.14.1", NEW, speed_up=2.0)
    record["latency"]["theoretical_speed_up"] = 4.0  # on these images; the survey's own count says 2
    Store(tmp_path, "latency").write(record)
    ((line,),) = [table.lines for table in surveys(tmp_path)]
    assert line.speed.realised == 0.5
