"""What tests of several workers share."""

from collections.abc import Iterator

import pytest

from worker_parts import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Four processes; a test takes as many of them as it needs."""
    found = Crew(4, tmp_path_factory.mktemp("crew"))
    yield found
    found.close()
