"""What a wrong configuration is told."""

import pytest

from tunesmith.config.load import load_config
from tunesmith.errors import ConfigError


def fault(name: str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)
