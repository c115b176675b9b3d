"""Which code made a record: ids, marks in tables, what is made again and what is not."""

import contextlib
import io
import json
import shutil
import sys

import pytest
import torch
import yaml
from conftest import ROOT, TOY, tiny_spec, written
from test_interruption import trainer_of
from test_leaderboard import CONTEXT, measure_record, train_record

from harness import freshness, measuring, render, workers
from harness.cells import load_run
from harness.data.dataset import open_data
from harness.device import plan
from harness.identity import Identity
from harness.leaderboard import tables
from harness.records import Store, identify, load_all
from harness.surveyboard import surveys
from harness.training.snapshots import read_state, save_state
from methods.core.registry import available, is_builtin

OTHER = "f" * 64  # the digest of no code


# Ids: what is committed stays what it is.


def committed(kind):
    return [record for _, record in load_all(ROOT / "results") if record["kind"] == kind]


def test_ids_of_committed_records_follow_from_their_content():
    train, measured = committed("train"), committed("measure")
    assert len(train) >= 87
    assert len(measured) >= 174
    for record in train:
        assert identify(record["context"]) == record["context_id"]
        parts = ("context", "weights_id", "method", "settings", "revision", "seed", "given")
        assert identify({part: record[part] for part in parts if part in record}) == record["id"]
    for record in (record for record in measured if record["measure_revision"] == 3):
        parts = ("weights_id", "device", "driver", "dtype", "mode", "batch", "measure_revision")
        assert identify({part: record[part] for part in parts}) == record["id"]


def test_the_reference_benchmark_finds_its_committed_records():
    """The ids that a run would look for, from the spec and the data."""
    run = load_run(ROOT / "benchmarks" / "fashion-reference.yaml")
    found = {record["id"]: record for record in committed("train")}
    trained = plan("cpu", next(iter(found.values()))["context"]["plan"]["dtype"])
    identity = Identity(run, open_data(run.spec.data, run.folder), trained)
    cells = run.cells()
    assert len(cells) == len(found) == len({identity.record_id(cell) for cell in cells})
    for cell in cells:
        assert found[identity.record_id(cell)]["weights_id"] == identity.weights_id(cell)


def test_built_in_methods_have_no_code_in_their_ids():
    assert all(freshness.plugin_part(name) == {} for name in available() if is_builtin(name))


# Runs. In processes of their own, which see the plug-in as it is then; nothing is timed.


def run_here(arguments):
    """Exit code and output of the command."""
    latency = {
        "batch": 2, "seconds": 1.0, "speed_up": 1.5, "speed_up_interval": [1.4, 1.6], "measured": True,
        **{name: {"p50_ms": 1.0, "warm": True, "noise": 1.0, "peak_bytes": 1, "operations": 9} for name in ("dense", "deployed")},
    }  # fmt: skip

    def measure(job):
        assert job.subject.code == freshness.code_digest(job.subject.method)  # what the process that times must find
        return iter([(number, latency) for number in range(len(job.conditions))])

    measuring.measure = measure
    workers.start_server = lambda: None
    sys.path.insert(0, str(ROOT))
    import bench as command

    sys.argv = ["bench.py", *map(str, arguments)]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        command.main()
    yield ended.value.code, told.getvalue()


def run(spec, results, *more, plugin=None):
    """The lines of a run that succeeded, by row."""
    ((code, told),) = workers.results_of(
        run_here, ["--spec", spec, "--results", results, *more, *(["--plugin", plugin] if plugin else [])]
    )
    assert code == 0, told
    return told


def verbs(told):
    """What was done for each row: present, measured, done."""
    lines = [line for line in told.splitlines() if line.startswith("[") and "top-1" in line]
    return {line.split("] ")[1].split(", seed")[0]: line.split(": ", 1)[1].split(", top-1")[0] for line in lines}


def stored(results):
    return {path: json.loads(path.read_text()) for path in (results / "tiny").glob("*.json")}


def doctored(results, label, kind):
    """Makes records, and with a train record its checkpoint, say that other code has made them."""
    for path, record in stored(results).items():
        if record["kind"] == kind and record["label"] == label:
            assert len(record["code"]["digest"]) == 64
            record["code"]["digest"] = OTHER
            path.write_text(json.dumps(record))
            if kind == "train":
                checkpoint = results / "checkpoints" / f"{record['weights_id']}.pt"
                content = torch.load(checkpoint, weights_only=True)
                content["code"]["digest"] = OTHER
                torch.save(content, checkpoint)


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_data):
    """A spec with a plug-in's method, the plug-in, and the results of a first run."""
    folder = tmp_path_factory.mktemp("first")
    spec, plugin = folder / "tiny.yaml", written(folder, "toy", TOY)
    spec.write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=[{"method": "toy"}])))
    told = run(spec, folder / "results", plugin=plugin)
    assert verbs(told) == {"dense": "done", "dense+": "done", "toy": "done"}
    return spec, plugin, folder / "results"


@pytest.fixture
def again(first, tmp_path):
    """The same to change."""
    spec, plugin, results = first
    shutil.copytree(results, tmp_path / "results")
    return spec, written(tmp_path, "toy", plugin.read_text()), tmp_path / "results"


def test_a_plugin_that_does_something_else_is_run_anew(again):
    spec, plugin, results = again
    before = stored(results)
    plugin.write_text(
        TOY.replace('"""A toy."""', '"""The same toy."""').replace("import methods\n", "import methods  # all\n\n")
    )
    told = run(spec, results, plugin=plugin)
    assert set(verbs(told).values()) == {"present"}
    assert stored(results) == before
    assert "§" not in (results / "leaderboard.md").read_text().split("How to read")[0]
    plugin.write_text(TOY.replace("-patches.new_ones", "patches.new_ones"))
    told = run(spec, results, plugin=plugin)
    assert verbs(told) == {"dense": "present", "dense+": "present", "toy": "done"}
    after = stored(results)
    assert {path: after[path] for path in before} == before
    toys = [record for record in after.values() if record["kind"] == "train" and record["method"] == "toy"]
    assert len({record["plugin_code"] for record in toys}) == len({record["weights_sha256"] for record in toys}) == 2
    labels = [row.label for row in tables(results)[0].rows]
    assert sorted(labels) == ["dense", "dense+", *sorted(f"toy (code {record['plugin_code'][:6]})" for record in toys)]
    (old,) = (
        record["plugin_code"] for record in before.values() if record["kind"] == "train" and record["method"] == "toy"
    )
    board = (results / "leaderboard.md").read_text()
    line = f"- § made by an earlier version of the plug-in: toy (code {old[:6]}); delete its records to drop the row"
    assert line in board
    assert "--stale redo" not in board.split("How to read")[0]  # nothing that it would make again
    assert board.count(" § |") == 2  # the old row, and its time
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert set(verbs(told).values()) == {"present"}
    assert "made by other code" not in told
    assert stored(results) == after


def test_what_other_code_has_trained_is_kept_and_marked_or_made_again(again):
    spec, plugin, results = again
    doctored(results, "dense+", "train")
    before = stored(results)
    told = run(spec, results, plugin=plugin)
    assert verbs(told) == {"dense": "present", "dense+": "present, made by other code", "toy": "present"}
    assert "1 row was made by other code (dense+, seed 0): --stale redo makes them again" in told
    assert stored(results) == before
    board = (results / "leaderboard.md").read_text()
    assert "| dense+ §" in board or "| dense+ ◆ §" in board
    assert "§ made by other code than what is here: dense+;" in board
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert "made by other code); training again" in told
    assert verbs(told) == {"dense": "present", "dense+": "done", "toy": "present"}
    (was,), (now,) = (
        [r for r in found.values() if r["label"] == "dense+" and r["kind"] == "train"]
        for found in (before, stored(results))
    )
    assert now["weights_sha256"] == was["weights_sha256"]
    assert now["code"]["digest"] == freshness.code_digest("dense")
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert set(verbs(told).values()) == {"present"}
    assert " § |" not in (results / "leaderboard.md").read_text()


def test_what_other_code_has_timed_is_timed_again_and_not_trained(again):
    spec, plugin, results = again
    doctored(results, "toy", "measure")
    told = run(spec, results, plugin=plugin)
    assert "1 row was made by other code (toy, seed 0)" in told
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert verbs(told) == {"dense": "present", "dense+": "present", "toy": "measured"}
    assert all(record["code"]["digest"] != OTHER for record in stored(results).values())


def test_a_dense_network_of_other_code_marks_what_began_with_it(again):
    """Its own records are gone, but its checkpoint is there: what begins with it says whose it is, and redoing does not use it."""
    spec, plugin, results = again
    doctored(results, "dense", "train")
    for path, record in stored(results).items():
        if record["label"] == "toy" and record["kind"] == "train":
            path.unlink()
            (results / "checkpoints" / f"{record['weights_id']}.pt").unlink()
    told = run(spec, results, plugin=plugin)
    assert verbs(told)["toy"] == "done, made by other code"
    (toy,) = (record for record in stored(results).values() if record["label"] == "toy" and record["kind"] == "train")
    assert toy["code"]["dense"] == OTHER != toy["code"]["digest"]
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert verbs(told) == {"dense": "done", "dense+": "present", "toy": "done"}
    assert all(OTHER not in record["code"].values() for record in stored(results).values() if record["kind"] == "train")


def test_records_and_checkpoints_without_digests_are_used_and_never_stale(again):
    spec, plugin, results = again
    for path, record in stored(results).items():
        record["code"] = (
            {"commit": "c", "dirty": False, "method": "m"} if record["kind"] == "train" else {"commit": "c"}
        )
        path.write_text(json.dumps(record))
    for path in (results / "checkpoints").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        del content["code"]
        torch.save(content, path)
    before = stored(results)
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert set(verbs(told).values()) == {"present"}
    assert stored(results) == before
    board = (results / "leaderboard.md").read_text()
    assert "- 3 rows were made before digests of code were recorded" in board
    assert " § |" not in board
    lost = next(path for path, record in before.items() if record["label"] == "dense+" and record["kind"] == "train")
    lost.unlink()
    told = run(spec, results, "--stale", "redo", plugin=plugin)
    assert "training again" not in told
    assert stored(results)[lost]["code"]["digest"] is None  # nobody knows who trained the checkpoint


# Trainings that other code has begun, and phases that it has run.


@pytest.fixture
def stages_spec(tmp_path, tiny_data):
    content = tiny_spec(tiny_data, entries=[{"method": "stages"}], budget={"epochs": 1, "adapt_epochs": 2})
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(content | {"train": {"checkpoint_steps": 1}}))
    return path


def stages(spec, plugin, results, watch=None):
    """Trains the cell of that name: what was said, and what its code is."""
    told = []
    loaded, trainer = trainer_of(spec, plugin, results, told.append)
    if watch:
        trainer.reporter.watch = watch
    (cell,) = (cell for cell in loaded.cells() if cell.method.name == "stages")
    return told, trainer, trainer.weights(cell, "stages")


def interrupted(spec, plugin, results):
    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.phase == "settle" and progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        stages(spec, plugin, results, stop)
    return sorted((results / "checkpoints").glob("*/step-*.state"))


@pytest.mark.parametrize("digest", [OTHER, None])
def test_a_training_that_other_code_began_begins_anew(digest, stages_spec, stages_file, tmp_path):
    results = tmp_path / "results"
    for path in interrupted(stages_spec, stages_file, results):
        content = read_state(path)
        assert content["code"] == {
            key: freshness.code_digest(name) for key, name in (("digest", "stages"), ("dense", "dense"))
        }
        save_state(path, content | {"code": content["code"] | {"digest": digest}})
    told, _, _ = stages(stages_spec, stages_file, results)
    is_other = digest is not None
    assert any("the method's code has changed since" in line for line in told) == is_other
    assert any("going on with phase" in line for line in told) != is_other


@pytest.mark.parametrize("part", ["digest", "dense"])
def test_what_other_code_made_of_a_phase_is_not_taken(part, stages_spec, stages_file, tmp_path):
    results = tmp_path / "results"
    stages(stages_spec, stages_file, results)
    (artifact,) = (results / "checkpoints" / "artifacts").iterdir()
    content = read_state(artifact)
    save_state(artifact, content | {"code": content["code"] | {part: OTHER}})
    checkpoints = list((results / "checkpoints").glob("*.pt"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        if len(torch.load(path, weights_only=True)["phases"]) > 1:
            path.unlink()
    told, _, _ = stages(stages_spec, stages_file, results)
    assert any("was made by other code; making it again" in line for line in told)
    assert not any("is taken from" in line for line in told)
    assert read_state(artifact)["code"] == content["code"]


# Tables.


def table_of(tmp_path, *rows):
    store = Store(tmp_path, "b")
    for record in rows:
        store.write(record)
    return tables(tmp_path)[0]


def test_tables_say_which_rows_and_times_are_of_other_code(tmp_path):
    here = {"digest": freshness.code_digest("dense")}
    old, new, gone = (train_record(*row, 0, [True] * 9 + [False]) for row in (
        ("dense", "dense", {"continued": False}), ("dense+", "dense", {"continued": True}), ("mine", "mine", {})
    ))  # fmt: skip
    records = [new | {"code": here}, gone | {"code": {"digest": OTHER}}, old]
    timed = measure_record(new) | {"code": {"digest": OTHER, "trained": here["digest"]}}
    table = table_of(tmp_path, *records, timed)
    states = {row.label: (row.code, *row.timing_code.values()) for row in table.rows}
    assert states == {"dense": ("unrecorded",), "dense+": ("this", "other"), "mine": ("absent",)}
    text = render.markdown([table])
    assert text.count(" § |") == 1
    assert "- § made by other code than what is here: dense+; --stale redo" in text
    assert "- 1 row was made before digests of code were recorded" in text
    assert "nobody knows whether it has changed: mine" in text
    lines = render.frame([table]).set_index("label")
    assert lines["code"].to_dict() == {"dense": "unknown", "dense+": "this", "mine": "unknown"}
    assert lines.loc["dense+", "timing_code"] == "other"


def test_a_time_of_weights_that_are_gone_is_of_other_code(tmp_path):
    here = freshness.code_digest("dense")
    row = train_record("dense+", "dense", {"continued": True}, 0, [True, False]) | {"code": {"digest": here}}
    timed = measure_record(row) | {"code": {"digest": here, "trained": OTHER}}
    (found,) = table_of(tmp_path, row, timed).rows
    assert (found.code, *found.timing_code.values()) == ("this", "other")


def test_one_seed_of_other_code_marks_the_row_and_so_does_dense(tmp_path):
    code, context = {"digest": freshness.code_digest("random")}, CONTEXT | {"dense_revision": 1}
    rows = [train_record("r", "random", {}, seed, [True, False], context=context) for seed in (0, 1)]
    (row,) = table_of(tmp_path / "a", rows[0] | {"code": code}, rows[1] | {"code": {"digest": OTHER}}).rows
    assert row.code == "other"
    (row,) = table_of(tmp_path / "b", rows[0] | {"code": code | {"dense": OTHER}}, rows[1] | {"code": code}).rows
    assert row.code == "other"
    (row,) = table_of(
        tmp_path / "c", *(row | {"code": code | {"dense": freshness.code_digest("dense")}} for row in rows)
    ).rows
    assert row.code == "this"


def test_surveys_say_so_too(tmp_path):
    facts = {
        "untrained": 0, "backbone": {"name": "vit", "kwargs": {}}, "image_size": None, "method": "random", "settings": {}, "revision": 1,
        "keep_rate": None, "macs_dense": 2e9, "macs_theoretical": 1e9, "macs_executed": 1e9, "parts": {},
    }  # fmt: skip
    record = measure_record({"weights_id": "w"}) | {"label": "random", "survey": facts, "code": {"digest": OTHER}}
    Store(tmp_path, "s").write(record)
    found = surveys(tmp_path)
    assert "- § made by other code than what is here: random;" in render.markdown([], found)
    assert render.frame([], found)["timing_code"].tolist() == ["other"]
    Store(tmp_path, "s").write(record | {"code": {"digest": freshness.code_digest("random")}})
    assert "§ made" not in render.markdown([], surveys(tmp_path))


def test_the_committed_leaderboard_marks_no_row_and_says_why():
    (table,) = tables(ROOT / "results")
    assert {row.code for row in table.rows} == {"unrecorded"}
    text = render.markdown([table])
    assert f"- {len(table.rows)} rows were made before digests of code were recorded" in text
    assert " § |" not in text


def test_stale_must_be_keep_or_redo(here):
    done = here("--stale", "yes")
    assert done.returncode == 2
    assert "'yes' must be keep or redo" in done.stderr
