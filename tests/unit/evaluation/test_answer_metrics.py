import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.metrics import (
    METRICS,
    exact_match,
    label_accuracy,
    metric_named,
    parse_record,
    record_match,
    token_f1,
)

WITCHER = (
    "inform(name[The Witcher 3: Wild Hunt], release_year[2015], "
    "genres[action-adventure, role-playing], has_multiplayer[no])"
)


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ("a b", "  a \n\t b ", 1.0),
        ("a b", "a\u00a0b", 1.0),
        ("a b", "ab", 0.0),
        ("Yes", "yes", 0.0),
        ("", " \n", 1.0),
    ],
)
def test_exact_match_ignores_only_whitespace_runs(expected, answer, value):
    assert exact_match(expected, answer) == value


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ("Positive", "\n positive \nbecause it praises the plot", 1.0),
        ("STRASSE", "straße", 1.0),
        ("positive", "positive, I think", 0.0),
        ("positive", "because\npositive", 0.0),
        ("positive", "", 0.0),
        ("positive", "\u2028", 0.0),
    ],
)
def test_label_accuracy_looks_at_the_first_line(expected, answer, value):
    assert label_accuracy(expected, answer) == value


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        # wanted {cat, sat}, given {cat, sat, on, mat}: precision 2/4, recall 2/2
        ("The cat sat.", "a cat SAT on the mat", 2 / 3),
        # wanted {b, b, c}, given {b, c, c}: two shared, precision and recall both 2/3
        ("b b c", "b c c", 2 / 3),
        ("1 2 3 4", "4 5", 1 / 3),
        ("dog", "cat", 0.0),
        ("the", "an", 1.0),
        ("the", "dog", 0.0),
        ("dog", "", 0.0),
    ],
)
def test_token_f1_by_hand(expected, answer, value):
    assert token_f1(expected, answer) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "answer",
    [
        WITCHER,
        "inform(has_multiplayer[no], genres[role-playing, action-adventure], release_year[2015], "
        "name[The Witcher 3: Wild Hunt])",
        "  Inform ( NAME [ The  Witcher 3: Wild Hunt ],release_year[2015],\n"
        "genres[action-adventure,role-playing] , has_multiplayer[no] )\n",
    ],
)
def test_records_that_mean_the_same(answer):
    assert record_match(WITCHER, answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        WITCHER.replace("inform", "confirm"),
        WITCHER.replace("2015", "2016"),
        WITCHER.replace("Witcher", "witcher"),  # values keep their case
        WITCHER.replace("release_year", "year"),
        WITCHER.replace(", has_multiplayer[no]", ""),
        WITCHER.replace("[no]", "[no], has_multiplayer[no]"),
        WITCHER.replace("action-adventure, role-playing", "action-adventure role-playing"),
        WITCHER.replace("action-adventure, role-playing", "action-adventure, action-adventure, role-playing"),
    ],
)
def test_records_that_differ(answer):
    assert answer != WITCHER
    assert parse_record(answer) is not None
    assert record_match(WITCHER, answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "inform",
        "inform(",
        WITCHER[:-1],
        WITCHER + ")",
        WITCHER + " and more",
        WITCHER.replace("],", "]", 1),
        WITCHER.replace("[no]", "[no"),
        WITCHER.replace("[no])", "[no],)"),
        WITCHER.replace("name[", "["),
        WITCHER.replace("inform", ""),
        WITCHER.replace("has_multiplayer[no]", "has_multiplayer"),
        '{"name": "The Witcher 3"}',
    ],
)
def test_what_is_no_record_scores_zero(answer):
    assert parse_record(answer) is None
    assert record_match(WITCHER, answer) == 0.0


def test_brackets_and_commas_inside_values():
    record = parse_record("inform(name[Foo [HD, Remastered] (2001), Bar], esrb[])")
    assert record is not None
    assert record.attributes == (("esrb", ("",)), ("name", ("Bar", "Foo [HD, Remastered] (2001)")))
    assert record_match("f(a[x [1, 2]])", "f(a[x [2, 1]])") == 0.0
    assert parse_record("f(a[x]y])") is None
    assert parse_record("request( )") == parse_record("REQUEST()")


VALUES = st.text(st.characters(codec="utf-8", exclude_characters="[],"), max_size=8)
NAMES = st.text(st.sampled_from("abcXYZ_ 9"), min_size=1, max_size=6).filter(str.strip)
PAIRS = st.lists(st.tuples(NAMES, st.lists(VALUES, min_size=1, max_size=3)), max_size=5)


@settings(max_examples=40)
@given(PAIRS, st.randoms(use_true_random=False))
def test_order_of_attributes_and_items_never_matters(pairs, random):
    def written(attributes):
        return "f(" + ", ".join(f"{name}[{','.join(items)}]" for name, items in attributes) + ")"

    shuffled = [(name.swapcase(), random.sample(items, len(items))) for name, items in pairs]
    random.shuffle(shuffled)
    assert record_match(written(pairs), written(shuffled)) == 1.0
    assert record_match(written(pairs), written([*pairs, ("other", ["1"])])) == 0.0


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ('{"a": 1, "b": [true, null]}', ' {"b":[true,null],"a":1.0}\n', 1.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0.0),
        ('{"a": [1, 2]}', '{"a": [1, 2, 3]}', 0.0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0.0),
        ('{"a": 1}', '{"A": 1}', 0.0),
        ('{"a": 1}', '{"a": 1, "a": 1}', 0.0),
        ('{"a": 1}', '{"a": 1} ok', 0.0),
        ('{"a": 1}', "1", 0.0),
        ('{"a": 1}', "f(a[1])", 0.0),
        ('[{"name": "x"}]', '[{"name":"x"}]', 1.0),
        ('{"a": 1}', '{"a": NaN}', 0.0),
        ('{"a": 1}', "[" * 100_000, 0.0),
        ('{"a": 1}', '{"a": ' + "9" * 5000 + "}", 0.0),
    ],
)
def test_json_records(expected, answer, value):
    assert record_match(expected, answer) == value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=2), JSON), st.dictionaries(st.text(max_size=2), JSON))
def test_json_equality_is_equality_of_canonical_text(left, right):
    def canonical(value):
        return json.dumps(value, sort_keys=True)

    backwards = json.dumps(dict(reversed(left.items())), indent=1)
    assert record_match(json.dumps(left), backwards) == 1.0
    same = canonical(left) == canonical(right)
    assert record_match(json.dumps(left), json.dumps(right)) == float(same)


@pytest.mark.parametrize("expected", ["positive", "", '{"a": ', "f(a[1]"])
def test_an_expected_answer_that_is_no_record_is_an_error(expected):
    with pytest.raises(DataError, match="neither func") as caught:
        record_match(expected, expected)
    assert "\n" not in str(caught.value)


@given(st.text(), st.text())
def test_every_metric_is_within_bounds_and_full_for_the_expected_answer(expected, answer):
    for metric in METRICS.values():
        if metric.name == "record_match":
            assert metric.function(WITCHER, answer) in (0.0, 1.0)
            continue
        value = metric.function(expected, answer)
        assert 0.0 <= value <= 1.0
        assert metric.function(expected, expected) == 1.0
        if metric.is_proportion:
            assert value in (0.0, 1.0)


def test_metrics_are_found_by_name():
    assert sorted(METRICS) == ["exact_match", "label_accuracy", "record_match", "token_f1"]
    assert metric_named("token_f1").function is token_f1
    assert [name for name, metric in METRICS.items() if not metric.is_proportion] == ["token_f1"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("exact-match", "exact_match"), ("f1", "token_f1"), ("accuracy", "label_accuracy")]
)
def test_an_unknown_metric_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError) as caught:
        metric_named(name)
    assert caught.value.place == "evaluation.metric"
    assert f"no metric {name}; closest is {nearest};" in str(caught.value)


def test_a_name_like_no_other_still_gets_an_answer():
    with pytest.raises(ConfigError, match="closest is "):
        metric_named("")
