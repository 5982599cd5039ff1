"""Tests that verification treats NaN logits as a mismatch, in any of the texts."""

import math

import pytest
import torch

from megatron_chatflow.convert.verify import Comparison, describe, largest_magnitude


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_in_any_text_counts(place: int) -> None:
    differences = [torch.zeros(2, 3), torch.zeros(4, 3), torch.full((1, 3), -1e-9)]
    assert largest_magnitude(differences) == pytest.approx(1e-9)
    differences[place][0, 1] = math.nan
    result = Comparison(5, (), largest_magnitude(differences), 1.0, 7)
    assert math.isnan(result.largest_difference or 0.0)
    assert not result.is_same and "DIFFERENT models" in describe(result)
