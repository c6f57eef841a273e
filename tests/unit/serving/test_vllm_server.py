"""vLLM's command line, environment and end, with a stand-in for vLLM; adapters that it would refuse are left out."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from serving_parts import save_adapter, save_base, wait_for
from tiny_models import tiny_model
from tunesmith.errors import ConfigError, RunError
from tunesmith.models.base import BaseFolder
from tunesmith.serving import vllm_server
from tunesmith.serving.security import Keys
from tunesmith.serving.vllm_server import (
    Adapter,
    Inspector,
    VllmOptions,
    command,
    environment,
    serve_with_vllm,
    shared_template,
    vllm_python,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseFolder:
    folder = save_base(tmp_path_factory.mktemp("bases") / "tiny")
    return BaseFolder(str(folder), folder, None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "root" / "red", 1)
    save_adapter(tmp_path / "root" / "tiny:green:abcde", 2)
    return tmp_path / "root"


def options_of(line: list[str]) -> dict[str, list[str]]:
    """By option, the values that follow it."""
    found: dict[str, list[str]] = {}
    for word in line[4:]:
        if word.startswith("--"):
            found[word] = values = []
        else:
            values.append(word)
    return found


def test_the_command_line_names_base_adapters_and_the_rank_they_need(base, tmp_path):
    adapters = [Adapter("a", tmp_path / "a", 8), Adapter("b,c=d", tmp_path / "x", 65)]
    given = VllmOptions(str(base.path), tmp_path, "0.0.0.0", 81, 7, 12)
    line = command("python", given, base, adapters, None)
    assert line[:3] == ["python", "-P", "-m"]
    found = options_of(line)
    assert found["--model"] == [str(base.path)]
    assert found["--served-model-name"] == ["tiny"]
    assert (found["--host"], found["--port"]) == (["0.0.0.0"], ["81"])
    assert (found["--max-num-seqs"], found["--shutdown-timeout"]) == (["7"], ["12"])
    assert (found["--max-model-len"], found["--max-lora-rank"], found["--max-loras"]) == (
        ["256"],
        ["128"],
        ["2"],
    )
    assert found["--enable-lora"] == []
    assert [json.loads(module) for module in found["--lora-modules"]] == [
        {"name": "a", "path": str(tmp_path / "a")},
        {"name": "b,c=d", "path": str(tmp_path / "x")},
    ]
    assert "--chat-template" not in found


def test_without_a_loading_path_there_are_no_adapters(base):
    found = options_of(command("python", VllmOptions(str(base.path)), base, [], None))
    assert not [name for name in found if "lora" in name]


def test_keys_go_by_the_environment_alone(base, root):
    environ = {
        "PATH": "/bin",
        "TUNESMITH_API_KEY": "one",
        "TUNESMITH_ADMIN_KEY": "two",
        "VLLM_API_KEY": "old",
    }
    found = environment(environ, Keys("one", "two"))
    assert found["VLLM_API_KEY"] == "one"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert not {"TUNESMITH_API_KEY", "TUNESMITH_ADMIN_KEY"} & found.keys()
    line = command("python", VllmOptions(str(base.path), root), base, [], None)
    assert not {"one", "two"} & set(line)


def test_loading_is_never_open_to_all():
    assert environment({}, Keys(None, "two"))["VLLM_API_KEY"] == "two"
    for keys in (Keys(), Keys("one")):
        assert environment({}, keys)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert "VLLM_API_KEY" not in environment({"VLLM_API_KEY": "old"}, Keys())


def test_adapters_that_vllm_takes_are_found_by_name(base, root):
    said: list[str] = []
    found = Inspector(base, said.append).usable(root)
    assert [(a.name, a.rank) for a in found] == [("red", 4), ("tiny:green:abcde", 4)]
    assert said == []


def test_adapters_that_vllm_would_refuse_are_named_and_left_out(base, root):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(tied=False), config).save_pretrained(root / "dora")
    shutil.copytree(root / "red", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    said: list[str] = []
    found = Inspector(base, said.append).usable(root)
    assert [a.name for a in found] == ["red", "tiny:green:abcde"]
    assert len(said) == 2
    assert said[0].startswith("model broken is left out: ")
    assert said[1].startswith("model dora is left out: ")
    assert "vLLM refuses DoRA" in said[1]


def test_an_adapter_of_larger_rank_than_the_server_holds_needs_a_new_start(base, root):
    said: list[str] = []
    inspector = Inspector(base, said.append)
    assert inspector.look("red", root / "red", 4) is not None
    assert inspector.look("red", root / "red", 1) is None
    assert said == ["model red has rank 4, the server was started for 1: start it anew"]


def test_a_chat_template_is_passed_where_all_adapters_have_it_and_the_base_has_not(base, tmp_path):
    for name, text in (("a", "own"), ("b", "own"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(text)
    (tmp_path / "bare").mkdir()
    a, b, c, bare = (tmp_path / name for name in ("a", "b", "c", "bare"))
    assert shared_template(base, [a, b]) == a / "chat_template.jinja"
    assert shared_template(base, [a, c]) is None
    assert shared_template(base, [a, bare]) is None
    assert shared_template(base, [bare]) is None
    assert shared_template(base, []) is None


def test_which_python_has_vllm(monkeypatch, tmp_path):
    assert vllm_python({"TUNESMITH_VLLM_PYTHON": sys.executable}) == sys.executable
    with pytest.raises(ConfigError, match="is no program"):
        vllm_python({"TUNESMITH_VLLM_PYTHON": str(tmp_path / "absent")})
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed here; name the bin/python"):
        vllm_python({})
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: object())
    assert vllm_python({}) == sys.executable


# Signals: in a process of its own, with a program that stands in for vLLM's Python.

STAND_IN = """#!{python}
import json, os, signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
record = {{"argv": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "child": child.pid}}
def end(number, frame):
    open({place!r} + ".signal", "w").write(str(number))
    {at_end}
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
open({place!r} + ".part", "w").write(json.dumps(record))
os.rename({place!r} + ".part", {place!r})
{body}
"""
MAIN = """
import sys
from pathlib import Path
from tunesmith.serving.vllm_server import VllmOptions, serve_with_vllm
serve_with_vllm(VllmOptions(sys.argv[1], grace_seconds=1), lambda text: print(text, file=sys.stderr))
"""


def stand_in(tmp_path: Path, body: str, at_end: str = "sys.exit(0)") -> Path:
    program = tmp_path / "python"
    text = STAND_IN.format(python=sys.executable, place=str(tmp_path / "seen"), body=body, at_end=at_end)
    program.write_text(text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.flow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_end_is_exit_code_0(base, tmp_path, number):
    program = stand_in(tmp_path, "time.sleep(60)")
    environ = {**os.environ, "TUNESMITH_VLLM_PYTHON": str(program), "TUNESMITH_API_KEY": "one"}
    with subprocess.Popen([sys.executable, "-c", MAIN, str(base.path)], env=environ) as process:
        wait_for((tmp_path / "seen").is_file, 60)
        process.send_signal(number)
        assert process.wait(20) == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert (tmp_path / "seen.signal").read_text() == str(int(number))
    assert seen["key"] == "one"
    assert "one" not in seen["argv"]
    wait_for(lambda: not is_alive(seen["child"]))  # vLLM's engine process must not outlive it


@pytest.fixture
def in_this_process(monkeypatch, base):
    """Serves here, where a thread can send the signal."""
    for name in ("TUNESMITH_API_KEY", "TUNESMITH_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)

    def serve(program: Path, grace_seconds: int = 30) -> list[str]:
        monkeypatch.setenv("TUNESMITH_VLLM_PYTHON", str(program))
        said: list[str] = []
        serve_with_vllm(VllmOptions(str(base.path), grace_seconds=grace_seconds), said.append)
        return said

    return serve


def test_an_end_of_its_own_is_an_error_with_its_exit_code(in_this_process, tmp_path):
    with pytest.raises(RunError, match="exit code 7; its output above"):
        in_this_process(stand_in(tmp_path, "sys.exit(7)"))


def test_one_that_does_not_end_is_killed_with_all_it_began(in_this_process, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "_SECONDS_TO_DIE", 0)
    program = stand_in(tmp_path, "while True: time.sleep(1)", at_end="pass")

    def interrupt() -> None:
        wait_for((tmp_path / "seen").is_file, 30)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=interrupt)
    sender.start()
    began = time.monotonic()
    said = in_this_process(program, grace_seconds=1)
    sender.join()
    assert said[-1] == "vLLM has not ended and is killed"
    assert time.monotonic() - began < 20
    wait_for(lambda: not is_alive(json.loads((tmp_path / "seen").read_text())["child"]))


def test_what_cannot_be_served_is_said_before_anything_starts(in_this_process, base, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_VLLM_PYTHON", str(stand_in(tmp_path, "pass")))
    with pytest.raises(ConfigError, match="--port 0"):
        serve_with_vllm(VllmOptions(str(base.path), port=0), print)
    with pytest.raises(ConfigError, match="is no folder"):
        serve_with_vllm(VllmOptions(str(base.path), tmp_path / "absent"), print)
    assert not (tmp_path / "seen").exists()
