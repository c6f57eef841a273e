"""docs/configuration.md is what the settings say, whole and current."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tunesmith.config.load import load_config
from tunesmith.config.lora_keys import LORA_CONFIG_KEYS
from tunesmith.config.reference import render, setting_rows
from tunesmith.config.reference_text import MEANINGS
from tunesmith.config.schema import RunConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def dotted(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section by way of its JSON schema, which knows nothing of the page's own walk."""
    schema = section.model_json_schema()
    yield from _keys(schema, schema.get("$defs", {}), prefix)


def _keys(node: dict, definitions: dict, prefix: str) -> Iterator[str]:
    for name, below in node.get("properties", {}).items():
        yield f"{prefix}{name}"
        for option in [below, *below.get("anyOf", [])]:
            if reference := option.get("$ref"):
                target = definitions[reference.rpartition("/")[2]]
                yield from _keys(target, definitions, f"{prefix}{name}.")


def flat_sections() -> list[type[BaseModel]]:
    found = [field.annotation for name, field in RunConfig.model_fields.items() if name != "method"]
    return [section for section in found if isinstance(section, type)]


def test_the_committed_page_is_what_the_settings_render() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), (
        "run: python -m tunesmith.config.reference > docs/configuration.md"
    )


def test_every_setting_at_every_depth_has_a_line() -> None:
    wanted = [key for section in flat_sections() for key in dotted(section)]
    assert len(wanted) > 50
    shown = re.findall(r"^\| `([a-z0-9_.]+)` \|.*\|.*\|.*\|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(wanted)


def test_no_meaning_is_kept_for_a_setting_that_is_gone() -> None:
    known = {row[0] for section in flat_sections() for row in setting_rows(section)}
    assert set(MEANINGS) <= known


@pytest.mark.parametrize(
    "line",
    [
        "| `model_id` | text (not empty) | the base model: hub id, folder or catalog name | required |",
        "| `optimizer.adam_betas` | list of 2 numbers | decay of the two moments "
        "| `[0.9, 0.999]`: AdamW's usual values |",
        "| `optimizer.adam_epsilon` | number (> 0) | added to the denominator | `1e-8`: AdamW's usual value |",
        "| `train_batch_size_per_device` | whole number (> 0) or `auto` | rows of a batch | `auto`: 8 rows |",
        "| `generation_config.stopping_sequences` | list of texts | further texts that end an answer "
        "| `[]`: the model's own end-of-turn token |",
    ],
)
def test_types_and_defaults_are_written_for_people(line: str) -> None:
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


def test_every_lora_key_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    part = page[page.index("### lora_config") : page.index("## Settings that contradict")]
    named = {name.removeprefix("lora_config.") for name in re.findall(r"`([a-z_.]+)`", part)}
    assert set(LORA_CONFIG_KEYS) <= named


def test_every_yaml_snippet_loads(tmp_path: Path) -> None:
    snippets = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(snippets) >= 4
    kinds = []
    for snippet in snippets:
        file = tmp_path / "snippet.yaml"
        file.write_text(snippet, encoding="utf-8")
        kinds.append(load_config(str(file)).config.method.kind)
    assert set(kinds) == {"lora", "full"}


def test_the_set_options_shown_do_what_is_said(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("model_id: m\ntrain_path: rows.jsonl\nnum_epochs: 3\n", encoding="utf-8")
    loaded = load_config(
        str(file), ["num_epochs=1", "optimizer.weight_decay=0.01", "lora_config.r=16"]
    ).config
    assert loaded.optimization.num_epochs == 1
    assert loaded.optimization.optimizer.weight_decay == 0.01
    assert loaded.method.model_dump() == {"kind": "lora", "lora_config": {"r": 16}}
    assert load_config(str(file)).config.optimization.num_epochs == 3
