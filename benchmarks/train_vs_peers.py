"""How fast does tunesmith train beside other trainers, on the same rows, weights and thread count?

    python benchmarks/train_vs_peers.py --data PATH/viggo PATH/sql/train.jsonl --peers transformers,trl

Each peer gets a virtual environment of its own in the cache folder, with the versions in
``peers/requirements-NAME.txt``, made on first use. All trainers take turns, so that a machine that slows down
slows all of them. Losses of the first step, where no adapter has an effect yet, are compared to see that all
train the same thing. Results: ``train_vs_peers.json`` with every single run, ``train_vs_peers.png``, ``peers.md``.
Logs of every child: ``peers/logs`` in the cache folder. Close other programs first: the times are wall time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.bars import plot
from peers.environment import PeerUnavailable, installed_versions, python_of
from peers.flops import needed_flops, weights_of
from peers.rows import Prepared, prepare
from peers.summary import OURS, summarise, table
from peers.trials import HERE, PEERS, SEED, Peer, Place, our_run, peer_run

from tunesmith.assembly import TRAIN_TOKEN_BUDGET
from tunesmith.models.base import BaseFolder, find_base
from tunesmith.models.catalog import cache_dir
from tunesmith.tracking.environment import machine, versions

_TRIED_MICRO_BATCHES = (2, 4, 8)
_LOSS_TOLERANCE = 1e-3


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="JSONL files, or folders with train.jsonl"
    )
    parser.add_argument(
        "--peers", default="transformers,trl,trl-default,llama-factory,litgpt,mlx-lm", help=", ".join(PEERS)
    )
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which every trainer runs once")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of a run; the first is not timed"
    )
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--peer-micro-batch", default="4", help='rows, or "best" of 2, 4 and 8')
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-seconds", type=float, default=900, help="of one run")
    parser.add_argument(
        "--once-limit-seconds", type=float, default=600, help="of peers that run once: trl-default, mlx-lm"
    )
    parser.add_argument("--output-dir", type=Path, default=HERE.parent / "results")
    chosen = parser.parse_args()
    chosen.peers = [name for name in chosen.peers.split(",") if name]
    chosen.methods = chosen.methods.split(",")
    if unknown := [name for name in chosen.peers if name not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} is none of {', '.join(PEERS)}")
    if unknown := [name for name in chosen.methods if name not in ("lora", "full")]:
        parser.error(f"--methods: {', '.join(unknown)} is none of lora, full")
    if chosen.steps < 2 or chosen.pairs < 1 or chosen.threads < 1:
        parser.error("--steps must be at least 2, --pairs and --threads at least 1")
    sizes = _TRIED_MICRO_BATCHES if chosen.peer_micro_batch == "best" else (int(chosen.peer_micro_batch),)
    if any(size < 1 or chosen.rows_per_step % size for size in sizes):
        parser.error(
            f"--rows-per-step must be a multiple of the peers' micro-batch ({', '.join(map(str, sizes))})"
        )
    return chosen


class Measurement:
    """The runs of one call of this program, written to disk after each of them."""

    def __init__(self, chosen: argparse.Namespace, base: BaseFolder, place: Place) -> None:
        self.chosen, self.base, self.place = chosen, base, place
        self.weights = weights_of(json.loads((base.path / "config.json").read_text(encoding="utf-8")))
        self.pythons: dict[str, Path] = {}
        self.micro_batch: dict[str, int] = {}
        self.matmul_rate = measure_matmul(base, chosen.threads)
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "settings": {
                key: [str(Path(p).name) for p in value] if key == "data" else value
                for key, value in vars(chosen).items()
                if key != "output_dir"
            },
            "machine": machine()
            | {"torch_threads": chosen.threads, "matmul_flops_per_second": self.matmul_rate},
            "versions": {OURS: versions()},
            "micro_batch": {},
            "runs": [],
        }

    def install(self, data: list[Prepared]) -> None:
        """Environments of all peers; one that cannot be installed is noted for every data set."""
        for name in self.chosen.peers:
            peer = PEERS[name]
            requirements = HERE / f"requirements-{peer.environment}.txt"
            print(f"{name}: looking for its environment, or installing it", flush=True)
            try:
                python = python_of(name, self.place.cache / peer.environment, requirements)
            except PeerUnavailable as error:
                print(error, file=sys.stderr)
                reason = str(error).partition("; log: ")[0]
                for where in data[:1] if peer.once else data:
                    for method in self.chosen.methods:
                        self._add({"data": where.name, "method": method, "trainer": name, "error": reason}, 0)
                continue
            self.pythons[name] = python
            self.result["versions"][name] = installed_versions(python)

    def choose_micro_batches(self, data: Prepared) -> None:
        """``--peer-micro-batch``: as given, or the fastest of three for each peer on ``data``."""
        asked = self.chosen.peer_micro_batch
        for name in self.pythons:
            if asked != "best":
                self.micro_batch[name] = int(asked)
                continue
            tried: dict[int, float] = {}
            for size in _TRIED_MICRO_BATCHES:
                run = self._peer(PEERS[name], data, self.chosen.methods[0], size, steps=2)
                if not run["error"]:
                    tried[size] = run["real_tokens_per_second"]
            self.micro_batch[name] = max(tried, key=lambda size: tried[size]) if tried else 4
            self.result["micro_batch"][name] = {"tried": tried, "chosen": self.micro_batch[name]}
            print(f"{name}: micro-batch {self.micro_batch[name]} of {tried}", flush=True)

    def measure(self, data: Prepared, method: str, *, is_first: bool) -> None:
        """All rounds of one data set and method. A peer that fails in one sits out the others."""
        peers = [PEERS[name] for name in self.pythons]
        broken_off: set[str] = set()
        for pair in range(1, self.chosen.pairs + 1):
            self._add(our_run(self.place, self.base, data, method, self.chosen.rows_per_step), pair, data)
            for peer in peers:
                if peer.name in broken_off or (peer.once and not (is_first and pair == 1)):
                    continue
                size = self.micro_batch[peer.name]
                run = self._peer(peer, data, method, size, steps=self.chosen.steps)
                self._add(run, pair, data)
                if run["error"]:  # it would fail, or take all its time, in every round
                    broken_off.add(peer.name)

    def _peer(self, peer: Peer, data: Prepared, method: str, size: int, *, steps: int) -> dict[str, Any]:
        place = self.place
        if peer.once:
            place, steps = replace(place, limit_seconds=self.chosen.once_limit_seconds), 2
        python, rows = self.pythons[peer.name], self.chosen.rows_per_step
        return peer_run(place, peer, python, self.base, data, method, size, steps=steps, rows_per_step=rows)

    def _add(self, run: dict[str, Any], pair: int, data: Prepared | None = None) -> None:
        run["pair"] = pair
        if data is not None and not run["error"]:
            computed = data.packed_tokens if run["trainer"] == OURS else run["step_real_tokens"]
            timed = zip(computed[1:], run["step_trained_tokens"][1:], strict=False)
            each = [needed_flops(self.weights, run["method"], *tokens) for tokens in timed]
            needed = sum(each[: len(run["step_real_tokens"]) - 1])
            seconds = run["seconds_per_step"] * (len(run["step_real_tokens"]) - 1)
            run["matmul_efficiency"] = needed / seconds / self.matmul_rate
            run["same_loss"] = self._same_loss(run)
        self.result["runs"].append(run)
        self.write()
        if run["error"]:
            speed = run["error"]
            if "log" in run:
                speed += f"; log: {self.place.cache / 'logs' / run['log']}"
        else:
            speed = f"{run['real_tokens_per_second']:.1f} tokens/s"
        print(f"{run['data']} {run['method']} round {pair} {run['trainer']}: {speed}", flush=True)

    def _same_loss(self, run: dict[str, Any]) -> bool | None:
        """Whether the first step's loss is ours; None where there is nothing to compare."""
        ours = [
            other["losses"][0]
            for other in self.result["runs"]
            if (other["data"], other["method"], other["trainer"]) == (run["data"], run["method"], OURS)
            and not other["error"]
        ]
        if run["trainer"] == OURS or not ours or not run["losses"]:
            return None
        return bool(abs(run["losses"][0] - ours[0]) <= _LOSS_TOLERANCE * abs(ours[0]))

    def write(self) -> None:
        """Everything so far, for programs and for people."""
        self.result["summary"] = summarise(self.result["runs"])
        folder: Path = self.chosen.output_dir
        text = json.dumps(self.result, indent=1)
        (folder / "train_vs_peers.json").write_text(text + "\n", encoding="utf-8")
        (folder / "peers.md").write_text(table(self.result), encoding="utf-8")
        plot(self.result["summary"], folder / "train_vs_peers.png")


def measure_matmul(base: BaseFolder, threads: int) -> float:
    """FLOPs a second of torch.mm here, from a process of its own."""
    command = [sys.executable, str(HERE / "measure_matmul.py"), str(base.path / "config.json")]
    command += [str(TRAIN_TOKEN_BUDGET), str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure, and write results after every run."""
    chosen = arguments()
    base = find_base(chosen.model, say=print)
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="train-vs-peers-") as work:
        place = Place(cache_dir() / "peers", Path(work), chosen.threads, chosen.limit_seconds)
        size = (chosen.steps, chosen.rows_per_step, SEED)
        data = [prepare(source, base, place.work, *size) for source in chosen.data]
        if len({each.name for each in data}) < len(data):
            raise SystemExit("--data: two data sets have the same name")
        measurement = Measurement(chosen, base, place)
        measurement.install(data)
        measurement.choose_micro_batches(data[0])
        for number, each in enumerate(data):
            for method in chosen.methods:
                measurement.measure(each, method, is_first=number == 0)
    print(f"Results: {chosen.output_dir}")


if __name__ == "__main__":
    main()
