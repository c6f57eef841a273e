"""README and docs against the program: what they show runs, parses, loads and exists."""

import ast
import dataclasses
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tunesmith import errors
from tunesmith.checkpoints.manifest import Manifest
from tunesmith.cli import cli
from tunesmith.config.load import load_config
from tunesmith.tracking.events import EpochEvent, EvalEvent, RunRecord, StepEvent
from tunesmith.tracking.scalars import scalars

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "tunesmith"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
_BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.M | re.S)


def blocks(name: str, language: str) -> list[tuple[str, str]]:
    """(rest of the info line, content) of the fenced blocks of a language."""
    return [(m[3].strip(), dedent(m[4])) for m in _BLOCK.finditer(TEXT[name]) if m[2] == language]


def spans(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", TEXT[name]))


def section(name: str, heading: str) -> str:
    """The text below a heading, up to the next one of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    begin = TEXT[name].index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{level}}} ", TEXT[name][begin:], re.M)
    return TEXT[name][begin : begin + end.start()] if end else TEXT[name][begin:]


def first_cells(text: str) -> list[str]:
    """Names in code in the first column of the tables in ``text``."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# Commands


def shown_commands() -> Iterator[tuple[str, str]]:
    for name in TEXT:
        for language in ("sh", "console"):
            for _, content in blocks(name, language):
                for line in content.splitlines():
                    if not line.startswith("Error: "):
                        yield name, line.removeprefix("$ ").partition("  #")[0].strip()
        yield from ((name, span) for span in spans(name))


def arguments(command: str) -> list[str] | None:
    """What follows ``tunesmith`` in a shown command; None where it is another program."""
    words = shlex.split(command)
    if words[:1] == ["tunesmith"] or words[:1] == [".venv/bin/tunesmith"]:
        return words[1:]
    return ["finetune", *words[2:]] if words[:2] == ["python", "main.py"] else None


def runnable() -> list[tuple[str, str]]:
    found = [(n, c) for n, c in shown_commands() if re.match(r"(\S*tunesmith|python main\.py) ", c)]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), runnable())
def test_a_shown_command_is_understood(page: str, command: str) -> None:
    words = arguments(command)
    assert words
    assert words[0] in cli.commands, f"{page}: no command {words[0]}"
    if words[1:] not in ([], ["--help"]):  # the command is only mentioned, or asked for help
        cli.commands[words[0]].make_context(words[0], words[1:])


def test_every_command_is_in_the_readme() -> None:
    table = section("README.md", "## Commands")
    assert {words[0] for span in first_cells(table) if (words := arguments(span))} == set(cli.commands)


def test_every_option_named_in_prose_exists() -> None:
    known = {"--help"} | {o for command in cli.commands.values() for p in command.params for o in p.opts}
    named = {(n, o) for n in TEXT for span in spans(n) for o in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    assert len(named) > 10
    assert [item for item in named if item[1] not in known] == []


def test_every_make_target_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {m[1] for _, command in shown_commands() if (m := re.fullmatch(r"make ([a-z-]+)", command))}
    assert {"run", "test"} <= named <= known


# Links, YAML


def slugs(text: str) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXT)
def test_every_relative_link_resolves(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in TEXT for _, content in blocks(name, "yaml")]
)
def test_every_yaml_block_loads(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(content, encoding="utf-8")
    data = load_config(str(file)).config.data
    for path in (data.train_path, data.valid_path):
        assert path is None or not path.startswith("examples/") or (ROOT / path).is_file()


# The tree


def test_the_tree_in_the_readme_is_the_tree_of_the_source() -> None:
    (_, tree), *others = [b for b in blocks("README.md", "text") if b[1].startswith("src/tunesmith/")]
    assert not others
    listed, package = [], ""
    for line in tree.splitlines()[1:]:
        if folder := re.fullmatch(r"  (\w+)/", line):
            package = f"{folder[1]}/"
            continue
        names, what = re.split(r"(?<=\.py|\w\.c|\w\.h) {2,}", line.strip())
        assert what
        inside = package if line.startswith("    ") else ""
        listed += [f"{inside}{name}" for name in names.split(", ")]
    assert len(listed) == len(set(listed))
    modules = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.[pch]*")
        if path.suffix in (".py", ".c", ".h")
    }
    modules = {name for name in modules if not name.endswith("__init__.py")}
    assert (modules - set(listed), set(listed) - modules) == (set(), set()), (
        "not listed, or listed and not there"
    )


@pytest.mark.parametrize("name", TEXT)
def test_every_source_path_that_is_named_exists(name: str) -> None:
    for span in spans(name):
        if re.fullmatch(r"(src/tunesmith/)?\w+/\w+\.py", span):
            assert (SOURCE / span.removeprefix("src/tunesmith/")).is_file(), span


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_point_the_way_that_the_design_says() -> None:
    table = section("docs/design.md", "## Which way imports point")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M)
    allowed = {package: set(re.findall(r"`(\w+)`", cell)) | {package} for package, cell in rows}
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert set(allowed) == packages | {"errors", "paths"}
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package not in allowed:
            continue
        ours = {m.split(".")[1] for m in imports(path) if m.startswith("tunesmith.")}
        assert ours <= allowed[package], path
        if package in ("config", "checkpoints", "tracking"):
            assert not {"torch", "transformers", "peft"} & set(imports(path, top_level_only=True)), path


# Outputs, dependencies


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_the_report_is_described_once() -> None:
    shown = first_cells(section("docs/outputs.md", "## report.json"))
    assert sorted(shown) == sorted(names(RunRecord))
    assert sorted(first_cells(section("docs/outputs.md", "### The manifest"))) == sorted(names(Manifest))


def test_the_metrics_are_those_that_trackers_get() -> None:
    step = StepEvent(1, 1, 1e-4, 2.0, 1.0, 1.0, 1.0, 1.0, 10, 5, 5.0, 0.1, 1, 1.0)
    events = [step, EvalEvent(1, 1.0, 2.0, 7.4, 1.0), EpochEvent(1, 1, 2.0, 1.0, 1.0)]
    rows = re.findall(r"^\| each (\w+) \| (.+) \|$", section("docs/outputs.md", "## Metrics"), re.M)
    shown = [re.findall(r"`(\w+)`", cell) for _, cell in rows]
    assert shown == [[point.name for point in scalars(event)] for event in events]


def test_every_exit_code_is_described() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    codes = {c.exit_code for c in classes if issubclass(c, errors.TunesmithError)}
    shown = re.findall(r"^\| (\d+) \|", section("docs/outputs.md", "## Exit codes"), re.M)
    assert {int(code) for code in shown} == codes | {0}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9-]", text)[0].lower() for text in requirements}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: requirement_names(some) for name, some in project["optional-dependencies"].items()}
    main, _, others = TEXT["docs/dependencies.md"].partition("## Extras")
    assert set(first_cells(main)) == requirement_names(project["dependencies"])
    shown = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|", others, re.M)
    assert {name: {package for n, package in shown if n == name} for name, _ in shown} == {
        name: packages for name, packages in extras.items() if name != "dev"
    }
    assert set(first_cells(others)) - {name for name, _ in shown} == extras["dev"] - {"tunesmith"}
    assert {extra for text in TEXT.values() for extra in re.findall(r"'\.\[(\w+)\]'", text)} <= set(extras)
