"""What is each idea of the trainer worth? One optimizer step with everything on, alternating with one idea off.

    python benchmarks/ablation.py --data train.jsonl

All variants take the same rows in one process; the learning rate is 0, so that every step does all its work and
leaves the model as it was: the losses of variants that compute the same must agree. Ideas are taken out from outside,
by replacing what a module looks up; the product has no switches for them. Results: ``ablation.json`` with every single
step, ``ablation.md``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tunesmith.assembly import Assembly, assemble
from tunesmith.config.load import load_config
from tunesmith.data.packing import PackedBatch
from tunesmith.models.batches import MicroBatches, packed_batches, padded_batches
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.method import trainable_parameters
from tunesmith.models.passes import AutogradPasses, KernelPasses, Passes
from tunesmith.tracking.environment import machine, versions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": {"lora_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": TARGETS}},
    "full": {},
}
CPU = torch.device("cpu")
BUDGET = 1408
_LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Variant:
    """A way to compute a step.

    Attributes:
        name: what is off.
        replaced: (where a module looks something up, what it finds there instead).
        batches, passes: instead of those of a run.
        fused: the optimizer in one pass over memory.
        changes_loss: the loss is not that of the rows: the work is what is looked at.
    """

    name: str
    replaced: Sequence[tuple[str, Any]] = ()
    batches: Callable[[int], MicroBatches] | None = None
    passes: Callable[[Assembly], Passes] | None = None
    attention: str | None = None
    fused: bool = True
    changes_loss: bool = False
    methods: Sequence[str] = field(default=("lora", "full"))


def fresh(_self: Scratch, _name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """In place of a buffer that is used again."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def fresh_gradient(_self: Scratch, parameter: torch.Tensor) -> torch.Tensor:
    """In place of memory that gradients of every step share."""
    return torch.empty_like(parameter)


def draw_every_element(size: int, probability: float) -> torch.Tensor:
    """Dropout by one random number for each element, as torch's own."""
    return (torch.rand(size) < probability).nonzero().squeeze(1)


def with_all_tokens_trained(budget: int) -> MicroBatches:
    """As many targets as tokens: the head, and the last layer, compute all of them."""

    def batches(rows: Any, chosen: Sequence[int]) -> Any:
        for batch in packed_batches(budget, CPU)(rows, chosen):
            assert isinstance(batch, PackedBatch)
            yield replace(batch, sources=torch.arange(len(batch.input_ids)), targets=batch.input_ids)

    return batches


def variants() -> list[Variant]:
    kernels = "tunesmith.models.kernels"
    return [
        Variant("nothing"),
        Variant("shared prefix computed once", [("tunesmith.data.packing.shared_prefix", lambda _rows: 0)]),
        Variant("head and last layer on trained tokens only", batches=with_all_tokens_trained, changes_loss=True),
        Variant(
            "gradients by hand (packed rows, PEFT's modules, autograd)",
            passes=lambda parts: AutogradPasses(parts.model),
        ),
        Variant(
            "gradients by hand and packing (padded rows of 4, sdpa, autograd)",
            passes=lambda parts: AutogradPasses(parts.model),
            batches=lambda _budget: padded_batches(10**9, 0, CPU, most_rows=4),
            attention="sdpa",
        ),
        Variant("dropout by what falls", [(f"{kernels}.layer.draw_dropped", draw_every_element)], methods=["lora"]),
        Variant(
            "everything that is compiled from C",
            [("tunesmith.native._library", lambda _name: None), ("tunesmith.native._function", lambda *_: None)],
        ),
        Variant("wide products in C", [(f"{kernels}.wide._is_amd", lambda: False)]),
        Variant(
            "buffers and gradients that keep their memory",
            [(f"{kernels}.scratch.Scratch.take", fresh), (f"{kernels}.scratch.Scratch.gradient", fresh_gradient)],
        ),
        Variant("micro-batches of 1,408 tokens (384 instead)", batches=lambda _budget: packed_batches(384, CPU)),
        Variant("optimizer in one pass over memory", fused=False, methods=["full"]),
    ]  # fmt: skip


def timed_step(
    parts: Assembly,
    kernels: Passes,
    variant: Variant,
    optimizers: dict[bool, torch.optim.Optimizer],
    chosen: list[int],
) -> tuple[float, float]:
    """Seconds of one optimizer step, and its loss."""
    batches = (variant.batches or (lambda budget: packed_batches(budget, CPU)))(BUDGET)
    passes = variant.passes(parts) if variant.passes else kernels
    with ExitStack() as stack:
        for place, value in variant.replaced:
            stack.enter_context(patch(place, value))
        before = parts.model.config._attn_implementation
        if variant.attention:
            parts.model.set_attn_implementation(variant.attention)
        try:
            return _step(parts, passes, batches, optimizers[variant.fused], chosen)
        finally:
            parts.model.set_attn_implementation(before)


def _step(
    parts: Assembly,
    passes: Passes,
    batches: MicroBatches,
    optimizer: torch.optim.Optimizer,
    chosen: list[int],
) -> tuple[float, float]:
    rows = parts.text.splits.train
    trained = int(rows.trained_counts[chosen].sum())
    torch.manual_seed(0)
    begun = time.perf_counter()
    total = sum(passes.train(batch, 1 / trained).total for batch in batches(rows, chosen))
    torch.nn.utils.clip_grad_norm_(trainable_parameters(parts.model), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun, total / trained


def measure(method: str, data: Path, rounds: int, rows_per_step: int) -> list[dict[str, Any]]:
    """Every variant once a round, after a round that is not counted."""
    loaded = load_config(
        None,
        [
            f"train_path={data}",
            "model_id=smollm2-135m-instruct-q4",
            f"train_batch_size_per_device={rows_per_step}",
        ]
        + [f"{key}={json.dumps(value)}" for key, value in METHODS[method].items()],
    )
    parts = assemble(loaded, skip_bad_rows=False, say=print)
    assert isinstance(parts.passes, KernelPasses), parts.passes_reason
    trained = trainable_parameters(parts.model)
    optimizers = {fused: torch.optim.AdamW(trained, lr=0.0, fused=fused) for fused in (True, False)}
    rows, chosen = parts.text.splits.train, list(range(rows_per_step))
    real_tokens = int(rows.lengths[chosen].sum())
    tried = [variant for variant in variants() if method in variant.methods]
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        for variant in tried:
            seconds, loss = timed_step(parts, parts.passes, variant, optimizers, chosen)
            facts = {"method": method, "off": variant.name, "round": number, "seconds": seconds, "loss": loss}
            if not variant.changes_loss and found and abs(loss - found[0]["loss"]) > _LOSS_TOLERANCE:
                raise SystemExit(f"{variant.name}: loss {loss}, with everything on {found[0]['loss']}")
            found.append(facts | {"real_tokens_per_second": real_tokens / seconds})
            print(
                f"{method} round {number} without {variant.name}: {real_tokens / seconds:.0f} tokens/s",
                flush=True,
            )
    return [facts for facts in found if facts["round"]]


def table(steps: Sequence[dict[str, Any]]) -> str:
    """Medians: tokens/s with one idea off, and what it is worth, in brackets the least and most of a round."""
    lines = ["| method | off | real tokens/s | with it, times as fast |", "|---|---|---|---|"]
    for method in dict.fromkeys(step["method"] for step in steps):
        speeds: dict[str, list[float]] = {}
        for step in steps:
            if step["method"] == method:
                speeds.setdefault(step["off"], []).append(step["real_tokens_per_second"])
        whole = speeds["nothing"]
        for name, own in speeds.items():
            # Of one round each: a machine that slows down slows both.
            ratios = sorted(a / b for a, b in zip(whole, own, strict=True))
            worth = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
            lines.append(f"| {method} | {name} | {statistics.median(own):.0f} | {worth} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a JSONL file")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    steps: list[dict[str, Any]] = []
    for method in chosen.methods.split(","):
        steps += measure(method, chosen.data, chosen.rounds, chosen.rows_per_step)
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "data": f"{chosen.data.parent.name}/{chosen.data.name}",
            "rows_per_step": chosen.rows_per_step,
            "machine": machine(),
            "versions": versions(),
            "steps": steps,
        }
        chosen.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        (chosen.output_dir / "ablation.json").write_text(text, encoding="utf-8")
        (chosen.output_dir / "ablation.md").write_text(table(steps), encoding="utf-8")
    print(table(steps))


if __name__ == "__main__":
    main()
