"""YAML file + overrides -> RunConfig. Precedence: defaults < file < ``--set``."""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.deepspeed_use import notices as deepspeed_notices
from tunesmith.config.deepspeed_use import stated
from tunesmith.config.lora_keys import LORA_CONFIG_KEYS
from tunesmith.config.old_names import OLD_NAMES, Source, paths, refuse_both, with_new_names
from tunesmith.config.schema import FLAT_SECTIONS, FullMethod, LoraMethod, RunConfig, Section
from tunesmith.config.yaml_file import KeyPath, YamlFile, dump_yaml, parse_value, read_yaml_file
from tunesmith.errors import ConfigError, shown_value

DEFAULT_LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}


@dataclass(frozen=True)
class Setting:
    """One resolved value and where it came from; for ``check --show`` and ``--default``."""

    key: str
    value: Any
    origin: str  # "default", "FILE line N" or "--set", and in brackets the key that it came from if that is another
    reason: str  # why the default is what it is


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration with the origin of every value."""

    config: RunConfig
    settings: tuple[Setting, ...]
    notices: tuple[str, ...] = ()  # old names, keys without an effect here, what a DeepSpeed file means

    def place(self, key: str) -> str:
        """Where the value of ``key`` was set, for error messages."""
        origin = next((s.origin for s in self.settings if s.key == key), "")
        return f"setting {key}" if origin in ("", "default") else f"{origin}: {key}"

    def is_given(self, key: str) -> bool:
        """Whether file or command line set ``key``, or a setting below it."""
        return any(
            s.origin != "default" and (s.key == key or s.key.startswith(f"{key}.")) for s in self.settings
        )

    def as_yaml(self) -> str:
        """Every value, as a file that this tool reads back to the same configuration."""
        return dump_yaml(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """Every value, nested as in a YAML file."""
        flat: dict[str, Any] = {}
        for section_name in FLAT_SECTIONS:
            flat |= getattr(self.config, section_name).model_dump(mode="json")
        if isinstance(self.config.method, LoraMethod):
            flat["lora_config"] = dict(self.config.method.lora_config)
        return flat


def find_config(name: str) -> Path:
    """The configuration file called ``name``: a path, or a bare name among the shipped ``configs/``."""
    path = Path(name)
    try:
        if path.exists() or path.name != name:
            return path
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return path  # whoever reads it says what is wrong
        raise ConfigError(
            shown_value(name), "is no name of a file", "give the path of a YAML file"
        ) from error
    for folder in _shipped_folders():
        if (folder / name).is_file():
            return folder / name
    shipped = sorted(p.name for folder in _shipped_folders() for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"closest shipped file is {near[0]}" if near else f"shipped files: {', '.join(shipped)}"
    raise ConfigError(name, "no such configuration file", hint)


def load_config(
    name: str | None, overrides: Sequence[str] = (), *, default: bool = False, settled: bool = False
) -> LoadedConfig:
    """Read, merge and check a configuration.

    Args:
        name: path or shipped name of the YAML file; None: the overrides alone.
        overrides: ``a.b=value`` texts, values in YAML.
        default: choose LoRA where the file does not say (``--default``).
        settled: leave the DeepSpeed file unread. What a run leaves holds the values that it stated, and it may be gone.

    Raises:
        ConfigError: with file, line, key and remedy; several faults give one line each.
    """
    file = read_yaml_file(find_config(name), name) if name else YamlFile("--set", {})
    source = with_new_names(Source(dict(file.values), {path: file.place(path) for path in file.lines}))
    _override(source, [_parse_override(text) for text in overrides])
    values, given = source.values, source.given
    if default:
        values.setdefault("lora_config", None)
    if "lora_config" in values and values["lora_config"] is None:  # `lora_config:` with nothing below it
        values["lora_config"] = {}
    config = _build(values, given, file)
    if config.cluster.deepspeed is not None and not settled:
        config = _with_deepspeed(config, config.cluster.deepspeed.config_path, source, file)
    return LoadedConfig(config, tuple(_settings(config, given)), tuple(dict.fromkeys(source.notices)))


def _override(source: Source, overrides: Sequence[tuple[KeyPath, Any]]) -> None:
    """Put settings of the command line over those of a file."""
    told = dict.fromkeys((path for path, _ in overrides), "--set")
    for path, value in overrides:
        if path[0] in OLD_NAMES:
            if len(path) > 1:
                raise ConfigError(
                    f"--set {'.'.join(map(str, path))}", f"{path[0]} is not a group of settings"
                )
            refuse_both(str(path[0]), "--set", told)
        # A path below a key that has no effect is no more than the key.
        one = with_new_names(Source({str(path[0]): value}, {path[:1]: "--set"}))
        source.notices += one.notices
        for key, new in one.values.items():
            here = path if key == path[0] else (key,)
            _put(source.values, here, new)
            # What the file says below the setting is gone with its old value.
            kept = {p: origin for p, origin in source.given.items() if p[: len(here)] != here}
            origin = one.given[(key,)]
            source.given = kept | dict.fromkeys(paths(here, new), origin)


def _with_deepspeed(config: RunConfig, path: str, source: Source, file: YamlFile) -> RunConfig:
    """The configuration with what its DeepSpeed file states, and notices of what else that says."""
    sharding, devices = read_deepspeed(path), config.cluster.num_devices
    given = {s.key: s.value for s in _settings(config, source.given) if s.origin != "default"}
    there = _place(source.given, ("deepspeed", "config_path"), file)
    for setting, (value, key) in stated(sharding, given, devices).items():
        where = tuple(setting.split("."))
        if given.get(setting) != value:
            _put(source.values, where, value)
            source.given |= {where: f"{there} ({key} of {path})"}
    config = _build(source.values, source.given, file)
    every = {setting.key: setting.value for setting in _settings(config, source.given)}
    every.setdefault("optimizer.max_grad_norm", config.optimization.optimizer.max_grad_norm)
    source.notices += deepspeed_notices(sharding, every, devices)
    return config


def _shipped_folders() -> list[Path]:
    # An installed package carries configs/ inside; a checkout has it beside src/.
    packaged = Path(str(resources.files("tunesmith"))) / "configs"
    checkout = Path(__file__).resolve().parents[3] / "configs"
    return [folder for folder in (packaged, checkout) if folder.is_dir()]


def _parse_override(text: str) -> tuple[KeyPath, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {text}", "is not of the form key=value", "for example --set num_epochs=2")
    return tuple(key.split(".")), parse_value(value, f"--set {text}")


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for depth, part in enumerate(path[:-1], 1):
        below = values.get(str(part))
        if below is not None and not isinstance(below, dict):
            dotted = ".".join(map(str, path[:depth]))
            raise ConfigError(f"--set {'.'.join(map(str, path))}", f"{dotted} is not a group of settings")
        values[str(part)] = dict(below or {})
        values = values[str(part)]
    values[str(path[-1])] = value


def _build(values: Mapping[str, Any], given: Mapping[KeyPath, str], source: YamlFile) -> RunConfig:
    owners = {key: name for name, section in FLAT_SECTIONS.items() for key in section.model_fields}
    flat: dict[str, dict[str, Any]] = {name: {} for name in FLAT_SECTIONS}
    faults: list[ConfigError] = []
    for key, value in values.items():
        if key in owners:
            flat[owners[key]][key] = value
        elif key != "lora_config":
            place = _place(given, (key,), source)
            faults.append(_unknown_key(place, str(key), _all_keys()))
    sections: dict[str, Any] = {}
    for name, section in FLAT_SECTIONS.items():
        try:
            sections[name] = section.model_validate(_tuples(flat[name]))
        except ValidationError as error:
            faults += _explain(error.errors(), section, given, source)
    sections["method"] = FullMethod()
    if "lora_config" in values:
        lora = values["lora_config"]
        if isinstance(lora, dict):
            faults += [
                _unknown_key(_place(given, ("lora_config", k), source), f"lora_config.{k}", LORA_CONFIG_KEYS)
                for k in lora
                if k not in LORA_CONFIG_KEYS
            ]
            sections["method"] = LoraMethod(lora_config=lora)
        else:
            place = _place(given, ("lora_config",), source)
            faults.append(
                ConfigError(
                    place,
                    f"lora_config is {shown_value(lora)}, not a group of settings",
                    "write `r: 8` below it",
                )
            )
    if faults:
        raise _joined(faults)
    return RunConfig.model_construct(**sections)


def _tuples(value: Any) -> Any:
    # YAML has lists only; sections hold tuples, so that frozen means frozen.
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _place(given: Mapping[KeyPath, str], path: KeyPath, source: YamlFile) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in given:
            return given[path[:length]]
    return source.name


def _unknown_key(place: str, key: str, known: Iterable[str]) -> ConfigError:
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], by_last_part, 1, cutoff=0.65)
    remedy = f"closest is {by_last_part[near[0]]}" if near else "docs/configuration.md lists every setting"
    return ConfigError(place, f"no setting {key}", remedy)


def _all_keys() -> Iterator[str]:
    """Dotted names, those at the top last, so that they win where a last part is not unique."""
    for section in FLAT_SECTIONS.values():
        yield from _keys_below(section, "")
    yield from (key for section in FLAT_SECTIONS.values() for key in section.model_fields)
    yield "lora_config"


def _keys_below(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key in section.model_fields:
        if (below := _nested(section, key)) is not None:
            yield from (f"{prefix}{key}.{name}" for name in below.model_fields)
            yield from _keys_below(below, f"{prefix}{key}.")


def _explain(
    items: Sequence[Any], section: type[BaseModel], given: Mapping[KeyPath, str], source: YamlFile
) -> list[ConfigError]:
    faults: list[ConfigError] = []
    wrong: dict[KeyPath, list[Any]] = {}  # the alternatives of a union are faults of one value
    located = [(item, *_locate(item, section)) for item in items]
    for item, path, known in located:
        dotted = ".".join(map(str, path))
        if item["type"] == "extra_forbidden":
            faults.append(_unknown_key(_place(given, path, source), dotted, known))
        elif item["type"] == "missing":
            place = _place(given, path, source)
            remedy = "give every value" if isinstance(path[-1], int) else f"add `{path[-1]}: …`"
            faults.append(ConfigError(place, f"setting {dotted} is missing", remedy))
        elif not any(len(other) > len(path) and other[: len(path)] == path for _, other, _ in located):
            wrong.setdefault(path, []).append(item)
    return faults + [_wrong_value(_place(given, path, source), path, same) for path, same in wrong.items()]


def _locate(item: Any, section: type[BaseModel]) -> tuple[KeyPath, list[str]]:
    """The path of a fault, and the names known where it lies."""
    # pydantic adds names of union members and of literals to the path; only keys of ours are kept.
    path: list[str | int] = []
    scope: type[BaseModel] | None = section
    known: list[str] = []
    names_are_free = False  # in a mapping with names of the user's own
    for depth, part in enumerate(item["loc"], 1):
        is_stranger = item["type"] == "extra_forbidden" and depth == len(item["loc"])
        if isinstance(part, int) or names_are_free:
            path.append(part)
            names_are_free = False
        elif scope is not None and (part in scope.model_fields or is_stranger):
            path.append(part)
            known = list(scope.model_fields)
            names_are_free = not is_stranger and _is_mapping(scope, part)
            scope = _nested(scope, part)
    return tuple(path), known


def _wrong_value(place: str, path: KeyPath, items: Sequence[Any]) -> ConfigError:
    wanted = [_wanted(item) for item in items]
    wish = " or ".join([wanted[0], *(text.removeprefix("should be ") for text in wanted[1:])])
    dotted, value = ".".join(map(str, path)), items[0]["input"]
    kinds = {item["type"] for item in items}
    remedy = "change the value"
    if kinds & {"int_type", "float_type"} and _is_quoted_number(value):
        remedy = "write the number without quotes"
    elif "string_type" in kinds and isinstance(value, bool | int | float):
        remedy = "put it in quotes"
    if isinstance(value, dict) and wish.startswith("must"):  # settings that contradict each other
        return ConfigError(place, f"{dotted} {wish}", "change one of them")
    return ConfigError(place, f"{dotted} is {shown_value(value)}; it {wish}", remedy)


def _wanted(item: Any) -> str:
    ours = {"model_type": "should be a group of settings", "bool_type": "should be true or false"}
    if item["type"] in ours:
        return ours[item["type"]]
    _, should, rest = str(item["msg"]).partition("should ")
    return should + rest if should else str(item["msg"]).removeprefix("Value error, ")


def _is_quoted_number(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[-+]?[0-9._]+([eE][-+]?[0-9]+)?", value) is not None


def _is_mapping(scope: type[BaseModel], part: str) -> bool:
    return get_origin(scope.model_fields[part].annotation) is Mapping


def _nested(scope: type[BaseModel], part: str | int) -> type[BaseModel] | None:
    annotation = scope.model_fields[str(part)].annotation if str(part) in scope.model_fields else None
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _joined(faults: Sequence[ConfigError]) -> ConfigError:
    unique = list(dict.fromkeys(map(str, faults)))
    return faults[0] if len(unique) == 1 else ConfigError("", "\n".join(unique))


def _settings(config: RunConfig, given: Mapping[KeyPath, str]) -> Iterator[Setting]:
    for name in FLAT_SECTIONS:
        yield from _section_settings(getattr(config, name), (), given)
    if isinstance(config.method, LoraMethod):
        origin = given.get(("lora_config",), "--default")
        if not config.method.lora_config:
            yield Setting("lora_config", {}, origin, "its presence selects LoRA; the documented set is used")
        for key, value in config.method.lora_config.items():
            yield Setting(f"lora_config.{key}", value, given.get(("lora_config", key), origin), "")


def _section_settings(section: Section, path: KeyPath, given: Mapping[KeyPath, str]) -> Iterator[Setting]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        here = (*path, key)
        origin = given.get(here, "default")
        if isinstance(value, Section) and (origin != "default" or any(p[: len(here)] == here for p in given)):
            yield from _section_settings(value, here, given)
        else:
            shown = value.model_dump(mode="json") if isinstance(value, Section) else value
            yield Setting(".".join(map(str, here)), shown, origin, field.description or "")
