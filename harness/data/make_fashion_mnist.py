"""Makes datasets/fashion-mnist-12k.npz: the first 1,000 training and 200 test images of each class of Fashion-MNIST.

    python -m harness.data.make_fashion_mnist FOLDER_WITH_THE_FOUR_IDX_FILES

The files are those that Zalando publishes (train-images-idx3-ubyte.gz and so on; Debian: package dataset-fashion-mnist).
The same input gives the same arrays; the card's checksum is printed at the end.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).resolve().parents[2] / "datasets" / "fashion-mnist-12k.npz"
CLASSES = 10
PER_CLASS = {"train": ("train", 1000), "test": ("t10k", 200)}


def read_idx(path: Path) -> np.ndarray:
    """An array in the idx format: two zero bytes, the type (8: uint8), the rank, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        sys.exit(f"{path}: not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def balanced_subset(images: np.ndarray, labels: np.ndarray, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `per_class` images of every class, in their original order."""
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)]))
    return images[chosen], labels[chosen]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder, arrays = Path(sys.argv[1]), {}
    for split, (prefix, per_class) in PER_CLASS.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = balanced_subset(images, labels, per_class)
    np.savez_compressed(TARGET, **arrays)
    print(
        f"{TARGET.name}: {TARGET.stat().st_size / 1e6:.2f} MB, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}"
    )


if __name__ == "__main__":
    main()
