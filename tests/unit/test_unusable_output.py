"""A place that cannot be written is told before anything is loaded, whatever the method."""

import pytest

from tunesmith.assembly import refuse_contradictions
from tunesmith.config.load import load_config
from tunesmith.errors import OutputError

LORA = ["lora_config.r=4"]


def check(*settings: str) -> None:
    refuse_contradictions(load_config(None, ["model_id=m", "train_path=rows.jsonl", *settings]))


@pytest.mark.parametrize("method", [LORA, []], ids=["lora", "full"])
def test_an_output_dir_on_a_url_is_refused(method):
    with pytest.raises(
        OutputError, match="output_dir s3://bucket/runs: is a URL; a run is written to a folder"
    ):
        check("output_dir=s3://bucket/runs", *method)


@pytest.mark.parametrize("method", [LORA, []], ids=["lora", "full"])
def test_a_file_in_its_place_is_refused(method, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/runs: cannot be written \(.*file is no folder\)"):
        check(f"output_dir={tmp_path}/file/runs", *method)


def test_where_copies_would_go_matters_only_where_one_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_STORAGE", str(tmp_path / "file" / "copies"))
    check(f"output_dir={tmp_path}/runs")
    with pytest.raises(OutputError, match="copies: cannot be written"):
        check(f"output_dir={tmp_path}/runs", *LORA)
