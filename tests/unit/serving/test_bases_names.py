"""Several bases in one server: which adapter goes with which, and what names mean."""

import json
import shutil
from pathlib import Path

import pytest

from bases_parts import PROMPT, Made, Start, ask, listed
from serving_parts import resolve
from tunesmith.serving.faults import Refusal


def test_an_adapter_goes_with_the_base_its_manifest_names(start: Start, made: Made) -> None:
    several = start("tiny", "other")
    shutil.copytree(made.on["tiny"], several.root / "a")
    shutil.copytree(made.on["other"], several.root / "b")
    shutil.copytree(made.on["other"], several.root / "tiny:c")  # whatever its folder is called
    assert listed(several) == {
        "tiny": (None, True), "other": (None, True), "a": ("tiny", False), "b": ("other", False),
        "tiny:c": ("other", False),
    }  # fmt: skip
    assert len({ask(several, name) for name in ("tiny", "other", "a", "b")}) == 4
    assert ask(several, "tiny:c") == ask(several, "b") == ask(several, "other:b")
    for name in ("tiny:b", "other:a", "tiny:nobody"):
        with pytest.raises(LookupError, match="404 model_not_found"):
            ask(several, name)
    assert listed(several)["b"] == ("other", True)
    assert sorted(several.opened) == ["other", "tiny"]


def test_an_adapter_of_no_base_here_is_refused_by_name(start: Start, made: Made) -> None:
    several = start("tiny", "other")
    shutil.copytree(made.on["full"], several.root / "lost")
    for _ in range(2):
        with pytest.raises(LookupError, match="404 model_not_loadable"):
            ask(several, "lost")
    assert list(listed(several)) == ["tiny", "other"]
    *_, said = several.server.said
    assert said.startswith("model lost cannot be loaded: ")
    assert "was trained on other weights of full than those of tiny, other; serve the base" in said
    assert sum(line.startswith("model lost") for line in several.server.said) == 1
    shutil.copytree(made.full, several.root / "its-base")  # as soon as its base is there, so is it
    assert ask(several, "lost")
    assert listed(several)["lost"] == ("its-base", True)


def test_without_a_manifest_the_name_tells_the_base(start: Start, adapters: dict[str, Path]) -> None:
    several = start("tiny", "other")
    for name in ("tiny:red", "other:red", "green"):
        shutil.copytree(adapters["red"], several.root / name)
    assert ask(several, "tiny:red") != ask(several, "other:red")
    with pytest.raises(LookupError, match="404 model_not_loadable"):
        ask(several, "green")
    assert "does not say to which of tiny, other it belongs" in several.server.said[-1]
    with several.server.client() as http:
        reply = http.post("/v1/completions", json={**PROMPT, "model": "red"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_ambiguous")
    assert reply.json()["error"]["message"] == "The model `red` may be other:red or tiny:red: ask for one"
    config = several.root / "green" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "other"}))
    assert ask(several, "green") == ask(several, "other:red")


def test_without_a_manifest_the_longest_name_of_a_base_counts(
    start: Start, made: Made, adapters: dict[str, Path]
) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "tiny:full:abcde")
    for name in ("tiny:full:abcde:red", "tiny:red"):
        shutil.copytree(adapters["red"], several.root / name)
    assert listed(several)["tiny:full:abcde:red"] == ("tiny:full:abcde", False)
    assert ask(several, "tiny:full:abcde:red") != ask(several, "tiny:red")
    assert several.opened == ["tiny", "tiny:full:abcde"]


def test_cards_are_of_the_model_that_requests_of_this_name_get(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "tiny:full:abcde")
    shutil.copytree(made.on["tiny"], several.root / "a")
    with several.server.client() as http:
        for name, model in (
            ("tiny", "tiny"), ("tiny:full:abcde", "tiny:full:abcde"), ("full:abcde", "tiny:full:abcde"),
            ("a", "a"), ("tiny:a", "a"),
        ):  # fmt: skip
            reply = http.get(f"/v1/models/{name}")
            assert (reply.status_code, reply.json()["id"]) == (200, model)
        for name in ("None:tiny", "None:a", "None:tiny:full:abcde", "full:abcde:a"):
            assert http.get(f"/v1/models/{name}").status_code == 404
            with pytest.raises(LookupError, match="404"):
                ask(several, name)


def test_a_pinned_name_has_the_card_of_its_own_folder(start: Start, made: Made) -> None:
    several = start("tiny", "other")
    shutil.copytree(made.on["tiny"], several.root / "a")
    shutil.copytree(made.on["other"], several.root / "b")
    with several.server.client(headers={"Authorization": "Bearer admin"}) as http:
        body = {"lora_name": "a", "lora_path": "b"}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        cards = {name: http.get(f"/v1/models/{name}").json() for name in ("a", "tiny:a")}
    assert cards["a"]["card"]["tag"] == "other:a:b"
    assert cards["tiny:a"]["card"]["tag"] == "tiny:a:b"  # whose answers this name still gives
    assert cards["tiny:a"]["parent"] == "tiny"
    assert ask(several, "a") == ask(several, "b") != ask(several, "tiny:a")


def test_loading_by_name_finds_the_base_and_spares_the_bases_names(start: Start, made: Made) -> None:
    several = start("tiny", "other")
    shutil.copytree(made.on["other"], several.root / "v1")
    shutil.copytree(made.full, several.root / "whole")
    with several.server.client(headers={"Authorization": "Bearer admin"}) as http:
        body = {"lora_name": "prod", "lora_path": "v1"}
        assert http.post("/v1/load_lora_adapter", json=body).json()["parent"] == "other"
        for name in ("other", "whole"):
            reply = http.post("/v1/load_lora_adapter", json={**body, "lora_name": name})
            assert reply.status_code == 400
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 404
        assert (
            http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "whole"}).status_code
            == 404
        )
    assert ask(several, "prod") == ask(several, "v1")
    assert listed(several)["prod"] == ("other", True)


def test_a_name_of_a_given_base_is_never_a_folders(start: Start, made: Made) -> None:
    several = start("tiny")
    before = ask(several, "tiny")
    shutil.copytree(made.full, several.root / "tiny")
    assert ask(several, "tiny") == before
    assert list(listed(several)) == ["tiny"]
    with pytest.raises(Refusal):
        resolve(several.server.service, "tiny:tiny")
