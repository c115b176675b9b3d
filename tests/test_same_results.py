"""Code that was shown to give the same results: with which settings, and of what it says nothing."""

import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_freshness import OTHER, table_of
from test_leaderboard import CONTEXT, measure_record, train_record

from harness import code_comparison, freshness, same_results
from harness.code_comparison import first_difference, with_recorded
from harness.errors import UserError
from harness.records import Store, identify, load_all
from harness.same_results import Evidence
from methods.core.registry import available, create, is_builtin


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """An empty list."""
    monkeypatch.setattr(same_results, "FILE", tmp_path / "same_results.yaml")
    same_results.listed.cache_clear(), same_results._linked.cache_clear()
    yield tmp_path / "same_results.yaml"
    same_results.listed.cache_clear(), same_results._linked.cache_clear()


ROW = {"keep_rate": 0.7, "exact": True}


def evidence(one, other, *rows):
    """one, other: digests, or digits to make them of."""
    rows = {str(number): settings for number, settings in enumerate(rows or [ROW])}
    return Evidence(
        digests=[(digest * 64)[:64] for digest in (one, other)], commits=["c", "d-dirty"], date="2026-01-01", versions={"torch": "2"},
        rows=rows, events=dict.fromkeys(rows, 1), backbones=["plain"], results="0" * 64,
    )  # fmt: skip


def are_same(one, other, settings=ROW, method="m", revision=1):
    return same_results.are_same(method, revision, one * 64, other * 64, settings)


def test_pairs_link_digests_of_one_method_and_revision(listed):
    assert not are_same("a", "b")
    assert same_results.add("m", 1, evidence("a", "b"))
    assert same_results.add("m", 1, evidence("c", "b"))
    assert not same_results.add("m", 1, evidence("a", "c"))  # known
    assert are_same("c", "a")
    assert not are_same("c", "a", revision=2)
    assert not are_same("c", "a", method="n")
    assert not are_same("d", "a")
    assert listed.read_text().startswith("# ")
    assert len(yaml.safe_load(listed.read_text())["methods"]["m"][1]) == 2


OTHERS = [{"keep_rate": 0.5, "exact": True}, {"keep_rate": 0.7}, {"keep_rate": 0.7, "exact": 1}, ROW | {"more": None}]


@pytest.mark.parametrize("settings", OTHERS)
def test_pairs_link_only_what_was_compared_with_the_very_settings(listed, settings):
    same_results.add("m", 1, evidence("a", "b", ROW))
    assert are_same("a", "b", dict(reversed(ROW.items())))
    assert not are_same("a", "b", settings)
    same_results.add("m", 1, evidence("b", "c", settings))
    assert not are_same("a", "c", settings)  # no chain leads there with one of the two
    assert not are_same("a", "c")
    assert same_results.add("m", 1, evidence("a", "b", ROW, settings))  # says more than what is known
    assert are_same("a", "c", settings)


def test_rows_of_code_that_gives_the_same_are_not_marked(listed, tmp_path):
    """Each row by its own settings; and that dense gives the same with its settings, which records do not repeat."""
    here, dense = (freshness.code_digest(name) for name in ("random", "dense"))
    context = CONTEXT | {"dense_revision": 1}
    code = {"digest": "e" * 64, "dense": "d" * 64}
    rows = [
        train_record(f"r{n}", "random", {"n": n}, 0, [True, False], context=context) | {"code": code} for n in (1, 2)
    ]

    def found():
        return {row.label: row.code for row in table_of(tmp_path / "r", *rows).rows}

    same_results.add("random", 1, evidence("e", here, {"n": 1}))
    assert found() == {"r1": "other", "r2": "other"}
    same_results.add("dense", 1, evidence("d", dense, {"continued": True}))
    assert found() == {"r1": "other", "r2": "other"}
    same_results.add("dense", 1, evidence("d", dense, {"continued": False}))
    assert found() == {"r1": "this", "r2": "other"}
    failed = rows[0] | {"kind": "failure", "code": {"digest": "e" * 64}}
    assert freshness.failure_state(failed) == "this"
    assert freshness.failure_state(failed | {"settings": {"n": 2}}) == "other"


def test_what_began_with_such_code_goes_on(listed):
    maker = freshness.Maker(
        "m", 1, ROW, {"digest": "a" * 64, "dense": "c" * 64}, dense_revision=1, dense_settings={"continued": False}
    )
    same_results.add("m", 1, evidence("a", "b", ROW))
    same_results.add("dense", 1, evidence("c", "d", {"continued": False}))
    saved = {"digest": "b" * 64, "dense": "d" * 64}
    assert maker.made(saved)
    assert not dataclasses.replace(maker, settings=OTHERS[0]).made(saved)
    assert not dataclasses.replace(maker, dense_settings={"continued": True}).made(saved)
    assert not maker.made(saved | {"dense": "e" * 64})


def test_the_same_results_say_nothing_of_times(listed, tmp_path):
    """A time is of the very code that was timed, whatever gives the same logits; the weights may be of code that gives the same."""
    here = freshness.code_digest("random")
    same_results.add("random", 1, evidence(OTHER, here, {}))
    row = train_record("r", "random", {}, 0, [True, False]) | {"code": {"digest": OTHER}}
    for digest, trained, state in (
        (OTHER, OTHER, "other"),
        (here, OTHER, "this"),
        (here, here, "this"),
        (here, "e" * 64, "other"),
    ):
        timed = measure_record(row) | {"code": {"digest": digest, "trained": trained}}
        (found,) = table_of(tmp_path, row, timed).rows
        assert (found.code, *found.timing_code.values()) == ("this", state)
    survey = {"method": "random", "settings": {}, "revision": 1}
    timed = measure_record(row) | {"survey": survey, "code": {"digest": OTHER}}
    assert freshness.survey_state(timed) == "other"
    assert freshness.survey_state(timed | {"code": {"digest": here}}) == "this"


# What is compared.


def settings_of(method, **settings):
    return create(method, **settings).settings.model_dump(mode="json")


@pytest.mark.parametrize("method", [name for name in available() if is_builtin(name)])
def test_what_the_committed_records_need_is_compared(method):
    needed = [r["settings"] for _, r in load_all(ROOT / "results") if r["kind"] == "train" and r["method"] == method]
    rows, left = with_recorded(method, {"defaults": settings_of(method)}, ROOT / "results")
    assert not left
    assert rows["defaults"] == settings_of(method)
    assert set(map(identify, needed)) <= set(map(identify, rows.values()))
    assert len(set(map(identify, rows.values()))) == len(rows)


def test_records_that_cannot_be_made_again_and_too_many_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(code_comparison, "MOST", 3)
    store, chosen = (
        Store(tmp_path, "b"),
        [settings_of("magnitude", density=density) for density in (0.1, 0.2, 0.3, 0.4)],
    )
    for seed, settings in ((0, chosen[0]), (0, chosen[1]), (1, chosen[1]), (0, chosen[2])):
        store.write(train_record("m", "magnitude", settings, seed, [True]))
    store.write(train_record("older", "magnitude", settings_of("magnitude", density=0.6), 0, [True], revision=9))
    store.write(train_record("partial", "magnitude", {"density": 0.7}, 0, [True]))
    store.write(train_record("unknown", "magnitude", chosen[0] | {"x": 1}, 0, [True]))
    store.write(train_record("another", "random", settings_of("random"), 0, [True]))
    rows, left = with_recorded("magnitude", {"m": chosen[3]}, tmp_path)
    assert left == 1
    assert list(rows.values())[:2] == [chosen[3], chosen[1]]  # what most records have comes first
    assert len(rows) == 3
    assert all(settings in chosen for settings in rows.values())
    timed = train_record("t", "magnitude", settings_of("magnitude", density=0.9), 0, [True])
    facts = {key: timed[key] for key in ("method", "settings", "revision")}
    store.write(measure_record(timed) | {"label": "t", "survey": facts | {"backbone": {}, "image_size": None}})
    monkeypatch.setattr(code_comparison, "MOST", 9)
    rows, left = with_recorded("magnitude", {}, tmp_path)
    assert left == 0
    assert list(rows.values()).count(facts["settings"]) == 1
    assert len(rows) == 4


@pytest.fixture
def compared(listed, monkeypatch, here):
    """The command, with what it asks both versions of the code for; nothing is trained. events: of each row, by its label."""
    asked, there = [], Path("there")

    def fingerprint(tree, method, rows, revision, events):
        asked.append(rows)
        return {
            "revision": 1, "digest": ("a" if tree == there else "b") * 64, "versions": {}, "rows": {
                label: {
                    "settings": settings,
                    "backbones": {"plain": {"training": [{"events": ["x"] * events(label)}]}, "odd": {"refused": "why"}}
                    if events(label) is not None
                    else {"plain": {"refused": "why"}},
                }
                for label, settings in rows.items()
            },
        }  # fmt: skip

    def run(*arguments, events):
        monkeypatch.setattr(code_comparison, "_fingerprint", lambda *given: fingerprint(*given, events))
        monkeypatch.setattr(code_comparison, "_checkout", lambda revision: nullcontext((there, "c" * 40)))
        monkeypatch.setattr(code_comparison, "ROOT", listed.parent)
        return here("check", "svite", "--same-results", *arguments), asked[-1]

    return run


def test_the_command_compares_what_records_need_and_says_how_much(compared, listed):
    done, rows = compared(events=lambda label: 0 if label.startswith("static") else 2)
    assert done.returncode == 0, done.stderr
    assert len(rows) == 9  # eight rows of the reference benchmark, and the defaults
    assert (
        "9 combinations of settings and 16 events of training steps (none with static masks 0.5); written to"
        in done.stdout
    )
    (pair,) = yaml.safe_load(listed.read_text())["methods"]["svite"][1]
    assert pair["rows"] == rows
    assert pair["events"] == {label: 2 * (not label.startswith("static")) for label in rows}
    done, rows = compared("--set", "svite.density=0.25", events=lambda label: 0)
    assert [settings["density"] for settings in rows.values()] == [0.25]
    assert "1 combination of settings and 0 events of training steps; written to" in done.stdout


def test_settings_that_fit_no_small_backbone_are_no_evidence(compared, listed):
    done, rows = compared(events=lambda label: None if label == "svite" else 1)
    assert done.returncode == 0, done.stderr
    (pair,) = yaml.safe_load(listed.read_text())["methods"]["svite"][1]
    assert set(rows) - set(pair["rows"]) == {"svite"}
    listed.unlink()
    done, _ = compared(events=lambda label: None)
    assert done.returncode == 2
    assert "svite: fits none of the small backbones" in done.stderr
    assert not listed.exists()


def test_a_line_without_its_evidence_is_refused(listed):
    content = evidence("a", "b").model_dump()
    del content["results"]
    listed.write_text(yaml.safe_dump({"methods": {"m": {1: [content]}}}))
    with pytest.raises(UserError, match=r"same_results\.yaml.*results"):
        are_same("a", "b")


def test_the_first_difference_is_named():
    one = {"random": {"settings": {"a": 1}, "weights": {"x": "1", "y": "2"}, "logs": [1.0, 2.0]}}
    assert first_difference(one, json.loads(json.dumps(one))) is None
    other = {"random": {**one["random"], "weights": {"x": "1", "y": "3"}, "logs": [1.0]}}
    assert first_difference(one, other) == 'random, weights, y: "2" there, "3" here'
    assert "logs: [1.0, 2.0] there, [1.0] here" in first_difference(
        one, other | {"random": {**one["random"], "logs": [1.0]}}
    )
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b: null there, 2 here"


@pytest.mark.long
def test_code_is_compared_with_a_commit(tmp_path):
    """In a clone: another name gives the same results and is written down; another number does not."""
    clone = tmp_path / "clone"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for path in subprocess.run(
        [*git, "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split():
        if (ROOT / path).is_file() and path.endswith((".py", ".cpp", ".h", ".yaml")):
            shutil.copy(ROOT / path, clone / path)
    subprocess.run([*git, "-C", str(clone), "commit", "--quiet", "--allow-empty", "-am", "here"], check=True)
    file, target = clone / "methods" / "random.py", clone / "methods" / "same_results.yaml"

    def compared(*arguments):
        return subprocess.run(
            [sys.executable, str(clone / "bench.py"), "check", "random", "--same-results", *arguments],
            cwd=clone, capture_output=True, text=True,
        )  # fmt: skip

    original = file.read_text()
    file.write_text(original.replace("import methods\n", "import methods\n\nUNUSED = 1\n", 1))
    done = compared()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same results as at HEAD" in done.stdout
    (pair,) = yaml.safe_load(target.read_text())["methods"]["random"][1]
    assert pair["commits"][1].endswith("-dirty")
    assert len(pair["rows"]) == len(pair["events"]) == 4  # those of the committed records, and the defaults
    changed = original.replace("Noise(self.seed, 0, seen)", "Noise(self.seed, 1, seen)")
    assert changed != original
    file.write_text(changed)
    done = compared()
    assert done.returncode == 1
    assert "other results than at HEAD" in done.stdout
    assert len(yaml.safe_load(target.read_text())["methods"]["random"][1]) == 1
    assert compared("--against", "nothing").returncode == 2
    worktrees = subprocess.run([*git, "-C", str(clone), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1
