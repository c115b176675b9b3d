"""Surveys: latency without training, run as a command; what the tables say of methods that skip nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, bench

from harness.surveyboard import surveys

BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--image-size", "16", *(
    part for key, value in {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}.items()
    for part in ("--set", f"backbone.{key}={value}") if key != "num_classes"
)]  # fmt: skip
QUICK = ["--seconds", "0.01", "--batch-sizes", "1,2"]


def records(results, name="latency"):
    return [json.loads(path.read_text()) for path in sorted((results / name).glob("*.json"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, masked_file, threshold_file):
    """A survey with a method that masks and one whose costs depend on the image: (process, results)."""
    results = tmp_path_factory.mktemp("survey")
    plugins = ["--plugin", masked_file, "--plugin", threshold_file]
    chosen = ["--methods", "dynamicvit,masked,threshold", "--modes", "eager,cudagraph", "--roofline"]
    return bench("latency", *BACKBONE, *QUICK, *plugins, *chosen, "--results", results), results, plugins, chosen


def test_every_method_is_timed_without_training(finished):
    done, results, _, _ = finished
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [record for record in records(results) if record["kind"] == "measure"]
    assert {record["label"] for record in measured} == {"dense", "dynamicvit", "masked", "threshold"}
    assert len(measured) == 4 * 2 * 2
    for record in measured:
        assert record["images"] == "synthetic"
        assert record["survey"]["macs_dense"] > 0
        assert ("unavailable" in record["latency"]) == (record["mode"] == "cudagraph")
    assert not list(results.glob("checkpoints/*"))


def test_masked_is_not_skipped_and_the_row_says_so(finished):
    done, results, _, _ = finished
    masked = next(record["survey"] for record in records(results) if record.get("label") == "masked")
    assert masked["macs_executed"] == masked["macs_dense"]
    assert masked["macs_theoretical"] < 0.8 * masked["macs_dense"]
    line = "masked: executes as many multiply-adds as dense, overhead aside"
    assert line in done.stdout
    assert "masked, not skipped" in (results / "leaderboard.md").read_text()
    assert "dynamicvit: executes" not in done.stdout


def test_cuda_graphs_are_not_available_and_the_table_says_why(finished):
    done, _, _, _ = finished
    assert "CUDA graphs need an NVIDIA GPU" in done.stdout
    assert "CUDA graphs need fixed shapes, and this method's depend on the image" in done.stdout


def test_the_roofline_gives_shares(finished):
    _, results, _, _ = finished
    (limit,) = [record for record in records(results) if record["kind"] == "roofline"]
    assert limit["gemm_tflops"] > 0.001
    assert limit["copy_gbs"] > 0.1
    (table,) = surveys(results)
    for line in table.lines:
        if not line.speed.unavailable:
            seconds = line.speed.mean_milliseconds / 1e3  # of those whose images differ, too
            reached = 2 * line.macs[2] * line.timing.batch / seconds
            assert line.of_products == pytest.approx(reached / (limit["gemm_tflops"] * 1e12))
            assert 0 < line.of_copies < 2
            assert line.images_per_second == pytest.approx(line.timing.batch / seconds)


@pytest.mark.long
def test_a_second_run_measures_nothing_and_a_third_goes_on(finished):
    _, results, plugins, chosen = finished
    before = {path: path.stat().st_mtime_ns for path in (results / "latency").glob("*.json")}
    again = bench("latency", *BACKBONE, *QUICK, *plugins, *chosen, "--results", results)
    assert again.returncode == 0
    assert again.stdout.count("present") == 4
    assert {path: path.stat().st_mtime_ns for path in (results / "latency").glob("*.json")} == before
    gone = next(
        path for path in before if '"label": "masked"' in path.read_text() and '"mode": "eager"' in path.read_text()
    )
    gone.unlink()
    third = bench("latency", *BACKBONE, *QUICK, *plugins, *chosen, "--results", results)
    assert third.stdout.count("present") == 3
    assert gone.exists()


def test_a_time_budget_stops_and_says_what_is_left(tmp_path):
    arguments = ["latency", *BACKBONE, *QUICK, "--methods", "dense,random", "--results", tmp_path]
    done = bench(*arguments, "--time-budget", "0.001s")
    assert done.returncode == 0
    assert "the time is up; 4 measurements are left" in done.stdout
    assert records(tmp_path) == []


@pytest.mark.long
def test_a_survey_file(tmp_path, toy_file):
    content = {
        "plugins": [str(toy_file)], "seconds": 0.01, "entries": [{"method": "toy", "settings": {"keep_rate": [0.9, 0.5]}}],
        "cases": [
            {"backbone": {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "embed_dim": width, "depth": 4, "num_heads": 2}},
             "image_size": 16, "batch_sizes": [1]} for width in (16, 32)
        ],
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    done = bench("latency", "--spec", path, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = surveys(tmp_path / "results")
    assert [table.backbone["kwargs"]["embed_dim"] for table in tables] == [16, 32]
    for table in tables:
        assert {line.label for line in table.lines} == {"dense", "toy keep_rate=0.9", "toy keep_rate=0.5"}
    csv = tmp_path / "numbers.csv"
    board = bench("leaderboard", "--results", tmp_path / "results", "--csv", csv)
    assert board.returncode == 0, board.stderr
    assert len(csv.read_text().splitlines()) == 7
    content["cases"][0]["batchsizes"] = [1]
    path.write_text(yaml.safe_dump(content))
    wrong = bench("latency", "--spec", path, "--results", tmp_path / "results")
    assert wrong.returncode == 2
    assert "did you mean 'batch_sizes'" in wrong.stderr


def test_the_committed_gpu_survey_is_valid():
    from harness.survey import load_survey

    survey = load_survey(ROOT / "benchmarks" / "gpu-latency.yaml")
    first = survey.cases[0]
    assert (first.backbone.name, first.dtypes, first.batch_sizes) == ("deit_small_patch16_224", ["bfloat16"], [1, 256])


WRONG = {
    "unknown backbone": (["--backbone", "deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
    "unsupported backbone": (["--backbone", "xcit_nano_12_p16_224"], "only timm's VisionTransformer is supported"),
    "unknown dtype": (["--dtypes", "float31"], "float32"),
    "unknown mode": (["--modes", "graph"], "cudagraph"),
    "bad batch": (["--batch-sizes", "a"], "--batch-sizes"),
    "bad time": (["--time-budget", "soon"], "must be a time like 90s, 25m or 1h"),
    "unknown method": (["--methods", "nothing"], "unknown method 'nothing'"),
    "a benchmark": (["--spec", "quick"], "has no cases, so it is a benchmark; say bench.py --spec quick"),
    "no such survey": (["--spec", "nothing.yaml"], "nothing.yaml: no such file"),
    "other backbone than the survey's": (["--spec", "gpu-latency", "--backbone", "x"], "unknown case 'x'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_told_in_a_line_and_exits_with_2(arguments, message, tmp_path, here):
    done = here("latency", *arguments, "--results", tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_killed_command_leaves_no_measurement_running(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bench.py"), "latency", *BACKBONE, "--seconds", "60", "--methods", "dense", "--results", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if "measuring" in line:
            break
    time.sleep(4)
    children = _descendants(process.pid)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    ends = time.monotonic() + 20
    while time.monotonic() < ends and any(_is_running(child) for child in children):
        time.sleep(0.2)
    assert not any(_is_running(child) for child in children)


def _descendants(pid):
    found = []
    for child in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split():
        found += [int(child), *_descendants(child)]
    return found


def _is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
