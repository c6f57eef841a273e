"""Which learning rate does a configuration deserve? Trains once a rate and lists the validation losses.

    python benchmarks/sweep_learning_rate.py configs/smollm2-135m-lora.yaml 5e-4 1e-3 2e-3 4e-3 --set num_epochs=1

Each run is the command a user would give, without task metrics. Results go to a JSON file beside the runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def train(config: str, rate: str, overrides: list[str], output_dir: Path) -> dict[str, Any]:
    """One run in a process of its own; its report."""
    folder = output_dir / f"{Path(config).stem}-{rate}"
    if folder.exists():
        raise SystemExit(f"{folder}: exists; give another --output-dir, or remove it")
    settings = [f"learning_rate={rate}", f"output_dir={folder}", "evaluation=null", *overrides]
    command = [sys.executable, "-m", "tunesmith", "finetune", config]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (report,) = folder.glob("*/report.json")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Sweep, print a table, write ``sweep.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("rates", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/sweep"))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for rate in arguments.rates:
        report = train(arguments.config, rate, arguments.overrides, arguments.output_dir)
        kept = (
            "method",
            "eval_loss",
            "perplexity",
            "steps",
            "wall_seconds",
            "real_tokens_per_second",
            "machine",
        )
        rows.append({"learning_rate": float(rate), "config": arguments.config, "set": arguments.overrides})
        rows[-1] |= {key: report[key] for key in kept}
        print(f"{rate:>8}  eval loss {report['eval_loss']:.4f}  {report['wall_seconds']:.0f} s", flush=True)
    target = arguments.output_dir / f"sweep-{Path(arguments.config).stem}.json"
    target.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    best = min(rows, key=lambda row: row["eval_loss"])
    print(f"lowest at {best['learning_rate']:g}; results in {target}")


if __name__ == "__main__":
    main()
