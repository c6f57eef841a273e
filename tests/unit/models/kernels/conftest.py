"""Every test of the kernels runs twice: with what is compiled, and by torch alone, as where no compiler was at hand."""

import pytest

from tunesmith import native


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How passes over memory are computed."""
    if request.param == "compiled":
        if not native.is_compiled("training"):
            pytest.skip("no C compiler was at hand when tunesmith was installed")
    else:
        monkeypatch.setattr(native, "_library", lambda _name: None)
        native._function.cache_clear()
    return str(request.param)


@pytest.fixture(autouse=True)
def functions_found_anew(way: str):
    """What was found without the compiled library is forgotten."""
    yield
    native._function.cache_clear()
