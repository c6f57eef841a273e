"""Does the server stay right, whole and small while everything happens at once?

    python benchmarks/serve_soak.py --minutes 10

Clients ask the base and 17 names for greedy answers that are known from before; meanwhile adapters are taken out of
the folder and dropped back, unloaded and loaded by the admin route, and one name changes its content; a fifth of all
requests is malformed, and some clients hang up. A reply is wrong if it is none of the answers that the name could
give while the request ran. Exit code 1 on a wrong answer, an answer 5xx, a malformed request that is not refused,
a slot that is not freed, or memory that grows by more than 5 %. Result: ``serve_soak.json``.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from serving_checks import body
from serving_history import ABSENT, History, verdict
from serving_material import ADAPTER_STD, drop, make_adapters, prompts, take_away
from serving_server import ADMIN, Server, ServerFailed, end_with_children, tunesmith_server
from serving_stats import growth
from tokenizers import Tokenizer

from tunesmith.models.base import find_base
from tunesmith.models.catalog import cache_dir
from tunesmith.tracking.environment import machine, versions

_CHANGING = "changing"  # the name whose content changes
_TOKENS = 12
_PROMPTS = 6
# Of the two likeliest tokens: nearer ones could change places by rounding when the batch is another.
_SMALLEST_GAP = 1e-3
_MOST_GROWTH = 0.05
# Seconds that the server may take to see a change: it looks at a name's files once a second.
_SLACK = 3.0
_MALFORMED_SHARE, _HANG_UP_SHARE = 0.2, 0.1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--adapter-std", type=float, default=ADAPTER_STD, help="of the random weights")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    if chosen.adapters < 3 or chosen.clients < 1 or chosen.minutes <= 0:
        parser.error("--adapters must be at least 3, --clients at least 1, --minutes above 0")
    return chosen


def malformed(draw: random.Random, model: str, prompt: list[int]) -> tuple[str, bytes]:
    """A request that must be refused with 4xx: its kind and its body."""
    good = body(model, prompt, 4)
    kinds: dict[str, Any] = {
        "no JSON": b'{"model": "x", "prompt": ', "not UTF-8": b'{"model": "\xff\xfe"}', "a list": [1, 2],
        "no prompt": {"model": model}, "no model": {"prompt": "x"}, "unknown field": {**good, "colour": "red"},
        "unknown model": {**good, "model": "nobody"}, "path as name": {**good, "model": "../../etc/passwd"},
        "negative length": {**good, "max_tokens": -1}, "length as text": {**good, "max_tokens": "ten"},
        "hot": {**good, "temperature": 9}, "token out of vocabulary": {**good, "prompt": [2**30]},
        "empty prompt": {**good, "prompt": []}, "too long": {**good, "prompt": [5] * 5000},
        "bias of nothing": {**good, "logit_bias": {"x": 1}}, "too many choices": {**good, "n": 1000},
        "depth": b"[" * 50_000,
    }  # fmt: skip
    kind = draw.choice(sorted(kinds))
    content = kinds[kind]
    return kind, content if isinstance(content, bytes) else json.dumps(content).encode()


class Soak:
    """One run: names, known answers and counts."""

    def __init__(
        self, chosen: argparse.Namespace, server: Server, root: Path, store: dict[str, Path]
    ) -> None:
        self.chosen, self.server, self.root, self.store = chosen, server, root, store
        self.base = server.base_name()
        self.histories = {name: History([0.0], [name]) for name in store}
        self.histories[self.base] = History([0.0], [self.base])
        self.histories[_CHANGING] = History([0.0], [next(iter(store))])
        self.prompts: list[list[int]] = []
        self.answers: list[dict[str, str]] = []  # by prompt, then by meaning
        self.counts: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.rss: list[dict[str, float]] = []
        self.began = 0.0
        self.until = 0.0

    def now(self) -> float:
        """Seconds of the soak's clock."""
        return time.monotonic() - self.began

    async def learn(self, client: httpx.AsyncClient, candidates: Sequence[list[int]]) -> None:
        """Ask every model alone for its answers; keep prompts on which rounding decides nothing.

        Raises:
            ServerFailed: there are none, or two models answer all alike.
        """
        near = 0
        for prompt in candidates:
            found: dict[str, str] = {}
            for name in (self.base, *self.store):
                reply = await client.post("/v1/completions", json=body(name, prompt, _TOKENS, logprobs=2))
                choice = reply.raise_for_status().json()["choices"][0]
                tops = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
                # Two parts of characters may have the same text, and are then one entry, which says nothing.
                if any(top[-1] - top[-2] < _SMALLEST_GAP for top in tops if len(top) > 1):
                    near += 1
                    break
                if choice["text"] in found.values():
                    break  # each model must give an answer of its own, or a mix-up of two would not be seen
                found[name] = choice["text"]
            if len(found) == len(self.store) + 1:
                self.prompts.append(prompt)
                self.answers.append(found)
            if len(self.prompts) == _PROMPTS:
                return
        if not self.prompts:
            tried = f"{len(candidates)} prompts, {near} with choices too near"
            raise ServerFailed(f"no prompt tells all models apart ({tried}); try another --adapter-std")

    async def run(self, client: httpx.AsyncClient) -> None:
        """Everything at once until the time is over, then once more every known answer."""
        self.began, self.until = time.monotonic(), 60 * self.chosen.minutes
        work = [self.ask_on(client, number) for number in range(self.chosen.clients)]
        await asyncio.gather(*work, self.change_folders(), self.change_by_route(client), self.watch(client))
        await asyncio.sleep(_SLACK)
        self.counts["slots not freed"] = await self.slots_at_work(client)
        for number, prompt in enumerate(self.prompts):
            for name in (self.base, *self.histories):
                await self.compare(client, name, number, prompt, streamed=False)

    async def ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        """One client: a request after the other."""
        draw = random.Random(f"{self.chosen.seed} {number}")
        names = sorted(self.histories)
        while self.now() < self.until:
            name, prompt = draw.choice(names), draw.randrange(len(self.prompts))
            dice = draw.random()
            try:
                if dice < _MALFORMED_SHARE:
                    await self.send_malformed(client, draw, self.prompts[prompt])
                elif dice < _MALFORMED_SHARE + (1 - _MALFORMED_SHARE) * _HANG_UP_SHARE:
                    await self.hang_up(client, name, self.prompts[prompt], draw.randrange(_TOKENS))
                else:
                    await self.compare(
                        client, name, prompt, self.prompts[prompt], streamed=draw.random() < 0.5
                    )
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.counts["broken"] += 1
                self.note("broken", name, prompt, type(error).__name__, str(error))
                self.server.check()

    async def compare(
        self, client: httpx.AsyncClient, name: str, number: int, prompt: list[int], *, streamed: bool
    ) -> None:
        """Ask, and judge the reply."""
        began = self.now()
        content = body(name, prompt, _TOKENS, stream=streamed)
        reply = await client.post("/v1/completions", json=content)
        text = _text(reply, streamed) if reply.status_code == 200 else None
        # A name that changed a moment ago may still mean what it meant; what it meant before is in the history.
        meanings = self.histories[name].meanings(began - _SLACK, self.now())
        said = verdict(reply.status_code, text, meanings, self.answers[number])
        self.counts[said] += 1
        if said in ("wrong", "server fault"):
            self.note(said, name, number, str(reply.status_code), text or reply.text)

    async def send_malformed(self, client: httpx.AsyncClient, draw: random.Random, prompt: list[int]) -> None:
        """A request that must be refused."""
        kind, content = malformed(draw, self.base, prompt)
        # Without its type a body is refused unread.
        reply = await client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        self.by_kind[f"{kind}: {reply.status_code}"] += 1
        self.counts["malformed"] += 1
        if not 400 <= reply.status_code < 500:
            self.counts["server fault" if reply.status_code >= 500 else "malformed but answered"] += 1
            self.note("malformed", kind, -1, str(reply.status_code), reply.text)

    async def hang_up(self, client: httpx.AsyncClient, name: str, prompt: list[int], pieces: int) -> None:
        """A client that is gone after some pieces of an answer."""
        self.counts["hung up"] += 1
        async with client.stream(
            "POST", "/v1/completions", json=body(name, prompt, 200, stream=True)
        ) as reply:
            if reply.status_code >= 500:
                self.counts["server fault"] += 1
                self.note("server fault", name, -1, str(reply.status_code), "")
            if reply.status_code == 200:
                async for _ in reply.aiter_lines():
                    pieces -= 1
                    if pieces < 0:
                        return

    async def change_folders(self) -> None:
        """Adapters go and come back; one name changes its content."""
        draw, names = random.Random(self.chosen.seed), list(self.store)
        while self.now() < self.until:
            name = draw.choice(names[1 : len(names) // 2])
            history = self.histories[name]
            history.change(self.now(), ABSENT)
            await asyncio.to_thread(take_away, self.root, name)
            history.change(self.now(), name, ABSENT)
            await asyncio.sleep(draw.random() * 3)
            history.change(self.now(), name)
            await asyncio.to_thread(drop, self.store[name], self.root, name)
            history.change(self.now(), ABSENT, name)
            content, changing = draw.choice(names), self.histories[_CHANGING]
            before = changing.meant[-1]
            changing.change(self.now(), ABSENT, content)  # between the two folders there is none
            await asyncio.to_thread(drop, self.store[content], self.root, _CHANGING)
            changing.change(self.now(), before, ABSENT, content)
            self.counts["folders changed"] += 2
            await asyncio.sleep(_SLACK + 1)

    async def change_by_route(self, client: httpx.AsyncClient) -> None:
        """Adapters are unloaded and loaded by an administrator."""
        draw, names = random.Random(-self.chosen.seed), list(self.store)
        while self.now() < self.until:
            name = draw.choice(names[len(names) // 2 :])
            history = self.histories[name]
            for route, before, after in (("unload", name, ABSENT), ("load", ABSENT, name)):
                history.change(self.now(), after)
                reply = await client.post(
                    f"/v1/{route}_lora_adapter", json={"lora_name": name}, headers=ADMIN
                )
                self.counts[f"{route}s by route"] += 1
                if reply.status_code != 200:
                    self.counts["refused loads"] += 1
                    self.note("refused load", name, -1, str(reply.status_code), reply.text)
                history.change(self.now(), before, after)
                await asyncio.sleep(draw.random() * 2)

    async def watch(self, client: httpx.AsyncClient) -> None:
        """Memory over time."""
        every = min(5.0, self.until / 30)
        while self.now() < self.until:
            self.rss.append({"seconds": self.now(), "bytes": self.server.rss_bytes()})
            if (await client.get("/health")).status_code != 200:
                self.counts["server fault"] += 1
            await asyncio.sleep(every)

    async def slots_at_work(self, client: httpx.AsyncClient) -> int:
        """Requests that run or wait although nobody asks for anything."""
        text = (await client.get("/metrics")).text
        wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(wanted))

    def note(self, what: str, name: str, prompt: int, status: str, text: str) -> None:
        """Keep the first faults in full."""
        if len(self.wrong) < 50:
            self.wrong.append(
                {
                    "what": what,
                    "model": name,
                    "prompt": prompt,
                    "status": status,
                    "text": text[:200],
                    "at": self.now(),
                }
            )

    def result(self) -> dict[str, Any]:
        """Everything that was counted, and whether it is as it must be."""
        grown = growth([sample["bytes"] for sample in self.rss])
        must_be_none = (
            "wrong", "server fault", "broken", "malformed but answered", "slots not freed", "refused loads",
        )  # fmt: skip
        faults = {name: self.counts[name] for name in must_be_none if self.counts[name]}
        if grown is not None and grown > _MOST_GROWTH:
            faults["memory growth"] = grown
        return {
            "counts": dict(sorted(self.counts.items())), "malformed": dict(sorted(self.by_kind.items())),
            "prompts": len(self.prompts), "models": len(self.histories), "memory_growth": grown,
            "faults": faults, "first_faults": self.wrong, "rss": self.rss,
        }  # fmt: skip


def _text(reply: httpx.Response, streamed: bool) -> str:
    """The answer of a reply, whole or streamed; ValueError where a stream has no end."""
    if not streamed:
        return str(reply.json()["choices"][0]["text"])
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        raise ValueError(f"the stream broke off: {''.join(lines[-1:])[:100]}")
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


async def soak(test: Soak, candidates: Sequence[list[int]]) -> None:
    """Learn the answers, then run."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=test.server.url, timeout=300, limits=limits, trust_env=False
    ) as client:
        await test.learn(client, candidates)
        print(f"{len(test.prompts)} prompts, {len(test.histories)} models: going", flush=True)
        await test.run(client)


def main() -> int:
    """Run, write the result, and say by the exit code whether all was well."""
    chosen = arguments()
    end_with_children()
    base = find_base(chosen.model, say=print)
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serve-soak-") as temporary:
        work = Path(temporary)
        store = make_adapters(
            base.path, base.model_id, work / "store", chosen.adapters, chosen.adapter_std, work
        )
        root = work / "root"
        root.mkdir()
        for name, folder in store.items():
            drop(folder, root, name)
        drop(next(iter(store.values())), root, _CHANGING)
        tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
        candidates = [ids for ids, _ in prompts(tokenizer, 10 * _PROMPTS, chosen.seed)]
        log = cache_dir() / "peers" / "logs" / "serve-soak.log"
        with tunesmith_server(chosen.model, root, log, chosen.threads) as server:
            test = Soak(chosen, server, root, store)
            asyncio.run(soak(test, candidates))
            found = test.result()
    if server.exit_code:
        found["faults"]["exit code after SIGTERM"] = server.exit_code
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "settings": {key: value for key, value in vars(chosen).items() if key != "output_dir"},
        "machine": machine() | {"torch_threads": chosen.threads}, "versions": versions(),
    }  # fmt: skip
    text = json.dumps(head | found, indent=1)
    (chosen.output_dir / "serve_soak.json").write_text(text + "\n", encoding="utf-8")
    print(
        json.dumps(
            {"counts": found["counts"], "memory_growth": found["memory_growth"], "faults": found["faults"]}
        )
    )
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerFailed, httpx.HTTPStatusError) as error:  # before anything was counted
        sys.exit(f"serve_soak: {error}")
