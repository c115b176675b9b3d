"""The accuracies of a record are looked at when it is read: what does not fit together names the file and the key."""

import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from harness import records
from harness.errors import UserError
from harness.packing import bits, pack


def record(correct, **changes):
    content = {key: 0 for key in records.REQUIRED["train"]} | {
        "id": "ab12",
        "kind": "train",
        "test_images": len(correct),
        "correct": pack(correct),
        "top1": float(correct.mean()),
        "top5": 1.0,
    }
    return content | changes


def read(tmp_path, content):
    path = tmp_path / "quick" / "ab12.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return records.load(path)


CORRECT = np.arange(21) % 3 > 0  # 14 of 21
WRONG = {
    "another mean": ({"top1": 0.5}, "top1 0.5 is not the share of images in correct, 0.666667"),
    "per cent": ({"top1": 200 / 3}, "top1 66.66"),
    "a mean of another rounding": ({"top1": 0.6667}, "top1 0.6667 is not the share"),
    "negative": ({"top1": -0.1}, "top1 -0.1 is no share from 0 to 1"),
    "not a number": ({"top1": float("nan")}, "top1 nan is no share"),
    "a text": ({"top1": "0.67"}, "top1 '0.67' is no share"),
    "nothing": ({"top1": None}, "top1 None is no share"),
    "a boolean": ({"top5": True}, "top5 True is no share"),
    "top-5 below top-1": ({"top5": 0.6}, "top5 0.6 is below top1"),
    "top-5 above 1": ({"top5": 1.01}, "top5 1.01 is no share"),
    "validation in per cent": ({"val_top1": 66.7}, "val_top1 66.7 is no share"),
    "averaged weights' is not a number": ({"ema_top1": float("inf")}, "ema_top1 inf is no share"),
    "untrained in per cent": ({"untrained_top1": 66.7}, "untrained_top1 66.7 is no share"),
    "untrained without a share": (
        {"untrained_correct": pack(CORRECT)},
        "untrained_top1 None is not the share of images in untrained_correct, 0.666667",
    ),
    "untrained of another mean": (
        {"untrained_correct": pack(CORRECT), "untrained_top1": 0.5},
        "untrained_top1 0.5 is not the share",
    ),
    "untrained of no base64": ({"untrained_correct": "!!!", "untrained_top1": 0.5}, "untrained_correct: "),
    "more images": ({"test_images": 29}, "correct: has 3 bytes, but 29 images are 4"),
    "fewer images": ({"test_images": 8}, "correct: has 3 bytes, but 8 images are 1"),
    "one image fewer": ({"test_images": 19}, "correct: has bits for more than 19 images"),
    "another number in the same bytes": (
        {"test_images": 24},
        "top1 0.666666.* is not the share of images in correct, 0.583333",
    ),
    "no images": ({"test_images": 0}, "test_images 0 is no number of images"),
    "half an image": ({"test_images": 21.5}, "test_images 21.5 is no number"),
    "a flipped bit": (
        {"correct": pack(CORRECT ^ (np.arange(21) == 4))},
        "top1 .* is not the share of images in correct",
    ),
    "a cut text": ({"correct": pack(CORRECT)[:-1]}, "correct: "),
    "characters of no base64": ({"correct": "%%%%"}, "correct: "),
    "a list": ({"correct": CORRECT.tolist()}, "correct: is no text but list"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    assert read(tmp_path, record(CORRECT))["top1"] == CORRECT.mean()
    with pytest.raises(UserError, match=rf"record .*quick/ab12\.json: {message}.*delete it to make it again") as told:
        read(tmp_path, record(CORRECT) | changes)
    assert "\n" not in str(told.value)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_what_was_packed_is_read(correct):
    array = np.array(correct)
    assert records._wrong_accuracy(record(array, val_top1=None)) is None
    assert bits(pack(array), len(array)).tolist() == correct


def test_all_committed_records_hold():
    kinds = [content["kind"] for _, content in records.load_all(ROOT / "results")]
    assert kinds.count("train") > 20
