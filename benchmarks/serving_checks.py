"""What the server must do besides being fast: equal answers, memory, loading, unloading, bad adapters."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from serving_material import BAD_KINDS, adapter_bytes, drop_bad, forget_cached
from serving_server import Server, run_client
from serving_stats import percentile


def body(model: str, prompt: Sequence[int] | str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of exactly ``tokens`` tokens."""
    fixed = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {**fixed, **more}


def ask(client: httpx.Client, model: str, prompt: Sequence[int], tokens: int) -> str:
    """The text of one answer; httpx.HTTPStatusError where there is none."""
    reply = client.post("/v1/completions", json=body(model, prompt, tokens)).raise_for_status()
    return str(reply.json()["choices"][0]["text"])


def equality(
    server: Server, base: str, expected: Mapping[str, list[dict[str, Any]]], prompts: Sequence[list[int]],
    tokens: int, text_of: Any, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Every model's greedy answers, 16 mixed at a time, against PEFT's (key "": the base), one at a time.

    Where one differs, how far apart PEFT's first two choices were at the nearest of its tokens tells whether
    rounding could have decided.
    """
    asked = [(name, number) for number in range(len(prompts)) for name in expected]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    requests = [
        {"model": name, "body": body(name or base, prompts[number], tokens, **stream)}
        for name, number in asked
    ]
    job = {
        "url": server.url, "path": "/v1/completions", "headers": {}, "timeout": 300, "core": None,
        "clients": 16, "requests": requests,
    }  # fmt: skip
    different, errors = [], 0
    for (name, number), record in zip(asked, run_client(job, work)["records"], strict=True):
        known = expected[name][number]
        errors += record["error"] is not None
        if record["error"] is None and record["text"] != text_of(known["ids"]):
            different.append({"model": name or base, "prompt": number, "smallest_gap": min(known["gaps"])})
    texts = {name: tuple(tuple(a["ids"]) for a in found) for name, found in expected.items()}
    return {
        "answers": len(asked), "equal": len(asked) - len(different) - errors, "errors": errors,
        "different": different, "models": len(expected), "models_told_apart": len(set(texts.values())),
    }  # fmt: skip


def registered(
    server: Server, names: Sequence[str], folders: Sequence[Path], prompt: list[int]
) -> dict[str, Any]:
    """Memory before and after each of many adapters has answered once."""
    with server.client() as client:
        ask(client, server.base_name(), prompt, 4)
        before = server.rss_bytes()
        for name in names:
            ask(client, name, prompt, 1)
    after, size = server.rss_bytes(), adapter_bytes(folders)
    return {
        "adapters": len(names), "rss_before": before, "rss_after": after, "adapter_file_bytes": size,
        "added_by_file_bytes": (after - before) / size,
    }  # fmt: skip


def cold_loads(server: Server, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Seconds of loading each adapter for the first time by the admin route, its files not in memory."""
    seconds, before = [], server.reads()
    with server.client() as client:
        client.get("/health")
        for name, folder in folders.items():
            forget_cached(folder)
            began = time.perf_counter()
            reply = client.post(
                "/v1/load_lora_adapter", json={"lora_name": f"cold-{name}", "lora_path": name}
            )
            seconds.append(time.perf_counter() - began)
            reply.raise_for_status()
        for name in folders:
            client.post("/v1/unload_lora_adapter", json={"lora_name": f"cold-{name}"}).raise_for_status()
    return {
        "loads": len(seconds), "p50_seconds": percentile(seconds, 0.5), "p99_seconds": percentile(seconds, 0.99),
        **_read_since(server, before),
    }  # fmt: skip


def warm_switch(server: Server, names: Sequence[str], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """What a request to another adapter than the last one costs more than to the same: medians, taken in turns."""
    stay, switch = [], []
    with server.client() as client:
        for name in names[:2]:
            ask(client, name, prompts[0], 2)
        before = server.reads()
        for number, prompt in enumerate(prompts):
            other = names[(number + 1) % 2]
            for model, times in ((other, switch), (other, stay)):  # the last request was to the other one
                began = time.perf_counter()
                # A first token of its own, so that nothing of the prompt has been read before.
                ask(client, model, [prompt[0] + 1 + len(times) % 7 + (times is stay) * 9, *prompt[1:]], 2)
                times.append(time.perf_counter() - began)
    return {
        "pairs": len(stay), "switch_seconds": median(switch) - median(stay), "stay_p50_seconds": median(stay),
        **_read_since(server, before),
    }  # fmt: skip


def cycles(server: Server, folders: Mapping[str, Path], count: int, prompt: list[int]) -> dict[str, Any]:
    """Memory over many loads and unloads; drift is from the first tenth on."""
    names, samples = list(folders), []
    every = max(1, count // 20)
    with server.client() as client:
        for number in range(count):
            name = names[number % len(names)]
            load = {"lora_name": f"cycle-{number % 4}", "lora_path": name}
            client.post("/v1/load_lora_adapter", json=load).raise_for_status()
            if number % every == 0:
                ask(client, load["lora_name"], prompt, 2)
            client.post("/v1/unload_lora_adapter", json={"lora_name": load["lora_name"]}).raise_for_status()
            if number % every == 0:
                samples.append(server.rss_bytes())
    settled = samples[len(samples) // 10 :]
    return {"cycles": count, "rss": samples, "drift": settled[-1] / settled[0] - 1}


def unload_during_streams(
    server: Server, name: str, prompts: Sequence[list[int]], tokens: int
) -> dict[str, Any]:
    """16 streams of one adapter, which is unloaded once all have begun: each must end as it would have."""
    started: list[int] = []

    def stream(number: int) -> str:
        more, text = {"stream": True}, []
        with (
            server.client() as client,
            client.stream(
                "POST", "/v1/completions", json=body(name, prompts[number], tokens, **more)
            ) as reply,
        ):
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    started.append(number)
                    text.append(httpx.Response(200, text=line[6:]).json()["choices"][0]["text"])
        return "".join(text)

    with server.client() as client, ThreadPoolExecutor(len(prompts)) as pool:
        known = [ask(client, name, prompt, tokens) for prompt in prompts]
        streams = [pool.submit(stream, number) for number in range(len(prompts))]
        while len(set(started)) < len(prompts) and not any(each.done() for each in streams):
            time.sleep(0.005)
        ended_before = sum(each.done() for each in streams)
        client.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
        texts = [each.result() for each in streams]
        after = client.post("/v1/completions", json=body(name, prompts[0], 1)).status_code
        client.post("/v1/load_lora_adapter", json={"lora_name": name}).raise_for_status()
    lost = sum(text != want for text, want in zip(texts, known, strict=True))
    return {
        "streams": len(texts),
        "ended_before_unload": ended_before,
        "lost_or_changed": lost,
        "status_after": after,
    }


def bad_loads(
    server: Server, good: Path, root: Path, names: Sequence[str], count: int, prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Bad adapters loaded while good ones answer: each is refused with 4xx, no good answer changes."""
    statuses: dict[str, int] = {}
    changed, asked = 0, 0
    with server.client() as client, server.client() as other, ThreadPoolExecutor(1) as pool:
        known = [ask(client, name, prompts[0], 8) for name in names]
        for number in range(count):
            kind = BAD_KINDS[number % len(BAD_KINDS)]
            drop_bad(good, root, "bad", kind)
            answer = pool.submit(ask, other, names[number % len(names)], prompts[0], 8)
            status = client.post("/v1/load_lora_adapter", json={"lora_name": "bad"}).status_code
            statuses[f"{kind}: {status}"] = statuses.get(f"{kind}: {status}", 0) + 1
            asked += 1
            changed += answer.result() != known[number % len(names)]
    refused = all(key[-3] == "4" for key in statuses)
    return {
        "loads": count,
        "statuses": statuses,
        "all_refused": refused,
        "answers": asked,
        "changed": changed,
    }


def _read_since(server: Server, before: dict[str, int] | None) -> dict[str, int | None]:
    after = server.reads()
    if before is None or after is None:
        return {"disk_bytes_read": None, "bytes_read_by_calls": None}
    return {
        "disk_bytes_read": after["read_bytes"] - before["read_bytes"],
        "bytes_read_by_calls": after["rchar"] - before["rchar"],
    }
