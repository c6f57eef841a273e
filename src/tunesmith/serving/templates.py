"""Chat templates rendered within bounds: in worker processes, which a template that does not end takes with it.

Threads cannot be ended from outside, and Jinja's sandbox bounds neither time nor memory. Two workers are kept, begun
when first needed, so that one bad template holds up no other model for long.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

RENDER_SECONDS = 5.0
_WORKERS = 2


class TemplateWorkers:
    """Renders in processes of their own; safe to use from several threads.

    Args:
        most: processes at once.
        seconds: that one rendering may take.
    """

    def __init__(self, most: int = _WORKERS, seconds: float = RENDER_SECONDS) -> None:
        self._free = threading.BoundedSemaphore(most)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._seconds = seconds
        self._lock = threading.Lock()

    def render(self, **asked: Any) -> str:
        """The text, for the arguments of transformers' ``render_jinja_template`` for one conversation.

        Raises:
            ValueError: the template refuses the conversation, or takes too long or too much memory.
        """
        line = json.dumps({**asked, "seconds": self._seconds}).encode() + b"\n"
        with self._free:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or _begun()
            answer = _answer(worker, line)
            if not answer.endswith(b"\n"):
                _end(worker)
                raise ValueError(f"it does not end within {self._seconds:g} s, or takes too much memory")
            with self._lock:
                self._idle.append(worker)
        reply = json.loads(answer)
        if "error" in reply:
            raise ValueError(reply["error"])
        return str(reply["text"])

    def close(self) -> None:
        """End the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            _end(worker)


def bound_rendering(tokenizer: Any, workers: TemplateWorkers | None = None) -> Any:
    """``tokenizer``, whose ``apply_chat_template`` renders one conversation to text within bounds from now on."""
    rendering = workers or SHARED

    def apply_chat_template(
        chat: list[dict[str, Any]],
        *,
        tools: list[Any] | None,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        assert not tokenize
        return rendering.render(
            # As transformers does before it renders: many templates break on null.
            conversations=[[{k: v for k, v in message.items() if v is not None} for message in chat]],
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )

    tokenizer.apply_chat_template = apply_chat_template
    return tokenizer


def _begun() -> subprocess.Popen[bytes]:
    # Keys are no business of a template; Ctrl-C on the server's terminal is none of a worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "tunesmith.serving.template_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _answer(worker: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The line that answers ``line``; cut short where the worker has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
        return worker.stdout.readline()
    except OSError:  # it ended while it was idle, or while it was written to
        return b""


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with suppress(OSError):  # what is left in its buffer has nowhere to go
                pipe.close()


SHARED = TemplateWorkers()
atexit.register(SHARED.close)
