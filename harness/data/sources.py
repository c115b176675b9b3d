"""Opens what a card points to: an .npz file, an ImageFolder tree, or any of timm's readers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from harness.data.cards import Card
from harness.data.folders import VisibleFolder, open_picture, visible_classes, without_hidden
from harness.data.labels import whole, whole_numbers
from harness.data.readable import Readable, Sample, collate, read_sample
from harness.data.rgb import to_rgb
from harness.data.shards import Shards, open_shards
from harness.errors import UserError

DARK = 32  # a split without a brighter pixel, of 255, is not in 8 bits
LOOKED_AT = 64  # images of a split that is decoded as it is read, to tell whether it is that dark
MEMORY_LIMIT = 2 * 2**30  # bytes of uint8 pixels per split that are kept in memory
_FOLDER_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}
_AS_THEY_ARE = {
    "hfds": {"input_img_mode": ""},
    "hfids": {"input_img_mode": ""},
}  # pictures are converted here, for all readers
_NEEDED = {
    "hfds": ("datasets", "load_dataset"),
    "hfids": ("datasets", "load_dataset"),
    "tfds": ("tensorflow_datasets", "builder"),
}


@dataclass
class Arrays:
    """A decoded split: images uint8 [N, C, S, S] with 1 or 3 channels, labels int64 [N]. unreadable: what was wrong with the
    files of images in whose places others stand, by number; left_out: hidden files and folders that are not read."""

    images: Tensor
    labels: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)


@dataclass
class Files:
    """A split that is decoded as it is read: `dataset` maps a number to (PIL image, label). left_out: see Arrays."""

    dataset: Dataset
    labels: Tensor
    listing: str  # identifies the files: names and sizes
    left_out: set[str] = field(default_factory=set)


Split = Arrays | Files


def open_split(
    card: Card, root: Path | None, which: str, image_size: int, workers: int, as_files: bool = False
) -> Split:
    """The split "train" or "test" of a card: in memory where it fits, unless it is wanted as_files (random resized crops
    are taken from the whole picture, not from its evaluation crop). UserError for whatever is wrong with it."""
    if card.reader == "npz":
        return _open_npz(card, root, which, image_size)
    dataset = _open_reader(card, root, which)
    if isinstance(dataset, IterableDataset):
        transform = evaluation_transform(image_size, card.crop_pct)
        return _decode(card, _streamed(dataset, transform), which, image_size)
    labels, left_out = (
        _labels_of(dataset, f"data card {card.name}: the {which} split"),
        getattr(dataset, "left_out", set()),
    )
    if (labels is None or not as_files) and len(dataset) * 3 * image_size**2 <= MEMORY_LIMIT:
        readable = Readable(dataset, torch.arange(len(dataset)) if which == "train" else None)
        decoded = Decoded(readable, image_size, card.crop_pct)
        loader = DataLoader(decoded, batch_size=256, num_workers=workers, collate_fn=collate)
        unreadable: dict[int, str] = {}
        split = _decode(card, _looked_at(loader, card, which, unreadable), which, image_size)
        return dataclasses.replace(split, unreadable=unreadable, left_out=left_out)
    if labels is None:
        raise UserError(f"data card {card.name}: {len(dataset):,} images of {image_size} pixels do not fit into memory, and "
                        f"the reader {card.reader} cannot be streamed yet; use an ImageFolder tree (reader: folder)")  # fmt: skip
    return Files(dataset, labels, _listing(dataset, labels, root), left_out)


def class_names(card: Card, root: Path | None) -> list[str] | None:
    """Names of the classes of an ImageFolder tree; UserError where its splits have different ones."""
    if card.reader != "folder" or root is None:
        return None
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; the card {card.name} reads a folder with a folder per split and class")
    found = {}
    for which in ("train", "test"):
        folder = _split_folder(card, root, which)
        found[which] = visible_classes(folder)
    for which, other in (("train", "test"), ("test", "train")):
        extra = sorted(set(found[which]) - set(found[other]))
        if extra:
            raise UserError(
                f"{root}: the class folder {extra[0]!r} is in the {which} split, but not in the {other} split"
            )
    return found["train"]


def count_classes(card: Card, train: Tensor, test: Tensor, names: list[str] | None) -> int:
    """The number of classes. UserError where the card says another one than the data."""
    found = len(names) if names else int(train.max()) + 1
    if not names and card.classes is None:
        _require_no_gap(card, train)
    if card.classes is not None and card.classes != found:
        raise UserError(f"data card {card.name}: says {card.classes} classes, but the training images have {found}")
    for which, labels in (("training", train), ("test", test)):
        if int(labels.min()) < 0 or int(labels.max()) >= found:
            low, high = int(labels.min()), int(labels.max())
            raise UserError(
                f"data card {card.name}: labels must be 0 to {found - 1}; the {which} split has {low} to {high}"
            )
    return found


def _require_no_gap(card: Card, labels: Tensor) -> None:
    """A number for "no class" (255), or counting from 1, would make classes that no image has."""
    seen = labels.unique()
    if len(seen) <= int(seen[-1]):
        gap = next(number for number, label in enumerate(seen.tolist()) if number != label)
        raise UserError(
            f"data card {card.name}: the training labels go up to {int(seen[-1])}, but no image has label {gap}; number the "
            f"classes from 0 without gaps, or say classes: {int(seen[-1]) + 1} in the card"
        )


def require_bright(card: Card, split: Split, which: str) -> None:
    """UserError where a split has no pixel brighter than DARK: then its numbers have another range than 8 bits. Black
    images (of 0 alone) are taken for what they are."""
    if isinstance(split, Arrays):
        brightest = int(split.images.max())
    else:
        readable = Readable(split.dataset, torch.arange(len(split.labels)))
        brightest = max(
            (_brightest(readable, index) for index in range(min(LOOKED_AT, len(split.labels)))), default=255
        )
    if 0 < brightest < DARK:
        raise UserError(
            f"data card {card.name}: the {which} split: no pixel is above {brightest} of 255 once in 8 bits; stretch the "
            "images to the whole range first"
        )


def _brightest(readable: Readable, index: int) -> int:
    """Of an image; what cannot be read is told when it is needed."""
    try:
        return int(np.asarray(readable.read(index)[0]).max())
    except UserError:
        return 255


def check_sum_of(splits: dict[str, Split]) -> str:
    """What tells this data from other data, for the records: of the decoded pixels, or of the listing."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        digest.update(name.encode())
        if isinstance(split, Arrays):
            digest.update(split.labels.numpy().tobytes())
            digest.update(split.images.numpy().tobytes())
        else:
            digest.update(split.listing.encode())
    return digest.hexdigest()


def _open_npz(card: Card, root: Path, which: str, image_size: int) -> Arrays:
    split = getattr(card.splits, which)
    try:
        with np.load(root, allow_pickle=False) as file:
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    except KeyError as error:
        raise UserError(f"{root}: {error.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{root}: not a readable .npz file ({error})") from None
    shape_fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not shape_fits or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(
            f"{root}: {split}_images must be uint8 [N, H, W] or [N, H, W, 3], at least one, with as many labels, not "
            f"{images.dtype} {list(images.shape)} with {list(labels.shape)} labels; scale other numbers to 0 to 255 first"
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if tensor.shape[-2:] != (image_size, image_size):
        tensor = _resize(tensor, image_size)
    return Arrays(tensor, whole_numbers(labels, f"{root}: {split}_labels"))


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] at another size, bicubic with antialiasing, a part at a time."""
    parts = [
        torch.nn.functional.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True)
        .round()
        .clamp(0, 255)
        .byte()
        for part in images.split(512)
    ]
    return torch.cat(parts)


def _open_reader(card: Card, root: Path | None, which: str) -> Any:
    prefix = card.reader.lower().partition("/")[0]
    package, attribute = _NEEDED.get(prefix, (None, None))
    if package and not hasattr(_import(package), attribute):
        raise UserError(
            f"data card {card.name}: the reader {card.reader} needs a package; install it with: pip install {package}"
        )
    split = getattr(card.splits, which)
    if prefix == "wds":
        return open_shards(root, split)
    try:
        if card.reader == "folder":
            return VisibleFolder(str(_split_folder(card, root, which)), **card.options)
        dataset = create_dataset(
            card.reader, root=str(root) if root else None, split=split, download=card.download,
            num_samples=card.sizes.get(which), **(_AS_THEY_ARE.get(prefix, {}) | card.options),
        )  # fmt: skip
        if hasattr(dataset, "loader"):
            dataset.loader = open_picture  # torchvision's own would convert pictures to RGB
        return Opened(dataset.reader) if prefix == "hfds" else without_hidden(dataset)
    except (OSError, RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
        first_line = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise UserError(
            f"data card {card.name}: the {which} split ({card.reader}, {root or 'no root'}): {first_line}"
        ) from None


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def _split_folder(card: Card, root: Path, which: str) -> Path:
    names = dict.fromkeys((getattr(card.splits, which), *_FOLDER_NAMES[which]))
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: no folder for the {which} split; looked for {', '.join(names)}")
    return folder


class Opened(Dataset):
    """The pictures of one of timm's readers as they are. timm's own data set takes the next image, and its label, where
    one cannot be opened."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        stream, label = self.reader[index][:2]
        return Image.open(stream), label


class Decoded(Dataset):
    """Readable pictures as samples with timm's evaluation transform."""

    def __init__(self, readable: Readable, image_size: int, crop_pct: float) -> None:
        self.readable = readable
        self.transform = evaluation_transform(image_size, crop_pct)

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.readable, index, index, self.transform)


def _looked_at(loader: Iterable, card: Card, which: str, unreadable: dict[int, str]) -> Iterable:
    """(images, labels) of a loader of samples; what is wrong goes into `unreadable`, and DataLost is raised for a lost image."""
    for batch in loader:
        if batch.lost:
            raise UserError(f"data card {card.name}: the {which} split: {batch.lost}")
        unreadable |= batch.wrong
        yield batch.images, batch.labels


def evaluation_transform(image_size: int, crop_pct: float) -> Any:
    """timm's evaluation transform (bicubic resize, centre crop), ending in a uint8 array [3, S, S]."""
    return create_transform(
        image_size, is_training=False, crop_pct=crop_pct, interpolation="bicubic", use_prefetcher=True
    )


def _decode(card: Card, batches: Iterable, which: str, image_size: int) -> Arrays:
    """Reads (uint8 [n, 3, S, S], labels [n]) pairs to their end; UserError where they are too many for the memory limit."""
    limit, images, labels, count = MEMORY_LIMIT // (3 * image_size**2), [], [], 0
    for pixels, numbers in _readable(card, batches, which):
        images.append(torch.as_tensor(pixels).clone())  # off the shared memory of the process that decoded it
        labels.append(torch.as_tensor(numbers).clone())
        count += len(numbers)
        if count > limit:
            raise UserError(
                f"data card {card.name}: the {which} split has more than {limit:,} images of {image_size} pixels; "
                f"{card.reader} cannot be streamed yet, use an ImageFolder tree (reader: folder)"
            )
    if not images:
        raise UserError(f"data card {card.name}: the {which} split has no images")
    return Arrays(torch.cat(images), torch.cat(labels))


def _streamed(dataset: IterableDataset, transform: Any) -> Iterator[tuple[Tensor, list[int]]]:
    """The pictures of a stream, one after the other, as batches of one. OSError for one that cannot be used."""
    for number, (picture, label) in enumerate(dataset):
        try:
            image = to_rgb(picture)
        except ValueError as error:
            raise OSError(f"image {number}: {error}") from None
        yield torch.as_tensor(transform(image))[None], [whole(label, f"image {number}")]


def _readable(card: Card, batches: Iterable, which: str) -> Iterable:
    """The same batches; UserError where a file cannot be read as an image."""
    try:
        yield from batches
    except (OSError, SyntaxError) as error:  # PIL's; from a worker process with a traceback before the last line
        last_line = str(error).strip().split("\n")[-1]
        raise UserError(f"data card {card.name}: the {which} split: no readable image: {last_line}") from None


def _labels_of(dataset: Any, where: str) -> Tensor | None:
    """All labels of a map-style dataset without decoding an image; None where its reader does not tell. UserError,
    which begins with `where`, for the first that is no whole number."""
    reader = getattr(dataset, "reader", dataset)
    if getattr(reader, "samples", None) is not None:
        return whole_numbers(np.array([label for _, label in reader.samples]), where)
    if getattr(reader, "targets", None) is not None:
        return whole_numbers(reader.targets, where)
    column = getattr(reader, "label_key", None)  # a Hugging Face data set
    return whole_numbers(reader.dataset[column], where) if column else None


def _listing(dataset: Any, labels: Tensor, root: Path | None) -> str:
    """File names, sizes and labels, one image a line; or the labels alone, where there are no files."""
    if isinstance(dataset, Shards):
        return dataset.listing
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    if samples is None:
        return " ".join(map(str, labels.tolist()))
    return "\n".join(
        f"{Path(name).relative_to(root or '.')} {Path(name).stat().st_size} {label}" for name, label in samples
    )
