"""What a built package holds beside the modules: the recipes and presets, where the program looks for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[2]
LOOK = """
from tunesmith.config.load import find_config, load_config
print(find_config("llama-3-8b-lora.yaml"))
print(load_config("llama-3-8b-full-parameter.yaml", []).config.cluster.num_devices)
"""


def test_the_recipes_are_in_the_package_and_are_found_there(tmp_path):
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "src", "configs", "deepspeed_configs"):
        copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    for folder in ("configs", "deepspeed_configs"):
        wanted = {file.name: file.read_bytes() for file in (ROOT / folder).iterdir()}
        found = {file.name: file.read_bytes() for file in (built / "tunesmith" / folder).iterdir()}
        assert found == wanted
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(built)},
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    path, devices = done.stdout.split()
    assert Path(path) == built / "tunesmith" / "configs" / "llama-3-8b-lora.yaml"
    assert int(devices) > 1


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copyfile(source, target)
