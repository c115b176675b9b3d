"""Statistics on small tables: the crossed analysis, McNemar's test, intervals, Holm's adjustment."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest, t

from harness import stats

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
counts = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 400))


@st.composite
def tables(draw, most_images=40):
    shape = draw(st.tuples(st.integers(2, 5), st.integers(2, most_images)))
    return draw(arrays(np.int8, shape, elements=st.integers(-1, 1)))


def by_residuals(table):
    """Mean squares of seeds, images and the rest of a two-way layout, from effects and residuals."""
    seeds, images = table.shape
    grand, by_seed, by_image = table.mean(), table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_image[None] + grand
    return (
        images * np.sum((by_seed - grand) ** 2) / (seeds - 1),
        seeds * np.sum((by_image - grand) ** 2) / (images - 1),
        np.sum(rest**2) / ((seeds - 1) * (images - 1)),
    )


@calm
@given(tables())
def test_the_crossed_analysis_is_the_two_way_layout(table):
    seeds, images = table.shape
    of_seeds, of_images, rest = by_residuals(table)
    spread = max(of_seeds, rest) + of_images - rest
    pieces = (
        max(of_seeds, rest) ** 2 / (seeds - 1) + of_images**2 / (images - 1) + rest**2 / ((seeds - 1) * (images - 1))
    )
    freedom = max(spread**2 / pieces, seeds - 1) if pieces > 1e-12 else seeds - 1
    error = np.sqrt(max(spread / (seeds * images), 1 / images**2))
    found = stats.crossed(table)
    assert found.mean == pytest.approx(table.mean(), abs=1e-12)
    assert found.freedom == pytest.approx(freedom, rel=1e-6)
    assert found.p_value == pytest.approx(2 * t.sf(abs(table.mean()) / error, freedom), rel=1e-6, abs=1e-12)
    half = t.ppf(0.975, freedom) * error
    ends = np.clip([table.mean() - half, table.mean() + half], -1, 1)
    assert found.interval == pytest.approx(tuple(ends), rel=1e-6, abs=1e-9)


@calm
@given(tables(), st.randoms(use_true_random=False))
def test_rows_swap_and_order_does_not_matter(table, random):
    found, swapped = stats.crossed(table), stats.crossed(-table)
    assert (swapped.mean, swapped.p_value) == pytest.approx((-found.mean, found.p_value))
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    order = random.sample(range(table.shape[1]), table.shape[1])
    assert stats.crossed(table[::-1, order]) == found


@calm
@given(st.integers(2, 6), st.integers(2, 50))
def test_without_any_difference_nothing_is_found_and_nothing_is_certain(seeds, images):
    found = stats.crossed(np.zeros((seeds, images), dtype=np.int8))
    assert (found.mean, found.p_value, found.freedom) == (0, 1, seeds - 1)
    low, high = found.interval
    assert low == -high
    assert high == pytest.approx(min(t.ppf(0.975, seeds - 1) / images, 1))


def test_seeds_that_agree_by_luck_do_not_shorten_the_interval():
    """Every seed wins 30 of 1,000 images and loses 10, each seed others: without the floor the seeds would not scatter."""
    table = np.zeros((3, 1000), dtype=np.int8)
    for seed, row in enumerate(table):
        row[40 * seed : 40 * seed + 30], row[40 * seed + 30 : 40 * seed + 40] = 1, -1
    found = stats.crossed(table)
    assert found.mean == pytest.approx(0.02)
    assert found.freedom == pytest.approx(2, abs=0.01)
    assert found.p_value > 0.02  # as two degrees of freedom have it


@pytest.mark.parametrize("shape", [(1, 50), (3, 1), (50,)])
def test_one_seed_or_image_is_no_layout(shape):
    with pytest.raises(ValueError, match="two seeds and two images"):
        stats.crossed(np.zeros(shape, dtype=np.int8))


def paired(won, lost, images):
    """A row of differences with these counts."""
    return np.array([1] * won + [-1] * lost + [0] * images, dtype=np.int8)


@calm
@given(counts)
def test_mcnemar_is_the_exact_binomial_test(case):
    won, lost, same = case
    found = stats.mcnemar(paired(won, lost, same))
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p_value == pytest.approx(expected)
    assert found.mean == pytest.approx((won - lost) / (won + lost + same))
    assert found.freedom is None


def score_by_search(won, lost, images, difference):
    """The score statistic of paired proportions, with the nuisance found by search."""
    lowest, highest = max(0.0, -difference), (1 - difference) / 2
    shares = np.linspace(lowest, highest, 400_001)[1:-1]
    likelihood = (images - won - lost) * np.log(1 - 2 * shares - difference)
    likelihood += won * np.log(shares + difference) if won else 0
    likelihood += lost * np.log(shares) if lost else 0
    share = shares[likelihood.argmax()]
    return (won - lost - images * difference) / np.sqrt(images * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("won", "lost", "images"), [(5, 3, 50), (12, 2, 100), (1, 9, 40), (30, 60, 2000)])
def test_the_paired_interval_ends_where_the_score_test_rejects(won, lost, images):
    low, high = stats.paired_interval(won, lost, images)
    assert score_by_search(won, lost, images, low) == pytest.approx(1.96, abs=2e-3)
    assert score_by_search(won, lost, images, high) == pytest.approx(-1.96, abs=2e-3)


@calm
@given(counts)
def test_the_paired_interval_holds_the_difference_and_turns_with_it(case):
    won, lost, same = case
    images = won + lost + same
    low, high = stats.paired_interval(won, lost, images)
    assert -1 <= low <= (won - lost) / images <= high <= 1
    assert low < high
    assert stats.paired_interval(lost, won, images) == pytest.approx((-high, -low), abs=1e-9)


def test_the_paired_interval_without_differences_is_wilsons():
    low, high = stats.paired_interval(0, 0, 100)
    assert (low, high) == pytest.approx((-(1.95996**2) / (100 + 1.95996**2), 1.95996**2 / (100 + 1.95996**2)), rel=1e-4)


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.05, 0.01), (0.004, 0.001)])
def test_off_the_shelf_rows_are_judged_at_their_level(gain, loss):
    draws = np.random.default_rng(0).multinomial(2000, [gain, loss, 1 - gain - loss], size=1500)
    intervals = np.array([stats.paired_interval(won, lost, 2000) for won, lost, _ in draws])
    covered = np.mean((intervals[:, 0] <= gain - loss) & (gain - loss <= intervals[:, 1]))
    assert 0.935 <= covered <= 0.97
    if gain == loss:
        found = [stats.mcnemar(paired(*row)).p_value < 0.05 for row in draws]
        assert np.mean(found) <= 0.05


def test_an_interval_of_these_networks_knows_images_alone():
    generator = np.random.default_rng(0)
    by_image = generator.integers(-1, 2, 500)
    low, high = stats.of_these_networks(np.array([by_image, by_image, by_image]))
    half = 1.9647 * by_image.std(ddof=1) / np.sqrt(500)
    assert (low, high) == pytest.approx((by_image.mean() - half, by_image.mean() + half), rel=1e-3)


@calm
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_only_raises(p_values):
    adjusted = stats.holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert max(adjusted) <= 1
    order = np.argsort(p_values)
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_on_a_known_case():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_are_students():
    mean, half = stats.mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert stats.mean_interval([0.5]) == (0.5, None)
