"""Labels that are no whole numbers are refused by every reader, with a line that names the first."""

import io
import json
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from harness.data import sources
from harness.data.dataset import open_data
from harness.data.labels import whole, whole_numbers
from harness.errors import UserError
from harness.spec import Data

WRONG = {
    "a fraction": 1.7,
    "nearly whole": 2.0000001,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "negative": -1,
    "a boolean": True,
    "a text": "cat",
    "digits": "3",
    "nothing": None,
    "a list": [1],
    "bytes": b"1",
    "a fraction of its own type": Fraction(3, 2),
    "too large": 2**40,
    "numpy's fraction": np.float32(0.5),
    "numpy's boolean": np.bool_(True),
    "a vector": np.array([1]),
    "a tensor's fraction": torch.tensor(1.5),
    "numpy's text": np.str_("1"),
}
RIGHT = {0: 0, 3.0: 3, np.uint8(4): 4, np.float64(5): 5}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_label_that_is_no_whole_number_is_refused(value):
    with pytest.raises(UserError, match=r"^a\.json: the label .* is no whole number") as told:
        whole(value, "a.json")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("value", "number"), RIGHT.items())
def test_whole_numbers_of_all_types_are_labels(value, number):
    for form in (value, np.array(value), torch.tensor(float(value))):
        assert whole(form, "x") == number
        assert type(whole(form, "x")) is int


@given(st.lists(st.integers(0, 10**9)), st.sampled_from([np.int64, np.uint32, np.float64]))
def test_lists_arrays_and_tensors_give_the_same(labels, dtype):
    array = np.array(labels, dtype=dtype)
    for form in (labels, array, torch.from_numpy(array.astype(np.int64))):
        found = whole_numbers(form, "x")
        assert found.dtype == torch.int64
        assert found.tolist() == labels


@pytest.mark.parametrize("form", [list, np.array, lambda values: torch.tensor(values)])
def test_the_first_wrong_one_is_named(form):
    with pytest.raises(UserError, match=r"^the train split, image 2: the label 0\.5 "):
        whole_numbers(form([0.0, 1.0, 0.5, 0.25]), "the train split")


def card(tmp_path, **content):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"name": "card", "image_size": 8} | content))
    return Data(card=str(tmp_path / "card.yaml"), workers=0)


ARRAYS = {
    "fractions": (np.array([0, 1, 1.7, 0]), "image 2: the label 1.7"),
    "not a number": (np.array([0, np.nan, 1, 0]), "image 1: the label nan"),
    "negative": (np.array([0, 1, 1, -1]), "image 3: the label -1"),
    "booleans": (np.array([False, True, True, False]), "image 0: the label False"),
    "texts": (np.array(["cat", "dog", "dog", "cat"]), "image 0: the label 'cat'"),
    "beyond int64": (np.array([0, 2**64 - 1, 1, 0], dtype=np.uint64), "image 1: the label 18446744073709551615"),
    "half floats": (np.array([0, 1, 0.5, 0], dtype=np.float16), "image 2: the label 0.5"),
    "half floats' infinity": (np.array([0, np.inf, 1, 0], dtype=np.float16), "image 1: the label inf"),
    "dates": (np.array(["2020-01-01"] * 4, dtype="datetime64[D]"), "image 0: the label datetime"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("labels", "message"), ARRAYS.values(), ids=ARRAYS)
def test_labels_of_arrays(tmp_path, labels, message, split):
    images, right = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.array([0, 1, 1, 0])
    given_ = {"train": right, "test": right, split: labels}
    np.savez(
        tmp_path / "x.npz",
        **{f"{s}_images": images for s in given_},
        **{f"{s}_labels": value for s, value in given_.items()},
    )
    with pytest.raises(UserError) as told:
        open_data(card(tmp_path, reader="npz"), ROOT, str(tmp_path / "x.npz"))
    assert f"x.npz: {split}_labels, {message}" in str(told.value)


def test_whole_floats_are_labels(tmp_path):
    images, labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.array([0.0, 1.0, 3.0, 2.0])
    np.savez(
        tmp_path / "x.npz",
        **{f"{s}_images": images for s in ("train", "test")},
        **{f"{s}_labels": labels for s in ("train", "test")},
    )
    assert open_data(card(tmp_path, reader="npz"), ROOT, str(tmp_path / "x.npz")).train.labels.tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize(
    ("labels", "gap", "classes"), [([0, 1, 255, 0], 2, 256), ([1, 2, 3, 2], 0, 4), ([0, 2000000, 1, 1], 2, 2000001)]
)
def test_classes_without_images_must_be_meant(tmp_path, labels, gap, classes):
    """255 for "no class", counting from 1: a class would be added that no image has."""
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(
        tmp_path / "x.npz",
        **{f"{s}_images": images for s in ("train", "test")},
        **{f"{s}_labels": np.array(labels) for s in ("train", "test")},
    )
    with pytest.raises(UserError, match=rf"no image has label {gap}; .* or say classes: {classes} in the card"):
        open_data(card(tmp_path, reader="npz"), ROOT, str(tmp_path / "x.npz"))
    assert open_data(card(tmp_path, reader="npz", classes=classes), ROOT, str(tmp_path / "x.npz")).classes == classes


SHARDS = {
    "a fraction": ("cls", b"1.5", "1.5"),
    "a boolean": ("cls", b"true", "True"),
    "negative": ("cls", b"-1\n", "-1"),
    "NaN": ("cls", b"NaN", "nan"),
    "a fraction in JSON": ("json", json.dumps({"label": 0.5}).encode(), "0.5"),
    "a text": ("json", b'{"cls": "cat"}', "'cat'"),
    "digits": ("json", b'{"label": "3"}', "'3'"),
    "a list": ("json", b'{"label": [1]}', r"\[1\]"),
}


def picture():
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("extension", "label", "shown"), SHARDS.values(), ids=SHARDS)
def test_labels_of_shards(tmp_path, extension, label, shown):
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name, content in (
                ("a.png", picture()),
                ("a.cls", b"0"),
                ("b.png", picture()),
                (f"b.{extension}", label),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=rf"train\.tar: b\.{extension}: the label {shown} is no whole number"):
        open_data(card(tmp_path, reader="wds/x"), ROOT, str(tmp_path))


class Reader:
    """A column of labels and files, as timm's reader of Hugging Face data sets."""

    label_key = "label"

    def __init__(self, labels):
        self.dataset = {"label": labels}

    def __len__(self):
        return len(self.dataset["label"])

    def __getitem__(self, index):
        return io.BytesIO(picture()), self.dataset["label"][index]


class Torchvision(torch.utils.data.Dataset):
    """A map-style data set that tells its labels beforehand, or does not."""

    def __init__(self, labels, told):
        self.labels = labels
        if told:
            self.targets = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.open(io.BytesIO(picture())), self.labels[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        yield from ((Image.open(io.BytesIO(picture())), label) for label in self.labels)


MAKERS = {
    "hfds/x": lambda labels: type("Data", (), {"reader": Reader(labels)})(),
    "torch/told": lambda labels: Torchvision(labels, True),
    "torch/untold": lambda labels: Torchvision(labels, False),
    "hfids/x": Stream,
    "tfds/x": Stream,
}


@pytest.mark.parametrize("reader", MAKERS)
@pytest.mark.parametrize("wrong", [1.5, "cat", True, -1, None, [1, 2]], ids=str)
def test_labels_of_other_readers(tmp_path, monkeypatch, reader, wrong):
    monkeypatch.setattr(
        sources, "_import", lambda package: type("Package", (), {"load_dataset": None, "builder": None})
    )
    monkeypatch.setattr(sources, "create_dataset", lambda name, **options: MAKERS[reader](labels))
    labels = [0, 1, 2.0]
    assert open_data(card(tmp_path, reader=reader), ROOT, str(tmp_path)).train.labels.tolist() == [0, 1, 2]
    labels = [0, 1, wrong]
    with pytest.raises(UserError, match=r"image 2: the label .* is no whole number"):
        open_data(card(tmp_path, reader=reader), ROOT, str(tmp_path))
