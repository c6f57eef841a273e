"""The web page in headless Chromium: against a served tiny model, and against a server that tells it HTML."""

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from bases_parts import Several, make_bases, serving
from browser_parts import CHROMIUM, Page, browser
from page_parts import report
from serving_parts import Served, save_adapter, save_base, served, wait_for
from tunesmith.serving.page_routes import add_page
from tunesmith.serving.security import Keys
from tunesmith.serving.server import bind

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
IDLE = "!document.getElementById('run').disabled"
CARDS_DRAWN = "[...document.querySelectorAll('.card')].every((card) => !card.innerText.includes('…'))"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny base and two adapters; slow enough to be stopped."""
    folder = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("red", "green"), 1):
        save_adapter(folder / "root" / name, seed)
    with served(save_base(folder / "tiny"), folder / "root", keys=Keys(api="secret")) as running:
        running.service.registry._fresh = 0.0
        yield running


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as found:
        yield found


def opened(page: Page, server: Served) -> Page:
    page.open(server.url)
    page.wait("!document.getElementById('key-form').hidden")
    page.fill("#key", "secret")
    page.click("#key-form button")
    page.wait(f"{IDLE} && {CARDS_DRAWN}")
    return page


def chosen(page: Page) -> list[str]:
    found: list[str] = page.value("[...document.querySelectorAll('select')].map((select) => select.value)")
    return found


def test_three_answers_side_by_side_are_those_of_the_interface(page: Page, server: Served) -> None:
    opened(page, server)
    assert chosen(page) == ["tiny", "green", "red"]
    page.fill("#prompt", "red green")
    page.fill("#max-tokens", "6")
    page.click("#run")
    page.wait(f"{IDLE} && document.querySelectorAll('.answer[aria-busy=false]').length === 3")
    assert page.texts(".answer h3") == ["tiny", "green", "red"]
    body = {"messages": [{"role": "user", "content": "red green"}], "temperature": 0, "max_tokens": 6}
    with server.client(headers={"Authorization": "Bearer secret"}) as http:
        replies = [
            http.post("/v1/chat/completions", json={**body, "model": name}).json()
            for name in ("tiny", "green", "red")
        ]
    shown = page.value("[...document.querySelectorAll('.answer pre')].map((text) => text.textContent)")
    assert shown == [reply["choices"][0]["message"]["content"] for reply in replies]
    assert len(set(shown)) == 3
    for numbers, reply in zip(page.texts(".numbers"), replies, strict=True):
        tokens = reply["usage"]["completion_tokens"]
        if reply["choices"][0]["message"]["content"]:
            assert numbers.startswith("first token after ")
            assert f"{tokens} token" in numbers
    assert set(page.requested) >= {f"{server.url}/", f"{server.url}/page.js", f"{server.url}/v1/models"}
    assert all(url.startswith(f"{server.url}/") or url == "data:," for url in page.requested)
    # The first look without a key is the only complaint: nothing ran against the policy.
    assert [text for text in page.complaints if "401" not in text] == []


def test_a_wrong_key_is_one_line_and_the_right_one_is_kept_in_memory_only(page: Page, server: Served) -> None:
    page.open(server.url)
    page.wait("!document.getElementById('key-form').hidden")
    assert page.text("#fault") == ""
    page.fill("#key", "wrong")
    page.click("#key-form button")
    page.wait("!document.getElementById('fault').hidden")
    assert page.text("#fault").startswith("The API key is missing or wrong")
    page.fill("#key", "secret")
    page.click("#key-form button")
    page.wait(IDLE)
    assert page.text("#fault") == ""
    assert page.value("document.getElementById('key-form').hidden")
    assert page.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert "secret" not in page.value("document.documentElement.outerHTML + location.href")
    page.open(f"{server.url}/?again")
    page.wait("!document.getElementById('key-form').hidden")


def test_stop_frees_the_servers_slots(page: Page, server: Served) -> None:
    opened(page, server)
    server.engine.pause = 0.02
    try:
        page.fill("#prompt", "red")
        page.fill("#max-tokens", "200")
        page.value("document.querySelectorAll('select').forEach((select) => { select.value = 'green' })")
        page.click("#run")
        page.wait("document.querySelectorAll('.answer').length === 1")
        wait_for(lambda: server.engine.facts().running == 1)
        page.wait("!document.getElementById('stop').disabled")
        page.click("#stop")
        page.wait(IDLE)
        wait_for(lambda: server.engine.facts().running == 0)
    finally:
        server.engine.pause = 0.0
    assert page.text(".numbers").startswith("stopped.")
    assert page.text(".answer .fault") == ""


def test_refresh_shows_what_appeared_and_keeps_the_choice(page: Page, server: Served) -> None:
    opened(page, server)
    assert page.text("#count") == "2 adapters"
    page.value("document.querySelectorAll('select')[1].value = ''")
    shutil.copytree(server.root / "red", server.root / "blue")
    page.click("#refresh")
    page.wait(f"document.getElementById('count').innerText === '3 adapters' && {CARDS_DRAWN}")
    assert page.texts(".card h3") == ["blue", "green", "red"]
    assert "has no tunesmith.json" in page.text(".card")
    assert chosen(page) == ["tiny", "", "red"]
    shutil.rmtree(server.root / "blue")
    page.value("document.querySelectorAll('select')[2].value = 'blue'")
    page.click("#refresh")
    page.wait("document.getElementById('count').innerText === '2 adapters'")
    assert chosen(page) == ["tiny", "", ""]


def test_errors_of_one_answer_stand_in_its_box_on_one_line(page: Page, server: Served) -> None:
    opened(page, server)
    page.fill("#prompt", "red " * 400)
    page.click("#run")
    page.wait("document.querySelectorAll('.answer .fault:not([hidden])').length === 3")
    assert "256" in page.text(".answer .fault")
    assert "\n" not in page.text(".answer .fault")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, server: Served, width: int) -> None:
    page.size(width, 800, is_phone=width < 600)
    opened(page, server)
    page.fill("#prompt", "red")
    page.fill("#max-tokens", "3")
    page.click("#run")
    page.wait(f"{IDLE} && document.querySelectorAll('.answer[aria-busy=false]').length === 3")
    assert page.value("document.documentElement.scrollWidth") <= width
    boxes = page.value("[...document.querySelectorAll('.answer')].map((b) => b.getBoundingClientRect().top)")
    assert len(set(boxes)) == (3 if width < 600 else 1)


# Checkpoints of full-parameter training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """A base; in the loading path a full-parameter checkpoint with its run near it, and an adapter on each."""
    folder = tmp_path_factory.mktemp("trained")
    made, outputs = make_bases(folder, save_base(folder / "tiny")), folder / "outputs"
    outputs.mkdir()
    with serving(made, ["tiny"], None, outputs / "lora_fine_tuning") as several:
        shutil.copytree(made.full, several.root / "tiny:full:abcde")
        for name in ("tiny", "full"):
            shutil.copytree(made.on[name], several.root / f"on-{name}")
        shutil.copytree(made.full, outputs / "run" / "best")
        (outputs / "run" / "report.json").write_text(report("run", "tiny:full:abcde"))
        yield several


def test_a_checkpoint_has_a_card_and_answers_and_so_do_adapters_on_it(page: Page, trained: Several) -> None:
    page.open(trained.server.url)
    page.wait(f"{IDLE} && document.querySelectorAll('.card').length === 3")
    assert page.texts(".card h3") == [
        "on-full",
        "on-tiny",
        "tiny:full:abcde",
    ]  # of the base itself there is none
    assert page.text("#count") == "2 adapters"
    assert page.value("document.getElementById('more').hidden")
    card = page.texts(".card")[2]
    for line in ("this one: run run, step 1", "2026-01-02", "4.7500", "0.0522", "115.6", "1.0536"):
        assert line in card
    assert "64 % (54 to 73)" in card
    assert page.texts(".card:last-child li")[0] == "tiny"
    groups = page.value(
        "[...document.querySelectorAll('select')[0].querySelectorAll('optgroup')].map((g) => g.label)"
    )
    assert groups == ["Adapters of tiny", "Adapters of tiny:full:abcde"]
    wanted = ["tiny", "tiny:full:abcde", "on-full"]
    for place, name in enumerate(wanted):
        page.value(f"document.querySelectorAll('select')[{place}].value = {json.dumps(name)}")
    assert chosen(page) == wanted
    page.fill("#prompt", "red green")
    page.fill("#max-tokens", "6")
    page.click("#run")
    page.wait(f"{IDLE} && document.querySelectorAll('.answer[aria-busy=false]').length === 3")
    body = {"messages": [{"role": "user", "content": "red green"}], "temperature": 0, "max_tokens": 6}
    with trained.server.client() as http:
        replies = [http.post("/v1/chat/completions", json={**body, "model": name}).json() for name in wanted]
    shown = page.value("[...document.querySelectorAll('.answer pre')].map((text) => text.textContent)")
    assert shown == [reply["choices"][0]["message"]["content"] for reply in replies]
    assert len(set(shown)) == 3
    assert page.complaints == []


# More cards than are shown at once


@contextmanager
def listing(adapters: int, checkpoints: int, *, broken: str = "") -> Iterator[str]:
    """A server of a base, and so many of both; asking for ``broken`` fails."""
    app = FastAPI(openapi_url=None)
    add_page(app)
    nothing = dict.fromkeys(("run", "before", "after"))

    @app.get("/v1/models")
    async def models():
        names = [("base", None), *((f"full{n}", None) for n in range(checkpoints))]
        names += [(f"a{n:02}", "base") for n in range(adapters)]
        return {"data": [{"id": name, "parent": parent} for name, parent in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name == broken:
            return JSONResponse({"error": {"message": "it is gone"}}, 404)
        return {"card": None if name == "base" else {**nothing, "note": f"card of {name}"}}

    with listening(app) as url:
        yield url


ALL_SHOWN = (
    "document.querySelectorAll('.card').length === {} && document.getElementById('more').hidden === {}"
)


def notes(adapters: int, checkpoints: int = 0) -> list[str]:
    return [f"card of a{n:02}" for n in range(adapters)] + [f"card of full{n}" for n in range(checkpoints)]


@pytest.mark.parametrize("adapters", [0, 1, 23, 24])
def test_there_is_no_more_to_show_where_all_is_shown(page: Page, adapters: int) -> None:
    """The base of the command line is a model without a card: it makes no promise of one."""
    with listing(adapters, 0) as url:
        page.open(url)
        page.wait(f"{IDLE} && {CARDS_DRAWN} && {ALL_SHOWN.format(adapters, 'true')}")
        wait_for(lambda: f"{url}/v1/models/base" in page.requested)
        later = "new Promise((told) => setTimeout(() => told(document.getElementById('more').hidden), 100))"
        assert page.value(later)
        assert page.texts(".card p") == notes(adapters)


@pytest.mark.parametrize(("adapters", "checkpoints"), [(25, 0), (24, 1), (20, 5), (47, 1), (0, 48)])
def test_more_shows_what_is_left_and_asks_for_nothing_twice(
    page: Page, adapters: int, checkpoints: int
) -> None:
    every = notes(adapters, checkpoints)
    with listing(adapters, checkpoints) as url:
        page.open(url)
        page.wait(f"{IDLE} && {CARDS_DRAWN} && {ALL_SHOWN.format(24, 'false')}")
        assert page.texts(".card p") == every[:24]
        page.click("#more")
        page.wait(f"{CARDS_DRAWN} && {ALL_SHOWN.format(len(every), 'true')}")
        assert page.texts(".card p") == every
        assert page.value("document.activeElement.querySelector('p').textContent") == every[24]
        asked = Counter(asked.rpartition("/")[2] for asked in page.requested)
        drawn = {note.removeprefix("card of ") for note in every[:24]}
        assert {name: asked[name] for name in drawn} == dict.fromkeys(drawn, 1)
        last = f"{url}/v1/models/{every[-1].removeprefix('card of ')}"
        before = page.requested.count(last)
        page.click("#refresh")  # as many as were shown are shown again
        wait_for(lambda: page.requested.count(last) > before)
        page.wait(f"{CARDS_DRAWN} && {ALL_SHOWN.format(len(every), 'true')}")
        assert page.texts(".card p") == every


def test_a_card_that_fails_is_told_in_its_place(page: Page) -> None:
    with listing(26, 0, broken="a24") as url:
        page.open(url)
        page.wait(f"{IDLE} && {CARDS_DRAWN} && {ALL_SHOWN.format(24, 'false')}")
        page.click("#more")
        page.wait(f"{CARDS_DRAWN} && {ALL_SHOWN.format(26, 'true')}")
        assert page.texts(".card p")[23:] == ["card of a23", "it is gone", "card of a25"]


# Texts that look like HTML

TAGS = "<img src=x onerror=document.title='run'><b>bold</b><script>document.title='run'</script>"


@contextmanager
def hostile() -> Iterator[str]:
    """A server whose every text is HTML; its events come in pieces of seven bytes."""
    app = FastAPI(openapi_url=None)
    add_page(app)

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "base", "parent": None}, {"id": TAGS, "parent": "base"}]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        nothing = dict.fromkeys(("rank", "train_rows", "epochs", "eval_loss", "after"))
        scored = {"rows": 1, "loss": 1, "perplexity": 1, "metric": TAGS, "value": None, "interval": None}
        texts = {"run": TAGS, "created": TAGS, "note": TAGS, "before": scored}
        lineage = [{"tag": TAGS, "run": TAGS, "step": 1}]
        return {"card": {**nothing, **texts, "steps": 1, "lineage": lineage, "is_lineage_whole": True}}

    @app.post("/v1/chat/completions")
    async def chat():
        chunks = [{"choices": [{"delta": {"content": TAGS + " é\n"}, "finish_reason": None}]}]
        chunks.append({"error": {"message": TAGS}})
        told = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks)
        whole = (": a comment\r\n\r\n" + told).encode()

        async def pieces():
            for start in range(0, len(whole), 7):
                yield whole[start : start + 7]
                await asyncio.sleep(0.001)

        return StreamingResponse(pieces(), media_type="text/event-stream")

    with listening(app) as url:
        yield url


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application at work; its address."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def test_texts_of_the_server_are_never_html(page: Page) -> None:
    with hostile() as url:
        page.open(url)
        page.wait(f"{IDLE} && {CARDS_DRAWN}")
        page.fill("#prompt", "x")
        page.click("#run")
        page.wait("document.querySelectorAll('.answer .fault:not([hidden])').length === 2")
        assert page.value("document.querySelectorAll('.answer pre')[1].textContent") == TAGS + " é\n"
        assert page.texts(".answer h3") == ["base", TAGS]
        assert page.texts(".answer .fault") == [TAGS, TAGS]
        assert (
            page.text(".card").count(TAGS) == 5
        )  # name, parent, run, metric, note; the date is cut to ten letters
        assert page.value("document.querySelectorAll('img, b, main script').length") == 0
        assert page.value("document.title") == "tunesmith: compare models"
        assert page.value("[...document.querySelectorAll('select')].at(1).value") == TAGS
