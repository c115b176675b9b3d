"""Pictures of what a record's report says."""

import json

import pytest
import yaml
from conftest import bench, tiny_spec

from harness.packing import unpack
from harness.pictures import PICTURES, draw


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_data):
    """Records of a network with fewer heads, neurons and tokens, and of dense ones."""
    folder = tmp_path_factory.mktemp("pictures")
    settings = {"pruning_type": "structured", "token_number": 0.5, "mode": "gather", "update_frequency": 0.1}
    entries = [{"method": "svite", "label": "less of all", "settings": settings}]
    spec = folder / "tiny.yaml"
    spec.write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=entries)))
    done = bench("--spec", spec, "--results", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def record_of(results, label):
    records = [json.loads(path.read_text()) for path in (results / "tiny").glob("*.json")]
    return next(record for record in records if record["kind"] == "train" and record["label"] == label)


def test_every_picture_is_drawn(results):
    record = record_of(results, "less of all")
    done = bench("visualize", record["id"][:10], "--results", results)
    assert done.returncode == 0, done.stderr
    drawn = [results / "pictures" / line.rpartition("/")[2] for line in done.stdout.split()]
    expected = ["density", "heads", "neurons", "exploration"]  # as many tokens in every block, and no fixed attention
    assert set(expected) < set(PICTURES)
    assert [path.stem.removeprefix(record["id"] + "-") for path in drawn] == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_tokens_are_drawn_where_blocks_differ(results, tmp_path):
    record = record_of(results, "dense")
    record["report"]["tokens"] = {"keys": [17, 17, 9, 5], "queries": [17, 17, 9, 5], "mlp": [17, 9, 9, 5]}
    (path,) = draw(record, tmp_path / "new")
    assert path.name == f"{record['id']}-tokens.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_record_tells_of_units_and_updates(results):
    record = record_of(results, "less of all")
    (phase,) = record["phases"]
    assert [event["update"] for event in phase["events"]] == list(range(1, len(phase["events"]) + 1))
    last = phase["events"][-1]
    assert last["step"] < 0.8 * phase["steps"]
    assert 0.5 < last["density"] < last["explored"] <= 1
    assert len(phase["events"][0]["layers"]) == len(last["layer_explored"]) == 12
    assert [sum(row) for row in record["report"]["head_density"]] == [1.0] * 4
    assert [int(unpack(row["active"], row["of"]).sum()) for row in record["report"]["neurons"]] == [38] * 4


def test_what_cannot_be_drawn_is_told(results):
    done = bench("visualize", record_of(results, "dense")["id"], "--results", results)
    assert done.returncode == 2
    assert "nothing to draw" in done.stderr
    measured = next(p for p in (results / "tiny").glob("*.json") if json.loads(p.read_text())["kind"] == "measure")
    done = bench("visualize", measured, "--results", results)
    assert done.returncode == 2
    assert "only a train record" in done.stderr
    done = bench("visualize", record_of(results, "less of all")["id"], "--results", results, "--output", measured)
    assert done.returncode == 2
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr
