"""The rules of our own operators against what the dispatcher counts of each one's definition in plain torch.

Both counters use these rules, so nothing else would find one that is wrong.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from harness.dispatched import Products
from methods.core.operators import RULES, listed_attention, packed_attention, scored_attention, tiled_attention
from methods.core.tiling import listed, tiled
from methods.sttabt.backtracking import concrete_masks, concrete_sets

few = settings(max_examples=12, deadline=None, derandomize=True)
sizes = st.integers(1, 4)
WIDTHS = st.integers(1, 5)


def counted(call, *arguments) -> float:
    """What the dispatcher counts of a call."""
    with torch.no_grad(), Products() as products:
        call(*arguments)
    return products.total


def by_rule(operator, *arguments) -> float:
    """The same of an operator of our own, which does not run: its kernel may need a compiler, or a GPU."""
    with FakeTensorMode() as mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, arguments)
        return counted(operator, *fake)


def attention(q, k, v):
    return (q @ k.mT).softmax(dim=-1) @ v


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)


@few
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4), sizes, WIDTHS)
def test_packed_attention(lengths, heads, width):
    queries, keys = map(list, zip(*lengths, strict=True))
    q, k = torch.randn(sum(queries), heads, width), torch.randn(sum(keys), heads, width)

    def image_by_image():
        for one, other in zip(q.split(queries), k.split(keys), strict=True):
            for head in range(heads):
                attention(one[:, head], other[:, head], other[:, head])

    packed = by_rule(packed_attention, q, k, k, starts(queries), starts(keys), queries, keys)
    assert packed == counted(image_by_image)


def masks():
    """(mask [H, N, N], width of a head, images): of any density, empty rows and heads too."""

    def mask(heads, tokens, density, seed):
        return torch.rand(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed)) < density

    shapes = st.builds(mask, sizes, st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
    return st.tuples(shapes, WIDTHS, sizes)


@few
@given(masks())
def test_listed_attention(case):
    kept, width, images = case
    heads, tokens, _ = kept.shape
    qkv = torch.randn(images, tokens, 3 * heads * width)

    def query_by_query():
        for q, k, v in qkv.unflatten(-1, (3, heads, width)).permute(0, 2, 3, 1, 4):
            for head, query in kept.any(dim=-1).nonzero().tolist():
                mine = kept[head, query]
                (k[head, mine] @ q[head, query]).softmax(dim=0) @ v[head, mine]

    assert by_rule(listed_attention, qkv, *listed(kept), heads) == counted(query_by_query)


@few
@given(sizes, st.integers(1, 9), sizes, WIDTHS, st.booleans())
def test_scored_attention(images, tokens, heads, width, standardised):
    qkv = torch.randn(images, tokens, 3 * heads * width)

    def all_at_once():
        q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        attention(q, k, v)

    assert by_rule(scored_attention, qkv, heads, standardised) == counted(all_at_once)


@few
@given(masks(), st.sampled_from([2, 3, 4]))
def test_tiled_attention(case, size):
    kept, width, images = case
    found, (heads, tokens, _) = tiled(kept, size), kept.shape
    q, bias = torch.randn(images, heads, tokens, width), torch.zeros(kept.shape)

    def tile_by_tile():
        rim = (0, 0, 0, -tokens % size)  # tiles there are computed whole
        rows = torch.nn.functional.pad(q, rim).unflatten(2, (-1, size))
        for image in rows:
            for head, row in ((head, row) for head in range(heads) for row in range(image.shape[1])):
                for column in found.indices[head, row, : found.counts[head, row]].tolist():
                    attention(image[head, row], image[head, column], image[head, column])

    tiles = by_rule(tiled_attention, q, q, q, bias, found.counts, found.indices, size, found.tiles)
    assert tiles == counted(tile_by_tile)


@few
@given(sizes, sizes, st.integers(1, 7), st.data())
def test_walking_back(blocks, images, tokens, data):
    outputs = data.draw(st.integers(1, tokens))
    ratings = [torch.rand(images, rows, tokens) for rows in [tokens] * (blocks - 1) + [outputs]]
    p_logit = torch.zeros(blocks)
    assert by_rule(concrete_sets, ratings, p_logit, outputs) == counted(concrete_masks, ratings, p_logit, outputs)


def test_no_rule_is_without_such_a_test():
    tested = {"packed_attention", "listed_attention", "scored_attention", "tiled_attention", "walk_back"}
    assert {name.partition("::")[2] for name in RULES if name.startswith("sparse_vit_bench::")} == tested
