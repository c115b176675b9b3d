"""WebDataset shards (tar files of images and labels) with random access, by an index of where each image lies.

timm's reader streams shards through a shuffle buffer: which images a step sees then depends on the position of the stream and on the
number of processes, and nothing can go on in the middle. A shard on a disk can as well be read at any place.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from harness.data.labels import whole
from harness.errors import UserError
from harness.hidden import hidden_part

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABELS = ("cls", "label", "json")  # a number, or a JSON object with one under "label" or "cls"


@dataclass
class Shards(Dataset):
    """(PIL image, label) by number, in the order of the shards. targets: labels; places: (shard, offset, bytes) of each
    image; names. left_out: hidden shards and images (see `harness.hidden`)."""

    files: list[Path]
    targets: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        shard, offset, size = self.places[index]
        with open(self.files[shard], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        return Image.open(io.BytesIO(content)), self.targets[index]

    @property
    def listing(self) -> str:
        """What tells this data from other data."""
        rows = zip(self.names, self.places, self.targets, strict=True)
        return "\n".join(f"{name} {place[2]} {label}" for name, place, label in rows)


def open_shards(root: Path, split: str) -> Shards:
    """The shards of a split: files in `root` whose names match the split's, which may have braces ({0000..1023}) and stars; a
    plain word stands for *word*.tar. UserError where there are none, or an image has no label."""
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; the reader wds/ reads a folder with .tar files")
    pattern = split if split.endswith(".tar") else f"*{split}*.tar"
    names = _expanded(pattern)
    found = {name: list(root.glob(name)) for name in names}
    hidden = {path: hidden_part(path.relative_to(root)) for paths in found.values() for path in paths}
    files = sorted(path for path, is_hidden in hidden.items() if not is_hidden)
    if not files:
        raise UserError(f"{root}: no shard matches {pattern}")
    missing = next((name for name, paths in found.items() if all(hidden[path] for path in paths)), None)
    if missing is not None:
        raise UserError(f"{root}: the shard {missing} is missing")
    shards = Shards(files, left_out={part for part in hidden.values() if part})
    for number, path in enumerate(files):
        _index(shards, number, path)
    if not len(shards):
        raise UserError(f"{root}: the shards {pattern} have no images ({', '.join(IMAGES)})")
    return shards


def _index(shards: Shards, number: int, path: Path) -> None:
    """Adds the images of a shard: neighbouring files with the same name, up to the first dot, are a sample."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                part = hidden_part(member.name)
                if part is not None:
                    shards.left_out |= {f"{path.name}:{part}"} if member.name.lower().endswith(IMAGES) else set()
                    continue
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                key, extension = f"{Path(member.name).parent}/{key}", extension.lower()
                if extension in IMAGES:
                    if key in images:
                        raise ValueError(f"two images are called {key}")
                    images[key] = (member.offset_data, member.size)
                elif extension in LABELS and key not in labels:
                    label = _label(archive.extractfile(member).read(), f"{path}: {member.name}")
                    labels |= {key: label} if label is not None else {}
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable shard ({' '.join(str(error).split())[:100] or type(error).__name__})"
        ) from None
    for key, (offset, size) in images.items():
        if key not in labels:
            raise UserError(f"{path}: the image {key} has no label (.cls or .json)")
        shards.places.append((number, offset, size))
        shards.targets.append(labels[key])
        shards.names.append(f"{path.name}:{key.removeprefix('./')}")


def _label(content: bytes, where: str) -> int | None:
    """None for an object with other things in it."""
    value = json.loads(content)
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return whole(value, where) if value is not None else None


def _expanded(pattern: str) -> list[str]:
    """{0000..0003} and {a,b} written out."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
