"""Running out of memory is told in one line; other errors pass unchanged."""

import pytest
import torch

from tunesmith.errors import RunError
from tunesmith.training.memory_errors import memory_errors


def test_a_tensor_that_does_not_fit():
    with pytest.raises(RunError, match="its memory does not suffice") as raised, memory_errors():
        torch.empty(2**50)
    assert raised.value.exit_code == 3


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
