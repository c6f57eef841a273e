"""Settings every test runs under."""

import os
import signal

import pytest

# A shell that starts the tests in the background lets them ignore Ctrl-C; tests of Ctrl-C need it to act.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: tiny tensors are faster on one thread, and runs are then equal bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and models are cached per session of tests, never in the user's cache."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
