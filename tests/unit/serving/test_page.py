"""The page's three files, and what ``GET /v1/models/{name}`` tells of a model."""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import openai
import pytest
from setuptools import build_meta

from page_parts import report
from serving_parts import Served, served
from tunesmith.checkpoints.manifest import (
    BaseWeights,
    Manifest,
    Parent,
    hash_files,
    identified,
    write_manifest,
)
from tunesmith.serving.model_cards import MAX_FILE_BYTES, MAX_GENERATIONS, card_of
from tunesmith.serving.security import Keys
from tunesmith.tracking.events import Score

PAGE = files("tunesmith.serving").joinpath("page")
PATHS = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
RUN = "tiny-lora-20260101-000000-aaaaa"


# The files


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")])
def test_the_files_are_sent_as_they_are_under_a_policy_that_lets_nothing_else_run(
    server: Served, path: str, kind: str
) -> None:
    reply = server.client().get(path)
    assert reply.status_code == 200
    assert reply.content == PAGE.joinpath(PATHS[path]).read_bytes()
    assert reply.headers["content-type"] == f"text/{kind}; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    head = server.client().head(path)
    assert (head.status_code, head.content) == (200, b"")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_elsewhere_and_has_no_script_or_style_within() -> None:
    for name in PATHS.values():
        without_comments = re.sub(r"^\s*//.*|\s// .*", "", PAGE.joinpath(name).read_text("utf-8"), flags=re.M)
        assert "//" not in without_comments, name
    parser = _Tags()
    parser.feed(PAGE.joinpath("index.html").read_text("utf-8"))
    names = {name for _, attributes in parser.found for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert [a["src"] for tag, a in parser.found if tag == "script"] == ["page.js"]
    assert "style" not in {tag for tag, _ in parser.found}
    loaded = [a["href"] for tag, a in parser.found if tag == "link"]
    assert loaded == ["data:,", "page.css"]


def test_nothing_in_the_script_makes_html_of_a_text_or_keeps_a_key() -> None:
    script = re.sub(r"//.*", "", PAGE.joinpath("page.js").read_text("utf-8"))
    banned = "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(|Function\\(|setHTML|DOMParser"
    assert not re.search(f"{banned}|localStorage|sessionStorage|cookie|indexedDB", script)


def test_a_built_wheel_holds_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Path(__file__).parents[3]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, tmp_path)
    here = tmp_path / "src" / "tunesmith"
    shutil.copytree(project / "src" / "tunesmith" / "serving", here / "serving")
    shutil.copy(project / "src" / "tunesmith" / "__init__.py", here)
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / build_meta.build_wheel(str(tmp_path))) as wheel:
        for name in PATHS.values():
            assert wheel.read(f"tunesmith/serving/page/{name}") == PAGE.joinpath(name).read_bytes()


def test_only_the_files_are_free_where_a_key_is_needed(base_folder: Path, tmp_path: Path) -> None:
    with served(base_folder, tmp_path, keys=Keys(api="secret")) as running, running.client() as http:
        assert [http.get(path).status_code for path in PATHS] == [200, 200, 200]
        assert http.get("/v1/models/tiny").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert http.get("/v1/models/tiny", headers=key).json()["id"] == "tiny"
        assert http.get("/page/page.js", headers=key).status_code == 404


# Models one by one


def test_the_official_client_retrieves_models_by_every_name(client: openai.OpenAI, server: Served) -> None:
    listed = {model.id: model for model in client.models.list()}
    for name, means in (
        ("tiny", "tiny"),
        ("green", "green"),
        ("tiny:green", "green"),
        ("tiny:red:abcde", "tiny:red:abcde"),
        ("red:abcde", "tiny:red:abcde"),
    ):
        found = client.models.retrieve(name)
        assert found.model_dump(exclude={"card"}) == listed[means].model_dump()
    assert server.client().get("/v1/models/tiny").json()["card"] is None
    for name in ("purple", "tiny:tiny", f"../{server.root.name}/green", "a/b", "x" * 5000):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_an_adapter_without_a_manifest_says_so_and_is_not_loaded(server: Served) -> None:
    loads = dict(server.engine.loads)
    card = server.client().get("/v1/models/green").json()["card"]
    assert card["note"] == "Where it comes from is not recorded: it has no tunesmith.json"
    assert card["lineage"] == []
    assert card["eval_loss"] is None
    assert server.engine.loads == loads


@pytest.fixture
def outputs(base_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> Path:
    """An output folder: a run, its best checkpoint and the forwarded copy."""
    trained(tmp_path / "outputs", adapters["red"], base_folder)
    return tmp_path / "outputs"


def trained(
    outputs: Path, adapter: Path, base: Path, run: str = RUN, tag: str = "tiny:me:aaaaa", **more: Any
) -> Path:
    """What ``tunesmith finetune`` leaves of a run; the forwarded adapter's folder."""
    best = outputs / run / "best"
    shutil.copytree(adapter, best)
    manifest = Manifest(
        format=1,
        method="lora",
        tag=tag,
        run=run,
        model_id="tiny",
        base=BaseWeights(str(base), None, {"model.safetensors": "0" * 64}, "f" * 64),
        step=100,
        epoch=2.0,
        eval_loss=0.0572,
        metrics={},
        config={"lora_config": {"r": 4}},
        data={"train": {"path": str(outputs / "rows.jsonl"), "sha256": "1" * 64, "rows": 400}},
        versions={},
        created="2026-01-01T00:00:00+00:00",
        parent=None,
        files=hash_files(best),
        seed=42,
        code_version="0.1.0",
    )
    write_manifest(best, replace(manifest, **more))
    (outputs / run / "report.json").write_text(report(run, tag))
    return Path(shutil.copytree(best, outputs / "lora_fine_tuning" / tag))


def test_a_card_has_lineage_and_scores(outputs: Path, base_folder: Path) -> None:
    root = outputs / "lora_fine_tuning"
    with served(base_folder, root) as running:
        reply = running.client().get("/v1/models/me:aaaaa")
    card = reply.json()["card"]
    weights = identified(root / "tiny:me:aaaaa")[0].files["adapter_model.safetensors"].sha256
    assert card == {
        "tag": "tiny:me:aaaaa",
        "run": RUN,
        "created": "2026-01-01T00:00:00+00:00",
        "base": "tiny",
        "base_fingerprint": "f" * 64,
        "weights_sha256": weights,
        "steps": 100,
        "epochs": 2.0,
        "rank": 4,
        "seed": 42,
        "train_rows": 400,
        "eval_loss": 0.0572,
        "before": {
            "rows": 100,
            "loss": 4.75,
            "perplexity": 115.5843,
            "metric": "record_match",
            "value": 0.0,
            "interval": [0.0, 0.037],
        },
        "after": {
            "rows": 100,
            "loss": 0.0522,
            "perplexity": 1.0536,
            "metric": "record_match",
            "value": 0.64,
            "interval": [0.5424, 0.7273],
        },
        "lineage": [],
        "is_lineage_whole": True,
        "note": None,
    }
    assert str(outputs) not in reply.text


def parent_of(folder: Path) -> Parent:
    manifest, sha256 = identified(folder)
    return Parent(manifest.tag, manifest.run, manifest.step, sha256, str(folder))


def test_lineage_goes_back_through_parents_and_ends_where_one_is_another(
    outputs: Path, adapters: dict[str, Path], base_folder: Path
) -> None:
    first = outputs / "lora_fine_tuning" / "tiny:me:aaaaa"
    second = trained(
        outputs,
        adapters["green"],
        base_folder,
        RUN[:-1] + "b",
        "org/tiny:me:b",
        parent_adapter=parent_of(first),
    )
    third = trained(
        outputs, adapters["blue"], base_folder, RUN[:-1] + "c", "tiny:me:c", parent_adapter=parent_of(second)
    )
    card = card_of(third)
    assert [generation.tag for generation in card.lineage] == ["org/tiny:me:b", "tiny:me:aaaaa"]
    assert card.is_lineage_whole
    shutil.rmtree(first)  # its run's best checkpoint is the same one
    assert card_of(third) == card
    with (outputs / RUN / "best" / "tunesmith.json").open("a") as file:
        file.write("\n")
    card = card_of(third)
    assert [generation.tag for generation in card.lineage] == ["org/tiny:me:b", "tiny:me:aaaaa"]
    assert not card.is_lineage_whole


def test_lineage_has_an_end(outputs: Path, adapters: dict[str, Path], base_folder: Path) -> None:
    folder = outputs / "lora_fine_tuning" / "tiny:me:aaaaa"
    for number in range(MAX_GENERATIONS + 1):
        folder = trained(
            outputs,
            adapters["red"],
            base_folder,
            f"run-{number}",
            f"t{number}",
            parent_adapter=parent_of(folder),
        )
    card = card_of(folder)
    assert len(card.lineage) == MAX_GENERATIONS
    assert not card.is_lineage_whole


def other_best(outputs: Path) -> None:
    manifest = outputs / RUN / "best" / "tunesmith.json"
    manifest.write_text(manifest.read_text().replace('"step": 100', '"step": 200'))


def long_report(outputs: Path) -> None:
    (outputs / RUN / "report.json").write_text(report(RUN, "tiny:me:aaaaa") + " " * MAX_FILE_BYTES)


def damaged_report(outputs: Path) -> None:
    (outputs / RUN / "report.json").write_text('{"run": ' + "[" * 100_000)


def pipe_for_report(outputs: Path) -> None:
    (outputs / RUN / "report.json").unlink()
    os.mkfifo(outputs / RUN / "report.json")


@pytest.mark.parametrize("change", [other_best, long_report, damaged_report, pipe_for_report])
def test_scores_of_another_checkpoint_or_a_bad_report_are_not_shown(
    outputs: Path, change: Callable[[Path], None]
) -> None:
    change(outputs)
    card = card_of(outputs / "lora_fine_tuning" / "tiny:me:aaaaa")
    assert (card.before, card.after, card.eval_loss) == (None, None, 0.0572)
    assert card.note == "The report of its run does not lie near, so there are no held-out scores"


@pytest.mark.parametrize("run", ["..", "../x", "/etc", "a/b", "", ".", "x\0y", "y" * 5000])
def test_a_manifest_cannot_point_elsewhere(
    adapters: dict[str, Path], base_folder: Path, tmp_path: Path, run: str
) -> None:
    folder = trained(tmp_path, adapters["red"], base_folder)
    parent = replace(parent_of(folder), run=run, tag="../" * 3 + "etc")
    manifest = replace(identified(folder)[0], run=run, parent_adapter=parent)
    write_manifest(folder, manifest)
    card = card_of(folder)
    assert card.run == run[:256]
    assert card.after is None
    assert not card.is_lineage_whole


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"format": 99}', "{} " * MAX_FILE_BYTES, "\udcff"]
)
def test_a_bad_manifest_is_told_without_its_place(outputs: Path, base_folder: Path, content: str) -> None:
    root = outputs / "lora_fine_tuning"
    (root / "tiny:me:aaaaa" / "tunesmith.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with served(base_folder, root) as running:
        reply = running.client().get("/v1/models/tiny:me:aaaaa")
    assert reply.status_code == 200
    assert "cannot be read or trusted" in reply.json()["card"]["note"]
    assert str(outputs) not in reply.text


def test_numbers_that_are_none_are_null(outputs: Path, base_folder: Path) -> None:
    score = Score(100, math.nan, math.inf, "record_match", math.nan, (0.0, math.nan))
    (outputs / RUN / "report.json").write_text(report(RUN, "tiny:me:aaaaa", after=score))
    with served(base_folder, outputs / "lora_fine_tuning") as running:
        after = running.client().get("/v1/models/tiny:me:aaaaa").json()["card"]["after"]
    assert after == {
        "rows": 100,
        "loss": None,
        "perplexity": None,
        "metric": "record_match",
        "value": None,
        "interval": None,
    }


def test_a_run_folder_is_a_loading_path_too(outputs: Path, base_folder: Path) -> None:
    with served(base_folder, outputs) as running:
        card = running.client().get(f"/v1/models/{RUN}/best").json()["card"]
    assert card["after"]["value"] == 0.64


def test_cards_follow_pinned_names(
    outputs: Path, base_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with served(base_folder, outputs / "lora_fine_tuning", keys=Keys(admin="admin")) as running:
        body = {"lora_name": "mine", "lora_path": "tiny:me:aaaaa"}
        key = {"Authorization": "Bearer admin"}
        assert running.client().post("/v1/load_lora_adapter", json=body, headers=key).status_code == 200
        assert running.client().get("/v1/models/mine").json()["card"]["run"] == RUN
