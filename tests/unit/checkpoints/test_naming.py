"""Names of runs: whatever a model is called, a folder can be."""

import re
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.checkpoints.naming import model_tag, new_run_folder, short_model_name

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("org/model-1.5", "org/model-1.5"),
        ("s3://bucket/some/model/", "model"),
        ("a b", "a-b"),
        ("~nobody-here/x", "-nobody-here/x"),
        ("a\0b", "a-b"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_short_names(model_id, name):
    assert short_model_name(model_id) == name
    assert model_tag(model_id).startswith(f"{name}:")


def test_a_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert short_model_name(".") == short_model_name(str(tmp_path / "tiny") + "/") == "tiny"


def test_a_long_name_is_cut_to_what_file_systems_take(tmp_path):
    (tmp_path / ("m" * 240)).mkdir()
    folder = new_run_folder(tmp_path, str(tmp_path / ("m" * 240)), "lora", NOW)
    assert re.fullmatch(r"m{160}-lora-20260102-030405-[a-z]{5}", folder.name)
    assert folder.is_dir()


@given(st.text(max_size=300))
def test_any_name_is_one_folder(tmp_path_factory, model_id):
    here = tmp_path_factory.mktemp("runs")
    assert new_run_folder(here, model_id, "full", NOW).parent == here
