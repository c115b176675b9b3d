"""Multiply-adds counted in torch's dispatcher while a model runs: forward and backward, on any device, on fake tensors.

torch's own FlopCounterMode passes over what it has no formula for. Here every operation has one, is known to have no
products, is made of others that are looked at instead, or is an error that names it and the module it was in.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from harness.operations import UncountedOperation, has_formula, is_free, macs_of, name_of

# Questions about sizes, which come here only for tensors of special kinds, and which those answer themselves.
_QUESTIONS = {f"aten::{name}" for name in """
    dim is_contiguous is_non_overlapping_and_dense is_strides_like_format numel size storage_offset stride
    sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride
""".split()} | {"prim::layout"}  # fmt: skip


class Products:
    """Counts what runs inside it. macs: multiply-adds by (name of the module, name of the operation); what runs in none
    of the modules of `model`, and every backward, belongs to "". `also`: names of `harness.operations.ALSO`.

    Compiled code hides its operations, so it runs uncompiled inside. UncountedOperation from the operation itself."""

    def __init__(self, model: nn.Module | None = None, also: frozenset[str] = frozenset()) -> None:
        self.macs: Counter[tuple[str, str]] = Counter()
        self._model, self._also = model, also

    @property
    def total(self) -> float:
        return float(sum(self.macs.values()))

    def by(self, which: int) -> Counter[str]:
        """Sums by module (0) or by operation (1)."""
        sums: Counter[str] = Counter()
        for names, macs in self.macs.items():
            sums[names[which]] += macs
        return sums

    def __enter__(self) -> Products:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            underway = stack.enter_context(_Underway(self._model))
            stack.enter_context(_Mode(self.macs, underway, self._also))
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave.__exit__(*error)


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, macs: Counter[tuple[str, str]], underway: _Underway, also: frozenset[str]) -> None:
        super().__init__()
        self.macs, self.underway, self.also = macs, underway, also

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise self._uncounted(name_of(func))
        if name_of(func) in _QUESTIONS or any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # of a tensor made of others: what is done with those comes here, too
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if has_formula(func) or is_free(func):
            return self._count(func, args, kwargs)
        with self:  # where autograd is off altogether, operations made of others come here whole
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise self._uncounted(name_of(func))
        return result

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with _as_deployed(func):
            result = func(*args, **kwargs)
        try:
            macs = macs_of(func, args, kwargs, result, self.also)
        except UncountedOperation as error:
            raise self._uncounted(str(error)) from None
        if macs:
            self.macs[self.underway.now, name_of(func)] += macs
        return result

    def _uncounted(self, what: str) -> UncountedOperation:
        return UncountedOperation(
            f"{what} in {self.underway.where} has no rule for counting multiply-adds "
            "(methods.core.operators: `counted` gives one, `free` says that there are none)"
        )


def _as_deployed(func: Any) -> contextlib.AbstractContextManager[Any]:
    """Custom operators are counted whole, so what is compiled inside them may stay so; some of it cannot run otherwise."""
    if func.namespace == "aten":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("default")


class _Underway:
    """Which module of a model is running: a context. now: its name."""

    def __init__(self, model: nn.Module | None) -> None:
        self._names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._root = "what runs" if model is None else type(model).__name__
        self._running: list[str] = []

    @property
    def now(self) -> str:
        return self._running[-1] if self._running else ""

    @property
    def where(self) -> str:
        """For people."""
        if not self._running:
            return "a backward" if torch._C._current_graph_task_id() != -1 else self._root
        return self.now or self._root

    def __enter__(self) -> _Underway:
        self._hooks = (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),  # even where a module raises what others catch
        )
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(self._names.get(id(module), self.now))  # a stranger belongs to whoever calls it

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
