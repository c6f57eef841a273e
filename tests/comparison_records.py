"""A comparison written down by hand, as a real one of the default model on 541 rows could come out."""

import math

from tunesmith.comparison.record import (
    FORMAT,
    Advice,
    Arm,
    ArmSummary,
    BaseScore,
    ComparisonRecord,
    Difference,
    Estimate,
    Forgetting,
    LossPoint,
    RunEntry,
    SampleAnswers,
    Serving,
    SweepPoint,
    Verdict,
)

ARMS = {"full": 1e-5, "lora": 1e-4, "lora:r=64": 3e-4}
_STEPS = 320


def _curve(start: float, end: float, every: int, wobble: float, seed: int) -> tuple[LossPoint, ...]:
    points = []
    for step in range(every, _STEPS + 1, every):
        noise = wobble * math.sin(12.9898 * step + 78.233 * seed)
        points.append(LossPoint(step, step / 160, end + (start - end) * math.exp(-step / 60) + noise))
    return tuple(points)


def _runs() -> list[RunEntry]:
    runs = []
    for index, (arm, rate) in enumerate(ARMS.items()):
        for number, rates in enumerate([[rate / 10, rate, rate * 10], [rate]]):
            for tried in rates:
                fails = tried == 1e-4 and arm == "full"
                runs.append(
                    RunEntry(
                        f"s{arm}{number}{tried}", arm, "sweep", number, tried, 0,
                        "failed" if fails else "finished", f"runs/{arm.replace(':', '-')}-sweep-{number}-{tried:g}",
                        80 * (number + 1), None if fails else 0.3 + 0.02 * index, None, 90.0, 81.0, 812.5,
                        1_500_000_000, (), (), "step 12: the loss became NaN" if fails else None,
                    )
                )  # fmt: skip
        for seed in range(3):
            end = 0.112 + 0.004 * index + 0.002 * seed
            runs.append(
                RunEntry(
                    f"f{arm}{seed}", arm, "final", None, rate, seed, "finished", f"runs/{arm.replace(':', '-')}-{seed}",
                    _STEPS, end + 0.001, 0.81 - 0.004 * index, 700.0 - 160 * index, 610.0, 840.0, 1_500_000_000,
                    _curve(1.9, end - 0.03, 1, 0.05, seed), _curve(1.4, end, 40, 0.001, seed),
                )
            )  # fmt: skip
    return runs


def _points() -> tuple[SweepPoint, ...]:
    points = []
    for arm, rate in ARMS.items():
        for number, factors in enumerate([(0.1, 0.3, 1, 3, 10), (0.3, 1, 3), (1,)]):
            for factor in factors:
                away = math.log10(factor) ** 2
                loss = None if arm == "full" and factor == 10 else 0.16 + 0.08 * away + 0.05 / (number + 1)
                points.append(
                    SweepPoint(
                        arm, number, rate * factor, 40 * 2**number, loss, abs(away) < 0.1 - 0.04 * number
                    )
                )
    return tuple(points)


def _summaries() -> tuple[ArmSummary, ...]:
    sizes = {
        "full": (3_310_000_000, 538_000_000, 134_515_008, 741.0),
        "lora": (1_360_000_000, 9_800_000, 2_442_240, 402.0),
        "lora:r=64": (1_520_000_000, 78_200_000, 19_537_920, 455.0),
    }
    return tuple(
        ArmSummary(
            arm=arm,
            learning_rate=rate,
            at_edge_of_grid=arm == "lora:r=64",
            seeds=(0, 1, 2),
            failed_runs=1 if arm == "full" else 0,
            eval_loss=Estimate(0.1142 + 0.0031 * i, (0.1021 + 0.0031 * i, 0.1266 + 0.0031 * i), 541),
            metric=Estimate(0.812 - 0.008 * i, (0.779 - 0.008 * i, 0.842 - 0.008 * i), 541),
            wall_seconds=sizes[arm][3],
            training_seconds=sizes[arm][3] - 60,
            tokens_per_second=640.0 + 300 * (arm != "full"),
            peak_memory_bytes=sizes[arm][0],
            trainable_parameters=sizes[arm][2],
            total_parameters=134_515_008 + (0 if arm == "full" else sizes[arm][2]),
            checkpoint_bytes=sizes[arm][1],
            training_cost=sizes[arm][3] / 3600 * 0.34,
            sweep_seconds=1000.0,
            serving=Serving(2.31, 2.31, 538_000_000, 41.2, None)
            if arm == "full"
            else Serving(2.4, 0.021, sizes[arm][1], 41.0, 36.5),
        )
        for i, (arm, rate) in enumerate(ARMS.items())
    )


def _forgetting() -> tuple[Forgetting, ...]:
    return tuple(
        Forgetting(
            arm, seed, source, 60, 3.7673, 3.7673 + change + 0.01 * seed,
            Estimate(change + 0.01 * seed, (change - 0.03, change + 0.05), 60),
            Estimate(80 / 120, (0.5783, 0.7447), 120) if source == "shipped" else None,
            Estimate((80 - 4 * i) / 120, (0.55, 0.72), 120) if source == "shipped" else None,
        )
        for source in ("shipped", "data/mine.jsonl")
        for i, (arm, change) in enumerate({"full": 0.21, "lora": 0.05, "lora:r=64": 0.09}.items())
        for seed in range(3)
    )  # fmt: skip


def record(**changes) -> ComparisonRecord:
    """A finished comparison of three arms; ``changes`` replace fields."""
    fields = {
        "format": FORMAT,
        "name": "compare-viggo",
        "status": "finished",
        "created": "2026-11-24T17:00:00Z",
        "seconds": 9130.0,
        "runs_done": 21,
        "runs_planned": 21,
        "model_id": "smollm2-135m-instruct-q4",
        "task": "instruction_tuning",
        "metric": "record_match",
        "rows": 541,
        "metric_rows": 541,
        "price_per_hour": 0.34,
        "arms": (
            Arm("full", "full-parameter", "full", None),
            Arm("lora", "LoRA, r 8", "lora", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
            Arm("lora:r=64", "LoRA, r 64", "lora", {"r": 64, "lora_alpha": 16}),
        ),
        "base": BaseScore(2.4131, Estimate(0.021, (0.012, 0.037), 541)),
        "sweep": _points(),
        "runs": tuple(_runs()),
        "summaries": _summaries(),
        "differences": (
            Difference("record_match", "full", "lora", 0.008, (-0.019, 0.034), 541, 3, False),
            Difference("eval_loss", "full", "lora", -0.0031, (-0.0058, -0.0004), 541, 3, True),
            Difference("general_loss", "full", "lora", 0.16, (0.11, 0.22), 60, 3, True),
        ),
        "forgetting": _forgetting(),
        "verdict": Verdict(
            "No difference shown on your 541 rows: 0.8 points, interval -1.9 to +3.4.",
            ("LoRA used 41 % of the memory and 1/55 of the disk.", "Full-parameter training forgot more: +0.16 nats."),
            (
                Advice("many models to serve", "lora", "9.3 MiB a variant against 513.1 MiB"),
                Advice("rapid experiments", "lora", "6:42 a run against 12:21"),
                Advice("maximum quality", None, "the interval of the difference covers 0"),
                Advice("one model", "lora", "no difference shown, and it forgets less"),
            ),
        ),
        "samples": (
            SampleAnswers(
                "Dirt: Showdown is a sport racing game from 2012 with a rating of E 10+.",
                "inform(name[Dirt: Showdown], genres[sport racing])",
                "Dirt: Showdown is a great game!\nI like it.",
                {
                    "full": "inform(name[Dirt: Showdown], genres[sport racing])",
                    "lora": "inform(name[Dirt: Showdown], genres[racing])",
                    "lora:r=64": "inform(name[Dirt: Showdown],  genres[sport racing])",
                },
            ),
        ),
        "settings": {"num_epochs": 2, "optimizer": {"name": "adamw", "betas": [0.9, 0.999]}, "valid_path": None},
        "options": {"arms": ["full", "lora", "lora:r=64"], "seeds": 3},
        "lineage": {
            "base": {"source": "smollm2-135m-instruct-q4"},
            "train": {"path": "train.jsonl", "sha256": "ab" * 32},
        },
        "machine": {"cpu": "x86_64", "ram_bytes": 16 * 2**30},
        "versions": {"tunesmith": "0.1.0", "torch": "2.9.0"},
        "notes": ("One run of full-parameter at 1e-4 failed: step 12: the loss became NaN.",),
    }  # fmt: skip
    return ComparisonRecord(**{**fields, **changes})
