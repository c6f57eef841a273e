"""docs/migration.md against the settings there are and the tables of keys."""

import re
from pathlib import Path

import pytest

from tunesmith.config.load import load_config
from tunesmith.config.old_names import IGNORED, OLD_NAMES
from tunesmith.config.schema import FLAT_SECTIONS
from tunesmith.conversion.convert import TOOLS
from tunesmith.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
OURS = {key for section in FLAT_SECTIONS.values() for key in section.model_fields} | {"lora_config"}
COLUMNS = ("axolotl", "llamafactory", "trl")


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its first two lines."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_has_every_setting_once() -> None:
    shown = [key for row in rows("Every setting") for key in code(row[0])]
    assert sorted(shown) == sorted(OURS)


def test_every_spelling_is_a_key_of_its_tool() -> None:
    for row in rows("Every setting"):
        assert len(row) == 5, row
        for tool, cell in zip(COLUMNS, row[2:], strict=True):
            for key in code(cell):
                assert key in TOOLS[tool].handlers, (tool, key)


UNREAD = [key for row in rows("Keys of LLMForge that are not read") for key in code(row[0])]


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_is_said_not_to_be_read_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"no setting {key}"):
        load_config(None, ["model_id=m", "train_path=t", f"{key}=1"])


def test_what_to_write_instead_is_a_setting() -> None:
    for row in [*rows("Keys of LLMForge that are not read"), *rows("Older names of LLMForge")]:
        assert set(code(row[1])) <= OURS


def test_every_old_name_is_on_the_page_with_what_it_is_read_as() -> None:
    shown = {code(row[0])[0]: code(row[1]) for row in rows("Older names of LLMForge")}
    assert shown == {key: [old.new] for key, old in OLD_NAMES.items()}


def test_every_key_without_effect_is_on_the_page() -> None:
    lines = [line for line in section("Older names of LLMForge").splitlines() if line.startswith("- ")]
    assert {code(line)[0] for line in lines} == set(IGNORED)


def test_a_number_with_underscores_as_on_the_page_is_read() -> None:
    (number,) = [text for text in code(section("Older names of LLMForge")) if text[0].isdigit()]
    loaded = load_config(None, ["model_id=m", "train_path=t", f"trainer_resources={{memory: {number}}}"])
    assert loaded.config.cluster.trainer_resources == {"memory": 37580963840}
