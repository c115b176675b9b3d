"""Labels as readers give them, as whole numbers: what is none is refused, never rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError

LARGEST = 2**31 - 1


def whole(value: Any, where: str) -> int:
    """A label as an int: whole numbers of any type, 3.0 as well. UserError, naming the label by `where`, for everything
    else: fractions, NaN, negative numbers (which many data sets have where a label is not known), booleans, texts,
    lists, nothing."""
    plain = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and _is_one(value) else value
    if isinstance(plain, int | float) and not isinstance(plain, bool) and 0 <= plain <= LARGEST and plain == int(plain):
        return int(plain)
    shown = repr(plain) if len(repr(plain)) <= 40 else f"{repr(plain)[:40]} ..."
    raise UserError(f"{where}: the label {shown} is no whole number from 0 on; labels are the classes' numbers")


def _is_one(value: Any) -> bool:
    return not np.ndim(value)


def whole_numbers(values: Iterable[Any] | np.ndarray | Tensor, where: str) -> Tensor:
    """Labels [N] as int64 [N]. UserError for the first that is no whole number; it is called "`where`, image
    NUMBER"."""
    array = _array(values)
    if array is not None and not len(array):
        return torch.zeros(0, dtype=torch.int64)
    if array is not None:
        good = (array >= 0) & (array <= LARGEST) & (array == np.trunc(array))
        if bool(good.all()):
            return torch.from_numpy(array.astype(np.int64))
        number = int(np.flatnonzero(~good)[0])
        whole(array[number], f"{where}, image {number}")
    return torch.tensor(
        [whole(value, f"{where}, image {number}") for number, value in enumerate(values)], dtype=torch.int64
    )


def _array(values: Any) -> np.ndarray | None:
    """Numbers in an array [N], which can be looked at all at once; None for other things, which are looked at one by
    one."""
    array = values.numpy() if isinstance(values, Tensor) else values
    if not (isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "iuf"):
        return None
    return array.astype(np.float64) if array.dtype.kind == "f" else array
