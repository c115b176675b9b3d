"""How often the leaderboard's claims are wrong, and what they can find: simulated rows whose true accuracies are known."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit
from scipy.stats import binomtest
from simulated import Case, comparisons, families, p_values

from harness import stats

REPLICATES = 4000
ROWS = 28  # that share dense+, as in results/fashion-reference
LEVEL = 0.05
MEASURING = Path(__file__).resolve().parent.parent / "docs" / "measuring.md"
GRID = [(seeds, images, scatter) for seeds in (3, 5) for images in (2000, 10_000) for scatter in (0.0, 0.2, 0.5)]


def generator(*key):
    return np.random.default_rng([int(1000 * part) for part in key])


def covered(found):
    return np.mean(np.abs(found.mean - found.truth) <= found.half)


@pytest.mark.parametrize(("seeds", "images", "scatter"), GRID)
def test_claims_hold_their_level(seeds, images, scatter):
    """At most 6 % false positives and at least 94 % coverage at the 5 % level, whether or not there is a difference. With
    4,000 replicates 5 % comes out as 4.3 to 5.7 %."""
    same = comparisons(Case(seeds, images, scatter), REPLICATES, generator(seeds, images, scatter))
    assert np.mean(same.p_values < LEVEL) <= 0.06
    assert covered(same) >= 0.94
    worse = comparisons(Case(seeds, images, scatter, gain=-3), REPLICATES, generator(seeds, images, scatter, 1))
    assert worse.mean.mean() == pytest.approx(-0.03, abs=1e-3)
    assert covered(worse) >= 0.94


@pytest.mark.parametrize(("seeds", "images", "scatter"), [(3, 10_000, 0.5), (5, 2000, 0.5)])
def test_claims_hold_where_images_suit_one_row_more(seeds, images, scatter):
    found = comparisons(Case(seeds, images, scatter, taste=1.0), REPLICATES, generator(seeds, images))
    assert np.mean(found.p_values < LEVEL) <= 0.06
    assert covered(found) >= 0.94


@pytest.mark.parametrize(("seeds", "images", "scatter"), GRID)
def test_intervals_are_not_much_wider_than_they_must_be(seeds, images, scatter):
    """Against the interval that knows the true variances. With five seeds that is the normal one; with three, whose variance
    has two degrees of freedom, Student's factor of 4.3 instead of 2 is the price of not knowing, so Student's."""
    found = comparisons(Case(seeds, images, scatter), 1000, generator(seeds, images, scatter, 2))
    ideal = ndtri(0.975) if seeds == 5 else stdtrit(seeds - 1, 0.975)
    assert np.median(found.half) <= 1.6 * ideal * found.true_error


def test_three_points_are_found_with_five_seeds():
    found = comparisons(Case(5, 2000, 0.2, gain=3), REPLICATES, generator(5))
    assert np.mean(found.p_values < LEVEL) >= 0.80


def wrong_tables(case, replicates, seed):
    """In how many tables of rows that are all as good as dense+ at least one is claimed to differ."""
    found = families(case, ROWS, replicates, generator(seed, case.seeds, case.images, case.scatter))
    return sum(min(stats.holm(p_values(*moments).tolist())) < LEVEL for moments in found)


@pytest.mark.parametrize(("seeds", "images", "replicates"), [(3, 2000, 500), (5, 10_000, 300)])
def test_few_tables_have_a_wrong_claim(seeds, images, replicates):
    """A part of what `test_at_most_six_tables_in_a_hundred_have_a_wrong_claim` does: fails where 6 % is out of the question
    (one time in a thousand by chance if it were just 6 %)."""
    wrong = wrong_tables(Case(seeds, images, 0.5), replicates, 0)
    assert binomtest(wrong, replicates, 0.06, alternative="greater").pvalue > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("seeds", "images", "scatter"), GRID)
def test_at_most_six_tables_in_a_hundred_have_a_wrong_claim(seeds, images, scatter):
    assert wrong_tables(Case(seeds, images, scatter), REPLICATES, 1) <= 0.06 * REPLICATES


@pytest.mark.long
@pytest.mark.parametrize(("seeds", "images", "scatter"), GRID)
def test_claims_hold_wherever_images_suit_one_row_more(seeds, images, scatter):
    found = comparisons(Case(seeds, images, scatter, taste=1.0), REPLICATES, generator(seeds, images, scatter, 3))
    assert np.mean(found.p_values < LEVEL) <= 0.06
    assert covered(found) >= 0.94


def documented():
    """(seeds, images, rows that are tested, points) of the table in docs/measuring.md."""
    lines = re.findall(r"^\| (\d) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", MEASURING.read_text(encoding="utf-8"), re.M)
    for seeds, images, alone, adjusted in lines:
        size = int(images.replace(",", ""))
        yield from ((int(seeds), size, 1, float(alone)), (int(seeds), size, ROWS, float(adjusted)))


@pytest.mark.parametrize("case", list(documented()))
def test_the_docs_say_what_can_be_found(case):
    """The smallest difference that is found four times in five, to a tenth of a point upwards: as the only one tested, or as
    the only one of 28 rows that differs."""
    seeds, images, rows, points = case

    def power(gain):
        found = comparisons(Case(seeds, images, 0.2, gain=gain), REPLICATES, generator(seeds, images, 4))
        return np.mean(found.p_values < LEVEL / rows)

    assert power(points) >= 0.79
    assert power(points - 0.15) <= 0.81


def test_the_docs_have_all_cases():
    assert [case[:3] for case in documented()] == [
        (seeds, images, rows) for seeds in (3, 5) for images in (2000, 10_000) for rows in (1, ROWS)
    ]
