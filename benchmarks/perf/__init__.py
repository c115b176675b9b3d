"""The pieces of which the benchmark is made, each timed alone, so that two commits can be compared (`make perf`).

The sizes are those of DeiT-S at 224 pixels, with DynamicViT's keep rate 0.7, where a file says nothing else. Every function also checks what it computed.
"""

from itertools import pairwise

from methods.core.pruning import stage_counts

WIDTH, HEADS, PATCHES = 384, 6, 196
ALIVE = (PATCHES, *stage_counts(PATCHES, 0.7, 3))  # patch tokens in the four quarters of the depth: 196, 137, 96, 67
STAGES = tuple(pairwise(ALIVE))  # (before, after) of each removal
BATCHES = (1, 8)
