"""One training run of ours or of a peer -> the facts of it, or the error that ended it."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.children import Finished, run_child
from peers.rows import Prepared
from peers.summary import OURS, speed_facts

from tunesmith.errors import TunesmithError
from tunesmith.models.base import BaseFolder
from tunesmith.tracking.jsonl import read_events

HERE = Path(__file__).resolve().parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, DROPOUT = 8, 16, 0.05
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
SEED = 42
# What would send a run's facts or files elsewhere, or change how it trains.
_UNWANTED = ("WANDB_API_KEY", "TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE", "PYTHONPATH")


@dataclass(frozen=True)
class Peer:
    """A trainer to compare with.

    Attributes:
        name: for people.
        environment: the peers of one environment share it; its requirements file has this name.
        script: its runner.
        once: two steps, once, on the first data set, under a shorter limit: for what is too slow here, or refuses.
    """

    name: str
    environment: str
    script: str
    once: bool = False


PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers", "transformers", "run_transformers.py"),
        Peer("trl", "trl", "run_trl.py"),
        Peer("trl-default", "trl", "run_trl_default.py", once=True),
        Peer("llama-factory", "llama-factory", "run_llama_factory.py"),
        Peer("litgpt", "litgpt", "run_litgpt.py"),
        Peer("mlx-lm", "mlx-lm", "run_mlx_lm.py", once=True),
    )
}


@dataclass(frozen=True)
class Place:
    """Where runs of one measurement live: ``cache`` is kept, ``work`` is not."""

    cache: Path
    work: Path
    threads: int
    limit_seconds: float

    def fresh(self, name: str) -> Path:
        """An empty folder below ``work``."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def log(self, *words: str) -> Path:
        return self.cache / "logs" / f"{'-'.join(words)}.log"

    def variables(self) -> dict[str, str]:
        """The environment of a training process."""
        kept = {key: value for key, value in os.environ.items() if key not in _UNWANTED}
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads)
        )
        offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
        return kept | threads | offline | {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def our_run(
    place: Place, base: BaseFolder, data: Prepared, method: str, rows_per_step: int
) -> dict[str, Any]:
    """``tunesmith finetune`` on the rows, measured from its own metrics.jsonl."""
    folder = place.fresh("ours")
    settings: dict[str, Any] = {
        "model_id": base.model_id,
        "train_path": str(data.ours),
        "num_epochs": 1,
        "train_batch_size_per_device": rows_per_step,
        "learning_rate": LEARNING_RATE[method],
        "lr_scheduler_type": "constant",
        "num_warmup_steps": 0,
        "seed": SEED,
        "precision": "fp32",
        "output_dir": str(folder / "outputs"),
    }
    if method == "lora":
        settings["lora_config"] = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": DROPOUT,
            "target_modules": list(TARGETS),
        }
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    log = place.log(data.name, method, OURS)
    command = [sys.executable, "-m", "tunesmith", "finetune", str(config)]
    done = run_child(command, log, limit_seconds=place.limit_seconds, environment=place.variables())
    facts: dict[str, Any] = {}
    if not done.error:
        try:
            facts = our_facts(folder / "outputs")
        except (TunesmithError, OSError, ValueError) as error:
            done = Finished(f"its metrics cannot be read: {error}", done.seconds, done.peak_rss_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    return _record(OURS, data, method, None, done, log, facts)


def our_facts(output_dir: Path) -> dict[str, Any]:
    """Speed, losses and time to the end of the first step, from what a finished run has left."""
    (metrics,) = output_dir.glob("*/metrics.jsonl")
    steps = [event for event in read_events(metrics) if event["event"] == "step"]
    report = json.loads(metrics.with_name("report.json").read_text(encoding="utf-8"))
    real, trained = [s["real_tokens"] for s in steps], [s["trained_tokens"] for s in steps]
    facts: dict[str, Any] = speed_facts([s["time_total_s"] for s in steps], real, trained)
    # The report's time is that before the first step.
    first = report["seconds_to_first_step"] + steps[0]["train_time_per_step"]
    return facts | {
        "seconds_to_first_step_done": first,
        "losses": [s["train_loss_batch"] for s in steps],
        "step_real_tokens": real,
        "step_trained_tokens": trained,
    }


def peer_run(
    place: Place,
    peer: Peer,
    python: Path,
    base: BaseFolder,
    data: Prepared,
    method: str,
    micro_batch: int,
    *,
    steps: int,
    rows_per_step: int,
) -> dict[str, Any]:
    """A peer's runner on the same rows, measured by its meter."""
    folder = place.fresh(peer.name)
    cache = place.cache / peer.environment / "models"
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "scratch").mkdir()
    result, job = folder / "meter.json", folder / "job.json"
    content = {
        "model": str(base.path),
        "model_name": base.model_id,
        "rows": str(data.tokens),
        "method": method,
        "steps": steps,
        "rows_per_step": rows_per_step,
        "micro_batch": micro_batch,
        "learning_rate": LEARNING_RATE[method],
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": DROPOUT,
        "targets": TARGETS,
        "result": str(result),
        "scratch": str(folder / "scratch"),
        "cache": str(cache),
        "started": time.time(),
        "seed": SEED,
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    log = place.log(data.name, method, peer.name)
    command = [str(python), str(HERE / peer.script), str(job)]
    done = run_child(command, log, limit_seconds=place.limit_seconds, environment=place.variables())
    facts: dict[str, Any] = {}
    if result.is_file():
        measured = json.loads(result.read_text(encoding="utf-8"))
        finished = len(measured["step_ends"])
        if finished >= 2:
            facts = peer_facts(measured)
        # The measurement is whole when all steps are in it, whatever became of what the peer does afterwards.
        if finished < steps:
            reason = done.error or "it ended early"
            error = f"{finished} of {steps} steps, then: {reason}"
            done = Finished(error, done.seconds, done.peak_rss_bytes)
        elif done.error:
            facts["after_training"] = done.error
            done = Finished(None, done.seconds, done.peak_rss_bytes)
    elif not done.error:
        done = Finished("it measured nothing", done.seconds, done.peak_rss_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    return _record(peer.name, data, method, micro_batch, done, log, facts)


def peer_facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The meter's file in the terms that our own run is described in."""
    ends: Sequence[float] = measured["step_ends"]
    facts: dict[str, Any] = speed_facts(ends, measured["real_tokens"], measured["trained_tokens"])
    return facts | {
        "seconds_to_first_step_done": ends[0],
        "losses": measured["losses"],
        "step_real_tokens": measured["real_tokens"],
        "step_trained_tokens": measured["trained_tokens"],
    }


def _record(
    trainer: str,
    data: Prepared,
    method: str,
    micro_batch: int | None,
    done: Finished,
    log: Path,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "data": data.name,
        "method": method,
        "trainer": trainer,
        "micro_batch": micro_batch,
        "error": done.error,
        "log": log.name,
        "wall_seconds": done.seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
        **facts,
    }
