"""Statistics of the leaderboard: intervals over seeds, tests of paired differences, Holm's correction. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit

MIN_SEEDS = 3  # a difference between trained rows is claimed only from this many seeds on
LEVEL = 0.05  # a p-value below it is marked
CONFIDENCE = 0.95  # of every interval
SMALLEST = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class Difference:
    """Accuracy of one row minus another's, as a share of the images.

    interval: 95 %. p_value: two-sided, of no difference. test: "crossed" or "mcnemar". freedom: Student's degrees of
    freedom; None where the test is exact.
    """

    mean: float
    interval: tuple[float, float]
    p_value: float
    test: str
    freedom: float | None = None


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None]:
    """Mean and half width of the t-interval over seeds (None for one seed)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * spread


def crossed(differences: np.ndarray) -> Difference:
    """The mean of paired differences in {-1, 0, 1} [seeds, images] with two sources of chance, seeds and test images.

    They are crossed, since every seed is tested on the same images: a two-way layout without replication, see
    `crossed_error`. ValueError for fewer than two seeds or images.
    """
    table = np.asarray(differences, dtype=np.int64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"differences of shape {list(table.shape)}: two seeds and two images are needed at least")
    squares = (np.sum(table.sum(axis=0) ** 2), np.sum(table**2))
    mean, error, freedom = (float(x) for x in crossed_error(table.sum(axis=1), *squares, table.shape[1]))
    half = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * error
    p_value = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Difference(mean, (max(mean - half, -1.0), min(mean + half, 1.0)), p_value, "crossed", freedom)


def crossed_error(
    seed_sums: np.ndarray, image_squares: np.ndarray, squares: np.ndarray, images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, its standard error and its degrees of freedom, from sums over a table of differences D [seeds, images].

    seed_sums [..., seeds]: of D over images. image_squares [...]: over images, of the squared sum of D over seeds.
    squares [...]: of D squared over all. With the mean squares of seeds, images and the rest, the variance of the mean is
    (max(MS_seed, MS_rest) + MS_image - MS_rest) / (seeds * images), with Satterthwaite's degrees of freedom. Few seeds
    often scatter less than chance allows; the floor keeps such luck from shortening the interval, and its term keeps
    seeds - 1 degrees of freedom. The error is never below one image's: a sample without any difference is no proof that
    there is none.
    """
    seeds = seed_sums.shape[-1]
    total = seed_sums.sum(axis=-1)
    common = total**2 / (seeds * images)
    seed_part = (seed_sums**2).sum(axis=-1) / images - common
    image_part = image_squares / seeds - common
    ms_seed, ms_image = seed_part / (seeds - 1), image_part / (images - 1)
    ms_rest = np.maximum(squares - common - seed_part - image_part, 0) / ((seeds - 1) * (images - 1))
    floored = np.maximum(ms_seed, ms_rest)
    spread = floored + ms_image - ms_rest
    pieces = floored**2 + (ms_image**2 * (seeds - 1) + ms_rest**2) / (images - 1)
    freedom = (seeds - 1) * np.maximum(spread**2 / np.maximum(pieces, SMALLEST), 1)
    return total / (seeds * images), np.sqrt(np.maximum(spread, seeds / images) / (seeds * images)), freedom


def mcnemar(differences: np.ndarray) -> Difference:
    """The mean of paired differences in {-1, 0, 1} [images] between two given networks: images are the only chance.

    McNemar's exact test: of the images that tell the two apart, either wins half. The interval is Tango's (1998).
    """
    table, images = np.asarray(differences, dtype=np.int64), len(differences)
    won, lost = int(np.sum(table == 1)), int(np.sum(table == -1))
    p_value = min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0
    return Difference((won - lost) / images, paired_interval(won, lost, images), p_value, "mcnemar")


def paired_interval(won: int, lost: int, images: int) -> tuple[float, float]:
    """Tango's score interval of a difference of paired proportions, (won - lost) / images: all differences that a score
    test of these counts does not reject."""
    limit = float(ndtri(0.5 + CONFIDENCE / 2))
    mean = (won - lost) / images
    high = _bisect(lambda difference: _score(won, lost, images, difference) < -limit, mean, 1.0)
    low = _bisect(lambda difference: _score(lost, won, images, difference) < -limit, -mean, 1.0)
    return -low, high


def _score(won: int, lost: int, images: int, difference: float) -> float:
    """How many standard errors the counts lie above what `difference` expects, with the share of lost images that is
    likeliest under it (the root of a quadratic equation)."""
    linear = won + lost - (2 * images - won + lost) * difference
    root = math.sqrt(max(linear**2 + 8 * images * lost * difference * (1 - difference), 0.0))
    share = (root + linear) / (4 * images)
    variance = images * (2 * share + difference * (1 - difference))
    distance = won - lost - images * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _bisect(rejected: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where `rejected` begins to hold between a value for which it does not and one for which it may."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def of_these_networks(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [seeds, images] where only the images are left to chance: true of
    these networks, not of another seed's. For remarks, not for claims."""
    by_image = np.asarray(differences, dtype=np.float64).mean(axis=0)
    mean, half = mean_interval(by_image)
    return mean - half, mean + half


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
