"""The leaderboard: one row's comparison, and all tables from the committed records."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from harness import leaderboard, records, stats

RESULTS = Path(__file__).resolve().parents[2] / "results"
BENCHMARK = "fashion-reference"


@pytest.mark.parametrize(("seeds", "images"), [(3, 10_000), (3, 50_000), (10, 50_000)])
@pytest.mark.benchmark(group="crossed analysis")
def test_crossed(benchmark, seeds, images):
    """As many test images as Fashion-MNIST and ImageNet have; one model is right on 80 %, the other on 77 %."""
    ours, theirs = (np.random.default_rng(0).random((seeds, images)) < share for share in (0.80, 0.77))
    found = benchmark(stats.crossed, ours.astype(np.int8) - theirs)
    assert np.isclose(found.mean, ours.mean() - theirs.mean())
    assert found.interval[0] < found.mean < found.interval[1]
    assert 0 < found.p_value < 0.05


@pytest.mark.benchmark(group="leaderboard")
def test_tables(benchmark, tmp_path):
    """From a copy, so that what else was run here does not count. Every record that was trained must be in a row."""
    shutil.copytree(RESULTS / BENCHMARK, tmp_path / BENCHMARK)
    (table,) = benchmark(leaderboard.tables, tmp_path)
    trained = [record for _, record in records.load_all(tmp_path) if record["kind"] == "train"]
    assert {row.label for row in table.rows} == {record["label"] for record in trained}
    assert sum(len(row.seeds) for row in table.rows) == len(trained)
    assert all((row.p_value is not None) == (row.standing == "trained") for row in table.rows)
