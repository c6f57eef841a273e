"""Axolotl's keys about rows: which files, how long, how padded."""

from typing import Any

from tunesmith.conversion.shared import data_path, length
from tunesmith.conversion.sheet import OFF, Handler, Sheet, flag
from tunesmith.errors import shown_value

_LENGTH_WAYS = {"drop": "drop", "truncate": "truncate", "raise": "error"}
_CHATS = ("chat_template", "chat_template.default")
# Parts of a data set's entry that say nothing where rows are read as ours are.
_PLAIN_PARTS = {
    "path": None, "type": None, "data_files": None, "ds_type": ("json",), "split": ("train",),
    "field_messages": ("messages",), "message_field_role": ("role",), "message_field_content": ("content",),
    "message_property_mappings": ({"role": "role", "content": "content"},), "field_tools": ("tools",),
    "roles_to_train": (["assistant"],), "train_on_eos": ("turn",), "train_on_eot": ("turn",),
    "field": ("text",), "text_column": ("text",), "chat_template": ("tokenizer_default",),
}  # fmt: skip


def datasets(setting: str) -> Handler:
    """The rows of one split; further data sets are lost."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        entries = [value] if isinstance(value, dict) else value
        if (
            not isinstance(entries, list)
            or not entries
            or not all(isinstance(item, dict) for item in entries)
        ):
            sheet.fault(
                key,
                f"is {shown_value(value)}; it should be a list of data sets",
                "each has a path and a type",
            )
            return
        for index in range(1, len(entries)):
            sheet.lose(f"{key}[{index}]", "a further data set", f"{setting} may be a folder or a glob")
        if key == "pretraining_dataset" and sheet.is_given("datasets"):
            sheet.lose(key, "text for pretraining", "one data set: `datasets` is written")
            return
        _one_dataset(sheet, key, entries[0], setting)

    return handle


def _one_dataset(sheet: Sheet, key: str, entry: dict[str, Any], setting: str) -> None:
    path, files = entry.get("path"), entry.get("data_files")
    names = files if isinstance(files, list) else [files] if files else []
    name = names[0] if names else path
    if not isinstance(name, str) or not name.strip():
        sheet.fault(f"{key}[0]", "names no path", "give it a path, or data_files")
        return
    kind = entry.get("type")
    is_text = key == "pretraining_dataset" or (isinstance(kind, str) and kind.startswith("completion"))
    is_ours = is_text or kind is None or (isinstance(kind, str) and kind in _CHATS)
    form = None if is_ours else f"rows of the type {shown_value(kind)}"
    data_path(sheet, key, name, setting, form)
    if setting == "train_path":
        whole = is_text or bool(flag(sheet.get("train_on_inputs")))
        sheet.carry(key, {"task": "causal_lm" if whole else "instruction_tuning"})
    if len(names) > 1:
        sheet.lose(
            f"{key}[0].data_files", "further files", f"{setting} may be a folder or a glob of several files"
        )
    for part, value in entry.items():
        usual = _PLAIN_PARTS.get(part, ())
        if value is not None and usual is not None and value not in usual:
            sheet.lose(
                f"{key}[0].{part}", "how rows of this data set are read", "rows of docs/data.md, all of them"
            )


def too_long(sheet: Sheet, key: str, value: Any) -> None:
    """What happens to rows that are too long; it goes with ``sequence_len``."""
    if isinstance(value, str) and value in _LENGTH_WAYS:
        sheet.pass_over(key, "it is in on_too_long")
    else:
        sheet.fault(key, f"is {shown_value(value)}; it should be drop, truncate or raise", "change the value")


def sequence_len(sheet: Sheet, key: str, value: Any) -> None:
    """The longest row, and what happens to longer ones."""
    way = sheet.get("excess_length_strategy")
    length(sheet, key, value, _LENGTH_WAYS.get(way, "drop") if isinstance(way, str) else "drop")


def pad(sheet: Sheet, key: str, value: Any) -> None:
    """Whether every row is padded to that length."""
    is_on = sheet.read(key, value, "flag")
    if is_on is not None:
        sheet.carry(key, {"padding": "max_length" if is_on else "longest"})


def val_set_size(sheet: Sheet, key: str, value: Any) -> None:
    """A share of the rows held out, which has no counterpart."""
    if value in OFF:
        sheet.pass_over(key, "off")
    else:
        sheet.lose(key, "a share of the training rows is held out", "valid_path, a file of rows of its own")
