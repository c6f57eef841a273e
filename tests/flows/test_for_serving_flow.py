"""``tunesmith check --for-serving``: what an engine would refuse is said before anything is trained."""

import json

import pytest

from flow_parts import LORA, settings_for, write_config
from tunesmith.cli import main

pytestmark = pytest.mark.flow


def check(tmp_path, tiny, rows, lora, *more):
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, lora_config=lora))
    return config, main(["check", str(config), *more])


def test_what_would_be_served_is_good(tmp_path, tiny, rows, capsys):
    for engine in ("vllm", "tunesmith"):
        _, code = check(tmp_path, tiny, rows, LORA, "--for-serving", engine)
        assert code == 0
        assert f"{engine} would serve what is trained." in capsys.readouterr().out


def test_what_would_be_refused_is_said_with_its_line_remedy_and_source(tmp_path, tiny, rows, capsys):
    lora = {"r": 600, "use_dora": True}
    config, code = check(tmp_path, tiny, rows, lora, "--for-serving", "vllm")
    out, err = capsys.readouterr()
    lines = config.read_text().splitlines()
    assert code == 2
    for key, words in (("r", "refuses rank 600"), ("use_dora", "refuses DoRA")):
        number = next(n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
        assert f"Not served: {config} line {number}: lora_config.{key}: vLLM {words}" in out
    assert "vLLM 0.32.0, vllm/lora/peft_helper.py" in out
    assert "are good" not in out
    assert "--for-serving vllm: 2 settings would not be served as trained, see above" in err


def test_our_own_engine_serves_dora(tmp_path, tiny, rows):
    assert check(tmp_path, tiny, rows, {"r": 4, "use_dora": True}, "--for-serving", "tunesmith")[1] == 0


def test_a_plain_check_says_nothing_of_engines(tmp_path, tiny, rows, capsys):
    _, code = check(tmp_path, tiny, rows, {"r": 600, "use_dora": True})
    assert code == 0
    assert "vLLM" not in capsys.readouterr().out


def test_json_holds_the_findings(tmp_path, tiny, rows, capsys):
    _, code = check(tmp_path, tiny, rows, {"r": 20, "use_dora": True}, "--for-serving", "vllm", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert code == 2
    assert facts["for_serving"] == "vllm"
    assert [(f["is_fatal"], f["place"].rpartition(" ")[2]) for f in facts["findings"]] == [
        (False, "lora_config.r"),
        (True, "lora_config.use_dora"),
    ]
