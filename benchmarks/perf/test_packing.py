"""Attention of images that keep different numbers of tokens: packed end to end without padding, image by image, padded to the longest, and as torch's jagged
tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from methods.core.operators import packed_attention

from . import BATCHES, HEADS

pytestmark = pytest.mark.usefixtures("inference")
HEAD_WIDTH = 64
KEPT = (
    (178, 94),
    (195, 142),
    (60, 24),
    (197, 185),
    (131, 33),
    (89, 46),
    (111, 105),
    (183, 60),
)  # (keys, queries) of an image


class Scene:
    """Queries [all, H, d], keys and values of a batch whose images differ."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.keys = [keys for keys, _ in KEPT[:batch]]
        self.queries = [queries for _, queries in KEPT[:batch]]
        self.q = torch.randn(sum(self.queries), HEADS, HEAD_WIDTH, device=device)
        self.k, self.v = torch.randn(sum(self.keys), 2, HEADS, HEAD_WIDTH, device=device).unbind(1)
        self.starts = [torch.tensor([0, *sizes], device=device).cumsum(0).int() for sizes in (self.queries, self.keys)]


def packed(scene: Scene) -> Tensor:
    return packed_attention(scene.q, scene.k, scene.v, *scene.starts, scene.queries, scene.keys)


def images(scene: Scene) -> Tensor:
    parts = zip(scene.q.split(scene.queries), scene.k.split(scene.keys), scene.v.split(scene.keys), strict=True)
    heads_first = ([x.transpose(0, 1)[None] for x in part] for part in parts)
    return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in heads_first])


def padded(scene: Scene) -> Tensor:
    q, k, v = (
        pad_sequence(x.split(sizes), batch_first=True).transpose(1, 2)
        for x, sizes in ((scene.q, scene.queries), (scene.k, scene.keys), (scene.v, scene.keys))
    )
    there = (
        torch.arange(x.shape[2], device=x.device) < torch.tensor(sizes, device=x.device)[:, None]
        for x, sizes in ((q, scene.queries), (k, scene.keys))
    )
    of_queries, of_keys = there
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=of_keys[:, None, None])
    return out.transpose(1, 2)[of_queries]


def jagged(scene: Scene) -> Tensor:
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x.contiguous(), starts.long()).transpose(1, 2)
        for x, starts in ((scene.q, scene.starts[0]), (scene.k, scene.starts[1]), (scene.v, scene.starts[1]))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


WAYS = {"packed": packed, "images": images, "padded": padded, "jagged": jagged}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_of_different_lengths(timed, device, batch, way):
    scene = Scene(batch, device)
    try:
        WAYS[way](scene)
    except Exception as error:  # jagged tensors do not attend everywhere
        pytest.skip(f"{way}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    out = timed(f"attention of images that keep different tokens, batch {batch}", WAYS[way], scene)
    torch.testing.assert_close(out, images(scene), atol=1e-4, rtol=1e-4)
