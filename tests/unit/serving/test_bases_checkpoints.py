"""Several bases in one server: full-parameter checkpoints in the loading path are bases."""

import json
import shutil
from pathlib import Path

import pytest

from bases_parts import PROMPT, Made, Start, ask, listed, save_other, stamp
from serving_parts import wait_for


def test_a_checkpoint_in_the_loading_path_is_a_base(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "tiny:full:abcde")
    shutil.copytree(made.full, several.root / "whole")
    shutil.copytree(made.on["full"], several.root / "on-full")
    assert listed(several) == {
        "tiny": (None, True), "on-full": ("tiny:full:abcde", False), "tiny:full:abcde": (None, False),
        "whole": (None, False),
    }  # fmt: skip
    assert several.opened == ["tiny"]
    assert ask(several, "whole") == ask(several, "full:abcde") != ask(several, "tiny")
    assert ask(several, "on-full") not in (ask(several, "whole"), ask(several, "tiny"))
    assert several.opened == ["tiny", "whole", "tiny:full:abcde"]
    assert listed(several)["on-full"] == ("tiny:full:abcde", True)
    shutil.rmtree(several.root / "tiny:full:abcde")
    with pytest.raises(LookupError, match="404"):
        ask(several, "full:abcde")
    assert listed(several)["on-full"] == ("whole", False)
    assert ask(several, "on-full")  # on the other one with the same weights
    wait_for(lambda: several.engines["tiny:full:abcde"]._closed)


def test_a_changed_checkpoint_is_a_new_version_and_answers_finish_on_the_old(
    start: Start, made: Made, tmp_path: Path
) -> None:
    several = start("tiny")
    whole = several.root / "whole"
    shutil.copytree(made.full, whole)
    before = ask(several, "whole")
    old = several.engines["whole"]
    old.gate.clear()
    body = {**PROMPT, "model": "whole", "stream": True}
    with several.server.client() as http, http.stream("POST", "/v1/completions", json=body) as reply:
        shutil.rmtree(whole)
        stamp(save_other(whole, 9), "full", "tiny:new:abcde", made.tiny)
        after = ask(several, "whole")
        assert not old._closed
        old.gate.set()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == before != after
    wait_for(lambda: old._closed)


def test_a_damaged_checkpoint_is_404_and_no_other_model_suffers(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "short")
    shutil.copytree(made.full, several.root / "changed")
    (several.root / "short" / "config.json").write_text("{}")
    weights = several.root / "changed" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for name in ("short", "changed"):
        for _ in range(2):
            with pytest.raises(LookupError, match="404 model_not_loadable"):
                ask(several, name)
        assert sum(line.startswith(f"model {name} cannot be loaded: ") for line in several.server.said) == 1
    assert any("its content is not what was saved" in line for line in several.server.said)
    assert ask(several, "tiny")


def test_a_link_out_of_the_root_is_no_checkpoint(start: Start, made: Made) -> None:
    several = start("tiny")
    (several.root / "linked").symlink_to(made.full)
    shutil.copytree(made.full, several.root / "file")
    (several.root / "file" / "model.safetensors").unlink()
    (several.root / "file" / "model.safetensors").symlink_to(made.full / "model.safetensors")
    for name in ("linked", "file"):
        with pytest.raises(LookupError, match="404 model_not_found"):
            ask(several, name)
    assert list(listed(several)) == ["tiny"]
