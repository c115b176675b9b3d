"""Statistics of the leaderboard: intervals over seeds, paired bootstrap over seeds and images, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 10_000
MIN_SEEDS = 3  # a difference is claimed only from so many seeds on


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean and half width of the t-interval over seeds (None for one seed)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * spread


def paired_bootstrap(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0
) -> tuple[float, tuple[float, float], float]:
    """Difference in accuracy between two rows that were trained with the same seeds and tested on the same images.

    pairs: per seed, (correct, correct of the reference), bool [N]. Resamples seeds, and within each drawn seed images.
    Returns the difference, its 95 % interval, and the two-sided p-value of no difference.
    """
    generator, shares, sizes = np.random.default_rng(seed), [], []
    for ours, theirs in pairs:
        difference = ours.astype(np.int8) - theirs.astype(np.int8)
        # An image is won, lost or neither: resampling images is one multinomial draw.
        shares.append([np.mean(difference == 1), np.mean(difference == -1), np.mean(difference == 0)])
        sizes.append(len(difference))
    drawn = generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    differences = np.zeros(RESAMPLES)
    for column in drawn.T:
        for index in range(len(pairs)):
            rows = np.flatnonzero(column == index)
            counts = generator.multinomial(sizes[index], shares[index], size=len(rows))
            differences[rows] += (counts[:, 0] - counts[:, 1]) / sizes[index] / len(pairs)
    observed = float(np.mean([share[0] - share[1] for share in shares]))
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return observed, (float(low), float(high)), float(min(1.0, 2 * max(tail, 1 / RESAMPLES)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, accuracy) points no other point beats in both (as good in one, better in the other)."""
    return [
        not any((c <= cost and a >= accuracy) and (c < cost or a > accuracy) for c, a in points)
        for cost, accuracy in points
    ]
