"""The targets that run the tests in other surroundings; and golden numbers and kernels as an old processor computes them."""

import os
import platform
import subprocess
import sys

import pytest
import versions
from conftest import ROOT
from matrix import Case, run_all
from rounding import OLD

import methods.core.native as native

QUICK = [
    "tests/test_dynamicvit.py::test_losses_and_gradients_agree_with_the_authors",
    "tests/test_sttabt.py::test_masked_forwards_are_the_authors",
    "tests/test_sttabt.py::test_end_to_end_training_is_the_authors",
    "tests/test_sttabt.py::test_scores_and_masks_are_the_authors",
    "tests/test_sttabt.py::test_dropped_tokens_give_the_authors_logits",
    "tests/test_svite.py::test_heads_and_neurons_are_the_official_ones",
    "tests/test_svite.py::test_selected_tokens_are_the_official_ones",
    "tests/test_vitcod.py::test_the_forward_is_the_official_one",
]

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels are those of x86-64 processors")


@x86
def test_an_old_processor_gets_the_same_numbers():
    """128 bits, torch's and MKL's plainest loops: some golden tests of each method and a kernel, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *QUICK],
        cwd=ROOT, env=os.environ | OLD | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@x86
def test_kernels_of_different_levels_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for level in ("x86-64-v2", "x86-64-v3"):
        monkeypatch.setenv(native.MARCH, level)
        native._library("walk_back")
    assert len(list((tmp_path / "sparse-vit-bench").iterdir())) == 2


def test_a_level_that_the_compiler_does_not_know_is_told(tmp_path, monkeypatch):
    """And nothing else stands in for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(native.MARCH, "x86-64-v9")
    with pytest.raises(native.NoKernel, match="x86-64-v9"):
        native._library("walk_back")


def test_the_newest_patch_of_each_minor_release_is_taken():
    releases = "2.15.0 2.14.1 2.14.0 2.13.0+cpu 2.13.0 2.10.0 2.9.1 2.16.0rc1 2.12.10 2.12.9".split()
    assert versions.newest_of_each(releases, "2.10") == {
        "2.10": "2.10.0", "2.12": "2.12.10", "2.13": "2.13.0", "2.14": "2.14.1", "2.15": "2.15.0",
    }  # fmt: skip
    assert versions.newest_of_each(["3.0.1", "2.9.0"], "2.10") == {"3.0": "3.0.1"}


def test_what_is_declared_is_read_from_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "timm", "torchvision"):
        assert f'"{package}>={versions.declared(package)}"' in text


def test_every_case_runs_and_one_failure_is_enough(tmp_path, capfd):
    (tmp_path / "test_told.py").write_text("import os\n\n\ndef test_told():\n    assert os.environ['TOLD'] == 'yes'\n")
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_told.py")]
    cases = [Case(f"told {word}", sys.executable, arguments, {"TOLD": word}) for word in ("no", "yes")]
    assert run_all(cases) == 1
    said = capfd.readouterr().out
    assert "told no: FAILED (1) in" in said
    assert "told yes: passed in" in said
    assert said.endswith("1 of 2 passed\n  failed: told no\n")
    assert run_all(cases[1:]) == 0
    assert run_all([]) == 1
