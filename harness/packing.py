"""Arrays as text, so that a record can hold them: per-image correctness, masks, maps. No torch here."""

import base64
import zlib

import numpy as np


def pack(correct: np.ndarray) -> str:
    """bool [N] as base64 text of its bits."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The bool [count] that `pack` packed."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def bits(text: object, count: int) -> np.ndarray:
    """The same of a text that may be wrong. ValueError for what is no packed bool [count]."""
    if not isinstance(text, str):
        raise ValueError(f"is no text but {type(text).__name__}")
    found = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(found) != -(-count // 8):
        raise ValueError(f"has {len(found)} bytes, but {count} images are {-(-count // 8)}")
    if np.unpackbits(found)[count:].any():
        raise ValueError(f"has bits for more than {count} images")
    return unpack(text, count)


def squeeze(array: np.ndarray) -> str:
    """An array's bytes, compressed, as base64 text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def unsqueeze(text: str, dtype: type, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    """The array that `squeeze` squeezed."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)
