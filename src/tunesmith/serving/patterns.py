"""Regular expressions in an adapter's settings, tried in a process of its own before PEFT matches by them here.

Python's ``re`` goes back over what it has read and keeps the interpreter to itself meanwhile: an expression such as
``(x+)*!`` in a file would stop the whole server, and no thread can be ended from outside.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tunesmith.errors import ModelError

SECONDS = 5.0
MAX_PATTERN = 10_000  # characters
_SPECIAL = re.compile(r"[][\\^$*+?{}|()]")
_TRY = """
import json, re, sys
asked = json.load(sys.stdin)
for pattern in asked["patterns"]:
    try:
        found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        continue
    for name in asked["names"]:
        found.match(name)
"""


def check_patterns(config: Any, names: Iterable[str], at: str) -> None:
    """Raise ModelError where matching the patterns of a ``LoraConfig`` takes too long. Faulty ones are PEFT's affair.

    Args:
        config: PEFT's settings.
        names: of the base's modules, which PEFT matches.
        at: the adapter's folder.
    """
    patterns = list(_patterns(config))
    longest = max(map(len, patterns), default=0)
    if longest > MAX_PATTERN:
        raise ModelError(at, f"a pattern has {longest:,} characters", f"{MAX_PATTERN:,} are the most")
    if not patterns:
        return
    asked = json.dumps({"patterns": patterns, "names": list(names)})
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=asked.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        tried = None
    if tried is None or tried.returncode:
        raise ModelError(
            at, f"its patterns take longer than {SECONDS:g} s to match", "name the modules in a list"
        )


def _patterns(config: Any) -> Iterator[str]:
    """As PEFT 0.17 and later put them together (``tuners_utils.py``, ``other.py``); plain names need no trial."""
    for form, given in (
        (r"(?:{})\Z", [config.target_modules]),
        (r"(?:{})\Z", [config.exclude_modules]),
        (r"(^|.*\.){}($|\..*)", config.modules_to_save),
        (r"(.*\.)?({})$", config.rank_pattern),
        (r"(.*\.)?({})$", config.alpha_pattern),
        (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", config.layers_pattern),
    ):
        listed = [given] if isinstance(given, str) else given or ()
        for pattern in listed:
            if isinstance(pattern, str) and _SPECIAL.search(pattern):
                yield form.replace("{}", pattern)
