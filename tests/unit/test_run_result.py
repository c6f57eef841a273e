"""The line that tells how to go on works when pasted."""

import pytest

from tunesmith.run_result import _chat_command


def test_the_chat_command_finds_program_and_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/somewhere/{name}")
    assert _chat_command("m:user:abcde", "./outputs") == "tunesmith chat m:user:abcde"
    assert _chat_command("m x:u", "my runs") == "tunesmith chat 'm x:u' --output-dir 'my runs'"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert _chat_command("m", "outputs").endswith("/tunesmith chat m")
