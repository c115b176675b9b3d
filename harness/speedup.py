"""How much faster one model is than another, from rounds in which both were timed; with an interval.

Where every batch takes the same work, each round gives one ratio, and their median is steadier on shared machines than
a ratio of medians. Where the work depends on the image, the speed-up is that of the mean times over the images, each
image by its median over the rounds: a round's own ratio of means would not do, since one call in eight that is
disturbed moves it. (Simulated with eight images of which one takes nine times as long, and 15 % of the calls up to
doubled: the median of such ratios is 2 % off, and its interval holds the truth in 85 of 100 cases at 60 rounds; this
one in 95.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 400

Turns = Sequence[Sequence[float]]  # of each round, the seconds of each batch: [rounds, batches]


def speed_up(dense: Turns, deployed: Turns) -> tuple[float, tuple[float, float]]:
    """Dense over deployed, and an interval that holds it in 95 % of the cases for a fixed number of rounds. The turns
    have as many batches as differ in their work."""
    if len(dense[0]) == 1:
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(dense, deployed, strict=True)]
        return statistics.median(ratios), median_interval(ratios)
    return _of_means(np.asarray(dense), np.asarray(deployed))


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the median lies with 95 % at least, by the binomial distribution of ranks; the
    smallest and the largest where there are too few for that."""
    ordered, n = sorted(values), len(values)
    outside, low = 0.0, 0
    while outside + math.comb(n, low) / 2**n <= 0.025 and low < (n - 1) // 2:
        outside += math.comb(n, low) / 2**n
        low += 1
    low = max(low - 1, 0) if outside else 0
    return ordered[low], ordered[n - 1 - low]


def _of_means(dense: np.ndarray, deployed: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Of [rounds, batches]. The interval: percentiles of a bootstrap over rounds, drawn for both models and all batches
    at once, since what disturbs a round disturbs all that is timed in it."""
    drawn = np.random.default_rng(0).integers(len(dense), size=(RESAMPLES, len(dense)))
    estimate = float(_mean_of_medians(dense) / _mean_of_medians(deployed))
    resampled = _mean_of_medians(dense[drawn]) / _mean_of_medians(deployed[drawn])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return estimate, (min(float(low), estimate), max(float(high), estimate))


def _mean_of_medians(turns: np.ndarray) -> np.ndarray:
    """[..., rounds, batches] to [...]: the mean over the batches of each one's median over the rounds."""
    return np.median(turns, axis=-2).mean(axis=-1)
