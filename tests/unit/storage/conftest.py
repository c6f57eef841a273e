"""No test waits for real between two attempts."""

import pytest

from tunesmith.storage import retries


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(retries, "sleep", waited.append)
    return waited


@pytest.fixture(autouse=True)
def no_waits(waits):
    return waits
