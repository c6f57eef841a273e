"""How long does tokenising a training file take, and how much memory? Once from the text, once from the cache.

    python benchmarks/tokenise.py --data train.jsonl --rows 100000

Rows are those of the file, over and over, each repetition with a number of its own in every user and assistant message
so that no two are equal. Each measurement is a process of its own; results go to a JSON file if asked for.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "orders" / "train.jsonl"


def write_rows(source: Path, count: int, target: Path) -> None:
    """``count`` rows made from those of ``source``."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    with target.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = rows[index % len(rows)]
            if index >= len(rows):
                row = numbered(row, index)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The row with ``index`` in its texts; the system message, which real rows share, stays."""
    if "text" in row:
        return {**row, "text": f"{row['text']} {index}"}
    said = ("user", "assistant")
    messages = [
        {**m, "content": f"{m['content']} {index}"} if m["role"] in said and m.get("content") else m
        for m in row["messages"]
    ]
    return {**row, "messages": messages}


def measure(data: str, model: str, cache: str) -> dict[str, Any]:
    """Tokenise ``data`` in this process; the time begins when the tokenizer is loaded."""
    from tunesmith.data.rendering import Renderer
    from tunesmith.data.splits import load_splits
    from tunesmith.models.base import find_base, load_tokenizer

    renderer = Renderer(load_tokenizer(find_base(model, weights=False, say=lambda _text: None), None))
    before, began, used = peak_memory(), time.perf_counter(), time.process_time()
    rows = load_splits(data, None, renderer, "auto", cache_dir=Path(cache)).train
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    after = peak_memory()
    digest = hashlib.sha256()
    for array in (rows.ids, rows.trained, rows.starts):
        digest.update(array.data)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "rows": len(rows),
        "tokens": len(rows.ids),
        "rows_per_second": round(len(rows) / seconds),
        "tokens_per_second": round(len(rows.ids) / seconds),
        "peak_rss_mb": round(after),
        "peak_rss_added_mb": round(after - before),
        "sha256": digest.hexdigest(),
    }


def peak_memory() -> float:
    """Peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10  # there in bytes, else in KB


def measured(data: Path, model: str, cache: Path) -> dict[str, Any]:
    """``measure`` in a process of its own, so that peaks are not each other's."""
    command = [sys.executable, __file__, "--measure", str(data), str(cache), "--model", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Make the rows, tokenise them cold and warm, print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=EXAMPLE, help="JSONL to make rows from; default: the example's"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4", help="whose tokenizer and template")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--measure", nargs=2, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], arguments.model, arguments.measure[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(arguments.data, arguments.rows, data)
        size = data.stat().st_size / 2**20
        print(f"{arguments.rows:,} rows from {arguments.data}, {size:.0f} MB, {os.cpu_count()} cores")
        found = {name: measured(data, arguments.model, Path(folder) / "cache") for name in ("cold", "warm")}
    for name, result in found.items():
        print(
            f"{name}  {result['seconds']:7.2f} s  {result['rows_per_second']:>10,} rows/s"
            f"  {result['tokens_per_second']:>12,} tokens/s  peak {result['peak_rss_mb']:,} MB,"
            f" {result['peak_rss_added_mb']:,} MB of it for the rows"
        )
    if found["cold"]["sha256"] != found["warm"]["sha256"]:
        raise SystemExit("the cache gave other tokens than the text")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
