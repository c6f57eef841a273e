"""Tiny bases and adapters; one server for the tests that change nothing in it, and servers of several bases."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
import torch

from bases_parts import Made, Several, Start, make_bases, serving
from serving_parts import Served, save_adapter, save_base, served
from tunesmith import native


@pytest.fixture(params=["AVX512", "AVX2"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Functions compiled for a level of processor that this one has."""
    if request.param == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: request.param)
    _forget_functions()
    yield request.param
    _forget_functions()


def _forget_functions() -> None:
    native._library.cache_clear()
    native._function.cache_clear()


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


@pytest.fixture(scope="session")
def made(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Bases, a checkpoint and adapters on them, to be copied into loading paths."""
    return make_bases(tmp_path_factory.mktemp("several"), base_folder)


@pytest.fixture
def start(made: Made, tmp_path: Path) -> Iterator[Start]:
    """(names of given bases, limit) -> a server of them, with an empty loading path."""
    with ExitStack() as stack:

        def begin(*names: str, limit: int | None = None) -> Several:
            return stack.enter_context(serving(made, names, limit, tmp_path / "root"))

        yield begin
