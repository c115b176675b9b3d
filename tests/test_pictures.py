"""Pictures of what a record's report says."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import bench, tiny_spec

from harness.errors import UserError
from harness.packing import unpack
from harness.photos import looked_at
from harness.pictures import PICTURES, draw
from harness.tokenpictures import kept_patches, shaded


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_data):
    """Records of a network with fewer heads, neurons and tokens, of one whose images keep different tokens, and of dense ones."""
    folder = tmp_path_factory.mktemp("pictures")
    settings = {"pruning_type": "structured", "token_number": 0.5, "mode": "gather", "update_frequency": 0.1}
    entries = [
        {"method": "svite", "label": "less of all", "settings": settings},
        {"method": "sttabt", "label": "back-tracked {p_logit}", "settings": {"p_logit": [-0.5, -2.0]}},
    ]
    spec = folder / "tiny.yaml"
    spec.write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=entries)))
    done = bench("--spec", spec, "--results", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "phase approx is taken from artifact" in done.stdout + done.stderr
    return folder


def record_of(results, label):
    records = [json.loads(path.read_text()) for path in (results / "tiny").glob("*.json")]
    return next(record for record in records if record["kind"] == "train" and record["label"] == label)


def test_every_picture_is_drawn(results):
    record = record_of(results, "less of all")
    done = bench("visualize", record["id"][:10], "--results", results)
    assert done.returncode == 0, done.stderr
    drawn = [results / "pictures" / line.rpartition("/")[2] for line in done.stdout.split()]
    assert "without the images" in done.stderr  # the record has the card's name alone
    expected = [
        "density",
        "heads",
        "neurons",
        "patches",
        "exploration",
    ]  # as many tokens in every block, and no fixed attention
    assert set(expected) < set(PICTURES)
    assert [path.stem.removeprefix(record["id"] + "-") for path in drawn] == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_kept_patches_are_drawn_over_the_images(results, tiny_data, tmp_path):
    record = record_of(results, "back-tracked -0.5")
    done = bench("visualize", record["id"], "--results", results, "--card", tiny_data, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(list(tmp_path.glob("*-patches.png"))) == 1
    kept = kept_patches(record)
    assert kept.shape[:2] == (4, 2)
    assert kept[0].sum() >= kept[-1].sum() > 0
    photos = looked_at(record, str(tiny_data))
    assert photos.shape[0] == 2
    found = shaded(np.full((8, 8, 3), 0.6), np.array([[True, False], [True, True]]))
    assert found[1, 6].tolist() == pytest.approx([0.2] * 3)  # dark
    assert found[1, 3].tolist() == [1.0] * 3  # the edge of what is kept
    assert found[6, 1].tolist() == [0.6] * 3
    record["context"]["data"]["checksum"] = "other"
    with pytest.raises(UserError, match="another checksum"):
        looked_at(record, str(tiny_data))


def test_occupancy_and_the_authors_count_are_in_the_tables(results, tmp_path):
    record = record_of(results, "back-tracked -0.5")
    csv = tmp_path / "all.csv"
    done = bench("leaderboard", "--results", results, "--csv", csv)
    assert done.returncode == 0, done.stderr
    occupancy, error = (record["report"][key]["occupancy"] for key in ("numbers", "numbers_error"))
    line = f"back-tracked -0.5: occupancy {occupancy:.3f} ± {error:.3f}, occupancy of the loss"
    assert line in (results / "leaderboard.md").read_text()
    row = pd.read_csv(csv).set_index("label").loc["back-tracked -0.5"]
    assert row["macs_authors"] == pytest.approx(record["report"]["authors"]["macs"])
    assert row["report: occupancy"] == pytest.approx(occupancy)
    assert row["report: occupancy, error"] == error
    assert (row["macs_theoretical_images"], row["macs_executed_images"]) == (20, 2)
    assert row["macs_theoretical_error"] == record["cost"]["macs_error"]["theoretical"] > 0
    assert row["macs_executed"] == pytest.approx(record["cost"]["theory_of_run"]["macs"], rel=1e-6)
    assert "back-tracked -0.5: does not skip all" not in (results / "leaderboard.md").read_text()


def test_theory_and_occupancy_are_of_the_whole_test_split(results):
    """20 test images; run, and the patches that are drawn, of the two that `measure.images` asks for."""
    record = record_of(results, "back-tracked -0.5")
    assert record["cost"]["count_revision"] == 2
    assert record["cost"]["macs_images"] == {"theoretical": record["test_images"], "executed": 2}
    shares = np.array(record["report"]["tokens"]["keys"]) / 17
    assert (shares.sum() + 1 / 17) / 5 == pytest.approx(record["report"]["numbers"]["occupancy"], abs=1e-3)
    assert abs(shares[0] * 20 * 17 - round(shares[0] * 20 * 17)) < 0.05  # a mean over 20 images
    assert kept_patches(record).shape[1] == 2
    fixed = record_of(results, "less of all")["cost"]
    assert fixed["macs_images"] == {"theoretical": 1, "executed": 1}
    assert fixed["macs_error"] == {"theoretical": 0, "executed": 0}


def test_cost_shows_how_the_authors_count():
    sizes = [
        part
        for key, value in {"embed_dim": 48, "depth": 4, "num_heads": 3}.items()
        for part in ("--set", f"backbone.{key}={value}")
    ]
    command = ["cost", "--backbone", "vit_tiny_patch16_224", "--methods", "dense,sttabt", *sizes]
    shown = bench(*command, "--authors")
    assert shown.returncode == 0, shown.stderr
    assert "as its authors count" in shown.stdout
    assert "192 tokens" in " ".join(shown.stdout.split())
    rows = json.loads(bench(*command, "--json").stdout)
    assert rows[0]["authors"] is None
    assert rows[1]["authors"]["macs"] == pytest.approx(sum(rows[1]["authors"]["parts"].values()))
    assert 0 < rows[1]["numbers"]["occupancy"] < 1


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
