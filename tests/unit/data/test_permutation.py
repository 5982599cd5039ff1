"""Tests the sample order: a uniform permutation, new in every epoch, the same on every machine."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.permutation import (
    MAX_SIZE,
    SampleOrder,
    domain_shape,
    permute,
    permute_one,
    permute_reference,
    round_keys,
)

GOLDEN_10 = [8, 3, 0, 5, 4, 6, 2, 7, 1, 9]
GOLDEN_LARGE = 862315070075


def permuted_in_integers(place: int, size: int, keys: np.ndarray) -> int:
    """Permutes one place in Python integers, by the definition in the module."""
    rows, columns = domain_shape(size)
    if not 0 <= place < size:
        raise ValueError(f"permutation: place {place} is not in [0, {size})")
    round_keys = keys.tolist()
    while True:
        left, right = divmod(place, columns)
        for number, key in enumerate(round_keys):
            if number % 2 == 0:
                left = (left + reduced(right, key, rows)) % rows
            else:
                right = (right + reduced(left, key, columns)) % columns
        place = left * columns + right
        if place < size:
            return place


def reduced(value: int, key: int, modulus: int) -> int:
    z = (value * 0x9E3779B97F4A7C15 + key) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return ((z >> 32) * modulus) >> 32


def epoch_order(size: int, epoch: int = 0, seed: int = 1234, source: str = "english"):
    return permute_reference(np.arange(size), size, round_keys(seed, source, epoch))


def chi_square_z(counts: np.ndarray) -> float:
    """Returns the distance of a chi-square statistic from its mean, in standard deviations.

    All expected counts are equal.
    """
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    degrees = counts.size - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def test_golden_order():
    assert epoch_order(10).tolist() == GOLDEN_10
    assert permuted_in_integers(10**12, 10**12 + 7, round_keys(1, "zh", 3)) == GOLDEN_LARGE


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 65536, 65537, 99991])
def test_every_sample_once(size):
    assert np.array_equal(np.sort(epoch_order(size)), np.arange(size))


@settings(max_examples=200, deadline=None)
@given(
    size=st.one_of(st.integers(1, 10**6), st.integers(1, MAX_SIZE)),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**63), 2**63 - 1),
    epoch=st.integers(0, 2**64 - 1),
)
def test_scalar_vectorised_and_compiled_are_equal(size, fraction, seed, epoch):
    place = min(int(fraction * size), size - 1)
    keys = round_keys(seed, "source", epoch)
    image = permuted_in_integers(place, size, keys)
    assert 0 <= image < size
    assert permute_reference(np.array([place]), size, keys).tolist() == [image]
    assert permute_one(place, size, keys) == image
    assert permute(np.array([place, 0]), size, keys)[0] == image


@given(size=st.integers(1, MAX_SIZE))
def test_rectangle_holds_the_domain_tightly(size):
    rows, columns = domain_shape(size)
    assert columns % 2 == 0
    assert size <= rows * columns < size + 2 * rows + 1
    assert max(rows, columns) < 2**32


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="is not between 1 and"):
        domain_shape(size)


@pytest.mark.parametrize("place", [-1, 5])
def test_places_outside_are_refused(place):
    keys = round_keys(0, "a", 0)
    with pytest.raises(ValueError, match="is not in"):
        permute_one(place, 5, keys)
    for many in (permute, permute_reference):
        with pytest.raises(ValueError, match="is not in"):
            many(np.array([place]), 5, keys)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_a_few_is_equally_likely(size):
    orders = {order: 0 for order in itertools.permutations(range(size))}
    for epoch in range(3000):
        orders[tuple(epoch_order(size, epoch).tolist())] += 1
    assert chi_square_z(np.array(list(orders.values()))) < 4


@pytest.mark.parametrize("size", [5, 30, 257])
def test_each_place_is_uniform(size):
    num_epochs = 2000
    counts = np.zeros((size, size), np.int64)
    for epoch in range(num_epochs):
        counts[np.arange(size), epoch_order(size, epoch)] += 1
    z = [chi_square_z(row) for row in counts]
    assert max(z) < 5.5
    assert abs(float(np.mean(z))) < 4 / math.sqrt(size)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1235}, {"source": "chinese"}])
def test_epochs_seeds_and_sources_do_not_correlate(other):
    size = 100_000
    first, second = epoch_order(size), epoch_order(size, **other)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(size)
    # The number of positions at which the two agree is Poisson-distributed with mean 1.
    assert np.count_nonzero(first == second) < 8


def test_neighbours_do_not_correlate():
    size = 100_000
    order = epoch_order(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(size)
    steps = np.diff(order) % size
    assert chi_square_z(np.bincount(steps * 100 // size, minlength=100)) < 4


def test_order_runs_on_over_epochs():
    order = SampleOrder(7, "english", 13)
    indices = np.arange(5, 5 + 13 * 4)
    ordinals = order.ordinals(indices)
    assert ordinals.tolist() == [order.ordinal(int(index)) for index in indices]
    epochs = np.concatenate([order.ordinals(np.arange(5)), ordinals])[: 13 * 4].reshape(4, 13)
    assert all(np.array_equal(np.sort(epoch), np.arange(13)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_unshuffled_order_is_the_samples_own():
    order = SampleOrder(7, "english", 3, shuffle=False)
    assert order.ordinals(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert order.ordinal(5) == 2


def test_negative_draws_and_empty_sources_are_refused():
    order = SampleOrder(7, "english", 3)
    with pytest.raises(ValueError, match="negative"):
        order.ordinal(-1)
    with pytest.raises(ValueError, match="negative"):
        order.ordinals(np.array([0, -1]))
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(7, "english", 0)
