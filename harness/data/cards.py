"""Data set cards: where images come from, their splits, classes and normalisation. No torch here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from harness.errors import UserError
from harness.spec import ROOT
from harness.yamlfile import Strict, read, validate
from methods.core.registry import unknown

CARD_FOLDER = ROOT / "datasets"
ROOT_VARIABLE = "SPARSE_VIT_BENCH_DATA"

READERS = ("torch", "hfds", "hfids", "tfds", "wds")  # each followed by a name
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Splits(Strict):
    """Names of the splits, as the reader calls them (folders of an ImageFolder tree). timm's synonyms (validation for
    val, ...) are tried as well."""

    train: str = "train"
    test: str = "test"


class Card(Strict):
    """A data set.

    reader: "npz" (arrays {split}_images [N, H, W] or [N, H, W, 3] uint8 and {split}_labels [N]), "folder" (an ImageFolder
        tree), wds/NAME (WebDataset shards, see harness/data/shards.py; the splits are patterns of file names), or any of timm's
        reader names: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME.
    root: file or folder, relative to the card; --data-root replaces it; without one the environment variable
        SPARSE_VIT_BENCH_DATA is asked. options: further arguments of timm's reader.
    sha256: of the .npz file, checked on load.
    classes: their number; None: as many as the training split has. val_fraction: share of the training split held out
        for curves and tuning. sizes: number of images per split, for readers that cannot tell (hfids).
    crop_pct: evaluation resizes the short side to image_size / crop_pct and crops the centre.
    """

    name: str
    title: str = ""
    reader: str = "folder"
    root: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    download: bool = False
    options: dict[str, Any] = {}
    splits: Splits = Splits()
    sizes: dict[str, PositiveInt] = {}
    classes: PositiveInt | None = None
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    image_size: PositiveInt = 224
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _reader_is_known(self) -> Card:
        prefix, slash, name = self.reader.partition("/")
        if prefix not in (READERS if slash and name else ("npz", "folder")):
            known = ["npz", "folder", *(f"{reader}/NAME" for reader in READERS)]
            raise ValueError(unknown("reader", self.reader, known))
        if self.reader in ("torch/image_folder", "torch/folder"):
            raise ValueError("write reader: folder for an ImageFolder tree")
        if self.sha256 and self.reader != "npz":
            raise ValueError("sha256 is for reader: npz; records show the checksum of other data")
        return self

    @property
    def needs_root(self) -> bool:
        """Hub readers and downloads know where to look by themselves."""
        return not self.reader.lower().startswith(("hfds/", "hfids/", "tfds/"))


def find_card(name: str, folder: Path | None = None) -> Path:
    """A card's file from its path (also relative to the spec's folder), or from its name in datasets/."""
    if Path(name).suffix in {".yaml", ".yml"}:
        return next((p for p in (Path(name), (folder or Path()) / name) if p.exists()), Path(name))
    inside = CARD_FOLDER / f"{name}.yaml"
    if not inside.exists():
        raise UserError(unknown("data card", name, sorted(p.stem for p in CARD_FOLDER.glob("*.yaml"))))
    return inside


def load_card(name: str, folder: Path | None = None) -> tuple[Card, Path]:
    """The card of that name or path, and its file."""
    path = find_card(name, folder)
    content, lines = read(path, "data card")
    return validate(Card, content, str(path), lines), path


def find_root(card: Card, card_file: Path, data_root: str | None) -> Path | None:
    """Where the card's images are: --data-root, the card's own root, the environment variable, in this order. UserError
    where nothing is there."""
    given, said = data_root, "--data-root"
    if not data_root and not card.root:
        given, said = os.environ.get(ROOT_VARIABLE), ROOT_VARIABLE
    if given:
        root, origin = Path(given).expanduser(), f"{said} {given}"
    elif card.root:
        root = (card_file.parent / Path(card.root).expanduser()).resolve()
        origin = f"data card {card.name}: root {card.root}"
    elif not card.needs_root:
        return None
    else:
        raise UserError(
            f"data card {card.name}: no root; give --data-root DIR, set {ROOT_VARIABLE}, or write root: into {card_file.name}"
        )
    if card.reader == "npz" and root.is_dir():
        raise UserError(
            f"{origin}: a folder, but the card {card.name} reads one .npz file; for a folder of class folders add "
            "--set data.card=image-folder"
        )
    if not root.exists() and not card.download:
        raise UserError(f"{origin}: no such file or folder")
    return root


def check_sum(card: Card, root: Path) -> str:
    """The SHA-256 of the file behind the card. UserError where it is not the card's."""
    digest = hashlib.sha256(root.read_bytes()).hexdigest()
    if card.sha256 and digest != card.sha256:
        raise UserError(
            f"{root}: checksum {digest[:12]}..., but the card {card.name} says {card.sha256[:12]}...; restore the file"
        )
    return digest
