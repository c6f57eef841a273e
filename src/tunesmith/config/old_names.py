"""LLMForge's older keys: names that became others, and keys that change nothing here. Both are accepted, and said."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config.yaml_file import KeyPath
from tunesmith.errors import ConfigError


def _opposite(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("should be true or false")
    return not value


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class OldName:
    """What a key is called today, and its value there."""

    new: str
    value: Callable[[Any], Any] = _same  # raises ValueError: what the value should be


OLD_NAMES: Mapping[str, OldName] = {
    "no_gradient_checkpoint": OldName("gradient_checkpointing", _opposite),
    "checkpoint_every_n_epochs": OldName(
        "checkpoint_and_evaluation_frequency", lambda epochs: {"unit": "epochs", "frequency": epochs}
    ),
    "max_num_checkpoints": OldName("num_checkpoints_to_keep"),
    "min_num_update_steps": OldName("min_update_steps"),
    "model_tag": OldName("custom_model_tag"),
}
IGNORED: Mapping[str, str] = {
    "dataset_size_scaling_factor": "every epoch has every row, as often as the files have it",
    "num_data_blocks_per_device": "rows are not read in blocks; every worker reads the token cache",
    "webhook_config": "nothing is sent; metrics.jsonl and `logger` tell how a run goes",
}


@dataclass
class Source:
    """Values of a file or of the command line, and where each was given."""

    values: dict[str, Any]
    given: dict[KeyPath, str]
    notices: list[str] = field(default_factory=list)


def with_new_names(source: Source) -> Source:
    """The same under today's names, with a notice for each key that was renamed or left out.

    Raises:
        ConfigError: the old and the new name are both there, or a value has no counterpart.
    """
    found = Source(
        {}, {p: place for p, place in source.given.items() if not _is_old(p[0])}, [*source.notices]
    )
    for key, value in source.values.items():
        place = source.given.get((key,), "--set")
        if key in IGNORED:
            found.notices.append(f"{place}: {key} has no effect here: {IGNORED[key]}")
        elif key in OLD_NAMES:
            new = OLD_NAMES[key].new
            refuse_both(key, place, source.given)
            found.values[new] = _value(key, value, place)
            found.given |= dict.fromkeys(paths((new,), found.values[new]), f"{place} ({key})")
            shown = json.dumps(found.values[new], ensure_ascii=False, default=str)
            found.notices.append(f"{place}: {key} is an old name, read as {new}: {shown}")
        else:
            found.values[key] = value
    return found


def refuse_both(key: str, place: str, given: Mapping[KeyPath, str]) -> None:
    """Raises ConfigError: the new name of ``key`` was given as well."""
    new = OLD_NAMES[key].new
    if (other := next((there for path, there in given.items() if path[0] == new), None)) is not None:
        raise ConfigError(place, f"{key} is the old name of {new}, which is set too ({other})", "keep one")


def paths(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    """``path``, and those of everything in its value."""
    yield path
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in below:
        yield from paths((*path, key), item)


def _is_old(key: str | int) -> bool:
    return key in OLD_NAMES or key in IGNORED


def _value(key: str, value: Any, place: str) -> Any:
    try:
        return OLD_NAMES[key].value(value)
    except ValueError as error:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise ConfigError(place, f"{key} is {shown[:60]}; it {error}", "change the value") from error
