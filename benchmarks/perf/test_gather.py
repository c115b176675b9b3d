"""Token gather: ways to take the kept tokens out of [B, n, C], alone and with the CLS token that always stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.core.pruning import take_tokens

from . import BATCHES, STAGES, WIDTH

pytestmark = pytest.mark.usefixtures("inference")


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """Element by element, with the ids repeated over the channels."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def rows(x: Tensor, ids: Tensor) -> Tensor:
    """All images' tokens end to end, and one index_select among them. Copies x first where it is not contiguous."""
    starts = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (ids + starts).flatten()).unflatten(0, ids.shape)


def index(x: Tensor, ids: Tensor) -> Tensor:
    """Advanced indexing with pairs (image, token)."""
    return x[torch.arange(len(x), device=x.device)[:, None], ids]


def images(x: Tensor, ids: Tensor) -> Tensor:
    """One image at a time."""
    return torch.stack([tokens.index_select(0, kept) for tokens, kept in zip(x, ids, strict=True)])


def mask(x: Tensor, ids: Tensor) -> Tensor:
    """A boolean mask: the tokens come in patch order, and on a GPU the host waits for their number."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, ids, True)
    return x[kept].unflatten(0, ids.shape)


def separate(x: Tensor, ids: Tensor) -> Tensor:
    """CLS and patches apart, and together again."""
    return torch.cat([x[:, :1], take_tokens(x[:, 1:], ids)], dim=1)


def together(x: Tensor, ids: Tensor) -> Tensor:
    """CLS as token 0 among those that are taken."""
    return take_tokens(x, F.pad(ids + 1, (1, 0)))


def together_rows(x: Tensor, ids: Tensor) -> Tensor:
    """The same by index_select."""
    return rows(x, F.pad(ids + 1, (1, 0)))


# take_tokens is what the methods use; the others stay as they are, for it to be compared with.
ALONE = {"take_tokens": take_tokens, "gather": gather, "rows": rows, "index": index, "images": images, "mask": mask}
WITH_CLS = {"separate": separate, "together": together, "together_rows": together_rows}


def scene(batch: int, patches: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """CLS and patches [B, 1 + n, C], and the patches that stay [B, k], in the order of random scores."""
    x = torch.randn(batch, 1 + patches, WIDTH, device=device)
    return x, torch.rand(batch, patches, device=device).topk(kept, dim=1).indices


@pytest.mark.parametrize("way", ALONE)
@pytest.mark.parametrize(("patches", "kept"), STAGES)
@pytest.mark.parametrize("batch", BATCHES)
def test_take_patches(timed, device, batch, patches, kept, way):
    """From x[:, 1:], the patches without CLS: a slice, not contiguous."""
    x, ids = scene(batch, patches, kept, device)
    taken = timed(f"take {kept} of {patches} patches, batch {batch}", ALONE[way], x[:, 1:], ids)
    ordered = ids.sort(dim=1).values if way == "mask" else ids
    assert torch.equal(taken, torch.stack([x[image, 1 + ordered[image]] for image in range(batch)]))


@pytest.mark.parametrize("way", WITH_CLS)
@pytest.mark.parametrize(("patches", "kept"), STAGES)
@pytest.mark.parametrize("batch", BATCHES)
def test_keep_cls(timed, device, batch, patches, kept, way):
    """From the whole x, with CLS in front of what stays."""
    x, ids = scene(batch, patches, kept, device)
    taken = timed(f"take CLS and {kept} of {patches} patches, batch {batch}", WITH_CLS[way], x, ids)
    assert torch.equal(taken[:, 0], x[:, 0])
    assert torch.equal(taken[:, 1:], torch.stack([x[image, 1 + ids[image]] for image in range(batch)]))
