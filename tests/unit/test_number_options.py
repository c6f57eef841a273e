"""Numbers that Python reads and nobody means are refused before a command does anything."""

import pytest

from tunesmith.cli import main


@pytest.mark.parametrize("value", ["nan", "inf", "1e400"])
@pytest.mark.parametrize(
    ("command", "option"),
    [("compare", "--price-per-hour"), ("compare", "--sweep-budget"), ("plan", "--price-per-hour")],
)
def test_what_is_no_finite_number_is_refused(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str
):
    assert main([command, "no such file.yaml", f"{option}={value}"]) == 2
    assert f"'{option}': {float(value)} is not a finite number." in capsys.readouterr().err
