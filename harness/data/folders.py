"""ImageFolder trees: torchvision's rules, without what systems and editors leave in folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness.data.rgb import CUT, is_cut
from harness.hidden import hidden_part


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file as it is, decoded; torchvision's own loader would convert it to RGB."""
    with open(path, "rb") as file:
        picture = Image.open(file)
        if is_cut(picture):
            picture.info[CUT] = True
        picture.load()
    return picture


def visible_classes(folder: Path) -> list[str]:
    """The class folders, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not hidden_part(path.name))


class VisibleFolder(ImageFolder):
    """Modifies torchvision's ImageFolder (a class per folder on the first level, and an error for one without images):
    hidden folders are no classes and hidden files no images (see `harness.hidden`); pictures keep their mode. left_out:
    those that would have been one."""

    def __init__(self, root: str, **options: Any) -> None:
        self.left_out: set[str] = set()
        super().__init__(root, loader=open_picture, is_valid_file=self._is_image, **options)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        folder = Path(directory)
        classes = visible_classes(folder)
        self.left_out |= {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in classes}
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        if not path.lower().endswith(IMG_EXTENSIONS):
            return False
        part = hidden_part(
            path.removeprefix(str(self.root)).lstrip(os.sep)
        )  # relpath would take longer than all else here
        self.left_out |= {part} if part else set()
        return part is None


def without_hidden(dataset: Any) -> Any:
    """Another of torchvision's data sets that lists folders (ImageNet, INaturalist), without hidden files."""
    paths = {"samples": lambda item: os.path.relpath(item[0], dataset.root), "index": lambda item: item[1]}
    for name, path_of in paths.items():
        listed = getattr(dataset, name, None)
        if not isinstance(dataset, VisionDataset) or not isinstance(listed, list):
            continue
        hidden = [hidden_part(path_of(item)) for item in listed]
        dataset.left_out = {part for part in hidden if part}
        kept = [item for item, part in zip(listed, hidden, strict=True) if part is None]
        setattr(dataset, name, kept)
        if name == "samples":
            dataset.imgs, dataset.targets = kept, [label for _, label in kept]
    return dataset
