"""Watches the operations of a forward: how many, how much memory their tensors take, which make the host wait."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The shape or value of their result depends on data, so a GPU has to be waited for before the host can go on.
WAITING = {
    aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.equal.default,
}  # fmt: skip


class Observer(TorchDispatchMode):
    """Use as a context around a forward. operations: those that compute (views do not); peak: bytes of new tensors alive at
    once, at most; waits: names of the operations for which the host would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.peak, self.waits = 0, 0, list[str]()
        self._alive, self._known = 0, dict[int, Any]()
        self._copies = _Copies(self.waits)

    def __enter__(self) -> Observer:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                    self._notice(tensor.untyped_storage())
        if func in WAITING or _size_depends_on_values(func, args, kwargs or {}):
            self.waits.append(str(func))
        return result

    def _notice(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._alive -= size


class _Copies(TorchFunctionMode):
    """Notices what brings tensors to the host without an operation of its own on the CPU."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits, self._on_host = waits, list[Tensor]()  # kept alive, so that they can be told by identity

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        target = (kwargs or {}).get("device", args[1] if len(args) > 1 else None)
        # "cpu" in words is meant as the host; a device object may just be where the tensor is already
        to_host = name == "cpu" or (
            name == "to" and (target == "cpu" if isinstance(target, str) else _leaves_gpu(args[0], target))
        )
        if to_host or (name in ("tolist", "numpy") and not any(x is args[0] for x in self._on_host)):
            self.waits.append(name)
        if to_host:
            self._on_host.append(result)
        return result


def _leaves_gpu(tensor: Tensor, target: Any) -> bool:
    return isinstance(target, torch.device) and target.type == "cpu" and tensor.device.type != "cpu"


def _size_depends_on_values(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """x[mask] finds out how many entries the mask has, repeating how often, unless it is told."""
    if func in (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor):
        return kwargs.get("output_size") is None
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
