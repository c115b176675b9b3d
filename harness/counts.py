"""What a record's `cost` says of its counts besides the counts: over how many images they are means, and with which error. No torch here.

Reads the records of every count revision: revision 1 has one number of images, and standard deviations in place of errors.
"""

from __future__ import annotations

import math
from typing import Any

from harness.records import COUNT_REVISION

OF_IMAGES = ("theoretical", "executed")  # counts that may differ from image to image
Cost = dict[str, Any]


def images(cost: Cost) -> dict[str, int]:
    """Over how many images each count is a mean; 1 where images do not differ."""
    found = cost.get("macs_images", 1)
    return dict.fromkeys(OF_IMAGES, found) if isinstance(found, int) else dict.fromkeys(OF_IMAGES, 1) | found


def errors(cost: Cost) -> dict[str, float]:
    """Their standard errors; 0 where images do not differ."""
    if "macs_error" in cost:
        return dict.fromkeys(OF_IMAGES, 0.0) | cost["macs_error"]
    spread, over = cost.get("macs_spread", {}), images(cost)
    return {name: spread.get(name, 0.0) / math.sqrt(max(over[name] - 1, 1)) for name in OF_IMAGES}


def comparable(cost: Cost) -> tuple[float, dict[str, dict[str, float]]]:
    """Multiply-adds by formula of the very images that were run, and the parts of all counts with those of these: what the run is held against.
    Over a whole split theory may be less by chance."""
    same, parts = cost.get("theory_of_run"), cost.get("parts", {})
    return (same["macs"], parts | {"theoretical": same["parts"]}) if same else (cost["macs_theoretical"], parts)


def old_images(cost: Cost) -> int | None:
    """Over how many images theory was counted by an earlier rule, which took a few; None where it was counted by today's, or
    images do not differ."""
    count = images(cost)["theoretical"]
    return count if count > 1 and cost.get("count_revision", 1) < COUNT_REVISION else None
