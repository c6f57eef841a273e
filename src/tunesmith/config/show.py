"""Settings for people: every value, where it came from and why it is so."""

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.config.load import LoadedConfig


def print_settings(console: Console, loaded: LoadedConfig) -> None:
    """Every setting as a line of YAML; behind it where it came from, or why the default is what it is."""
    for setting in loaded.settings:
        chosen = setting.origin == "default"
        line = Text(f"{setting.key}: ", style="" if chosen else "bold")
        line.append(_shown(setting.value))
        why = setting.reason if chosen or setting.value == {} else ""
        line.append(f"  # {setting.origin}{': ' if why else ''}{why}", style="dim" if chosen else "cyan")
        console.print(line, soft_wrap=True)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
