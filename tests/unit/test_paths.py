"""Names that no file can have end in a line, not in a traceback."""

from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.errors import ConfigError
from tunesmith.paths import expanded


def test_a_home_is_found_and_that_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/models") == Path("/somewhere/models")
    with pytest.raises(ConfigError, match="has no home folder here"):
        expanded("~no-such-user/models")
    assert expanded("models/~x") == Path("models/~x")


@pytest.mark.parametrize("model", ["~no-such-user/x", "m" * 5000, "n/" * 3000])
@pytest.mark.parametrize("key", ["model_id", "train_path", "output_dir"])
def test_a_name_that_no_file_has_is_an_error_of_one_line(
    key: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    values = {"model_id": str(tmp_path), "train_path": str(tmp_path / "rows.jsonl"), key: model}
    (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    assert main(["check", str(tmp_path / "c.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ")
    assert told.count("\n") == 1
