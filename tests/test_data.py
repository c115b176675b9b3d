"""Data: cards and their errors, folders, and batches that do not depend on workers."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from harness.data import sources
from harness.data.cards import ROOT_VARIABLE, load_card
from harness.data.dataset import open_data
from harness.errors import UserError
from harness.spec import Data, Recipe

PLAIN = {"auto_augment": None, "color_jitter": 0, "random_erasing": 0, "mixup": 0, "cutmix": 0}
CPU = torch.device("cpu")


def opened(card, root=None, crop="none", **changes):
    return open_data(Data(card=str(card), **({"workers": 0} | changes)), ROOT, root and str(root), crop)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An ImageFolder tree: 2 classes, 12 training and 4 validation images each, of different sizes."""
    root, generator = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                size = (40 + index, 32, 3)
                Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def card(tmp_path):
    def _card(**content):
        path = tmp_path / "card.yaml"
        path.write_text(yaml.safe_dump({"name": "card", "image_size": 24} | content))
        return path

    return _card


def test_the_embedded_set_is_balanced_and_checked():
    data = opened("fashion-mnist-12k")
    assert data.train.labels.bincount().tolist() == [1000] * 10
    assert data.test.labels.bincount().tolist() == [200] * 10
    assert (len(data.train_ids), len(data.val_ids)) == (9500, 500)
    assert not set(data.train_ids.tolist()) & set(data.val_ids.tolist())
    assert data.checksum == load_card("fashion-mnist-12k")[0].sha256
    batch = next(data.eval_batches("test", 2000, CPU))
    assert batch.images.shape == (2000, 3, 28, 28)
    assert abs(batch.images.mean()) < 0.05
    assert abs(batch.images.std() - 1) < 0.05


def test_a_changed_file_is_refused(tmp_path):
    for name in ("fashion-mnist-12k.yaml", "fashion-mnist-12k.npz"):
        shutil.copy(ROOT / "datasets" / name, tmp_path / name)
    with (tmp_path / "fashion-mnist-12k.npz").open("r+b") as file:
        file.seek(100_000)
        file.write(b"x")
    with pytest.raises(UserError, match=r"checksum .* but the card fashion-mnist-12k says"):
        opened(tmp_path / "fashion-mnist-12k.yaml")


def test_a_folder_tree_in_the_layout_of_imagenet(tree, card):
    data = opened(card(classes=2, val_fraction=0.25), tree)
    assert (data.classes, len(data.train_ids), len(data.val_ids), len(data.test.labels)) == (2, 18, 6, 8)
    batch = next(data.eval_batches("test", 3, CPU))
    assert batch.images.shape == (3, 3, 24, 24)
    assert [b.keys.tolist() for b in data.eval_batches("test", 3, CPU)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_classes_are_counted_where_the_card_does_not_say(tree, card):
    assert opened(card(), tree).classes == 2


def test_a_root_from_the_environment(tree, card, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tree))
    assert opened(card()).classes == 2


def test_images_that_do_not_fit_into_memory_give_the_same_batches(tree, card, monkeypatch):
    small = opened(card(), tree)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    large = opened(card(), tree)
    assert isinstance(large.train, sources.Files)
    for one, other in zip(small.eval_batches("train", 5, CPU), large.eval_batches("train", 5, CPU), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("limit", [sources.MEMORY_LIMIT, 0], ids=["memory", "files"])
def test_augmented_batches_do_not_depend_on_the_workers(tree, card, monkeypatch, limit):
    monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
    recipe = Recipe(batch_size=8)
    batches = [list(opened(card(), tree, workers=workers).train_batches(recipe, 1, 0, 5, CPU)) for workers in (0, 2)]
    assert len(batches[0]) == 5
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize(
    "changes", [{"crop": "pad", "crop_padding": 3, **PLAIN}, {"crop": "resized"}], ids=["fast", "slow"]
)
def test_a_step_is_the_same_wherever_training_begins(tree, card, changes):
    data, recipe = opened(card(), tree), Recipe(batch_size=6, **changes)
    whole = list(data.train_batches(recipe, 5, 0, 9, CPU))
    later = list(data.train_batches(recipe, 5, 4, 9, CPU))
    for one, other in zip(whole[4:], later, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
    other_seed = next(data.train_batches(recipe, 6, 0, 1, CPU))
    assert not torch.equal(whole[0].images, other_seed.images)


def test_an_epoch_has_every_image_once(tree, card):
    data, recipe = opened(card(), tree), Recipe(batch_size=6, crop="none", **PLAIN)
    steps = data.steps_per_epoch(6)
    for epoch in range(2):
        ids = torch.cat([b.keys for b in data.train_batches(recipe, 0, epoch * steps, (epoch + 1) * steps, CPU)])
        assert sorted(ids.tolist()) == data.train_ids.tolist()


def test_padded_crops_move_the_picture_without_bending_it(tmp_path):
    image = np.zeros((8, 16, 16), np.uint8)
    image[:, 6:10, 6:10] = 200
    np.savez(
        tmp_path / "x.npz",
        train_images=image,
        train_labels=np.arange(8) % 2,
        test_images=image,
        test_labels=np.arange(8) % 2,
    )
    (tmp_path / "x.yaml").write_text(
        "{name: x, reader: npz, root: x.npz, image_size: 16, mean: [0, 0, 0], std: [1, 1, 1]}"
    )
    data = opened(tmp_path / "x.yaml")
    (batch,) = data.train_batches(Recipe(batch_size=8, crop="pad", crop_padding=4, flip=0, **PLAIN), 0, 0, 1, CPU)
    assert torch.allclose(batch.images.sum(dim=(2, 3)), torch.tensor(16 * 200 / 255))
    assert len({tuple(image.nonzero()[0].tolist()) for image in batch.images}) > 3


def test_pad_needs_images_in_memory(tree, card, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    data = opened(card(), tree)
    with pytest.raises(UserError, match="use crop: resized"):
        next(data.train_batches(Recipe(batch_size=6, crop="pad", **PLAIN), 0, 0, 1, CPU))


def test_torchvision_readers(tmp_path, card):
    """A CIFAR-10 in torchvision's own format, made here."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator, sums = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {
            "data": generator.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    sums["batches.meta"] = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
        patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
        data = opened(card(reader="torch/cifar10", classes=10, image_size=32), tmp_path)
    assert (len(data.train.labels), len(data.test.labels)) == (100, 20)


def wrong_cases():
    return {
        "no root": ({}, None, "no root; give --data-root DIR"),
        "missing root": ({}, "/no/such/place", "--data-root /no/such/place: no such file or folder"),
        "classes": ({"classes": 5}, "tree", "says 5 classes, but the training images have 2"),
        "unknown key": ({"clases": 5}, "tree", "did you mean 'classes'"),
        "npz for a folder": ({"reader": "npz", "root": "x.npz"}, "tree", "--set data.card=image-folder"),
        "unknown torch set": ({"reader": "torch/nothing"}, "tree", "the train split (torch/nothing"),
        "unknown reader": ({"reader": "fodler"}, "tree", "unknown reader 'fodler'; allowed: npz, folder, torch/NAME"),
        "another way to say folder": ({"reader": "torch/image_folder"}, "tree", "write reader: folder"),
        "checksum of a folder": ({"sha256": "0" * 64}, "tree", "sha256 is for reader: npz"),
        "no hub package": ({"reader": "tfds/x"}, "tree", "pip install tensorflow_datasets"),
        "no shards": ({"reader": "wds/x"}, "tree", "no shard matches *train*.tar"),
    }


@pytest.mark.parametrize(("content", "root", "message"), wrong_cases().values(), ids=wrong_cases())
def test_wrong_data_is_told_in_one_line(tree, card, content, root, message, monkeypatch):
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "_import", lambda package: None)
    with pytest.raises(UserError) as told:
        opened(card(**content), tree if root == "tree" else root)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_splits_with_different_classes_are_refused(tree, card, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "val" / "dog").rename(tmp_path / "tree" / "val" / "wolf")
    with pytest.raises(UserError, match="'dog' is in the train split, but not in the test split"):
        opened(card(), tmp_path / "tree")


def test_a_tree_without_splits_is_refused(tree, card):
    with pytest.raises(UserError, match="no folder for the train split"):
        opened(card(), tree / "train")


def test_unknown_cards_show_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_card("cifar-10")


@pytest.fixture
def changed_tree(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    return tmp_path / "tree"


def test_a_class_folder_without_images_is_refused(changed_tree, card):
    """Left out, it would shift the numbers of the classes after it in one split alone."""
    for split in ("train", "val"):
        (changed_tree / split / "ant").mkdir()
    with pytest.raises(UserError, match="ant"):
        opened(card(), changed_tree)


def test_images_outside_class_folders_do_not_count_and_nested_ones_do(changed_tree, card):
    plain = opened(card(), changed_tree)
    shutil.copy(changed_tree / "train" / "cat" / "0.png", changed_tree / "train" / "cover.png")
    (changed_tree / "train" / "dog" / "puppies").mkdir()
    shutil.copy(changed_tree / "train" / "dog" / "0.png", changed_tree / "train" / "dog" / "puppies" / "0.png")
    data = opened(card(), changed_tree)
    assert data.train.labels.bincount().tolist() == [12, 13]
    assert data.classes == plain.classes == 2
    assert data.checksum != plain.checksum


def test_an_archive_is_not_taken_for_both_splits(tree, card, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "tree"), "tar", tree)
    with pytest.raises(UserError, match="not a folder"):
        opened(card(), archive)


def test_a_damaged_test_image_is_an_error_that_names_it(changed_tree, card):
    (changed_tree / "val" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"test split: no readable image.*broken\.jpg") as told:
            opened(card(), changed_tree, workers=workers)
        assert "\n" not in str(told.value)


def test_splits_are_part_of_what_the_data_is(tiny_data):
    content = yaml.safe_load(tiny_data.read_text())
    swapped = tiny_data.parent / "swapped.yaml"
    swapped.write_text(yaml.safe_dump(content | {"splits": {"train": "test", "test": "train"}}))
    assert opened(tiny_data).identity != opened(swapped).identity


def test_grey_and_transparent_pictures_become_rgb(changed_tree, card):
    Image.new("L", (30, 30), 100).save(changed_tree / "train" / "cat" / "grey.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 4)).save(changed_tree / "train" / "cat" / "glass.png")
    assert next(opened(card(), changed_tree).eval_batches("train", 100, CPU)).images.shape[1] == 3


def test_random_resized_crops_are_taken_from_the_picture_itself(tree, card):
    folder = card(crop_pct=0.5)
    cropped = open_data(Data(card=str(folder), workers=0), ROOT, str(tree), crop="none")
    whole = open_data(Data(card=str(folder), workers=0), ROOT, str(tree), crop="resized")
    assert isinstance(cropped.train, sources.Arrays)
    assert isinstance(whole.train, sources.Files)
    assert isinstance(whole.test, sources.Arrays)
    assert whole.train.dataset[0][0].size == (32, 40)


@pytest.mark.parametrize(
    "arrays",
    [
        {"train_images": np.zeros((4, 8, 8, 4), np.uint8), "train_labels": np.arange(4)},
        {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.arange(0)},
        {"train_images": np.zeros((4, 8, 8), np.float32), "train_labels": np.arange(4)},
        {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.arange(3)},
        {"images": np.zeros((4, 8, 8), np.uint8)},
    ],
    ids=["channels", "empty", "floats", "lengths", "names"],
)
def test_arrays_of_another_form_are_refused(tmp_path, card, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=r"x\.npz"):
        opened(card(reader="npz", root="x.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"text"])
def test_files_that_are_no_arrays_are_refused(tmp_path, card, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a readable"):
        opened(card(reader="npz", root="x.npz"))


class Stream(torch.utils.data.IterableDataset):
    """What timm makes of shards: pictures and labels, one after the other."""

    def __iter__(self):
        for index in range(10):
            yield Image.new("L", (30, 40), index * 20), index % 2


def test_streams_are_decoded_to_their_end(card, monkeypatch):
    monkeypatch.setattr(sources, "_open_reader", lambda *_: Stream())
    data = opened(card(reader="hfids/x", classes=2))
    assert data.train.images.shape == (10, 3, 24, 24)
    assert data.train.labels.tolist() == [0, 1] * 5


def test_streams_that_are_too_long_are_told(card, monkeypatch):
    monkeypatch.setattr(sources, "_open_reader", lambda *_: Stream())
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 5 * 3 * 24**2)
    with pytest.raises(UserError, match="more than 5 images of 24 pixels"):
        opened(card(reader="hfids/x"))


@pytest.mark.parametrize(
    "changes", [{"crop": "pad", "crop_padding": 6, **PLAIN}, {"crop": "resized"}], ids=["fast", "slow"]
)
def test_every_image_and_every_epoch_has_dice_of_its_own(changed_tree, card, changes):
    """The same picture under 24 names."""
    for path in (changed_tree / "train").glob("*/*.png"):
        shutil.copy(changed_tree / "val" / "cat" / "0.png", path)
    recipe = Recipe(batch_size=24, **changes, **({} if "mixup" in changes else {"mixup": 0, "cutmix": 0}))
    first, second = opened(card(), changed_tree).train_batches(recipe, 0, 0, 2, CPU)
    assert len({image.numpy().tobytes() for image in first.images}) > 12
    order = [first.images[first.keys.argsort()], second.images[second.keys.argsort()]]
    assert sum(torch.equal(one, other) for one, other in zip(*order, strict=True)) < 6


def shards(folder, split, classes, per_shard=6, grey=()):
    """WebDataset shards with a picture and a label per sample; pictures are 40 x 32 pixels of one brightness."""
    for number in range(2):
        with tarfile.open(folder / f"set-{split}-{number:04d}.tar", "w") as archive:
            for sample in range(per_shard):
                index = number * per_shard + sample
                picture = io.BytesIO()
                Image.new("RGB", (40, 32), (index * 20,) * 3).save(picture, "PNG")
                label = str(index % classes) if sample % 2 else json.dumps({"label": index % classes})
                for name, content in (
                    ("png", picture.getvalue() if index not in grey else b"no picture"), ("cls" if sample % 2 else "json", label.encode()),
                ):  # fmt: skip
                    member = tarfile.TarInfo(f"{split}/{index:05d}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("pattern", ["train", "set-train-{0000..0001}.tar", "set-train-*.tar"])
def test_shards_are_read_at_any_place(tmp_path, card, pattern):
    shards(tmp_path, "train", 3)
    shards(tmp_path, "test", 3, per_shard=2)
    chosen = card(reader="wds/x", classes=3, splits={"train": pattern, "test": "test"})
    data = opened(chosen, tmp_path, crop="resized")
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    assert [data.train.dataset[index][0].getpixel((0, 0))[0] for index in (11, 0, 7)] == [220, 0, 140]
    (batch,) = data.train_batches(Recipe(batch_size=8, mixup=0, cutmix=0, **AUGMENTED_LITTLE), 0, 0, 1, CPU)
    assert batch.targets.tolist() == (batch.keys % 3).tolist()
    in_memory = opened(chosen, tmp_path)
    assert in_memory.train.images.float().mean(dim=(1, 2, 3)).tolist() == [index * 20 for index in range(12)]


AUGMENTED_LITTLE = {"auto_augment": None, "color_jitter": 0, "random_erasing": 0}


def test_shards_that_are_wrong_are_told(tmp_path, card):
    shards(tmp_path, "train", 2)
    shards(tmp_path, "test", 2)
    missing = {"train": "set-train-{0000..0002}.tar", "test": "test"}
    with pytest.raises(UserError, match=r"the shard set-train-0002\.tar is missing"):
        opened(card(reader="wds/x", splits=missing), tmp_path)
    (tmp_path / "set-train-0001.tar").write_bytes(b"text" * 300)
    with pytest.raises(UserError, match=r"set-train-0001\.tar: not a readable shard"):
        opened(card(reader="wds/x"), tmp_path)


def test_shards_with_odd_members(tmp_path, card):
    def add(archive, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    picture = io.BytesIO()
    Image.new("RGB", (40, 32)).save(picture, "PNG")
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            add(archive, "a.json", b'{"width": 40}')
            add(archive, "a.cls", b"1")
            add(archive, "a.png", picture.getvalue())
            add(archive, "b.png", picture.getvalue())
            add(archive, "b.cls", b"0")
    assert opened(card(reader="wds/x", classes=2), tmp_path).train.labels.tolist() == [1, 0]
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        add(archive, "b.png", picture.getvalue())
    with pytest.raises(UserError, match=r"two images are called \./b"):
        opened(card(reader="wds/x"), tmp_path)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, "a.tif", picture.getvalue())
    with pytest.raises(UserError, match="have no images"):
        opened(card(reader="wds/x"), tmp_path)


def test_a_damaged_image_in_a_shard_is_named_and_replaced(tmp_path, card):
    shards(tmp_path, "train", 2, grey=(3,))
    shards(tmp_path, "test", 2)
    data = opened(card(reader="wds/x", classes=2), tmp_path)
    assert list(data.unreadable) == [3]
    assert "set-train-0000.tar:train/00003" in data.unreadable[3]
    assert data.train.labels.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1]
