"""Settings every test runs under."""

import os
import secrets
import signal

import pytest
from hypothesis import settings

# `make test` judges a commit, and the same commit twice alike; `make check` looks for new examples every time.
settings.register_profile("same", derandomize=True)

# A shell that starts the tests in the background lets them ignore Ctrl-C; tests of Ctrl-C need it to act.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: tiny tensors are faster on one thread, and runs are then equal bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_API_KEY", None)
# Ray reads these once, when it is imported, and some modules of tests do that; each Ray of ours asks for a token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and models are cached per session of tests, never in the user's cache."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
