"""Records and checkpoints on disk: whole or not there, found again, and never silently replaced."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import records
from harness.errors import UserError
from harness.packing import pack
from harness.records import Store, identify, write_atomically

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@settings(max_examples=25)
@given(content=st.dictionaries(st.text(), json_values, min_size=2))
def test_ids_depend_on_the_content_and_not_on_its_order(content):
    backwards = dict(reversed(content.items()))
    assert identify(backwards) == identify(content)
    key = next(iter(content))
    assert identify(content | {key: "changed-" + str(content[key])}) != identify(content)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.json: cannot be written: no space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            write_atomically(path, b"x")


def a_train_record(record_id="ab12"):
    return {key: 0 for key in records.REQUIRED["train"]} | {
        "id": record_id,
        "kind": "train",
        "top1": 0.1 + 0.2,
        "top5": 1.0,
        "test_images": 10,
        "correct": pack(np.arange(10) < 3),
        "label": "Δ",
    }


def test_a_record_comes_back_as_it_was(tmp_path):
    store, record = Store(tmp_path, "b"), a_train_record()
    store.write(record)
    assert store.read("ab12") == record
    assert store.read("other") is None
    assert list(records.load_all(tmp_path)) == [("b", record)]


def test_a_record_that_lacks_something_is_named(tmp_path):
    record = a_train_record()
    del record["weights_id"]
    Store(tmp_path, "b").write(record)
    with pytest.raises(UserError, match=r"ab12\.json: lacks 'weights_id'; delete it"):
        Store(tmp_path, "b").read("ab12")


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path, "b").write({"id": "a", "kind": "train", "loss": float("nan")})
    assert not list(tmp_path.rglob("*.json"))


def test_a_benchmark_does_not_take_records_from_another(tmp_path):
    """What is committed for one benchmark must not keep another from running."""
    Store(tmp_path, "one").write(a_train_record())
    assert Store(tmp_path, "two").read("ab12") is None


def test_failures_are_numbered_and_forgotten(tmp_path):
    store = Store(tmp_path, "b")
    for number in range(1, 12):
        assert store.fail("ab12", "error", "why").name == f"ab12.attempt{number}.json"
    assert len(store.failures("ab12")) == 11
    store.forget_failures("ab12")
    assert store.failures("ab12") == []


def test_records_are_found_by_the_beginning_of_their_id(tmp_path):
    store = Store(tmp_path, "b")
    for record_id in ("abcd", "abxy"):
        store.write({"id": record_id, "kind": "train"})
    store.fail("abcd", "error", "why")
    assert records.find(tmp_path, "abc").name == "abcd.json"
    assert records.find(tmp_path, str(tmp_path / "b" / "abxy.json")).name == "abxy.json"
    for name, message in (("ab", "give more digits"), ("zz", "no record 'zz'"), ("", "no record")):
        with pytest.raises(UserError, match=message):
            records.find(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[]", "is no record"), ('{"id": 1}', "is no record")]
)
def test_a_damaged_record_is_named(tmp_path, content, message):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(records.load_all(tmp_path))
