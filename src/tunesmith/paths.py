"""Paths as a user writes them."""

from pathlib import Path

from tunesmith.errors import ConfigError, shown_value


def expanded(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced.

    Raises:
        ConfigError: of whom no home is known. A folder named ``~user`` would be found by nobody.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            shown_value(str(path)), "has no home folder here", "write the path in full"
        ) from error
