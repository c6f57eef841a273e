"""Another tool's YAML file -> ours, checked by our own loader, with a list of what could not be carried."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.load import load_config
from tunesmith.config.schema import FLAT_SECTIONS
from tunesmith.config.yaml_file import YamlFile, dump_yaml, parse_value, read_yaml_file
from tunesmith.conversion.axolotl import AXOLOTL
from tunesmith.conversion.llamafactory import LLAMA_FACTORY
from tunesmith.conversion.sheet import Finding, Sheet, Tool
from tunesmith.conversion.trl import TRL
from tunesmith.errors import ConfigError, OutputError, printable

TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (AXOLOTL, LLAMA_FACTORY, TRL)}


@dataclass(frozen=True)
class Converted:
    """A configuration of ours, and what became of the other tool's keys."""

    tool: Tool
    text: str  # YAML that load_config takes, with comments on where each value comes from
    lost: tuple[Finding, ...]
    needless: tuple[Finding, ...]


def convert_file(name: str, tool_name: str | None = None, overrides: Sequence[str] = ()) -> Converted:
    """Convert the YAML file ``name``.

    Args:
        name: path of the file.
        tool_name: "axolotl", "llamafactory" or "trl"; None: told from the keys.
        overrides: ``a.b=value`` texts in our names, laid over what was converted.

    Raises:
        ConfigError: the file is no YAML, is not plainly one tool's, or says something that no configuration of ours
            can say; one line for each fault, with file and line.
    """
    source = read_yaml_file(Path(name), name)
    tool = TOOLS[tool_name] if tool_name else _tell(source)
    sheet = Sheet(tool, source)
    for key, value in source.values.items():
        if key not in tool.handlers:
            sheet.lose(key, *_unknown(tool, key))
        elif value is None and key not in tool.nulls:
            sheet.pass_over(key, "empty")
        elif key not in sheet.settled:
            tool.handlers[key](sheet, key, value)
    for key, value in tool.defaults.items():
        if not sheet.is_given(key) and not (key in source.values and key in tool.nulls):
            _carry_default(sheet, key, value)
    if sheet.faults:
        raise _joined(sheet.faults)
    values = _nested(sheet.settings)
    _refuse_missing(sheet, values, overrides)
    _check(sheet, values, overrides)
    return Converted(tool, _render(sheet, values, overrides), tuple(sheet.lost), tuple(sheet.needless))


def write_converted(path: Path, text: str) -> None:
    """Write a converted file where none is yet.

    Raises:
        OutputError: something lies there, or it cannot be written.
    """
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise OutputError(str(path), "exists already", "name another file, or remove it") from error
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})", "name another place") from error
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)  # a part of it would load as a whole
        raise OutputError(str(path), f"cannot be written ({error.strerror})", "name another place") from error


def _tell(source: YamlFile) -> Tool:
    """The tool that knows the most of the file's keys, if it is one."""
    known = {tool.name: sum(key in tool.handlers for key in source.values) for tool in TOOLS.values()}
    best = [name for name, count in known.items() if count == max(known.values())]
    if len(best) > 1:
        names = ", ".join(TOOLS)
        raise ConfigError(source.name, "does not say whose file it is", f"name the tool with --from: {names}")
    return TOOLS[best[0]]


def _unknown(tool: Tool, key: str) -> tuple[str, str]:
    near = difflib.get_close_matches(key, tool.handlers, 1, cutoff=0.8)
    means = f"no key of {tool.title}" + (f"; closest is {near[0]}" if near else "")
    return means, "docs/migration.md has the keys that are carried"


def _carry_default(sheet: Sheet, key: str, value: Any) -> None:
    """Carry what the tool does where the file is silent; of what says nothing here nothing is said."""
    before = len(sheet.needless)
    sheet.tool.handlers[key](sheet, key, value)
    del sheet.needless[before:]


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in sorted(settings, key=lambda name: name.count(".")):
        *groups, last = setting.split(".")
        scope = values
        for group in groups:
            scope = scope.setdefault(group, {})
        scope[last] = dict(value) if isinstance(value := settings[setting], dict) else value
    order = [*(key for section in FLAT_SECTIONS.values() for key in section.model_fields), "lora_config"]
    return {key: values[key] for key in order if key in values}


def _refuse_missing(sheet: Sheet, values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    by_hand = {text.partition("=")[0] for text in overrides}
    faults = [
        ConfigError(sheet.name, f"names no {what}", f"give it with --set {setting}=…")
        for setting, what in (("model_id", "model"), ("train_path", "data set"))
        if setting not in values and setting not in by_hand
    ]
    if faults:
        raise _joined(faults)


def _check(sheet: Sheet, values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Our own loader has to take the result; what it refuses is named by the key it came from."""
    # A DeepSpeed file that is named need not be here: `tunesmith check` reads it where the run will be.
    ours = [f"{key}={_json(value)}" for key, value in values.items()]
    try:
        load_config(None, [*ours, *overrides], settled=True)
    except ConfigError as error:
        if faults := list(_refused(sheet)):
            raise _joined(faults) from error
        raise


def _refused(sheet: Sheet) -> Iterator[ConfigError]:
    """The settings that our loader refuses, each tried alone."""
    for setting, origin in sheet.origins.items():
        needed = [
            "model_id=m",
            "train_path=t",
            *(["logger.provider=wandb"] if setting.startswith("logger") else []),
        ]
        try:
            load_config(None, [*needed, f"{setting}={_json(sheet.settings[setting])}"], settled=True)
        except ConfigError as error:
            fault = f"{origin.key} cannot be {setting}: {error.fault}"
            yield ConfigError(origin.place, fault, error.remedy or "change the value")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _render(sheet: Sheet, values: Mapping[str, Any], overrides: Sequence[str]) -> str:
    lines = [
        f"# Converted from {_plain(Path(sheet.name).name)} ({sheet.tool.title}) by tunesmith convert.",
        "# Settings that are not here keep their defaults: docs/configuration.md.",
    ]
    by_hand = _by_hand(overrides)
    for key in [*values, *(key for key in by_hand if key not in values)]:
        value = by_hand.get(key, values.get(key))
        origins = [f for setting, f in sheet.origins.items() if setting.split(".")[0] == key]
        lines.append("")
        if key in by_hand:
            lines.append("# --set")
        lines += dict.fromkeys(f"# {_comment(sheet, origin)}" for origin in origins)
        lines += dump_yaml({key: value}).rstrip("\n").split("\n")
    for title, findings in (("Could not be carried", sheet.lost), ("Says nothing here", sheet.needless)):
        if findings:
            lines += ["", f"# {title}:", *(f"#   {_comment(sheet, f)}" for f in findings)]
    return "\n".join(lines) + "\n"


def _by_hand(overrides: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` sets at the top; a setting within a group is laid over when the file is loaded, so refused."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if "." in key:
            raise ConfigError(
                f"--set {text}", "sets a part of a group", "give it to `tunesmith finetune` instead"
            )
        values[key] = parse_value(value, f"--set {text}")
    return values


def _comment(sheet: Sheet, found: Finding) -> str:
    """``line N: key: text``, on one line; the file's name stands at the top once."""
    place = found.place.removeprefix(sheet.name).strip()
    return _plain(": ".join(part for part in (place, found.key, found.text) if part))


def _plain(text: str) -> str:
    """A comment is one line, and YAML has no control characters."""
    return printable(" ".join(text.split()))


def _joined(faults: Sequence[ConfigError]) -> ConfigError:
    unique = list(_unique(faults))
    return unique[0] if len(unique) == 1 else ConfigError("", "\n".join(map(str, unique)))


def _unique(faults: Sequence[ConfigError]) -> Iterator[ConfigError]:
    seen: set[str] = set()
    for fault in faults:
        if str(fault) not in seen:
            seen.add(str(fault))
            yield fault
