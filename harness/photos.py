"""The images that a record's report looked at, from its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from harness.data.dataset import open_data
from harness.errors import UserError
from harness.spec import SPEC_FOLDER, Data


def looked_at(record: dict[str, Any], card: str | None = None, data_root: str | None = None) -> np.ndarray:
    """Float [n, H, W, 3] in 0..1, as many as the report's kept patches are of. card: where it is not the one in datasets/ that the record names. UserError where the data is not here, or is other data."""
    context, crop = (
        record["context"]["data"],
        record["context"]["recipe"]["crop"],
    )  # which decides how images are kept, and their checksum
    data = open_data(Data(card=card or context["card"], image_size=context["image_size"]), SPEC_FOLDER, data_root, crop)
    if data.checksum != context["checksum"]:
        raise UserError(f"data {context['card']}: not the images that the record is of (another checksum)")
    count, split = record["report"]["kept_patches"]["shape"][1], "val" if len(data.val_ids) else "test"
    images = next(data.eval_batches(split, count, torch.device("cpu"))).images
    mean, std = (part / 255 for part in data.statistics)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
