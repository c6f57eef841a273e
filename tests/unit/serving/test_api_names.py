"""Names and folders: what appears, disappears, changes, and what must never be reached."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving_parts import PlainEngine, Served, resolve, served
from tiny_models import chatml_tokenizer
from tunesmith.serving import registry
from tunesmith.serving.faults import Refusal
from tunesmith.serving.security import Keys

PROMPT = {"prompt": "red", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def live(base_folder: Path, tmp_path: Path) -> Iterator[Served]:
    """A server that looks at the disk for every request."""
    root = tmp_path / "root"
    root.mkdir()
    with served(base_folder, root, keys=Keys(admin="admin")) as running:
        running.service.registry._fresh = 0.0
        yield running


def ask(server: Served, model: str) -> str:
    reply = server.client().post("/v1/completions", json={**PROMPT, "model": model})
    if reply.status_code != 200:
        raise LookupError(reply.json()["error"]["code"])
    return str(reply.json()["choices"][0]["text"])


def admin(server: Served, route: str, **body: Any) -> httpx.Response:
    with server.client(headers={"Authorization": "Bearer admin"}) as http:
        return http.post(f"/v1/{route}_lora_adapter", json=body)


def listed(server: Served) -> list[str]:
    return [model["id"] for model in server.client().get("/v1/models").json()["data"]]


def test_adapters_come_and_go_with_their_folders(live: Served, adapters: dict[str, Path]) -> None:
    with pytest.raises(LookupError, match="model_not_found"):
        ask(live, "red")
    shutil.copytree(adapters["red"], live.root / "red")
    shutil.copytree(adapters["green"], live.root / "tiny:green:abcde")
    shutil.copytree(adapters["blue"], live.root / "org" / "model:blue:abcde")
    assert listed(live) == ["tiny", "org/model:blue:abcde", "red", "tiny:green:abcde"]
    answers = {ask(live, name) for name in ("tiny", "red", "green:abcde", "org/model:blue:abcde")}
    assert len(answers) == 4
    assert ask(live, "tiny:red") == ask(live, "red")
    shutil.rmtree(live.root / "red")
    for name in ("red", "tiny:red"):
        with pytest.raises(LookupError, match="model_not_found"):
            ask(live, name)
    assert listed(live) == ["tiny", "org/model:blue:abcde", "tiny:green:abcde"]
    assert sorted(live.engine.loads.values()) == [1, 1]


def test_what_was_seen_is_believed_for_a_while(live: Served, adapters: dict[str, Path]) -> None:
    registry, clock = live.service.registry, [0.0]
    registry._fresh, registry._now = 1.0, lambda: clock[0]
    assert len(registry.listed()) == 1
    shutil.copytree(adapters["red"], live.root / "red")
    assert len(registry.listed()) == 1
    version = resolve(live.service, "red")
    shutil.rmtree(live.root / "red")
    clock[0] = 0.9
    assert resolve(live.service, "red") is version
    clock[0] = 1.0
    with pytest.raises(Refusal, match="does not exist"):
        resolve(live.service, "red")
    assert live.engine.loads == {}


def test_a_changed_folder_is_a_new_version(live: Served, adapters: dict[str, Path]) -> None:
    shutil.copytree(adapters["red"], live.root / "a")
    red = ask(live, "a")
    shutil.rmtree(live.root / "a")
    shutil.copytree(adapters["green"], live.root / "a")
    shutil.copytree(adapters["green"], live.root / "b")
    assert ask(live, "a") == ask(live, "b") != red
    assert list(live.engine.loads.values()) == [2]


def test_a_warm_name_reads_no_file(
    live: Served, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters["red"], live.root / "red")
    version = resolve(live.service, "red")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read a file"))
    monkeypatch.setattr(live.engine, "load", lambda _: pytest.fail("loaded again"))
    assert resolve(live.service, "red") is version


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../outside",
        "a/../../outside",
        "/etc",
        "a//b",
        "./a",
        ".hidden",
        "a/./b",
        "~",
        "a\\b",
        "a b",
        "",
        "x" * 300,
    ],
)
def test_a_name_cannot_leave_the_root(live: Served, adapters: dict[str, Path], name: str) -> None:
    shutil.copytree(adapters["red"], live.root.parent / "outside")
    shutil.copytree(adapters["red"], live.root / ".hidden")
    with pytest.raises(Refusal) as refused:
        resolve(live.service, name)
    assert refused.value.status == 404
    assert admin(live, "load", lora_name="x", lora_path=name).status_code in (400, 404)
    with pytest.raises(LookupError):
        ask(live, name)
    assert live.engine.loads == {}


def test_a_link_out_of_the_root_is_no_model(live: Served, adapters: dict[str, Path]) -> None:
    outside = shutil.copytree(adapters["red"], live.root.parent / "outside")
    (live.root / "folder").symlink_to(outside)
    shutil.copytree(adapters["green"], live.root / "file")
    (live.root / "file" / "adapter_model.safetensors").unlink()
    (live.root / "file" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (live.root / "round").symlink_to(live.root / "round")
    shutil.copytree(adapters["blue"], live.root / "real")
    (live.root / "inside").symlink_to(live.root / "real")
    assert listed(live) == ["tiny", "inside", "real"]
    assert ask(live, "inside") == ask(live, "real")
    for name in ("folder", "file", "round"):
        with pytest.raises(LookupError, match="model_not_found"):
            ask(live, name)
        assert admin(live, "load", lora_name="x", lora_path=name).status_code in (400, 404)


def test_what_is_no_adapter_is_404_and_tried_once(live: Served, adapters: dict[str, Path]) -> None:
    shutil.copytree(adapters["red"], live.root / "bad")
    (live.root / "bad" / "adapter_model.safetensors").write_bytes(b"nothing")
    for _ in range(3):
        with pytest.raises(LookupError, match="model_not_loadable"):
            ask(live, "bad")
    _, said = live.said  # the first is where it serves
    assert said.startswith("model bad cannot be loaded: ")
    shutil.rmtree(live.root / "bad")
    shutil.copytree(adapters["red"], live.root / "bad")
    assert ask(live, "bad")


def test_an_adapter_called_as_the_base_never_answers_for_it(live: Served, adapters: dict[str, Path]) -> None:
    before = ask(live, "tiny")
    shutil.copytree(adapters["red"], live.root / "tiny")
    assert ask(live, "tiny") == before
    assert listed(live) == ["tiny"]
    assert admin(live, "load", lora_name="tiny", lora_path="tiny").status_code == 400


def test_loading_under_a_name_of_ones_own(live: Served, adapters: dict[str, Path]) -> None:
    shutil.copytree(adapters["red"], live.root / "v1")
    shutil.copytree(adapters["green"], live.root / "v2")
    reply = admin(live, "load", lora_name="prod", lora_path="v1")
    assert reply.status_code == 200
    assert (reply.json()["id"], reply.json()["parent"]) == ("prod", "tiny")
    assert ask(live, "prod") == ask(live, "v1")
    assert admin(live, "load", lora_name="prod", lora_path="v2").json()["version"] != reply.json()["version"]
    assert ask(live, "prod") == ask(live, "v2") != ask(live, "v1")
    assert "prod" in listed(live)
    (live.root / "bad").mkdir()
    shutil.copy(adapters["red"] / "adapter_config.json", live.root / "bad")
    (live.root / "bad" / "adapter_model.safetensors").write_bytes(b"nothing")
    refused = admin(live, "load", lora_name="prod", lora_path="bad")
    assert refused.status_code == 400
    assert str(live.root) not in refused.text
    assert ask(live, "prod") == ask(live, "v2")
    assert admin(live, "unload", lora_name="prod").status_code == 200
    with pytest.raises(LookupError, match="model_not_found"):
        ask(live, "prod")
    assert admin(live, "unload", lora_name="prod").status_code == 404


def test_what_was_unloaded_stays_so_until_loaded_or_changed(live: Served, adapters: dict[str, Path]) -> None:
    shutil.copytree(adapters["red"], live.root / "red")
    before = ask(live, "red")
    assert admin(live, "unload", lora_name="red").json() == {"id": "red", "object": "model", "deleted": True}
    assert live.engine.loads == {}
    for name in ("red", "tiny:red"):
        with pytest.raises(LookupError, match="model_not_found"):
            ask(live, name)
    assert listed(live) == ["tiny"]
    assert admin(live, "load", lora_name="red").status_code == 200
    assert ask(live, "red") == before
    admin(live, "unload", lora_name="red")
    shutil.rmtree(live.root / "red")
    shutil.copytree(adapters["green"], live.root / "red")
    assert ask(live, "red") != before


@pytest.mark.parametrize("name", ["red", "tiny:red"])
def test_what_is_loaded_again_goes_by_all_its_names_again(
    live: Served, adapters: dict[str, Path], name: str
) -> None:
    shutil.copytree(adapters["red"], live.root / "red")
    before = ask(live, "red")
    admin(live, "unload", lora_name="red")
    assert admin(live, "load", lora_name=name).status_code == 200
    assert ask(live, "red") == ask(live, "tiny:red") == before
    assert listed(live) == ["tiny", "red"]


def test_what_an_administrator_has_loaded_is_not_forgotten_for_others(
    live: Served, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("red", "green", "blue"):
        shutil.copytree(adapters[name], live.root / name)
    monkeypatch.setattr(registry, "MAX_LISTED", 2)
    assert admin(live, "load", lora_name="prod", lora_path="red").status_code == 200
    answers = {name: ask(live, name) for name in ("red", "green", "blue")}
    assert ask(live, "prod") == answers["red"]
    assert len(live.service.registry._names.entries) == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "special_tokens_map.json"])
def test_a_change_in_how_a_model_speaks_is_a_new_version(
    live: Served, adapters: dict[str, Path], file: str
) -> None:
    shutil.copytree(adapters["red"], live.root / "red")
    chatml_tokenizer().save_pretrained(live.root / "red")
    (live.root / "red" / "generation_config.json").write_text('{"eos_token_id": 2}')
    (live.root / "red" / "special_tokens_map.json").write_text("{}")
    before = resolve(live.service, "red")
    assert resolve(live.service, "red") is before
    (live.root / "red" / file).write_text((live.root / "red" / file).read_text() + " ")
    assert resolve(live.service, "red") is not before


@pytest.mark.parametrize("route", ["load", "unload"])
@pytest.mark.parametrize(
    "body",
    [{}, {"lora_name": ""}, {"lora_name": "../x"}, {"lora_name": 1}, {"lora_name": "x", "lora_path": "/etc"},
     {"lora_name": "x", "lora_path": "a" * 1_025}, {"lora_name": "x", "other": 1}],
)  # fmt: skip
def test_the_bounds_of_loading(live: Served, route: str, body: dict[str, Any]) -> None:
    assert admin(live, route, **body).status_code == 400


def test_answers_go_on_while_their_adapter_is_replaced(
    base_folder: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    shutil.copytree(adapters["red"], tmp_path / "a")
    engine = PlainEngine()
    with served(base_folder, tmp_path, engine, Keys(admin="admin")) as server:
        server.service.registry._fresh = 0.0
        whole = ask(server, "a")
        engine.gate.clear()
        body = {**PROMPT, "model": "a", "stream": True}
        with server.client() as http, http.stream("POST", "/v1/completions", json=body) as reply:
            shutil.rmtree(tmp_path / "a")
            shutil.copytree(adapters["green"], tmp_path / "a")
            resolve(server.service, "a")
            engine.gate.set()
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        said = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        assert said == whole != ask(server, "a")


def test_under_load_and_reloads_no_name_answers_for_another(
    base_folder: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    names = ("red", "green", "blue")
    for name in names:
        shutil.copytree(adapters[name], tmp_path / name)
    with served(base_folder, tmp_path, PlainEngine(8, 64), Keys(admin="admin")) as server:
        server.service.registry._fresh = 0.0
        right = {name: ask(server, name) for name in ("tiny", *names)}
        assert len(set(right.values())) == 4
        wrong: list[str] = []
        found: Counter[str] = Counter()

        def check(number: int) -> None:
            name = ("tiny", *names)[number % 4]
            try:
                text = ask(server, name)
            except LookupError as error:
                found[str(error)] += 1
                if name != "red" or str(error) != "model_not_found":
                    wrong.append(f"{name}: {error}")
                return
            found[name] += 1
            if text != right[name]:
                wrong.append(f"{name}: {text}")

        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(check, number) for number in range(24)]
            for round_ in range(3):
                assert admin(server, "unload", lora_name="red").status_code == 200
                assert admin(server, "load", lora_name="red").status_code == 200
                assert admin(server, "load", lora_name="more", lora_path=names[round_ % 3]).status_code == 200
            for future in asked:
                future.result()
        assert wrong == []
        assert (found["tiny"], found["green"], found["blue"]) == (6, 6, 6)
        # Nothing is left of what was loaded and taken away: three folders, and one more name for one of them.
        assert sorted(server.engine.loads.values()) == [1, 1, 2]
        assert not server.service.metrics.active
