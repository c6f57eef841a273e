"""Configuration files of a few lines."""

from pathlib import Path

import pytest

NEEDED = "model_id: m\ntrain_path: t\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes c.yaml in the current folder: the two needed settings on lines 1 and 2, then the text."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str = "", needed: str = NEEDED) -> str:
        Path("c.yaml").write_text(needed + text, encoding="utf-8")
        return "c.yaml"

    return write_file
