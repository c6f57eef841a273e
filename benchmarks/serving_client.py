"""The client of the load test, a process of its own: sends the requests of a job, notes when each piece came.

    python serving_client.py JOB.json RESULT.json

It does as little as it can while requests run (bytes are kept as they came and read afterwards), since it shares
the machine's cores with the server it measures; what it used is in the result. aiohttp, as in vLLM's own benchmark,
takes half of the time that httpx takes for an event. A job names the core it stays on, the same for every engine.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp


async def ask(
    client: aiohttp.ClientSession, path: str, request: dict[str, Any], due: float
) -> dict[str, Any]:
    """One streamed request; errors become a short text in the record."""
    record: dict[str, Any] = {
        "model": request["model"],
        "due": due,
        "sent": time.perf_counter(),
        "error": None,
    }
    chunks: list[tuple[float, bytes]] = []
    try:
        async with client.post(path, json=request["body"]) as reply:
            if reply.status != 200:
                body = (await reply.read()).decode(errors="replace")
                record["error"], record["said"] = f"status {reply.status}", body[:300]
            else:
                async for chunk in reply.content.iter_any():
                    chunks.append((time.perf_counter(), chunk))
    except (aiohttp.ClientError, TimeoutError) as error:
        record["error"] = type(error).__name__
    record["ended"] = time.perf_counter()
    record["chunks"] = chunks
    return record


def lines_of(chunks: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """Lines with data, each with the time when its end came."""
    found, open_line = [], b""
    for at, chunk in chunks:
        *whole, open_line = (open_line + chunk).split(b"\n")
        found += [(at, line.decode()) for line in whole if line.startswith(b"data:")]
    return found


def read_events(record: dict[str, Any], expected_tokens: int) -> None:
    """Replace a record's chunks by the times of its pieces, its text, its end and its number of tokens."""
    text, times, finish, usage, is_done = [], [], None, None, False
    for at, line in lines_of(record.pop("chunks")):
        content = line.removeprefix("data:").strip()
        if content == "[DONE]":
            is_done = True
            continue
        event = json.loads(content)
        if "error" in event:
            record["error"] = "error in the stream"
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if piece:
                text.append(piece)
                times.append(at)
            finish = choice.get("finish_reason") or finish
    if record["error"] is None and (finish is None or not is_done):
        record["error"] = "the stream broke off"
    # Servers that count nothing in a stream say at least that the length has been reached.
    counted = expected_tokens if finish == "length" else len(times)
    record["tokens"] = usage["completion_tokens"] if usage else counted
    record |= {"text": "".join(text), "times": times, "finish": finish}


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """All requests of a job, in a closed loop of clients or at their times."""
    records: list[dict[str, Any]] = [{} for _ in job["requests"]]
    async with aiohttp.ClientSession(
        job["url"],
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=job["timeout"]),
        headers=job["headers"],
    ) as client:
        numbers = iter(range(len(records)))
        began, cpu = time.perf_counter(), time.process_time()

        async def loop() -> None:
            for number in numbers:  # shared by the loops: whoever is free takes the next
                request = job["requests"][number]
                records[number] = await ask(client, job["path"], request, time.perf_counter())

        async def at(number: int) -> None:
            request = job["requests"][number]
            due = began + request["at"]
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            records[number] = await ask(client, job["path"], request, due)

        if job["clients"]:
            await asyncio.gather(*(loop() for _ in range(job["clients"])))
        else:
            await asyncio.gather(*map(at, range(len(records))))
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    for record, request in zip(records, job["requests"], strict=True):
        read_events(record, request["body"]["max_tokens"])
        for name in ("due", "sent", "ended"):
            record[name] -= began
        record["times"] = [at - began for at in record["times"]]
    return {"records": records, "client_cpu_share": cpu / wall if wall else 0.0}


def main() -> None:
    """Read the job, stay on its core, write the result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    result = asyncio.run(run(job))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
