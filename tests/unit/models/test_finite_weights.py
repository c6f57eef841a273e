"""Weights that are no numbers are found before they are saved."""

import math

import pytest
import torch
from torch import nn

from tunesmith.models.method import is_finite


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_of_many_is_enough(wrong: float):
    model = nn.Linear(3, 4)
    assert is_finite(model)
    with torch.no_grad():
        model.weight[2, 1] = wrong
    assert not is_finite(model)


def test_what_is_not_trained_is_not_looked_at():
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)[0, 0] = math.nan
    assert is_finite(model)
