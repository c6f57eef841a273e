"""What do pages and bits of the served weights bring? Products and steps of the engine, by turns in one process.

    python benchmarks/serving_products.py

Products of some rows with weights that do not fit the caches, kept in 32, 16, 8 and 4 bits, and in 32 bits in small
pages; then one step of the default model, head included, in its own bits and in 32. Everything takes its turn in each
round. Results: ``serving_products.json`` with every time, ``serving_products.md``. Close other programs first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from tunesmith.models.base import find_base
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.base_weights import BaseWeights, load_base
from tunesmith.serving.forward import logits
from tunesmith.serving.kv_cache import KvCache
from tunesmith.serving.next_tokens import NextTokenPass
from tunesmith.serving.pages import HugePages, small_pages
from tunesmith.serving.planner import Planner
from tunesmith.serving.product import Product
from tunesmith.tracking.environment import machine, versions

WIDTH, COLUMNS, LAYERS = 576, 3072, 40
ROWS = (1, 4, 8, 16, 32)
CONTEXT = 100  # tokens in each cache
_KINDS = {
    4: gguf.GGMLQuantizationType.Q4_1,
    8: gguf.GGMLQuantizationType.Q8_0,
    16: gguf.GGMLQuantizationType.BF16,
}


class SmallPages(HugePages):
    """Memory in pages of 4 KB, in place of huge ones."""

    def empty(self, *shape: int) -> torch.Tensor:
        """Zeros in float32."""
        return small_pages(*shape)


def weights(bits: int) -> list[torch.Tensor]:
    """Random weights as a checkpoint of so many bits gives them."""
    random = np.random.default_rng(bits)
    drawn = [random.normal(size=(COLUMNS, WIDTH)).astype(np.float32) for _ in range(LAYERS)]
    if bits in _KINDS:
        drawn = [dequantize(quantize(one, _KINDS[bits]), _KINDS[bits]) for one in drawn]
    return [torch.from_numpy(one) for one in drawn]


def by_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def products(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a product by rows and layout."""
    kept = {}
    for name, bits, memory in (
        ("32 bits, small pages", 32, SmallPages()), ("32 bits", 32, HugePages()), ("16 bits", 16, HugePages()),
        ("8 bits", 8, HugePages()), ("4 bits", 4, HugePages()),
    ):  # fmt: skip
        kept[name] = [Product([one], None, memory) for one in weights(bits)]
        panels = kept[name][0].panels
        if panels is None or panels[1] != bits:
            raise SystemExit("serving.c was not compiled for this machine: there is nothing to compare")
    scratch, found = Scratch(), {}
    for rows in ROWS:
        x = torch.randn(rows, WIDTH)

        def work(of: list[Product], x: torch.Tensor = x) -> None:
            for product in of:
                product(x, scratch)

        times = by_turns({name: lambda of=of: work(of) for name, of in kept.items()}, rounds)
        found[str(rows)] = {name: [one / LAYERS for one in own] for name, own in times.items()}
    return found


def steps(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step of the default model by requests and bits."""
    folder = find_base("smollm2-135m-instruct-q4")
    bases = {"its own bits": load_base(folder, 2048)}
    with patch("tunesmith.serving.product._bits", lambda _: 32):
        bases["32 bits"] = load_base(folder, 2048)
    cache, scratch = KvCache([layer.shape for layer in bases["32 bits"].layers], 16, 2048), Scratch()
    for layer in cache.layers:
        layer.view(16, 2048, -1)[:, :CONTEXT].normal_()
    passes = {name: NextTokenPass(base, cache, scratch) for name, base in bases.items()}

    def work(name: str, base: BaseWeights, rows: int) -> None:
        plan = Planner(base).rows([None] * rows)
        hidden = passes[name](list(range(5, 5 + rows)), [CONTEXT] * rows, list(range(rows)), plan)
        logits(base, hidden, plan, scratch)

    return {
        str(rows): by_turns(
            {name: lambda n=name, b=base, r=rows: work(n, b, r) for name, base in bases.items()}, rounds
        )
        for rows in (1, 4, 8, 16)
    }


def table(result: dict[str, Any]) -> str:
    """Medians: GFLOP/s of products, milliseconds of steps."""
    lines = [
        "# Products and steps of the engine", "",
        f"Measured {result['date']} by `benchmarks/serving_products.py`, {result['machine']['processor']}, "
        f"{result['machine']['torch_threads']} threads, medians of {result['rounds']} rounds by turns.", "",
    ]  # fmt: skip
    flops = 2 * WIDTH * COLUMNS / 1e9
    for title, unit, found, shown in (
        (f"Products with weights of {COLUMNS} x {WIDTH}, {LAYERS} of them in turn", "rows, GFLOP/s",
         result["products"], lambda rows, seconds: f"{rows * flops / seconds:.0f}"),
        (f"One step of the default model, {CONTEXT} tokens in each cache", "requests, ms",
         result["steps"], lambda _, seconds: f"{seconds * 1e3:.1f}"),
    ):  # fmt: skip
        names = list(next(iter(found.values())))
        lines += [
            f"## {title}",
            "",
            "| " + " | ".join([unit, *names]) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for rows, times in found.items():
            cells = [shown(int(rows), statistics.median(times[name])) for name in names]
            lines.append("| " + " | ".join([rows, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    with torch.inference_mode():
        result = {
            "date": datetime.now(UTC).date().isoformat(), "rounds": chosen.rounds,
            "machine": machine() | {"torch_threads": torch.get_num_threads()}, "versions": versions(),
            "products": products(chosen.rounds), "steps": steps(chosen.rounds),
        }  # fmt: skip
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    (chosen.output_dir / "serving_products.json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
    )
    text = table(result)
    (chosen.output_dir / "serving_products.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
