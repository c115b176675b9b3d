"""Per-image correctness as text, so that a record can hold it. No torch here."""

import base64

import numpy as np


def pack(correct: np.ndarray) -> str:
    """bool [N] as base64 text of its bits."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The bool [count] that `pack` packed."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)
