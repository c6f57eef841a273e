"""YAML as people mean it: numbers of YAML 1.2, the line of every key, faults that name their line."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.yaml_file import dump_yaml, parse_value, parse_yaml, read_yaml_file
from tunesmith.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e5", 2e5),
        ("1E-4", 1e-4),
        ("-3.5e+2", -350.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("0.0001", 1e-4),
        ("12", 12),
        ("-7", -7),
        ("+7", 7),
        ("0x1F", 31),
        ("012", 12),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_numbers_booleans_and_null(text, value):
    parsed = parse_value(text, "here")
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "off", "y", "1_000", "1:30", "2024-01-01", "e5", "1e", "1.2.3", "=", "0o17"]
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text):
    assert parse_value(text, "here") == text


@pytest.mark.parametrize("quoted", ["'1e-4'", '"true"', "'12'"])
def test_quoted_values_are_text(quoted):
    assert parse_value(quoted, "here") == quoted[1:-1]


def test_not_a_number():
    assert math.isnan(parse_value(".nan", "here"))


def test_every_key_has_its_line():
    file = parse_yaml(
        "# a comment\nmodel_id: m\n\noptimizer:\n  weight_decay: 0.1\n  adam_betas:\n    - 0.9\n    - 0.99\n",
        "f",
    )
    assert file.lines == {
        ("model_id",): 2,
        ("optimizer",): 4,
        ("optimizer", "weight_decay"): 5,
        ("optimizer", "adam_betas"): 6,
        ("optimizer", "adam_betas", 0): 7,
        ("optimizer", "adam_betas", 1): 8,
    }
    assert file.values == {"model_id": "m", "optimizer": {"weight_decay": 0.1, "adam_betas": [0.9, 0.99]}}
    assert file.place(("optimizer", "weight_decay")) == "f line 5"
    assert file.place(("optimizer", "nothing", "below")) == "f line 4"
    assert file.place(("nothing",)) == "f"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f line 3: setting a is given twice; keep one"),
        ("g:\n  x: 1\n  y: 2\n  x: 1\n", "f line 4: setting x is given twice; keep one"),
        ("a: {b: 1, b: 1}\n", "f line 1: setting b is given twice"),
        ("a: [{b: 1, b: 1}]\n", "f line 1: setting b is given twice"),
        ("", "f: is empty"),
        ("# nothing\n", "f: is empty"),
        ("- a\n- b\n", "f: is not a mapping of settings"),
        ("just text\n", "f: is not a mapping of settings"),
        ("a: 1\nb: [1\n", "f line 3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "f line 2: not valid YAML"),
        ("a: b: c\n", "f line 1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f line 2: not valid YAML"),
        ("a: *nothing\n", "f line 1: not valid YAML"),
        ("a: !!python/object:os.system {}\n", "f line 1: not valid YAML"),
        ("a: !!int x\n", "f: not valid YAML"),
        ("a: \x00\n", "f: not valid YAML"),
        ("1: x\n", "f line 1: a setting's name is not text; put it in quotes"),
        ("a:\n  true: x\n", "f line 2: a setting's name is not text"),
        ("? [a, b]\n: x\n", "f line 1: a setting's name is not text"),
        ("a: &a [*a]\n", "f: is nested more than 50 levels deep"),
        (
            "a: &a ["
            + "x, " * 9
            + "]\n"
            + "".join(f"{one}: &{one} [{', '.join(['*' + to] * 9)}]\n" for to, one in pairwise("abcdefghij")),
            "f: has more than 100,000 values with those that aliases repeat",
        ),
        ("a: " + "[" * 60 + "]" * 60, "f: is nested more than 50 levels deep"),
        ("a: " + "[" * 1_000, "f: not valid YAML"),
        ("a: " + "1" * 5000, "f: not valid YAML"),
    ],
)
def test_faults_name_their_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["[1", "{a: 1, a: 2}", "!!int x", "a: b: c", "1" * 5000, "[" * 1_000, "\x00"]
)
def test_faults_of_one_value(text):
    with pytest.raises(ConfigError, match=r"^--set a"):
        parse_value(text, "--set a")


def test_anchors_are_followed():
    assert parse_yaml("a: &x {n: 1}\nb: *x\n", "f").values == {"a": {"n": 1}, "b": {"n": 1}}


def test_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(
        "\ufeffmodel_id: é\r\ntrain_path: t\r\n".encode()
    )  # mark and line ends as Windows has them
    assert read_yaml_file(path, "c.yaml").values == {"model_id": "é", "train_path": "t"}
    path.write_bytes(b"model_id: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"^c\.yaml: is not UTF-8 \(byte 13\); save it as UTF-8$"):
        read_yaml_file(path, "c.yaml")
    with pytest.raises(ConfigError, match=r"^none\.yaml: cannot be read \(No such file"):
        read_yaml_file(tmp_path / "none.yaml", "none.yaml")
    with pytest.raises(ConfigError, match=r"^folder: cannot be read \(Is a directory"):
        read_yaml_file(tmp_path, "folder")


odd = st.sampled_from(
    [
        "\x85",
        "\u2028x",
        "1e-4",
        "1e5",
        "yes",
        "null",
        "12",
        "0x1F",
        "1_000",
        "2024-01-01",
        "~",
        "<<",
        "1:30",
        "# x",
    ]
)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = (
    odd
    | st.text(letters, max_size=12)
    | st.text(st.sampled_from("a: #'\"\n-{}[]&*!|>%@`\\ 🙂\t"), max_size=12)
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, database=None)
@given(st.dictionaries(texts, values, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(written):
    assert parse_yaml(dump_yaml(written), "f").values == written
