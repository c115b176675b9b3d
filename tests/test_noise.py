"""Random numbers as a function of (seed, step, sample, name)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.core.noise import Noise, image_keys

pytestmark = pytest.mark.rounding

numbers = st.integers(0, 2**40)


@given(seed=numbers, step=numbers, samples=st.lists(numbers, min_size=2, max_size=8, unique=True))
@settings(max_examples=50)
def test_a_sample_gets_its_numbers_in_any_batch(seed, step, samples):
    keys = torch.tensor(samples)
    together = Noise(seed, step, keys).uniform("x", 3, 2)
    assert together.shape == (len(samples), 3, 2)
    assert ((together > 0) & (together < 1)).all()
    assert torch.equal(Noise(seed, step, keys.flip(0)).uniform("x", 3, 2).flip(0), together)
    assert torch.equal(Noise(seed, step, keys[1:2]).uniform("x", 3, 2), together[1:2])


def test_seed_step_name_and_sample_all_matter():
    keys = torch.arange(4)
    draws = [
        Noise(0, 0, keys).uniform("a", 50),
        Noise(1, 0, keys).uniform("a", 50),
        Noise(0, 1, keys).uniform("a", 50),
        Noise(0, 0, keys).uniform("b", 50),
        Noise(0, 0, keys + 4).uniform("a", 50),
    ]
    for i, one in enumerate(draws):
        assert len(one.unique()) > 190
        for other in draws[:i]:
            assert (one == other).float().mean() < 0.01


def test_the_numbers_are_uniform_and_uncorrelated():
    values = Noise(7, 3, torch.arange(2000)).uniform("u", 50).double()
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002
    assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 0.12
    assert torch.histc(values, 20, 0, 1).sub(5000).abs().max() < 400


def test_gumbel_has_its_mean_and_variance():
    values = Noise(1, 1, torch.arange(4000)).gumbel("g", 50).double()
    assert values.isfinite().all()
    assert abs(values.mean() - 0.57722) < 0.02
    assert abs(values.var() - torch.pi**2 / 6) < 0.05


def test_image_keys_depend_on_the_pixels_and_their_places():
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    swapped = image.flip(-1)
    changed = image.clone()
    changed[0, 2, 7, 7] += 0.01
    keys = image_keys(torch.cat([image, swapped, changed, image]))
    assert len(set(keys.tolist())) == 3
    assert keys[0] == keys[3]


def test_image_keys_tell_large_pictures_apart():
    for size in (224, 256, 512):
        images = torch.ones(6, 3, size, size)
        for index, image in enumerate(images[1:]):
            image[:, size // 3 : size // 2, size // 3 : size // 2] = index + 2.0
        assert len(image_keys(images).unique()) == 6
