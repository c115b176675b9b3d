"""Speed-ups of simulated rounds: near the truth, and with intervals that hold it as often as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.speedup import speed_up

WORK = {
    "one image takes nine times as long": [1.0] * 7 + [9.0],
    "all differ a little": [0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8],
    "two batches": [0.5, 0.7],
    "the same work": [0.6],
}


def rounds(generator, work, count):
    """Seconds [rounds, batches] of a dense model and one with that work, on a machine whose speed drifts, with 5 %
    noise, and 15 % of the calls up to doubled."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.01, count)))[:, None]

    def turns(seconds):
        noise = np.exp(generator.normal(0, 0.05, (count, len(work))))
        disturbed = generator.random((count, len(work))) < 0.15
        return seconds * drift * noise * np.where(disturbed, 1 + generator.random((count, len(work))), 1)

    return turns(np.ones(len(work))).tolist(), turns(np.array(work)).tolist()


@pytest.mark.parametrize("count", [15, 60])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_the_interval_holds_the_ratio_of_the_mean_works(work, count):
    generator, true = np.random.default_rng(count), 1 / np.mean(work)
    found = [speed_up(*rounds(generator, work, count)) for _ in range(100)]
    errors = [ratio / true - 1 for ratio, _ in found]
    assert abs(np.mean(errors)) < 0.012
    assert sum(low <= true <= high for _, (low, high) in found) >= 90  # 95 expected: fewer than 90 in 1 of 100 tries


TIMES = st.floats(0.1, 10)


def both_models(batches):
    """Up to 20 rounds of two models."""
    turn = st.lists(TIMES, min_size=batches, max_size=batches)
    return st.lists(st.tuples(turn, turn), min_size=1, max_size=20)


@given(st.integers(1, 4).flatmap(both_models))
@settings(deadline=None)
def test_the_interval_holds_the_estimate_and_a_slower_clock_changes_nothing(turns):
    dense, deployed = [ours for ours, _ in turns], [theirs for _, theirs in turns]
    ratio, (low, high) = speed_up(dense, deployed)
    assert low <= ratio <= high
    slower = [[[2 * seconds for seconds in turn] for turn in model] for model in (dense, deployed)]
    assert speed_up(*slower)[0] == pytest.approx(ratio)


def test_batches_that_take_longer_count_as_what_they_take():
    assert speed_up([[8.0, 8.0]] * 5, [[1.0, 3.0]] * 5)[0] == 4
    assert speed_up([[8.0]] * 5, [[1.0], [1.0], [3.0], [3.0], [3.0]])[0] == pytest.approx(8 / 3)


def test_where_all_take_the_same_work_it_is_the_median_of_the_rounds_ratios():
    """The second round is disturbed for both: a ratio of medians would be 3."""
    assert speed_up([[10.0], [100.0], [30.0]], [[5.0], [100.0], [10.0]]) == (2, (1, 3))
