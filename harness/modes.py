"""Ways of executing a model: eager, compiled, as a CUDA graph; and the attention kernels and memory format it is fastest with.

An attention module may have kernels of its own besides timm's two: `kernels(device)` names all it has there, the usual choice first, and
`use_kernel(name, device)` makes it go on with one. `work_differs` False: all of them execute the same multiply-adds.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from harness import device as devices
from harness.device.execution import NotAvailable, is_out_of_memory, record_graph, synchronize, timed
from methods.core.native import NoKernel

KERNELS = ("fused", "plain")  # the usual choice first
TRIALS = 7  # timed calls of each alternative
WORTH_IT = 0.97  # what is not the usual choice must take less than this share of the time, or noise would choose

Forward = Callable[[Tensor], Tensor]


@dataclass
class Prepared:
    """A model that is ready to run: call it with images [B, 3, H, W]. kernels: which attention kernel for which number of tokens, several where
    layers differ. refused: kernels that could not be tried, and why."""

    model: nn.Module
    forward: Forward
    channels_last: bool = False
    kernels: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def inputs(self, images: Tensor) -> Tensor:
        """The images in the memory format that the model takes."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


@torch.inference_mode()
def prepare(model: nn.Module, images: Tensor, dtype: str, mode: str) -> Prepared:
    """A copy of the model on the images' device in that dtype, executed in that mode, with the attention kernel that a short
    measurement finds fastest for every number of tokens. NotAvailable with the reason where the mode cannot be."""
    own = copy.deepcopy(model).to(images.device, devices.DTYPES[dtype]).eval().requires_grad_(False)
    channels_last = _prefers_channels_last(own, images)
    if channels_last:
        own.patch_embed.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if mode == "compile":
        forward, kernels, refused = _compiled(own, images)
    else:
        kernels, refused = _choose_kernels(own, images, mode)
        forward = record_graph(images.device, own, images) if mode == "cudagraph" else own
    return Prepared(own, forward, channels_last, kernels, refused)


def has_own_kernels(model: nn.Module) -> bool:
    """Whether how much it executes depends on the kernels chosen for it."""
    return any(hasattr(module, "use_kernel") and getattr(module, "work_differs", True) for module in model.modules())


def _kernels_of(module: Attention, device: torch.device) -> tuple[str, ...]:
    return module.kernels(device) if hasattr(module, "kernels") else KERNELS


def _use(module: Attention, kernel: str, device: torch.device) -> None:
    if hasattr(module, "use_kernel"):
        module.use_kernel(kernel, device)
    else:
        module.fused_attn = kernel == "fused"


def _compiled(model: nn.Module, images: Tensor) -> tuple[Forward, dict[str, str], dict[str, str]]:
    """The whole model in one graph, with the same attention kernel throughout (where a layer has it): the compiler fuses across modules, so what is
    fastest for a module alone says little."""
    device = images.device
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    offered = {module: _kernels_of(module, device) for module in attentions}
    candidates: dict[str, Forward] = {}
    refused: dict[str, str] = {}
    for kernel in dict.fromkeys([*KERNELS, *(name for names in offered.values() for name in names)]):
        for module, names in offered.items():
            _use(module, kernel if kernel in names else names[0], device)
        own = copy.deepcopy(model)
        forward = torch.compile(own, fullgraph=True, dynamic=False)
        try:
            forward(images)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if kernel in KERNELS:
                raise NotAvailable(_why_not_compiled(error)) from error
            refused[kernel] = _why_refused(error)
            continue
        candidates[kernel] = forward
    names = list(candidates)
    best = names[_fastest([lambda forward=forward: forward(images) for forward in candidates.values()], device)]
    for module, own_names in offered.items():
        _use(module, best if best in own_names else own_names[0], device)
    return candidates[best], {"all": best}, refused


def _why_not_compiled(error: Exception) -> str:
    kind, text = type(error).__name__, str(error)
    if kind == "InvalidCxxCompiler" or "No working C++ compiler" in text:
        return "torch.compile needs a C++ compiler, and none was found"
    first = next((line.strip() for line in text.splitlines() if line.strip()), kind)
    return f"torch.compile: {'the graph breaks: ' if kind == 'Unsupported' else ''}{first[:160]}"


def _why_refused(error: Exception) -> str:
    return str(error) if isinstance(error, NoKernel) else _why_not_compiled(error)


def _choose_kernels(model: nn.Module, images: Tensor, mode: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sets every attention to the kernel that is fastest on the tokens it gets, and says which, and what could not be tried."""
    chosen: dict[str, dict[str, None]] = {}
    refused: dict[str, str] = {}
    for (tokens, *_), (example, modules) in _attention_inputs(model, images).items():
        calls: dict[str, Callable[[], object]] = {}
        for kernel in _kernels_of(modules[0], images.device):
            one = copy.deepcopy(modules[0])
            _use(one, kernel, images.device)
            try:
                run = record_graph(images.device, one, example) if mode == "cudagraph" else one
                run(example)
            except Exception as error:
                if kernel in KERNELS or is_out_of_memory(error):
                    raise
                refused[kernel] = _why_refused(error)
                continue
            calls[kernel] = lambda run=run, example=example: run(example)
        best = list(calls)[_fastest(list(calls.values()), images.device)]
        for module in modules:
            _use(module, best, images.device)
        chosen.setdefault(str(tokens), {})[best] = None
    return {tokens: " and ".join(sorted(names)) for tokens, names in chosen.items()}, refused


def _attention_inputs(model: nn.Module, images: Tensor) -> dict[tuple, tuple[Tensor, list[Attention]]]:
    """timm's attention modules that are called with tokens alone, by what decides their speed, with an example of their input."""
    found: dict[tuple, tuple[Tensor, list[Attention]]] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        others = [value for value in (*args[1:], *kwargs.values()) if value is not None and value is not False]
        if isinstance(args[0], Tensor) and not others:
            itself = id(module) if hasattr(module, "use_kernel") else 0  # kernels of its own depend on its mask
            key = (args[0].shape[-2], tuple(args[0].shape), type(module), module.num_heads, module.head_dim, itself)
            found.setdefault(key, (args[0].clone(), []))[1].append(module)

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in attentions]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _prefers_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether the stem, the only part whose tensors are pictures, is clearly faster on channels-last images."""
    stem = getattr(model, "patch_embed", None)
    if not isinstance(stem, nn.Module):
        return False
    other = copy.deepcopy(stem).to(memory_format=torch.channels_last)
    turned = images.contiguous(memory_format=torch.channels_last)
    return _fastest([lambda: stem(images), lambda: other(turned)], images.device) == 1


def _fastest(calls: list[Callable[[], object]], device: torch.device) -> int:
    """The number of the fastest; the first, unless another one is clearly faster."""
    medians = _medians(calls, device)
    best = medians.index(min(medians))
    return best if medians[best] < WORTH_IT * medians[0] else 0


def _medians(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call, taken in turns after two calls each to get warm."""
    for call in calls:
        call()
        call()
    synchronize(device)
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(TRIALS):
        for call, times in zip(calls, samples, strict=True):
            wall, inside = timed(device, call)
            times.append(wall if inside is None else inside)
    return [statistics.median(times) for times in samples]
