"""One server for the tests that change nothing in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serving_parts import Served, save_adapter, save_base, served


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters, to be copied into loading paths."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, seed) for seed, name in enumerate(("red", "green", "blue"), 1)}


@pytest.fixture(scope="module")
def server(
    base_folder: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapters["red"], root / "tiny:red:abcde")
    shutil.copytree(adapters["green"], root / "green")
    with served(base_folder, root) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
