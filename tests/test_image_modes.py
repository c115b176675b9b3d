"""Images of all modes: scaled by their range, or refused by name; never white, black or constant without a word."""

import io
import struct
import tarfile
import zlib

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
from harness.data.rgb import to_rgb
from harness.errors import UserError
from harness.spec import Data

CPU = torch.device("cpu")
RAMP = np.linspace(0, 65535, 24 * 24).reshape(24, 24)  # all brightnesses of 16 bits
EXPECTED = np.round(RAMP / 257).astype(np.int64)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(pixels, colour_type, depth=16):
    """A PNG file of that many bits: pixels [H, W, C]. PIL writes none of 16 bits in colour."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey_tree(root, content, name="0.png", splits=("train", "val")):
    """An ImageFolder tree in which each class has that file."""
    for split in splits:
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            (root / split / label / name).write_bytes(content)
    return root


def opened(tmp_path, root, **card):
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({"name": "card", "image_size": 24, "mean": [0, 0, 0], "std": [1, 1, 1]} | card))
    return open_data(Data(card=str(path), workers=0), ROOT, str(root))


def opened_from(content):
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


DEEP = {  # 16 bits in all the ways that PIL opens them
    "grey PNG (I;16)": (encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), "0.png"),
    "grey TIFF (I;16)": (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), "0.tif"),
    "grey TIFF, big-endian (I;16B)": (
        encoded(Image.frombytes("I;16B", (24, 24), RAMP.astype(">u2").tobytes()), "TIFF"),
        "0.tif",
    ),
    "grey PGM (I)": (b"P5 24 24 65535\n" + RAMP.astype(">u2").tobytes(), "0.pgm"),
    "grey and alpha PNG": (png(np.stack([RAMP, 65535 - RAMP], axis=-1), 4), "0.png"),
    "RGB PNG": (png(np.stack([RAMP] * 3, axis=-1), 2), "0.png"),
    "RGBA PNG": (png(np.stack([RAMP] * 4, axis=-1), 6), "0.png"),
    "RGB PPM": (b"P6 24 24 65535\n" + np.stack([RAMP] * 3, axis=-1).astype(">u2").tobytes(), "0.ppm"),
}


@pytest.mark.parametrize(("content", "name"), DEEP.values(), ids=DEEP)
def test_sixteen_bits_are_scaled_by_their_range(tmp_path, content, name):
    data = opened(tmp_path, grey_tree(tmp_path / "tree", content, name))
    for split in (data.train, data.test):
        assert (
            int((split.images.long() - torch.from_numpy(EXPECTED)).abs().max()) <= 1
        )  # PIL truncates where it scales itself
    assert len(data.train.images[0].unique()) > 200


UNKNOWN = {
    "HDR TIFF (F)": (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), "0.tif", "mode F: floats"),
    "32-bit TIFF (I)": (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "0.tif", "mode I: 32-bit integers"),
    "float PFM under another name": (b"Pf\n24 24\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "0.ppm", "mode F"),
}


@pytest.mark.parametrize(("content", "name", "message"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("split", ["train", "val"])
def test_modes_of_unknown_range_are_refused(tmp_path, content, name, message, split):
    """At once, in training too: a set of such images is not one with a few damaged ones."""
    grey_tree(tmp_path / "tree", encoded(Image.new("RGB", (24, 24), (1, 2, 3)), "PNG"), "1.png")
    root = grey_tree(tmp_path / "tree", content, name, splits=(split,))
    with pytest.raises(UserError, match=rf"{name}: {message}.*convert the images to 8 or 16 bits") as told:
        opened(tmp_path, root)
    assert "\n" not in str(told.value)


PLAIN = np.arange(24 * 24).reshape(24, 24).astype(np.uint8)
SHALLOW = {
    mode: Image.fromarray(np.stack([PLAIN] * 3, axis=-1)).convert(mode)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "PA")
} | {
    "La": Image.fromarray(PLAIN).convert("LA").convert("La"),
    "RGBa": Image.fromarray(PLAIN).convert("RGBA").convert("RGBa"),
}


@pytest.mark.parametrize("mode", SHALLOW)
def test_eight_bits_are_converted_as_torchvision_and_timm_do(mode):
    picture = SHALLOW[mode]
    found = to_rgb(picture)
    assert found.mode == "RGB"
    expected = picture.convert("LA").convert("RGB") if mode == "La" else picture.convert("RGB")
    assert found.tobytes() == expected.tobytes()


def test_a_palette_with_transparency_is_looked_up(tmp_path):
    picture = Image.fromarray(PLAIN % 4, "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    found = to_rgb(opened_from(encoded(picture, "PNG", transparency=0)))
    assert [found.getpixel((column, 0)) for column in range(4)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]


LOST = {
    "icon in its alpha": (np.stack([PLAIN * 0] * 3 + [PLAIN], axis=-1), "RGBA", "in its transparency"),
    "grey icon in its alpha": (np.stack([PLAIN * 0, PLAIN], axis=-1), "LA", "in its transparency"),
    "palette of one colour": (PLAIN % 4, "P", "look at its palette"),
    "a map of numbers in 16 bits": ((PLAIN % 100).astype(np.uint16), "I;16", "0 to 99 of 65535"),
    "16 bits, nearly white": (np.uint16(65535) - (PLAIN % 9), "I;16", "65527 to 65535 of 65535"),
}


def lost(pixels, mode):
    picture = Image.frombytes(
        mode, (24, 24), np.ascontiguousarray(pixels).astype("<u2" if mode == "I;16" else "u1").tobytes()
    )
    if mode == "P":
        picture.putpalette([7, 7, 7] * 4)
    return encoded(picture, "PNG")


@pytest.mark.parametrize(("pixels", "mode", "message"), LOST.values(), ids=LOST)
def test_what_becomes_constant_is_damaged(tmp_path, pixels, mode, message):
    """An error in the test split; in the training split another image takes its place, counted and named."""
    grey_tree(tmp_path / "tree", encoded(Image.fromarray(PLAIN), "PNG"), "1.png")
    root = grey_tree(tmp_path / "tree", lost(pixels, mode), "0.png", splits=("train",))
    data = opened(tmp_path, root)
    assert sorted(data.unreadable) == [0, 2]
    assert all(
        "0.png: all of it would become one colour" in wrong and message in wrong for wrong in data.unreadable.values()
    )
    grey_tree(tmp_path / "tree", lost(pixels, mode), "0.png", splits=("val",))
    with pytest.raises(UserError, match=r"test split: no readable image: .*0\.png: all of it would become one colour"):
        opened(tmp_path, root)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16"])
def test_a_picture_of_one_colour_stays_one(mode):
    content = (
        png(np.full((8, 8, 1), 700), 0)
        if mode == "I;16"
        else encoded(Image.new("RGB", (8, 8), (9, 9, 9)).convert(mode), "PNG")
    )
    assert to_rgb(opened_from(content)).getcolors() == [(64, (round(700 / 257),) * 3 if mode == "I;16" else (9, 9, 9))]


@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4, unique=True), st.sampled_from(["I;16", "I;16B"]))
def test_brightness_keeps_its_order(values, mode):
    array = np.array(values, dtype=np.uint16).reshape(2, 2)
    picture = Image.frombytes(mode, (2, 2), array.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    try:
        found = np.asarray(to_rgb(picture))[..., 0].flatten()
    except ValueError:
        assert max(values) - min(values) < 257
        return
    assert (np.abs(found - np.array(values) / 257) <= 0.5).all()


def shard(path, content, extension):
    with tarfile.open(path, "w") as archive:
        for label in range(2):
            for name, part in ((extension, content), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{label}.{name}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))


class FakeReader:
    """What timm's reader of Hugging Face data sets gives: files, and a column of labels."""

    label_key = "label"

    def __init__(self, content, labels=(0, 1)):
        self.content, self.dataset = content, {"label": list(labels)}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return io.BytesIO(self.content), self.dataset["label"][index]


class FakeStream(torch.utils.data.IterableDataset):
    def __init__(self, content):
        self.content = content

    def __iter__(self):
        yield from ((opened_from(self.content), label) for label in range(2))


def read_by(reader, tmp_path, content, monkeypatch):
    """The two training images of a set with that file twice, by any reader."""
    if reader == "folder":
        return opened(tmp_path, grey_tree(tmp_path / "tree", content)).train.images
    if reader == "wds":
        for split in ("train", "test"):
            shard(tmp_path / f"{split}.tar", content, "png")
        return opened(tmp_path, tmp_path, reader="wds/x").train.images
    asked = {}

    def made(name, **options):
        asked.update(options)
        return type("Data", (), {"reader": FakeReader(content)})() if reader == "hfds" else FakeStream(content)

    monkeypatch.setattr(
        sources, "_import", lambda package: type("Package", (), {"load_dataset": None, "builder": None})
    )
    monkeypatch.setattr(sources, "create_dataset", made)
    found = opened(tmp_path, tmp_path, reader=f"{reader}/x").train.images
    assert asked.get("input_img_mode") == "" or reader == "tfds"  # TensorFlow decodes to 8 bits
    return found


@pytest.mark.parametrize("reader", ["folder", "wds", "hfds", "hfids", "tfds"])
def test_all_readers_have_the_same_conversion(tmp_path, monkeypatch, reader):
    images = read_by(reader, tmp_path, DEEP["grey PNG (I;16)"][0], monkeypatch)
    assert torch.equal(images.long(), torch.from_numpy(EXPECTED).expand(2, 3, 24, 24))
    # The file's name where there is one; its number in a stream and in a table.
    with pytest.raises(UserError, match=r"(0\.png|train\.tar:0|image 0): mode F"):
        read_by(reader, tmp_path, UNKNOWN["HDR TIFF (F)"][0], monkeypatch)


def test_an_image_that_cannot_be_opened_is_not_the_next_one(tmp_path, monkeypatch):
    """timm's own data set would take the next image, and its label, with a line in a log."""
    reader = FakeReader(b"no picture")
    monkeypatch.setattr(sources, "_import", lambda package: type("Package", (), {"load_dataset": None}))
    monkeypatch.setattr(sources, "create_dataset", lambda name, **options: type("Data", (), {"reader": reader})())
    with pytest.raises(UserError, match="no readable image: image 0"):
        opened(tmp_path, tmp_path, reader="hfds/x")


ARRAYS = {
    "16 bits": (RAMP.astype(np.uint16)[None].repeat(4, 0), "uint16"),
    "floats of 0 to 1": ((RAMP / 65535).astype(np.float32)[None].repeat(4, 0), "float32"),
    "booleans": (np.ones((4, 24, 24), dtype=bool), "bool"),
    "signed bytes": (np.ones((4, 24, 24, 3), dtype=np.int8), "int8"),
    "with alpha": (np.ones((4, 24, 24, 4), dtype=np.uint8), r"\[4, 24, 24, 4\]"),
}


@pytest.mark.parametrize(("images", "shown"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_other_ranges_are_refused(tmp_path, images, shown):
    np.savez(
        tmp_path / "x.npz",
        **{f"{s}_images": images for s in ("train", "test")},
        **{f"{s}_labels": np.arange(4) for s in ("train", "test")},
    )
    with pytest.raises(UserError, match=rf"x\.npz: train_images must be uint8 .*not .*{shown}.*scale other numbers"):
        opened(tmp_path, tmp_path / "x.npz", reader="npz")


def test_floats_that_were_cast_to_bytes_are_refused(tmp_path):
    images = (np.arange(4 * 8 * 8).reshape(4, 8, 8) / 200).astype(np.uint8)  # 0 and 1, as of floats from 0 to 1
    np.savez(
        tmp_path / "x.npz",
        **{f"{s}_images": images for s in ("train", "test")},
        **{f"{s}_labels": np.arange(4) for s in ("train", "test")},
    )
    with pytest.raises(UserError, match="the train split: no pixel is above 1 of 255"):
        opened(tmp_path, tmp_path / "x.npz", reader="npz")


@pytest.mark.parametrize("brightest", [2, 15, 31])
def test_a_split_that_is_all_dark_is_refused(tmp_path, brightest):
    """Class numbers, four bits: nothing in the numbers that come out would tell."""
    bright = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    dark = (bright.astype(int) * brightest // 255).astype(np.uint8)
    np.savez(
        tmp_path / "x.npz", train_images=bright, test_images=dark, train_labels=np.arange(4), test_labels=np.arange(4)
    )
    with pytest.raises(UserError, match=f"the test split: no pixel is above {brightest} of 255"):
        opened(tmp_path, tmp_path / "x.npz", reader="npz")


@pytest.mark.parametrize("crop", ["none", "resized"])
@pytest.mark.parametrize("colour", [2, 4, 6])
def test_files_of_sixteen_bits_that_hold_eight_are_refused(tmp_path, colour, crop):
    """PIL cuts colours of 16 bits to their upper 8, which are 0 here."""
    channels = {2: 3, 4: 2, 6: 4}[colour]
    root = grey_tree(tmp_path / "tree", png(np.arange(24 * 24 * channels).reshape(24, 24, channels) % 256, colour))
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"name": "card", "image_size": 24}))
    with pytest.raises(UserError, match=r"it has 16 bits per colour, .* nothing is left of it"):
        open_data(Data(card=str(tmp_path / "card.yaml"), workers=0), ROOT, str(root), crop)
