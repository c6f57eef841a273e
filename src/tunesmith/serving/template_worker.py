"""A process that renders chat templates and nothing else, so that it may be lost: run by ``templates.py``.

Reads one JSON object a line, writes one. Each rendering has a deadline, at which the system ends the process, whatever
it is at; memory and the length of the text are bounded too. It ends with its input.
"""

import json
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 * 2**30  # of address space, of which an idle worker takes a quarter
MAX_RENDERED = 16_000_000  # characters
MAX_REFUSAL = 2_000  # characters of what a template says instead


def main() -> None:
    """Answer until the input ends."""
    # transformers takes torch for absent then: rendering needs none, and loading it takes seconds and memory.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked.pop("seconds"))  # SIGALRM, left as it is, ends the process
        reply = _rendered(render_jinja_template, asked)
        written = json.dumps(reply).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(written + b"\n")
        sys.stdout.buffer.flush()


def _rendered(render: Any, asked: dict[str, Any]) -> dict[str, str]:
    try:
        (text,), _ = render(**asked)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # Jinja runs a foreign template: it may raise anything
        return {"error": str(error)[:MAX_REFUSAL] or type(error).__name__}
    if len(text) > MAX_RENDERED:
        return {"error": f"it renders to more than {MAX_RENDERED:,} characters"}
    return {"text": text}


if __name__ == "__main__":
    main()
