"""Whole files: from a path to text that our loader takes, and what the command prints."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion_names import AXOLOTL, LLAMA_FACTORY, TRL
from tunesmith.cli import main
from tunesmith.config.load import load_config
from tunesmith.conversion.convert import convert_file, write_converted
from tunesmith.errors import ConfigError, OutputError

THEIRS = """\
# A file as people have it.
base_model: org/model
datasets:
  - path: rows.jsonl
    type: chat_template
val_set_size: 0.05

adapter: lora
lora_r: 32
lora_alpha: 16
learning_rate: 2e-4
num_epochs: 2
strict: false
sampel_packing: true
warmup_steps: 4
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(THEIRS, encoding="utf-8")
    return "theirs.yaml"


def test_the_result_loads_and_says_where_each_value_comes_from(theirs: str) -> None:
    result = convert_file(theirs)
    assert result.tool.name == "axolotl"
    Path("ours.yaml").write_text(result.text, encoding="utf-8")
    config = load_config("ours.yaml").config
    assert (config.model.model_id, config.data.train_path) == ("org/model", "rows.jsonl")
    assert config.optimization.learning_rate == 2e-4
    assert config.optimization.num_warmup_steps == 4
    assert config.method.lora_config["r"] == 32
    assert result.text.startswith("# Converted from theirs.yaml (Axolotl 0.18.0) by tunesmith convert.\n")
    assert "# line 11: learning_rate\nlearning_rate: 0.0002\n" in result.text
    assert "#   line 13: strict: unknown keys are always reported\n" in result.text


def test_what_is_lost_is_named_by_file_and_line(theirs: str) -> None:
    assert [(f.place, f.key) for f in convert_file(theirs).lost] == [
        ("theirs.yaml line 6", "val_set_size"),
        ("theirs.yaml line 14", "sampel_packing"),
    ]


def test_the_command_prints_the_file_and_lists_the_rest(theirs: str, capsys) -> None:
    assert main(["convert", theirs]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["num_epochs"] == 2
    first, second = err.splitlines()
    assert first == (
        "Not carried: theirs.yaml line 6: val_set_size: a share of the training rows is held out; here: valid_path, "
        "a file of rows of its own"
    )
    assert second.startswith(
        "Not carried: theirs.yaml line 14: sampel_packing: no key of Axolotl 0.18.0; closest is"
    )


def test_strict_writes_nothing_where_something_is_lost(theirs: str, capsys) -> None:
    assert main(["convert", theirs, "--strict", "-o", "ours.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "Error: theirs.yaml: 2 keys cannot be carried, see above; take them out, or leave --strict out"
    )
    assert not Path("ours.yaml").exists()


def test_strict_is_content_where_nothing_is_lost(theirs: str) -> None:
    lines = [line for line in THEIRS.splitlines() if not line.startswith(("val_set_size", "sampel"))]
    Path(theirs).write_text("\n".join(lines), encoding="utf-8")
    assert main(["convert", theirs, "--strict", "-o", "ours.yaml"]) == 0
    assert load_config("ours.yaml").config.model.model_id == "org/model"


def test_a_file_is_not_written_over(theirs: str, capsys) -> None:
    assert main(["convert", theirs, "-o", theirs]) == 2
    assert "theirs.yaml: exists already" in capsys.readouterr().err
    assert Path(theirs).read_text(encoding="utf-8") == THEIRS


def test_what_is_missing_can_be_given_by_hand(theirs: str, capsys) -> None:
    Path(theirs).write_text("base_model: m\nmicro_batch_size: 2\nwarmup_steps: 0\n", encoding="utf-8")
    assert main(["convert", theirs]) == 2
    assert capsys.readouterr().err == (
        "Error: theirs.yaml: names no data set; give it with --set train_path=…\n"
    )
    assert main(["convert", theirs, "--set", "train_path=t.jsonl"]) == 0
    out, _ = capsys.readouterr()
    assert "# --set\ntrain_path: t.jsonl\n" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base_model: [1\n", "not valid YAML"),
        ("base_model: m\nbase_model: n\n", "line 2: setting base_model is given twice"),
        ("- base_model\n", "is not a mapping of settings"),
        ("", "is empty"),
        ("base_model: m\nx: !!python/object:os.system {}\n", "not valid YAML"),
        ("learning_rate: 1e-4\n", "does not say whose file it is"),
        ("nothing: known\n", "does not say whose file it is"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(theirs: str, text: str, says: str, capsys) -> None:
    Path(theirs).write_text(text, encoding="utf-8")
    assert main(["convert", theirs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: theirs.yaml")
    assert says in line


def test_a_file_that_is_not_there_is_refused(theirs: str, capsys) -> None:
    assert main(["convert", "other.yaml"]) == 2
    assert capsys.readouterr().err.startswith("Error: other.yaml: cannot be read")


def test_a_file_that_cannot_be_written_whole_does_not_stay(tmp_path: Path, monkeypatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, *_: Any, **__: Any) -> Full:
        path.touch()
        return Full()

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
        write_converted(tmp_path / "ours.yaml", "model_id: m\n")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_do_not_make_a_file_that_is_no_yaml(theirs: str) -> None:
    text = 'train_sampling_strategy: "a\\u0007b"\n"k\\u0080": 1\n'
    Path(theirs).write_text(f"model_name_or_path: m\ndataset: rows.jsonl\n{text}", encoding="utf-8")
    result = convert_file(theirs, "llamafactory")
    assert all(line.isprintable() for line in result.text.splitlines())
    Path("ours.yaml").write_text(result.text, encoding="utf-8")
    load_config("ours.yaml")


# --- whatever is in a file: it loads, or it is refused by name

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3000), st.floats(-1, 10), st.just("auto"), st.just("no"),
    st.sampled_from(["steps", "epoch", "cosine", "linear", "constant", "lora", "chatml", "1e-4", "a\nb", "# x", "é✓"]),
    st.text(max_size=5),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["path", "type", "enabled"]), SCALARS, max_size=2),
)
BEGINNINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "axolotl": (AXOLOTL, {"base_model": "m", "datasets": [{"path": "t.jsonl"}]}),
    "llamafactory": (LLAMA_FACTORY, {"model_name_or_path": "m", "dataset": "t.jsonl"}),
    "trl": (TRL, {"model_name_or_path": "m", "dataset_name": "t.jsonl"}),
}


@pytest.mark.parametrize("tool", BEGINNINGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_keys_with_any_values_load_or_are_refused_by_name(tmp_path: Path, tool: str, data) -> None:
    names, begin = BEGINNINGS[tool]
    keys = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=8))
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump({**begin, **keys}, sort_keys=False, allow_unicode=True), encoding="utf-8")
    try:
        result = convert_file(str(file), tool)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(str(file)), line
            assert "names no" in line or any(key in line for key in names), line
        return
    written = tmp_path / "ours.yaml"
    written.write_text(result.text, encoding="utf-8")
    load_config(str(written), settled=True)  # a DeepSpeed file of any name is not there
    # Nothing is dropped in silence: each key is lost, passed over, or named above a setting.
    told = {f.key for f in (*result.lost, *result.needless)}
    for key in (*begin, *keys):
        assert key in told or f": {key}\n" in result.text or f": {key}: " in result.text, key


def test_no_value_of_a_key_that_is_not_carried_is_shown(theirs: str, capsys) -> None:
    secret = "hf_0123456789"
    keys = ("hf_use_auth_token", "comet_api_key", "wandb_entity", "hub_token_of_mine")
    Path(theirs).write_text(THEIRS + "".join(f"{key}: {secret}\n" for key in keys), encoding="utf-8")
    assert main(["convert", theirs]) == 0
    out, err = capsys.readouterr()
    assert secret not in out + err
    assert all(key in out for key in keys)
