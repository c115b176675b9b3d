"""The command, run as a process: what it prints, writes and exits with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, bench


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_spec_file, toy_file):
    """A whole run with a plug-in: (process, results folder)."""
    results = tmp_path_factory.mktemp("run") / "results"
    return bench("--spec", tiny_spec_file, "--plugin", toy_file, "--results", results), results


def records(results):
    return {path.name: json.loads(path.read_text()) for path in (results / "tiny").glob("*.json")}


def test_a_run_trains_measures_and_ranks(finished):
    done, results = finished
    assert done.returncode == 0, done.stderr
    found = list(records(results).values())
    train = {record["label"]: record for record in found if record["kind"] == "train"}
    assert set(train) == {"dense", "dense+", "dynamicvit keep_rate=0.6", "toy"}
    assert sum(record["kind"] == "measure" for record in found) == 4
    board = (results / "leaderboard.md").read_text()
    assert all(f"| {label}" in board for label in train)
    sparse = train["dynamicvit keep_rate=0.6"]
    assert sparse["cost"]["macs_executed"] == sparse["cost"]["macs_theoretical"] < sparse["cost"]["macs_dense"]
    assert sparse["report"]["tokens"]["keys"] == [17, 10, 6, 4]
    assert [phase["name"] for phase in sparse["phases"]] == ["prune"]
    assert {"classification", "ratio", "distillation", "token"} <= sparse["phases"][0]["curve"][0].keys()
    assert train["dense+"]["untrained_correct"] == train["dense"]["correct"]  # where its training starts
    assert (train["dense"]["untrained_top1"], sparse["untrained_top1"] is None) == (None, False)
    for record in found:
        if record["kind"] == "train":
            assert record["where"]["waiting"]["rule"]
        assert record["where"]["packages"]["torch"]
        assert str(ROOT) not in json.dumps({key: value for key, value in record.items() if key != "context"})


def test_a_second_run_does_nothing_and_writes_the_same_bytes(finished, tiny_spec_file, toy_file):
    _, results = finished
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in results.rglob("*.json")}
    board = (results / "leaderboard.md").read_bytes()
    again = bench("--spec", tiny_spec_file, "--plugin", toy_file, "--results", results)
    assert again.returncode == 0
    assert again.stdout.count("present") == 4
    assert not re.search(r"seed 0[^\n]*: (training|evaluating|measuring)", again.stdout)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in results.rglob("*.json")} == before
    assert (results / "leaderboard.md").read_bytes() == board


@pytest.mark.long
def test_one_seed_gives_one_accuracy_and_dense_is_trained_once(finished, tiny_spec_file, tmp_path):
    _, results = finished
    again = bench("--spec", tiny_spec_file, "--results", tmp_path, "--seeds", "0,1")
    assert again.returncode == 0, again.stderr
    first, second = records(results), records(tmp_path)
    common = [name for name in first if name in second and first[name]["kind"] == "train"]
    assert len(common) == 3
    for name in common:
        assert first[name]["correct"] == second[name]["correct"]
        assert first[name]["weights_sha256"] == second[name]["weights_sha256"]
    assert again.stdout.count("dense, seed 0: training") == 1
    assert again.stdout.count("its dense network") == 0
    assert sum(record["kind"] == "train" for record in second.values()) == 6


@pytest.mark.long
def test_rows_can_be_renamed_and_checkpoints_stand_in_for_training(finished, tiny_spec_file, tmp_path):
    _, results = finished
    copied = tmp_path / "results"
    shutil.copytree(results, copied)
    spec = yaml.safe_load(tiny_spec_file.read_text())
    spec["entries"][0] |= {"label": "mine [b]", "control": True}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec))
    renamed = bench("--spec", tmp_path / "tiny.yaml", "--results", copied)
    assert renamed.returncode == 0, renamed.stderr
    assert renamed.stdout.count("present") == 3
    assert "mine [b]" in renamed.stdout.splitlines()[-4] + renamed.stdout
    (line,) = (line for line in (copied / "leaderboard.md").read_text().splitlines() if line.startswith("| mine [b]"))
    assert " control |" in line
    shutil.rmtree(copied / "tiny")
    again = bench("--spec", tmp_path / "tiny.yaml", "--results", copied)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stdout
    before, after = records(results), records(copied)
    for name in set(before) & set(after):
        for key in ("loss", "untrained_top1", "untrained_correct"):
            assert before[name].get(key) == after[name].get(key)


def test_what_depends_on_a_failed_dense_network_is_tried_again(tmp_path, tiny_spec_file):
    arguments = ["--spec", tiny_spec_file, "--results", tmp_path]
    broken = bench(*arguments, "--set", "recipe.lr=1e30", "--set", "adapt.lr=1e-3")
    assert broken.returncode == 1
    assert broken.stdout.count("FAILED") == 3
    failures = [record for record in records(tmp_path).values() if record["kind"] == "failure"]
    assert [failure["reason"] for failure in failures] == ["divergence"]


def test_show_and_leaderboard_do_without_torch(finished):
    _, results = finished
    name = next(name for name, record in records(results).items() if record["kind"] == "train")
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry:\n runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n assert 'torch' not in sys.modules"
    for arguments, words in (
        (["show", name[:-5]], "top1"),
        (["leaderboard"], "dense+"),
        (["leaderboard", "--csv", str(results / "x.csv")], "dense+"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "bench.py"), *arguments, "--results", str(results)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    assert len((results / "x.csv").read_text().splitlines()) == 5


def test_help_is_quick():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert bench("--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def test_list_names_everything():
    done = bench("list")
    assert done.returncode == 0
    for word in ("dynamicvit", "random", "quick", "imagenet-deit-small", "gpu-latency", "fashion-mnist-12k"):
        assert word in done.stdout


def test_cost_as_json():
    done = bench(
        "cost",
        "--backbone",
        "deit_small_patch16_224",
        "--methods",
        "dense,dynamicvit",
        "--set",
        "dynamicvit.keep_rate=0.7",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    dense, sparse = json.loads(done.stdout)
    assert list(dense) == [
        "method",
        "settings",
        "backbone",
        "macs_dense",
        "macs_theoretical",
        "macs_executed",
        "params",
        "params_nonzero",
        "params_theoretical",
        "macs_spread",
        "macs_error",
        "macs_images",
        "count_revision",
        "parts",
        "blocks",
        "counters",
        "convention",
        "remarks",
        "estimates",
        "numbers",
        "numbers_error",
        "authors",
    ]
    assert (dense["remarks"], dense["estimates"]) == ([], [])
    assert sum(dense["parts"]["executed"].values()) == 4598882304
    assert dense["macs_dense"] == dense["macs_executed"] == 4598882304
    assert sparse["macs_theoretical"] == sparse["macs_executed"] == 2980897728


def test_cost_as_a_table_fits_a_narrow_terminal():
    done = bench(
        "cost",
        "--backbone",
        "deit_tiny_patch16_224",
        "--methods",
        "dynamicvit",
        "--set",
        "dynamicvit.keep_rate=[0.9,0.7]",
        COLUMNS="80",
    )
    assert done.returncode == 0, done.stderr
    assert "dynamicvit keep_rate=0.9" in done.stdout
    assert "0.8012" in done.stdout
    assert "…" not in done.stdout


WRONG = {
    "unknown method": (
        ["--methods", "dense,dynamicvitt"],
        "unknown method 'dynamicvitt'; allowed: dense, dynamicvit, magnitude, random, sttabt, svite, vitcod; did you mean",
    ),
    "unknown setting": (
        ["--methods", "dynamicvit", "--set", "dynamicvit.keep=1"],
        "dynamicvit: unknown setting 'keep'",
    ),
    "missing spec": (["--spec", "nothing.yaml"], "spec nothing.yaml: no such file"),
    "a survey": (["--spec", "gpu-latency"], "is a survey; say bench.py latency --spec gpu-latency"),
    "unknown key": (["--set", "budget.epoch=1"], "did you mean 'epochs'"),
    "missing data": (
        ["--data-root", "/nothing", "--set", "data.card=image-folder"],
        "--data-root /nothing: no such file or folder",
    ),
    "missing plug-in": (["--plugin", "nothing.py"], "nothing.py: no such file"),
    "bad seeds": (["--seeds", "a"], "must be whole numbers"),
    "no methods": (["--methods", ","], "needs at least one method"),
    "unknown option": (["--metods", "a"], "No such option"),
    "unknown record": (["show", "zzz"], "no record 'zzz'"),
    "unknown backbone": (["cost", "--backbone", "deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
    "option before a command": (["--methods", "random", "list"], "write it after list"),
    "unknown optimizer": (["--set", "recipe.optimizer=muonn"], "did you mean 'muon'"),
    "managed argument": (["cost", "--set", "backbone.img_size=384"], "of cost: --image-size"),
    "unsupported backbone": (
        ["cost", "--backbone", "xcit_nano_12_p16_224"],
        "only timm's VisionTransformer is supported",
    ),
    "unwritable results": (["--results", str(ROOT / "README.md"), "--set", "budget.max_steps=1"], "cannot be written"),
    "no records": (["leaderboard", "--results", "/nothing"], "--results /nothing: no such folder"),
    "check of an unknown method": (["check", "dynamic"], "unknown method 'dynamic'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_told_in_a_line_and_exits_with_2(arguments, message, tmp_path, here):
    has_own = "--results" in arguments or arguments[0] in ("cost", "check") or arguments[-1] == "list"
    extra = [] if has_own else ["--results", tmp_path]
    done = here(*arguments, *extra)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_wrong_use_ends_the_process_with_2(tmp_path):
    done = bench("--methods", "dynamicvit", "--set", "dynamicvit.keep=1", "--results", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_failing_cell_does_not_stop_the_others(tmp_path, tiny_spec_file, toy_file):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import methods\n\n@methods.register\nclass Broken(methods.Method):\n    name = 'broken'\n\n"
        "    def sparsify(self, vit):\n        raise RuntimeError('on purpose')\n"
    )
    arguments = [
        "--spec",
        tiny_spec_file,
        "--plugin",
        broken,
        "--plugin",
        toy_file,
        "--methods",
        "broken,toy",
        "--results",
        tmp_path,
    ]
    done = bench(*arguments)
    assert done.returncode == 1
    assert "broken, seed 0: FAILED (error: on purpose)" in done.stdout
    assert "toy, seed 0: done" in done.stdout
    (failure,) = (tmp_path / "tiny").glob("*.attempt1.json")
    assert json.loads(failure.read_text())["reason"] == "error"
    again = bench(*arguments)
    assert again.returncode == 1
    assert "failed before (error: on purpose); --retry tries it again" in again.stdout
    assert "present" in again.stdout


@pytest.mark.long
def test_check_names_the_rule_that_is_broken(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "import copy, methods, torch\n\n@methods.register\nclass Wrong(methods.Method):\n    name = 'wrong'\n\n"
        "    def sparsify(self, vit):\n        return copy.deepcopy(vit)\n\n"
        "    def deploy(self, sparse):\n        fast = super().deploy(sparse)\n"
        "        fast.head.bias += 1\n        return fast\n"
    )
    done = bench("check", "wrong", "--plugin", path)
    assert done.returncode == 1
    assert "wrong on plain breaks the rule: deployed equals sparse" in done.stdout


def test_ctrl_c_leaves_whole_records_and_says_how_to_go_on(tmp_path, tiny_spec_file):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bench.py"), "--spec", str(tiny_spec_file), "--results", str(tmp_path), "--set", "budget.adapt_epochs=3000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "dense+, seed 0: training" in line:
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(seen) + rest
    assert "the same command goes on with the rest" in rest
    assert "Traceback" not in rest
    for path in (tmp_path / "tiny").iterdir():
        json.loads(path.read_text())
    assert sum(json.loads(path.read_text())["kind"] == "train" for path in (tmp_path / "tiny").glob("*.json")) == 1
