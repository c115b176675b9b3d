"""Simulated benchmarks: rows whose true accuracies are known, tested on the same images and trained with the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy.special import expit, ndtri, stdtr, stdtrit

from harness import stats

# As in results/fashion-reference: 85 % accuracy, 57 % of the images are right in every row and seed and 3 % in none, and
# two seeds differ on 9 % of the images.
BASE, ALWAYS, DOUBTFUL = 0.85, 0.57, 0.40
HARDNESS = 2.85  # standard deviation of the logit of a doubtful image
OUTCOMES = np.array([-1, 0, 1])  # lost, neither, won
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean, its error, degrees of freedom


@dataclass(frozen=True)
class Case:
    """seeds x images. scatter: standard deviation of a seed's accuracy, of each model, in points. gain: points by which the
    row is truly better. taste: standard deviation over images of the logit by which the row differs from the reference in
    every seed: images that suit it more, images that suit it less."""

    seeds: int
    images: int
    scatter: float = 0.0
    gain: float = 0.0
    taste: float = 0.0


@dataclass(frozen=True)
class Comparisons:
    """Of each replicate what `stats.crossed_error` gives; the true difference, and the error by the true variances."""

    mean: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    truth: float
    true_error: float

    @property
    def p_values(self) -> np.ndarray:
        return p_values(self.mean, self.error, self.freedom)

    @property
    def half(self) -> np.ndarray:
        """Half the width of the intervals."""
        return stdtrit(self.freedom, 0.975) * self.error


def p_values(mean: np.ndarray, error: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    return 2 * stdtr(freedom, -np.abs(mean) / error)


def nodes(count: int) -> np.ndarray:
    """Equally likely values that stand for a standard normal variable [count]."""
    values = ndtri((np.arange(count) + 0.5) / count)
    return values / values.std()


@cache
def offset_of(points: float) -> float:
    """The logit of a doubtful image of mean hardness, for a model with so many points more than BASE."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accuracy(middle) < BASE + points / 100 else (low, middle)
    return low


def accuracy(offset: float) -> float:
    return ALWAYS + DOUBTFUL * float(expit(offset + HARDNESS * nodes(200)).mean())


def shifts(case: Case, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """What seeds add to logits: so much that accuracies scatter by `case.scatter` points."""
    logit_of_point = (offset_of(0.05) - offset_of(-0.05)) / 0.1
    return generator.standard_normal(shape) * case.scatter * logit_of_point


def comparisons(case: Case, replicates: int, generator: np.random.Generator) -> Comparisons:
    """Independent comparisons of a row with the reference. Images are alike before anyone has seen them, so the numbers of
    images by their outcomes over the seeds are one multinomial draw."""
    patterns = np.array(list(product(OUTCOMES, repeat=case.seeds)))  # of one image over the seeds
    moved = shifts(case, (2, replicates, case.seeds), generator)
    parts = np.array_split(moved, -(-replicates // 500), axis=1)  # what fits into the caches
    chances = np.concatenate([_chances(case, part) for part in parts])
    counts = generator.multinomial(case.images, chances)
    sums, squares = patterns.sum(axis=1), (patterns**2).sum(axis=1)
    found = stats.crossed_error(counts @ patterns, counts @ sums**2, counts @ squares, case.images)
    means = chances @ sums / case.seeds
    within = (chances @ sums**2 / case.seeds**2 - means**2).mean() / case.images
    return Comparisons(*found, case.gain / 100, float(np.sqrt(means.var() + within)))


def _chances(case: Case, moved: np.ndarray) -> np.ndarray:
    """How likely an image shows each pattern of outcomes over the seeds [replicates, 3 ** seeds]."""
    taste = nodes(5) * case.taste if case.taste else np.zeros(1)
    hardness = HARDNESS * nodes(40)[:, None]
    ours = expit(offset_of(case.gain) + (hardness + taste / 2).ravel() + moved[0][..., None])
    theirs = expit(offset_of(0.0) + (hardness - taste / 2).ravel() + moved[1][..., None])  # [replicates, seeds, nodes]
    won, lost = ours * (1 - theirs), (1 - ours) * theirs
    outcomes = np.stack([lost, 1 - won - lost, won], axis=-1)  # [replicates, seeds, nodes, 3]
    half = case.seeds // 2
    first, rest = _joint(outcomes[:, :half]), _joint(outcomes[:, half:])
    both = np.einsum("rni,rnj->rij", first, rest, optimize=True).reshape(len(first), -1) / first.shape[1]
    chances = DOUBTFUL * both
    chances[:, chances.shape[1] // 2] += 1 - DOUBTFUL  # the pattern without any difference
    return chances / chances.sum(axis=1, keepdims=True)


def _joint(outcomes: np.ndarray) -> np.ndarray:
    """[replicates, nodes, 3 ** seeds] from each seed's [replicates, seeds, nodes, 3]."""
    joint = outcomes[:, 0]
    for seed in range(1, outcomes.shape[1]):
        joint = (joint[..., None] * outcomes[:, seed, :, None]).reshape(*joint.shape[:2], -1)
    return joint


def families(case: Case, rows: int, replicates: int, generator: np.random.Generator) -> Iterator[Moments]:
    """Tables of `rows` rows, none of them truly different, that share the reference: of each table the moments [rows]."""
    each = round(case.images * DOUBTFUL / 40)  # images of one hardness
    logits = offset_of(0.0) + HARDNESS * nodes(40)
    bits = np.random.SFC64(generator.integers(2**63))
    for _ in range(replicates):
        moved = shifts(case, (rows + 1, case.seeds, 1), generator)
        limits = np.repeat((expit(logits + moved) * 2**16).astype(np.uint16), each, axis=-1)
        draws = bits.random_raw(-(-limits.size // 4)).view(np.uint16)[: limits.size].reshape(limits.shape)
        right = draws < limits  # [rows + 1, seeds, doubtful images]
        yield stats.crossed_error(*_sums(right[1:], right[0]), case.images)


def _sums(right: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums that `stats.crossed_error` wants of rows [rows, seeds, images] and a reference [seeds, images], both bool."""
    theirs = [np.count_nonzero(one) for one in reference]
    by_seed = np.array([[np.count_nonzero(one) for one in row] for row in right]) - theirs
    different = np.array([np.count_nonzero(row) for row in right != reference])
    by_image = sum(right[:, seed].view(np.int8) - reference[seed].view(np.int8) for seed in range(len(reference)))
    return by_seed, (by_image * by_image).sum(axis=1, dtype=np.int64), different
