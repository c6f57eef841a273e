"""The shipped example dataset: reproducible, split as promised, and every record follows from its message."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "orders"
COUNTS = {"train": 400, "valid": 50, "test": 100}
FUNCTIONS = {"order", "change", "cancel", "complain", "ask_price", "ask_stock", "track", "refund"}
# In the order README.md promises.
ATTRIBUTES = ("id", "item", "quantity", "weight", "roast", "grind", "organic")
ATTRIBUTES += ("delivery", "day", "repeat", "payment", "gift", "problem")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("orders_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def read(split: str) -> list[dict]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs(split: str) -> list[tuple[str, str]]:
    return [(row["messages"][1]["content"], row["messages"][2]["content"]) for row in read(split)]


def parse(record: str) -> tuple[str, list[tuple[str, str]]]:
    whole = re.fullmatch(r"(\w+)\((\w+\[[^\[\]]+\](?:, \w+\[[^\[\]]+\])*)\)", record)
    assert whole, record
    return whole[1], re.findall(r"(\w+)\[([^\[\]]+)\]", whole[2])


def signature(record: str) -> tuple[str, ...]:
    function, values = parse(record)
    return (function, *(name for name, _ in values))


def test_running_the_generator_reproduces_the_committed_bytes(tmp_path):
    command = [sys.executable, "-I", "-B", str(FOLDER / "generate.py"), "--out", str(tmp_path / "new")]
    subprocess.run(command, check=True)
    made = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert made == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    for name in made:
        assert (tmp_path / "new" / name).read_bytes() == (FOLDER / name).read_bytes(), name


@pytest.mark.parametrize("split", COUNTS)
def test_rows_have_the_promised_count_and_form(split):
    data = (FOLDER / f"{split}.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert b"\r" not in data
    rows = read(split)
    assert len(rows) == COUNTS[split]
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    assert len({row["messages"][0]["content"] for row in rows}) == 1


@pytest.mark.parametrize("split", COUNTS)
def test_records_parse_and_keep_to_the_schema(split, generator):
    for _, record in pairs(split):
        function, values = parse(record)
        names = [name for name, _ in values]
        assert function in FUNCTIONS
        assert names == [name for name in ATTRIBUTES if name in names], record
        assert all(value in generator.LEXICON[name] for name, value in values), record


def test_no_message_occurs_twice_in_any_split():
    messages = Counter(
        " ".join(re.findall(r"\w+", words.lower())) for split in COUNTS for words, _ in pairs(split)
    )
    assert [words for words, times in messages.items() if times > 1] == []


def test_splits_share_no_combination_of_function_and_attributes():
    seen = {split: {signature(record) for _, record in pairs(split)} for split in COUNTS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["valid"]
    assert not seen["valid"] & seen["test"]
    assert min(len(seen["valid"]), len(seen["test"])) > 30  # held out widely, not a few shapes repeated


@pytest.mark.parametrize("split", ["valid", "test"])
def test_each_part_of_a_held_out_record_occurs_in_training(split):
    functions = {parse(record)[0] for _, record in pairs("train")}
    values = {value for _, record in pairs("train") for value in parse(record)[1]}
    assert functions == FUNCTIONS
    for _, record in pairs(split):
        assert parse(record)[0] in functions
        assert set(parse(record)[1]) <= values, record


def test_training_rows_hold_every_value_and_all_functions_equally(generator):
    values = {value for _, record in pairs("train") for value in parse(record)[1]}
    assert values == {(name, value) for name, table in generator.LEXICON.items() for value in table}
    assert set(Counter(parse(record)[0] for _, record in pairs("train")).values()) == {50}


@pytest.mark.parametrize("split", COUNTS)
def test_each_record_follows_from_its_message(split, generator):
    for words, record in pairs(split):
        function, values = parse(record)
        stated = generator.stated_values(words)
        if function == "change":  # may also name the value that is given up: "Friday instead of Monday"
            assert set(values) <= stated, (words, record)
            assert {name for name, _ in values} == {name for name, _ in stated}, (words, record)
        else:
            assert set(values) == stated, (words, record)


def test_stated_values_reads_the_longest_way_of_saying(generator):
    words = "pls don't gift-wrap it, it came torn open after two days, 2 kg of Decaf beans"
    assert generator.stated_values(words) == {
        ("gift", "no"),
        ("problem", "damaged"),
        ("quantity", "2"),
        ("weight", "2 kg"),
        ("item", "decaf"),
    }
    assert generator.stated_values("it doesn't need to be organic, once a month") == {
        ("organic", "no"),
        ("repeat", "monthly"),
    }
    assert generator.stated_values("nothing of the kind, 41234 monsters") == set()


def test_every_way_of_saying_a_value_means_that_value_alone(generator):
    owners = Counter(
        way.lower() for table in generator.LEXICON.values() for ways in table.values() for way in set(ways)
    )
    assert [way for way, times in owners.items() if times > 1] == []
    for attribute, table in generator.LEXICON.items():
        for value, ways in table.items():
            for way in ways:
                assert generator.stated_values(f"well, {way}!") == {(attribute, value)}


def test_every_attribute_can_be_said_as_a_sentence_of_its_own(generator):
    # Without one, a message whose start and end are taken would have no place for it.
    assert [head for head, ways in generator.TEMPLATES.items() if all(way[0] in "+^" for way in ways)] == []


def test_draws_come_from_sha256_and_stay_in_range(generator):
    # First eight bytes of sha256(b"k/0") and sha256(b"k/1"), by `printf k/0 | sha256sum`.
    draw = generator.Draw("k")
    assert [draw.below(1000), draw.below(1000)] == [
        int("7306c07d1e16ba09", 16) % 1000,
        int("860989f0929ae9d0", 16) % 1000,
    ]
    assert sorted(generator.Draw("s").shuffled(range(50))) == list(range(50))
    assert {generator.Draw("c").choice("abc") for _ in range(5)} <= set("abc")


def test_the_example_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 1_000_000


def test_the_rows_shown_in_the_readme_are_rows_of_the_training_file():
    shown = re.findall(
        r"^\| (.+) \| `(\w+\(.+\))` \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(shown) == 4
    assert set(shown) <= set(pairs("train"))
