"""Which input is timed how often, and what follows for throughput, speed-up and multiply-adds. The clock is pretended:
it moves when a model says so, hence the numbers are exact."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness import contender, latency
from harness.contender import Contender
from harness.device import execution
from harness.latency import Conditions
from harness.modes import Prepared
from harness.speeds import speed_of

CPU = torch.device("cpu")
MS = 1e-3


class Clock:
    """Seconds, and the inputs of the calls: `timed` ones in order, `others` between them."""

    def __init__(self):
        self.now, self.is_timing = 0.0, False
        self.calls = []  # (is timed, number of the image, address of the input)

    def __deepcopy__(self, memo):
        return self  # models are copied before they run

    def timed(self, device, call):
        started, self.is_timing = self.now, True
        call()
        self.is_timing = False
        return self.now - started, None

    def counts(self, images):
        found = Counter(image for is_timed, image, _ in self.calls if is_timed)
        return [found[image] for image in range(images)]


class Taking(nn.Module):
    """Takes as many seconds as it is told for the image whose number is in its first pixel."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        image = int(x.flatten()[0])
        self.clock.calls.append((self.clock.is_timing, image, x.data_ptr()))
        self.clock.now += self.seconds[image % len(self.seconds)]
        return x.flatten(1)[:, :3]


def numbered(count):
    return [torch.full((1, 3, 4, 4), float(number)) for number in range(count)]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (contender, latency):
        monkeypatch.setattr(module, "timed", clock.timed)
    return clock


def compared(clock, dense, deployed, batches, varies, seconds=1.0):
    first, *others = batches
    return latency.compare(
        Taking(clock, dense), Taking(clock, deployed), first, Conditions(1, "float32", seconds=seconds), others, varies
    )


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40_000))
@settings(deadline=None)
def test_inputs_exceed_the_cache_twice_and_have_every_batch_equally_often(batches, size, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "cache_size", lambda device: cache)
        inputs = execution.cold_inputs([torch.full((size,), float(number)) for number in range(batches)])
    assert sum(x.nbytes for x in inputs) > 2 * cache
    assert sum(x.nbytes for x in inputs[:-batches]) <= 2 * cache  # and no more than that takes
    assert [int(x[0]) for x in inputs] == [call % batches for call in range(len(inputs))]
    assert len({x.data_ptr() for x in inputs}) == len(inputs) >= batches
    assert len(inputs) % batches == 0


@pytest.mark.parametrize("varies", [False, True])
def test_a_cache_that_holds_many_inputs_does_not_make_one_image_be_timed_more_often(clock, monkeypatch, varies):
    monkeypatch.setattr(execution, "cache_size", lambda device: 350 * 192 // 2)  # an image has 192 bytes
    compared(clock, [MS], [MS], numbered(8), varies, seconds=0.3)
    counts = clock.counts(8)
    assert min(counts) > 2 * 15  # of both models together
    assert max(counts) - min(counts) <= 2
    assert len({address for is_timed, _, address in clock.calls if is_timed}) > 350


TURNS = st.lists(st.integers(0, 20), max_size=12)


@given(st.integers(1, 8), st.integers(1, 3), TURNS, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
@settings(deadline=None)
def test_every_image_is_timed_equally_often_over_any_rounds(batches, passes, turns, seconds, varies):
    clock = Clock()
    inputs = [x for _ in range(passes) for x in numbered(batches)]
    one = Contender(Prepared(nn.Identity(), Taking(clock, seconds)), inputs, batches, CPU, varies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contender, "timed", clock.timed)
        for wanted in turns:
            one.turn(wanted)
            counts = clock.counts(batches)
            assert max(counts) - min(counts) <= (0 if varies else 1)
            assert one.wall[-1] == seconds[clock.calls[-1][1] % len(seconds)]
    assert sum(clock.counts(batches)) == len(one.wall)
    assert len(clock.calls) - len(one.wall) == len(turns)  # one call a turn does not count


@given(st.integers(2, 8), st.integers(1, 3), TURNS)
@settings(deadline=None)
def test_the_call_that_does_not_count_warms_no_input_that_is_timed_next(batches, passes, turns):
    clock = Clock()
    inputs = [x for _ in range(passes) for x in numbered(batches)]
    one = Contender(Prepared(nn.Identity(), Taking(clock, [1.0])), inputs, batches, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contender, "timed", clock.timed)
        for wanted in turns:
            one.turn(wanted)
    place = {x.data_ptr(): number for number, x in enumerate(inputs)}
    for (is_timed, _, address), (_, _, following) in zip(clock.calls, clock.calls[1:], strict=False):
        if not is_timed:  # all others are between it and its own turn
            assert (place[following] - place[address]) % len(inputs) == 1


def test_one_image_that_takes_nine_times_as_long_counts_in_the_mean(clock):
    seconds = [MS] * 7 + [9 * MS]
    row = compared(clock, [8 * MS], seconds, numbered(8), varies=True)
    deployed = row["deployed"]
    assert (row["varies"], row["inputs"]) == (True, 8)
    assert deployed["images_per_second"] == 500
    assert (deployed["p50_ms"], deployed["mean_ms"]) == (1, 2)
    assert deployed["input_ms"] == [1] * 7 + [9]
    assert deployed["noise"] == row["dense"]["noise"] == 1  # an image that takes longer is no noise
    assert deployed["warm"]
    assert row["speed_up"] == row["speed_up_interval"][0] == row["speed_up_interval"][1] == 4
    speed = speed_of([row | {"theoretical_speed_up": 5.0}], theoretical=3.0)
    assert speed.realised == pytest.approx(4 / 5)
    assert speed.images_per_second == pytest.approx(500)
    assert row["dense"]["samples"] * 8 * MS >= 1
    assert deployed["samples"] * 2 * MS >= 1


def test_images_that_take_the_same_work_have_the_median_of_the_rounds(clock):
    row = compared(clock, [3 * MS], [2 * MS], numbered(8), varies=False)
    assert row["speed_up"] == 1.5
    assert row["deployed"]["images_per_second"] == 500
    assert not row["varies"]
    disturbed = compared(clock, [3 * MS], [2 * MS] * 7 + [9 * MS], numbered(8), varies=False)["deployed"]
    assert (disturbed["mean_ms"], disturbed["images_per_second"]) == (2, 500)
    assert disturbed["input_ms"] == [2] * 7 + [9]


def test_thinned_samples_have_something_of_every_image(clock, monkeypatch):
    monkeypatch.setattr(contender, "KEPT", 60)  # every fourth sample would be enough, and of two images alone
    row = compared(clock, [MS], [(1 + image) * MS for image in range(8)], numbered(8), varies=True)["deployed"]
    assert row["raw_every"] == 5
    assert len(row["raw_ms"]) <= 60 < row["samples"] <= 240
    assert set(row["raw_ms"]) == {1, 2, 3, 4, 5, 6, 7, 8}
    for number, sample in enumerate(row["raw_ms"]):
        assert sample == row["input_ms"][number * row["raw_every"] % 8]


class Growing(Taking):
    """A layer that runs on one token more for every image, with kernels of its own."""

    def __init__(self, clock):
        super().__init__(clock, [MS])
        self.layer = nn.Linear(3, 5)

    def use_kernel(self, kernel, device):
        pass

    def forward(self, x):
        super().forward(x)
        tokens = x.flatten(2).transpose(1, 2)[:, : 1 + int(x.flatten()[0])]
        return self.layer(tokens).mean(dim=1)


@pytest.mark.parametrize(("varies", "tokens"), [(True, 4.5), (False, 1)])
def test_multiply_adds_are_a_mean_over_what_is_timed(clock, varies, tokens):
    first, *others = numbered(8)
    dense = Taking(clock, [MS])
    row = latency.compare(dense, Growing(clock), first, Conditions(1, "float32", seconds=0.1), others, varies)
    assert row["deployed"]["macs_executed"] == tokens * 3 * 5
    assert sum(row["deployed"]["parts_executed"].values()) == tokens * 3 * 5
    assert "macs_executed" not in row["dense"]


def test_warm_up_compares_windows_with_the_same_images(clock):
    """Half of the images take nine times as long, so a median goes by how many of which a window has."""
    row = compared(clock, [0.1], [0.1] * 3 + [0.9] * 3, numbered(6), varies=True, seconds=0.01)["deployed"]
    assert row["warm"]
    assert (row["mean_ms"], row["images_per_second"]) == (500, 2)


def test_energy_is_a_mean_over_the_images_too(clock, monkeypatch):
    class Meter:
        """A device that draws one watt."""

        def __init__(self, device):
            pass

        def idle_watts(self):
            return 0.5

        def per_call(self, call):
            before = clock.now
            for _ in range(3):
                call()
            return (clock.now - before) / 3, 3

    monkeypatch.setattr(latency.sensors, "EnergyMeter", Meter)
    first, *others = numbered(8)
    models = Taking(clock, [MS]), Taking(clock, [MS] * 7 + [9 * MS])
    row = latency.compare(*models, first, Conditions(1, "float32", seconds=0.1, energy=True), others, varies=True)
    assert row["idle_watts"] == 0.5
    assert row["deployed"]["joules_per_image"] == pytest.approx(2e-3)
    assert row["deployed"]["energy_calls"] == 24
