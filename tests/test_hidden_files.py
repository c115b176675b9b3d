"""What systems and editors leave in folders is neither a class nor an image, and one line says so."""

import importlib
import io
import shutil
import tarfile

import numpy as np
import pytest
import yaml
from conftest import ROOT, tiny_spec
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder, VisionDataset

from harness import records, runner
from harness.cells import load_run
from harness.data import sources
from harness.data.dataset import open_data
from harness.errors import UserError
from harness.hidden import hidden_part, left_out
from harness.spec import Data

LEFT_BEHIND = [
    ".ipynb_checkpoints",
    ".DS_Store",
    "._cat.jpg",
    "__MACOSX",
    "Thumbs.db",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    ".Trash-1000",
    ".git",
    ".AppleDouble",
    "#recycle",
    "System Volume Information",
    "__pycache__",
    "desktop.ini",
    "THUMBS.DB",
    ".nfs0001",
    ".cat.jpg.swp",
]
VISIBLE = [
    "cat",
    "n01440764",
    "_cat",
    "cat.dog",
    "cat~",
    "lost",
    "found",
    "recycle",
    "macosx",
    "1",
    "cat copy",
    "@home",
    "thumbs",
    "trash",
    "git",
]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_a_name_is_hidden_anywhere_in_a_path(name):
    assert hidden_part(name) == name
    assert hidden_part(f"cat/{name}") == f"cat/{name}"
    assert hidden_part(f"./{name}/deep/0.png") == name


@pytest.mark.parametrize("name", VISIBLE)
def test_other_names_are_visible(name):
    assert hidden_part(name) is hidden_part(f"./{name}/0.png") is hidden_part(f"../{name}") is None


@given(st.sets(st.sampled_from(LEFT_BEHIND), min_size=1))
def test_the_line_counts_and_names_some(names):
    line = left_out(names)
    assert line.startswith(f"{len(names)} hidden or system file")
    assert "\n" not in line
    assert sum(name in line for name in names) >= min(len(names), 3)
    assert left_out([]) is None


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for number, label in enumerate(("cat", "dog")):
            for index in range(2):
                picture(tmp_path / "tree" / split / label / f"{index}.png", 100 + 50 * number + index)
    return tmp_path / "tree"


def opened(root, reader="folder", **content):
    path = root.parent / "card.yaml"
    path.write_text(yaml.safe_dump({"name": "card", "reader": reader, "image_size": 8} | content))
    return open_data(Data(card=str(path), workers=0), ROOT, str(root))


FOLDERS = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".Trash-1000"]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("splits", [("train",), ("train", "val")], ids=["one split", "both"])
@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "full"])
def test_a_hidden_folder_is_no_class(tree, name, splits, is_empty):
    """Today .ipynb_checkpoints, which comes first, shifted the numbers of all classes."""
    before = opened(tree)
    for split in splits:
        (tree / split / name).mkdir()
        if not is_empty:
            picture(tree / split / name / "0-checkpoint.png")
    data = opened(tree)
    assert (data.classes, data.checksum) == (before.classes, before.checksum)
    assert data.train.labels.tolist() == before.train.labels.tolist()
    assert data.left_out == f"1 hidden or system file or folder is left out: {name}"
    assert before.left_out is None


INSIDE = [
    "._0.png",
    ".0.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "@eaDir/0.png",
    "__MACOSX/cat/._0.png",
    "puppies/.thumbnails/0.png",
]


@pytest.mark.parametrize("name", INSIDE)
def test_a_hidden_file_is_no_image(tree, name):
    before = opened(tree)
    picture(tree / "train" / "cat" / name)
    (tree / "train" / "cat" / ".DS_Store").write_bytes(b"nothing that anybody took for an image")
    data = opened(tree)
    assert (len(data.train.labels), data.checksum) == (4, before.checksum)
    assert data.left_out.startswith("1 hidden or system file or folder is left out: cat/")


def test_a_data_set_may_lie_in_a_hidden_folder(tree):
    home = tree.parent / ".cache" / "@eaDir" / "data"
    shutil.copytree(tree, home)
    assert opened(home).left_out is None
    assert opened(home).train.labels.tolist() == [0, 0, 1, 1]


def test_a_class_of_which_only_hidden_files_are_left_is_an_error(tree):
    for split in ("train", "val"):
        (tree / split / "ant").mkdir()
        picture(tree / split / "ant" / "._0.png")
    with pytest.raises(UserError, match="ant"):
        opened(tree)


def test_listings_of_data_sets_without_such_files_are_what_they_were(tree):
    """The rule for classes, images, and their order is torchvision's."""
    for name, split in (("train", opened(tree).train), ("val", opened(tree).test)):
        theirs = ImageFolder(str(tree / name))
        assert split.labels.tolist() == theirs.targets
    files = sources.open_split(opened(tree).card, tree, "train", 8, 0, as_files=True)
    assert files.listing.splitlines()[0] == f"train/cat/0.png {(tree / 'train' / 'cat' / '0.png').stat().st_size} 0"
    assert [path for path, _ in files.dataset.samples] == [path for path, _ in ImageFolder(str(tree / "train")).samples]


def content():
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


def shard(path, *more):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, part in (("0.png", content()), ("0.cls", b"0"), ("1.png", content()), ("1.cls", b"1"), *more):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))


MEMBERS = {
    "an image in a hidden folder": ((".ipynb_checkpoints/2.png", content()), (".ipynb_checkpoints/2.cls", b"7")),
    "one that has no label": (("__MACOSX/2.png", content()),),
    "one beside an image": (("._0.png", b"AppleDouble"), ("._0.cls", b"AppleDouble")),
    "deeper": (("./train/@eaDir/2.png", content()), ("./train/@eaDir/2.cls", b"5")),
}


@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_hidden_members_of_shards_are_no_images(tmp_path, members):
    for split in ("train", "test"):
        shard(tmp_path / "shards" / f"{split}.tar")
    before = opened(tmp_path / "shards", "wds/x")
    shard(tmp_path / "shards" / "train.tar", *members)
    data = opened(tmp_path / "shards", "wds/x")
    assert data.train.labels.tolist() == [0, 1]
    assert data.checksum == before.checksum
    assert data.left_out.startswith("1 hidden or system file or folder is left out: train.tar:")


@pytest.mark.parametrize("name", ["._train-0.tar", ".train-0.tar", ".ipynb_checkpoints/train-0.tar"])
def test_hidden_shards_are_not_read(tmp_path, name):
    for split in ("train", "test"):
        shard(tmp_path / "shards" / f"{split}-0.tar")
    (tmp_path / "shards" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "shards" / name).write_bytes(b"no shard")
    pattern = "**/*train*.tar" if "/" in name else "train"
    data = opened(tmp_path / "shards", "wds/x", splits={"train": pattern})
    assert data.train.labels.tolist() == [0, 1]
    assert data.left_out == f"1 hidden or system file or folder is left out: {name.split('/')[0]}"
    with pytest.raises(UserError, match="no shard matches"):
        opened(tmp_path / "shards", "wds/x", splits={"train": "._train-0.tar"})


@pytest.mark.parametrize("attribute", ["samples", "index"])
def test_data_sets_of_torchvision_that_list_folders(tree, monkeypatch, attribute):
    """As ImageNet (paths and labels) and INaturalist (classes and names)."""

    class Listed(VisionDataset):
        def __init__(self):
            super().__init__(str(tree))
            listed = [
                (str(tree / "train" / "cat" / name), number)
                for number, name in enumerate(("0.png", "._0.png", "1.png"))
            ]
            found = listed if attribute == "samples" else [(number, path.rsplit("/")[-1]) for path, number in listed]
            setattr(self, attribute, found)

        def __len__(self):
            return len(getattr(self, attribute))

        def __getitem__(self, index):
            item = getattr(self, attribute)[index]
            path, label = item if attribute == "samples" else (tree / "train" / "cat" / item[1], item[0])
            return Image.open(path), label

    monkeypatch.setattr(sources, "create_dataset", lambda name, **options: Listed())
    data = opened(tree, "torch/x", classes=3)
    assert data.train.labels.tolist() == [0, 2]
    assert "._0.png" in data.left_out


def test_hidden_folders_hold_no_records(tmp_path):
    record = {"id": "a", "kind": "failure", "reason": "error", "message": "why"}
    for folder in ("quick", ".ipynb_checkpoints", "__MACOSX"):
        records.write_atomically(tmp_path / folder / "a.json", records._dump(record))
    records.write_atomically(tmp_path / "quick" / "._a.json", b"\0\5\26\7AppleDouble")
    assert [benchmark for benchmark, _ in records.load_all(tmp_path)] == ["quick"]


def test_a_run_says_it_once(tree, monkeypatch, capsys):
    opened(tree)  # writes the card
    for split in ("train", "val"):
        picture(tree / split / ".ipynb_checkpoints" / "0.png")
    spec = tree.parent / "spec.yaml"
    spec.write_text(yaml.safe_dump(tiny_spec(tree.parent / "card.yaml", entries=[])))
    monkeypatch.setattr(runner.Runner, "execute", lambda self: 0)
    monkeypatch.syspath_prepend(ROOT)
    assert importlib.import_module("bench")._execute(load_run(spec), tree.parent / "results", str(tree)) == 0
    assert capsys.readouterr().out.count("1 hidden or system file or folder is left out: .ipynb_checkpoints\n") == 1
