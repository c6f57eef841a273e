"""Several bases in one server: bases and adapters make room for one another."""

import json
import shutil

import httpx

from bases_parts import PROMPT, Made, Start, ask, listed, metric, sizes
from serving_parts import wait_for


def test_bases_and_adapters_make_room_for_one_another(start: Start, made: Made) -> None:
    whole, part = sizes(made)
    several = start("tiny", "other", limit=2 * whole + 2 * part)
    for name in ("tiny", "other", "full"):
        shutil.copytree(made.on[name], several.root / f"on-{name}")
    shutil.copytree(made.full, several.root / "whole")
    right = {name: ask(several, name) for name in ("other", "on-other", "tiny", "on-tiny")}
    assert metric(several, "tunesmith:model_bytes{}") == str(2 * whole + 2 * part)
    assert metric(several, "tunesmith:model_bytes_limit{}") == str(2 * whole + 2 * part)
    assert metric(several, 'tunesmith:base_bytes{model_name="tiny"}') == str(whole)
    right["on-full"] = ask(several, "on-full")  # puts out both adapters, and then the older base
    assert {name: is_loaded for name, (_, is_loaded) in listed(several).items()} == {
        "tiny": True, "other": False, "on-full": True, "on-other": False, "on-tiny": False, "whole": True,
    }  # fmt: skip
    assert several.engines["other"]._closed
    assert metric(several, 'tunesmith:evictions_total{kind="adapter"}') == "2"
    assert metric(several, 'tunesmith:evictions_total{kind="base"}') == "1"
    assert metric(several, "tunesmith:bases_loaded{}") == "2"
    assert metric(several, "tunesmith:model_bytes{}") == str(2 * whole + part)
    assert metric(several, 'tunesmith:load_seconds_count{kind="base"}') == "3"
    assert {name: ask(several, name) for name in right} == right


def test_a_base_without_room_waits_for_its_first_request(start: Start, made: Made) -> None:
    whole, _ = sizes(made)
    several = start("tiny", "other", limit=whole + 10)
    assert several.opened == ["tiny"]
    assert [is_loaded for _, is_loaded in listed(several).values()] == [True, False]
    assert ask(several, "other") != ask(several, "tiny")
    assert several.opened == ["tiny", "other", "tiny"]


def test_no_answer_is_cut_off_for_room_and_who_wants_it_is_told_to_come_again(
    start: Start, made: Made
) -> None:
    whole, part = sizes(made)
    several = start("tiny", "other", limit=whole + part)
    shutil.copytree(made.on["tiny"], several.root / "a")
    before = ask(several, "a")
    engine = several.engines["tiny"]
    engine.gate.clear()
    with several.server.client() as http:
        with http.stream("POST", "/v1/completions", json={**PROMPT, "model": "a", "stream": True}) as reply:
            refused = httpx.post(f"{several.server.url}/v1/completions", json={**PROMPT, "model": "other"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert error["code"] == "no_memory"
            assert error["message"].startswith("other needs ")
            assert error["message"].endswith(" are taken by models that are answering; try again")
            assert listed(several)["a"] == ("tiny", True)
            engine.gate.set()
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == before
    wait_for(lambda: not several.server.service.metrics.active)
    assert ask(several, "other")
    assert not listed(several)["a"][1]


def test_a_checkpoint_that_can_never_fit_says_so(start: Start, made: Made) -> None:
    whole, part = sizes(made)
    several = start("tiny", limit=whole + part // 2)
    shutil.copytree(made.on["tiny"], several.root / "a")
    with several.server.client() as http:
        reply = http.post("/v1/completions", json={**PROMPT, "model": "a"})
    assert reply.status_code == 503
    assert "retry-after" not in reply.headers
    assert "too little --max-memory" in reply.json()["error"]["message"]
