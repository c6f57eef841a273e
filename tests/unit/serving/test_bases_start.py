"""Bases given on the command line: what they are called, and what ends the start."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from bases_parts import MEASURE, Made, sizes
from serving_parts import service_of
from tunesmith.checkpoints.manifest import fingerprint_weights
from tunesmith.cli import main
from tunesmith.errors import CheckpointError, ConfigError, ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.bases import checkpoint_base, given_base, given_bases


def test_a_checkpoint_on_the_command_line_goes_by_its_tag(made: Made, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run-1"
    shutil.copytree(made.full, run / "best")
    by_tag = given_base("tiny:full:abcde", [tmp_path / "outputs"], MEASURE, print)
    by_run = given_base(str(run), [], MEASURE, print)
    assert (by_tag.name, by_run.name) == ("tiny:full:abcde",) * 2
    assert by_tag.is_given
    assert by_tag.folder.path == by_run.folder.path == run / "best"
    _, fingerprint = fingerprint_weights(by_tag.folder.weight_files)
    assert by_tag.fingerprint == fingerprint  # from the manifest, without reading the weights
    assert given_base(str(made.tiny), [], MEASURE, print).name == "tiny"


def test_what_cannot_be_a_base(made: Made, tmp_path: Path, adapters: dict[str, Path]) -> None:
    for adapter in (made.on["tiny"], adapters["red"]):
        with pytest.raises(ModelError, match="is an adapter, no base"):
            given_base(str(adapter), [], MEASURE, print)
    with pytest.raises(ModelError, match="is an adapter"):
        checkpoint_base("x", made.on["tiny"], MEASURE)
    with pytest.raises(CheckpointError):
        checkpoint_base("x", made.tiny, MEASURE)
    shutil.copytree(made.other, tmp_path / "-bad-")
    with pytest.raises(ConfigError, match="is no model name"):
        given_base(str(tmp_path / "-bad-"), [], MEASURE, print)
    with pytest.raises(ConfigError, match="two are called tiny"):
        given_bases([str(made.tiny)] * 2, [], MEASURE, print)


def test_memory_too_small_for_a_base_is_refused_at_the_start(made: Made) -> None:
    whole, _ = sizes(made)
    base = given_base(str(made.tiny), [], MEASURE, print)
    with pytest.raises(ConfigError) as refused:
        service_of([base], None, lambda _: pytest.fail("loaded"), print, limit=whole - 1)
    assert str(refused.value) == (
        f"--max-memory: tiny needs {whole / 1e3:.1f} kB with its cache, "
        f"models may have {(whole - 1) / 1e3:.1f} kB here; raise it, lower --max-running, or take a smaller model"
    )


def test_a_base_that_cannot_be_loaded_ends_the_start(made: Made) -> None:
    base = given_base(str(made.tiny), [], MEASURE, print)
    said: list[str] = []

    def fail(_: BaseFolder) -> Any:
        raise ModelError("tiny", "is strange", "take another")

    with pytest.raises(ModelError, match="tiny: is strange; take another"):
        service_of([base], None, fail, said.append)
    assert said == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-memory", "1kB"], "Error: --max-memory: tiny needs "),
        (["--max-memory", "much"], "'much' is no size; write 6GB, 512MiB or the like"),
        (["--max-memory", "0"], "'0' is no size"),
        (["--base", "BASE"], "Error: --base: two are called tiny; name each once, or rename a folder\n"),
        (["--engine", "vllm", "--max-memory", "1GB"], "Error: --engine vllm: serves one base"),
    ],
)
def test_options_that_cannot_be_used(
    capfd: pytest.CaptureFixture[str], made: Made, arguments: list[str], said: str
) -> None:
    given = [str(made.tiny) if argument == "BASE" else argument for argument in arguments]
    assert main(["serve", "--base", str(made.tiny), "--port", "0", *given]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err
