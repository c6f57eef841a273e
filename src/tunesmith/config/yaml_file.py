"""YAML text -> plain values, with the line of every key kept.

PyYAML reads YAML 1.1, in which ``1e-4`` is text and ``yes`` is true. Both surprise people who write
configuration files, so numbers and booleans follow YAML 1.2's core schema here. Whole numbers with underscores, which
1.1 alone has, are left to the schema to decide (``UnderscoredInt``).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ConfigError

KeyPath = tuple[str | int, ...]
_MAX_DEPTH = 50
_MAX_VALUES = 100_000  # a few lines of aliases of aliases stand for billions


class UnderscoredInt(str):
    """Text such as ``37_580_963_840``, without quotes: a number where the schema wants one, text elsewhere."""

    def number(self) -> int:
        """The whole number that YAML 1.1 reads."""
        return int(self.replace("_", ""))


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans; dates and merge keys (``<<``) stay text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML 1.1's further line ends come back as others, unless they are escaped, which only this style does.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16) if text.startswith("0x") else int(text)


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    is_plain = node.style is None and re.fullmatch(r"[-+]?[1-9][0-9]*(?:_[0-9]+)+", text)
    return UnderscoredInt(text) if is_plain else text


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(UnderscoredInt, _represent_text)


@dataclass(frozen=True)
class YamlFile:
    """The values of a file and where each key stands.

    ``lines`` maps a key's path, such as ``("optimizer", "weight_decay")``, to its line, from 1.
    """

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """``FILE line N`` of the key, or of the nearest key around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name} line {self.lines[path[:length]]}"
        return self.name


def read_yaml_file(path: Path, name: str) -> YamlFile:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file cannot be read, is no valid YAML, repeats a key or is not a mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(name, f"cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> YamlFile:
    """Parse YAML text; ``name`` stands in error messages. Raises ConfigError as ``read_yaml_file``."""
    node, values, lines = _parse(text, name)
    if node is None:
        raise ConfigError(name, "is empty", "it needs at least model_id and train_path")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(name, "is not a mapping of settings", "write `key: value` lines")
    return YamlFile(name, values, lines)


def parse_value(text: str, name: str) -> Any:
    """One YAML value, as the right side of ``--set key=value``. Raises ConfigError as ``read_yaml_file``."""
    return _parse(text, name)[1]


def dump_yaml(values: dict[str, Any]) -> str:
    """``values`` as text from which ``parse_yaml`` gets them back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, name: str) -> tuple[yaml.Node | None, Any, dict[KeyPath, int]]:
    lines: dict[KeyPath, int] = {}
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None, lines
        _note_lines(node, (), lines, name)
        return node, loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}", f"not valid YAML: {error.problem}", "mend this line") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(name, f"not valid YAML: {error}".splitlines()[0], "mend it") from error
    finally:
        if loader is not None:
            loader.dispose()


def _note_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    if len(path) > _MAX_DEPTH:
        raise ConfigError(name, f"is nested more than {_MAX_DEPTH} levels deep", "flatten it")
    if len(lines) > _MAX_VALUES:
        raise ConfigError(
            name, f"has more than {_MAX_VALUES:,} values with those that aliases repeat", "write fewer"
        )
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{name} line {line}", "a setting's name is not text", "put it in quotes")
            key = str(key_node.value)
            if (*path, key) in lines:
                raise ConfigError(f"{name} line {line}", f"setting {key} is given twice", "keep one")
            lines[(*path, key)] = line
            _note_lines(value_node, (*path, key), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _note_lines(item, (*path, index), lines, name)
