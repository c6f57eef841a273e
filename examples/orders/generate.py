"""Write the example dataset: a coffee roaster's customer messages and the record each one means.

    python examples/orders/generate.py [--out DIR]

Writes ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` (UTF-8, LF). Every choice is drawn from
SHA-256, so the bytes are the same with every Python version and on every machine. Only the standard
library is used. README.md beside this file describes the task and the splits.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Values = dict[str, str]  # attribute -> normalised value
Signature = tuple[str, ...]  # function, then its attributes in schema order

SEED = "orders-1"
SPLITS = {"train": 400, "valid": 50, "test": 100}
# grammar.json holds the words, this file the rules:
# - functions: the sets of attributes a message starts from, those it may add, fewest and most in all.
# - lexicon: attribute -> value -> the ways a customer says it. All ways of one value fit the same templates.
# - frames: function -> sentences around a noun phrase {np} or a reference {ref} to an earlier order; {adv}
#   takes the templates marked "+".
# - templates: how an attribute is said beside the noun phrase, looked up as function.attribute.value,
#   function.attribute, *.attribute.value, *.attribute. "+" joins the end of the main sentence, "^" its start,
#   the rest are sentences. One without {} speaks for its value by itself; {old} is a value no longer wanted.
# - allowed: attribute -> function -> the values that make sense there, where not all of them do.
GRAMMAR: dict[str, Any] = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))
# The order of the attributes here is their order in a record.
LEXICON: dict[str, dict[str, list[str]]] = {
    "id": {number: [number] for number in (str(1000 + 7919 * k % 9000) for k in range(1, 41))},
    **GRAMMAR["lexicon"],
}
FRAMES: dict[str, list[str]] = GRAMMAR["frames"]
TEMPLATES: dict[str, list[str]] = GRAMMAR["templates"]

# Only a change may speak of these without naming the item: the shop knows what was ordered.
NEED_ITEM = {"quantity", "weight", "roast", "grind"}


class Draw:
    """Random choices from SHA-256 of a key and a counter: the same in every Python version."""

    def __init__(self, key: str) -> None:
        self._digests = (hashlib.sha256(f"{key}/{n}".encode()).digest() for n in count())

    def below(self, n: int) -> int:
        return int.from_bytes(next(self._digests)[:8], "big") % n

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]


@dataclass(frozen=True)
class Speaker:
    """One customer with one thing to say, and the luck that decides on the words."""

    function: str
    values: Values
    draw: Draw
    casual: bool

    def say(self, attribute: str, value: str, fits: Callable[[str], object] = bool) -> str:
        ways = [way for way in LEXICON[attribute][value] if fits(way)]
        # Days are shortened only in casual messages, and then not always.
        return ways[0] if attribute == "day" and not self.casual else self.draw.choice(ways)

    def template(self, attribute: str, variant: str = "") -> str:
        value = variant or self.values[attribute]
        return self.draw.choice(templates_for(self.function, attribute, value))


def templates_for(function: str, attribute: str, value: str) -> list[str]:
    """The templates of the most specific entry, see TEMPLATES; KeyError where there is none."""
    keys = (f"{attribute}.{value}", attribute)
    heads = [f"{speaker}.{key}" for speaker in (function, "*") for key in keys]
    return next(TEMPLATES[head] for head in heads if head in TEMPLATES)


def render_record(function: str, values: Values) -> str:
    """``function(attribute[value], ...)`` with the attributes in schema order."""
    return f"{function}({', '.join(f'{name}[{values[name]}]' for name in LEXICON if name in values)})"


def noun_phrase(by: Speaker, definite: bool, at_end: bool) -> tuple[str, set[str]]:
    """Name the coffee with what fits before and after it. Returns the words and the attributes said."""
    draw, values, said = by.draw, by.values, {"item"}
    adjectives = []
    if "roast" in values and (definite or draw.chance(70)):
        adjectives.append(by.say("roast", values["roast"]))
        said.add("roast")
    if values.get("organic") == "yes" and draw.chance(60):
        adjectives.append(by.say("organic", "yes"))
        said.add("organic")
    coffee = " ".join([*draw.shuffled(adjectives), by.say("item", values["item"])])
    measure, each = "", ""
    if "quantity" in values:
        # "the two bags", not "the a couple of bags".
        number = by.say("quantity", values["quantity"], lambda way: not definite or " " not in way)
        container = draw.choice(("bags", "bags", "packs"))
        measure = f"{number} {container} of"
        if "weight" in values and at_end and draw.chance(35):
            each = f", {by.say('weight', values['weight'], is_mass)} each"
        elif "weight" in values:
            size = by.say("weight", values["weight"], is_modifier)
            times = " x" if number.isdigit() and size[0].isdigit() else ""
            measure = f"{number}{times} {size} {container} of"
        said |= {"quantity", "weight"}
    elif "weight" in values:
        if definite or draw.chance(35):
            measure = f"{'' if definite else 'a '}{by.say('weight', values['weight'], is_modifier)} bag of"
        else:
            measure = f"{by.say('weight', values['weight'], is_mass)} of"
        said.add("weight")
    if definite:
        text = f"the {measure} {coffee}" if measure else f"the {coffee}"
    else:
        article = draw.choice(("", "", "the ", "your ")) if measure else bare_article(by)
        text = f"{measure} {article}{coffee}".lstrip()
    if "grind" in values and at_end and draw.chance(55):
        each += f", {by.say('grind', values['grind'])}"
        said.add("grind")
    return text + each, said


def bare_article(by: Speaker) -> str:
    """What stands before the coffee when no amount is said: prices are asked for a kind, not some of it."""
    return by.draw.choice(("the ", "your ")) if by.function == "ask_price" else "some "


def is_modifier(weight: str) -> bool:
    """Whether the words can stand before "bag": "500 g", "half-kilo"."""
    return "-" in weight or weight.endswith("g")


def is_mass(weight: str) -> bool:
    """Whether the words can stand before "of": "500 grams", "half a kilo"."""
    return "-" not in weight


def reference(by: Speaker) -> tuple[str, set[str]]:
    """Point at an order the shop already has, by number, by what is in it, or by both."""
    values, draw = by.values, by.draw
    number = order_number(by) if "id" in values else ""
    if "item" not in values:
        return number, {"id"}
    coffee, said = noun_phrase(by, definite=True, at_end=False)
    if number:
        return draw.choice(
            (f"{coffee} from {number}", f"{number} ({coffee})", f"{coffee} in {number}")
        ), said | {"id"}
    return draw.choice((coffee, f"{coffee} I ordered", f"{coffee} that I ordered")), said


def order_number(by: Speaker) -> str:
    if "id" not in by.values:
        return by.draw.choice(("my order", "my last order", "the order I placed"))
    form = by.draw.choice(
        ("order {}", "order {}", "order number {}", "order no. {}", "my order {}", "order #{}")
    )
    return form.format(by.values["id"])


def edits(by: Speaker) -> str:
    """The changes a customer wants, as one list of short sentences."""
    said = []
    for attribute in by.draw.shuffled([name for name in by.values if name != "id"]):
        new = by.values[attribute]
        template = by.template(attribute)
        others = [value for value in LEXICON[attribute] if value not in (new, "pickup", "none")]
        wanted = by.say(attribute, new, stands_alone)
        old = by.say(attribute, by.draw.choice(others), stands_alone)
        said.append(template.format(wanted, old=old))
    return ", ".join(said[:-1]) + by.draw.choice((" and ", ", and ", ", and also ")) + said[-1]


def stands_alone(way: str) -> bool:
    """Whether nothing need follow the words: not so for "half-kilo" and "a couple of"."""
    return not way.endswith(("-kilo", " of"))


def main_sentence(by: Speaker) -> tuple[str, set[str]]:
    """The sentence that carries the function. Returns it, perhaps with {adv}, and the attributes said."""
    if by.function == "change":
        return by.draw.choice(FRAMES["change"]).format(id=order_number(by), edits=edits(by)), set(by.values)
    with_problem = by.function == "refund" and "problem" in by.values
    frame = by.draw.choice(FRAMES["refund.problem" if with_problem else by.function])
    if "{np}" in frame:
        words, said = noun_phrase(by, definite=False, at_end="{np}{adv}" in frame)
        return frame.replace("{np}", words), said
    words, said = reference(by)
    if "{pred}" in frame:
        frame = frame.replace("{pred}", by.say("problem", by.values["problem"]))
        said = said | {"problem"}
    return frame.replace("{ref}", words), said


def message(by: Speaker) -> str:
    """The whole message: greeting, main sentence, what is left to say, thanks."""
    main, said = main_sentence(by)
    starts: list[str] = []
    ends: list[str] = []
    sentences: list[str] = []
    for attribute in by.draw.shuffled([name for name in by.values if name not in said]):
        variant = (
            "starting" if attribute == "day" and by.function == "order" and "repeat" in by.values else ""
        )
        template = by.template(attribute, variant)
        while (template[0] == "^" and starts) or (template[0] == "+" and len(ends) == 2):
            template = by.template(attribute, variant)
        words = template.lstrip("+^").format(by.say(attribute, by.values[attribute]))
        {"+": ends, "^": starts}.get(template[0], sentences).append(words)
    comma = "," if ends and "," in main.partition("{adv}")[0] else ""
    joint = " and " if all(end.startswith("if ") for end in ends) else f"{comma} "
    main = main.replace("{adv}", f"{comma} {joint.join(ends)}" if ends else "")
    if starts:
        main = f"{starts[0]}, {main}"
    if len(sentences) > 1 and not re.search(r"please|\?", "".join(sentences[:2])) and by.draw.chance(50):
        sentences[:2] = [f"{sentences[0]} and {sentences[1]}"]
    return dress(by, [main, *(part if part.endswith("?") else f"{part}." for part in sentences)])


def dress(by: Speaker, parts: list[str]) -> str:
    """Greeting, thanks, capitals; or the careless spelling of a casual message."""
    if by.draw.chance(35):
        parts = [by.draw.choice(GRAMMAR["greetings"]), *parts]
    if by.draw.chance(25):
        parts = [*parts, by.draw.choice(GRAMMAR["closings"])]
    text = " ".join(parts)
    if by.casual:
        return text.lower().replace("please", by.draw.choice(("please", "pls"))).rstrip(".")
    return re.sub(r"(^|(?<!no)[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def signatures(function: str) -> list[Signature]:
    """Every set of attributes the function may have, with the function before it."""
    rule = GRAMMAR["functions"][function]
    found: set[Signature] = set()
    for start in rule["starts_from"]:
        for size in range(rule["fewest"], rule["most"] + 1):
            for extra in combinations(rule["may_add"], max(0, size - len(start))):
                names = {*start, *extra}
                if function == "change" or "item" in names or not names & NEED_ITEM:
                    found.add((function, *(name for name in LEXICON if name in names)))
    return sorted(found)


def split_of(signature: Signature) -> str:
    """Each signature belongs to one split: of ten, two to test, one to valid, seven to train."""
    bucket = Draw(f"{SEED}/split/{' '.join(signature)}").below(10)
    return "test" if bucket < 2 else "valid" if bucket < 3 else "train"


def allowed_values(function: str, attribute: str) -> list[str]:
    """The values that make sense in a function: what was picked up cannot be late, say."""
    limits: dict[str, list[str]] = GRAMMAR["allowed"].get(attribute, {})
    return limits.get(function) or list(LEXICON[attribute])


def examples(split: str) -> list[tuple[str, str]]:
    """(message, record) pairs of one split. Functions and values come from shuffled decks, so all occur."""
    draw = Draw(f"{SEED}/{split}")
    decks: dict[tuple[str, ...], list[str]] = {}

    def deal(key: tuple[str, ...], cards: Sequence[str]) -> str:
        if not decks.get(key):
            decks[key] = draw.shuffled(cards)
        return decks[key].pop()

    pools = {name: [s for s in signatures(name) if split_of(s) == split] for name in GRAMMAR["functions"]}
    pairs: dict[str, str] = {}
    while len(pairs) < SPLITS[split]:
        function = deal(("function",), list(GRAMMAR["functions"]))
        _, *names = draw.choice(pools[function])
        values = {
            name: deal((name, *allowed_values(function, name)), allowed_values(function, name))
            for name in names
        }
        words = message(Speaker(function, values, draw, casual=draw.chance(30)))
        pairs.setdefault(words, render_record(function, values))
    return list(pairs.items())


def stated_values(words: str) -> set[tuple[str, str]]:
    """(attribute, value) of every way of saying a value found in a message, longest match first."""
    ways = {
        way.lower(): (attribute, value)
        for attribute, table in LEXICON.items()
        for value, alternatives in table.items()
        for way in alternatives
    }
    for head, alternatives in TEMPLATES.items():
        _, attribute, *value = head.split(".")
        for way in alternatives:
            if "{" not in way:
                ways[way.lstrip("+^").lower()] = (attribute, value[0])
    longest_first = sorted(ways, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return {ways[found] for found in re.findall(pattern, words.lower())}


def write(folder: Path) -> None:
    """Write the three files into a folder, which is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = (
            {
                "messages": [
                    {"role": "system", "content": GRAMMAR["system"]},
                    {"role": "user", "content": words},
                    {"role": "assistant", "content": record},
                ]
            }
            for words, record in examples(split)
        )
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_bytes(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the order records example dataset.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
