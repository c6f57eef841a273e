"""Several bases in one server: who asks while a model is being loaded, and who asks for one that is."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bases_parts import PROMPT, Made, Several, Start, ask, listed
from serving_parts import resolve, wait_for
from tunesmith.serving.memory import Base


def _bases(several: Several) -> list[Any]:
    return [item for item in several.server.service.memory._loading if isinstance(item, Base)]


def test_requests_that_wait_for_a_load_are_bounded_too(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "whole")
    several.server.service.most_preparing = 3
    several.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, several, "whole") for _ in range(3)]
        wait_for(lambda: several.server.service.preparing == 3)
        with several.server.client() as http:
            reply = http.post("/v1/completions", json={**PROMPT, "model": "whole"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        assert "retry-after" in reply.headers
        several.gate.set()
        assert len({one.result(20) for one in waiting}) == 1
    assert several.server.service.preparing == 0
    assert ask(several, "whole") == waiting[0].result()


def test_while_a_base_is_loaded_others_answer_and_it_is_loaded_once(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "whole")
    shutil.copytree(made.on["full"], several.root / "on-full")
    shutil.copytree(made.on["tiny"], several.root / "on-tiny")
    right = ask(several, "tiny")
    several.gate.clear()
    with ThreadPoolExecutor(12) as pool:  # more than asyncio has threads
        waiting = [pool.submit(ask, several, name) for name in ("whole", "on-full") * 6]
        wait_for(lambda: several.opened == ["tiny", "whole"])
        wait_for(lambda: any(item.name == "whole" and item.uses == 14 for item in _bases(several)))
        assert ask(several, "tiny") == right
        assert ask(several, "on-tiny")  # loads meanwhile
        assert listed(several)["whole"] == (None, False)
        text = several.server.client().get("/metrics").text
        assert 'waiting_lora_adapters="on-full"' in text
        several.gate.set()
        assert len({future.result(20) for future in waiting}) == 2
    assert several.opened == ["tiny", "whole"]
    assert list(several.engines["whole"].loads.values()) == [1]


def test_who_hangs_up_while_a_model_loads_leaves_nothing(start: Start, made: Made) -> None:
    several = start("tiny")
    shutil.copytree(made.full, several.root / "whole")
    several.gate.clear()
    with pytest.raises(httpx.ReadTimeout), several.server.client(timeout=0.3) as http:
        http.post("/v1/completions", json={**PROMPT, "model": "whole"})
    [whole] = _bases(several)
    wait_for(lambda: whole.uses == 1)  # the load's own
    several.gate.set()
    wait_for(lambda: whole.uses == 0)
    assert listed(several)["whole"] == (None, True)
    assert ask(several, "whole")


def test_a_warm_switch_reads_no_file(start: Start, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    several = start("tiny", "other")
    service = several.server.service
    for name in ("tiny", "other"):
        shutil.copytree(made.on[name], several.root / f"on-{name}")
    names = ("tiny", "on-tiny", "other", "on-other")
    service.registry._fresh = 60.0
    versions = [resolve(service, name) for name in names]
    for method in ("open", "stat", "read_bytes", "read_text", "is_file", "glob"):
        monkeypatch.setattr(Path, method, lambda *_, **__: pytest.fail("went to the disk"))
    assert [resolve(service, name) for name in names] == versions
