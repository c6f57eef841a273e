"""Everything a comparison has to know before its first training, checked while it still costs nothing."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.assembly import Say, assemble_text, held_out, refuse_contradictions, rows_per_step
from tunesmith.checkpoints.atomic import write_text
from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.record import Arm
from tunesmith.comparison.sweep import middle_rate, rate_grid
from tunesmith.comparison.trials import TrainRows, slug
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.load import DEFAULT_LEARNING_RATE, LoadedConfig
from tunesmith.config.schema import LoraMethod
from tunesmith.config.yaml_file import parse_value
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.rendering import Renderer
from tunesmith.data.rows import TokenizedRows
from tunesmith.data.sources import RawRecord, read_records
from tunesmith.errors import ConfigError, DataError
from tunesmith.models.base import BaseFolder
from tunesmith.paths import expanded
from tunesmith.planned_adapter import with_adapter
from tunesmith.run_open import base_weights
from tunesmith.starting_points import weights_id
from tunesmith.training.schedule import plan_steps


@dataclass(frozen=True)
class CompareOptions:
    """What the command was asked for, beside the configuration.

    Attributes:
        arms: texts of ``--arms``.
        learning_rates: texts of ``--learning-rates``: ``ARM=RATE,RATE`` or rates for every arm.
        sweep_budget: what each arm's sweep may take, in full runs.
        output: the folder of the comparison; None: ``{output_dir}/compare-{name of the file}``.
        forgetting: files of general text beside the shipped ones.
        price_per_hour: of this machine, in any currency.
    """

    arms: tuple[str, ...]
    seeds: int
    learning_rates: tuple[str, ...]
    sweep_budget: float
    output: Path | None
    forgetting: tuple[str, ...]
    price_per_hour: float | None
    skip_bad_rows: bool


@dataclass(frozen=True)
class Experiment:
    """A comparison ready to start.

    Attributes:
        folder: of the comparison.
        settings: the configuration, resolved, ``lora_config`` left out.
        rates: the grid of each arm.
        given_rates: arms whose grid the user named; it does not grow.
        full_steps: optimizer steps of a final run.
        identity: digests of data and base weights, and what the DeepSpeed file says.
        is_selected_on: whether the compared rows also chose rate and checkpoint.
    """

    folder: Path
    settings: Mapping[str, Any]
    arms: tuple[Arm, ...]
    rates: Mapping[str, tuple[float, ...]]
    given_rates: frozenset[str]
    seeds: tuple[int, ...]
    full_steps: int
    train_rows: TrainRows
    identity: Mapping[str, Any]
    base: str
    task: str
    metric: str | None
    rows: int
    data: Mapping[str, Mapping[str, Any]]
    is_selected_on: bool


def prepare(loaded: LoadedConfig, options: CompareOptions, say: Say) -> Experiment:
    """Read the rows, check the arms, work out grids and steps.

    Raises:
        ConfigError, DataError, ModelError: what cannot be compared.
    """
    config = loaded.config
    _refuse(loaded)
    method = config.method
    given = method.lora_config if isinstance(method, LoraMethod) else None
    arms = parse_arms(options.arms, given)
    rates, given_rates = _rates(arms, options.learning_rates, loaded)
    text = assemble_text(loaded, weights=True, skip_bad_rows=options.skip_bad_rows, say=say)
    fitted = text.splits.fitted(text.context_length, config.data.on_too_long)
    heldout, valid = held_out(loaded, text, fitted, skip_bad_rows=options.skip_bad_rows)
    assert heldout is not None  # _refuse has seen to it
    assert valid is not None
    _check_arms(arms, text.base)
    for file in options.forgetting:
        _check_general(file, text.renderer, text.context_length)
    optimization = config.optimization
    batch = rows_per_step(
        optimization.train_batch_size_per_device,
        optimization.gradient_accumulation_steps,
        config.cluster.num_devices,
    )
    plan = plan_steps(len(fitted.train), batch, optimization.num_epochs, optimization.min_update_steps)
    folder = options.output or expanded(config.output.output_dir) / f"compare-{_name(loaded)}"
    data = {
        name: {"path": rows.path, "sha256": rows.sha256, "rows": len(rows)}
        for name, rows in (("train", fitted.train), ("valid", valid.rows), ("test", heldout.rows))
    }
    settings = {key: value for key, value in loaded.resolved().items() if key != "lora_config"}
    return Experiment(
        folder=folder,
        settings=settings,
        arms=arms,
        rates=rates,
        given_rates=given_rates,
        seeds=tuple(optimization.seed + i for i in range(options.seeds)),
        full_steps=plan.total_steps,
        train_rows=TrainRows(
            fitted.train.path, len(fitted.train), batch, _Subsets(fitted.train, folder / "rows").file
        ),
        identity={
            "base": base_weights(text.base).fingerprint,
            "tokens": token_digest((fitted.train, valid.rows, heldout.rows)),
            **{name: facts["sha256"] for name, facts in data.items()},
            **deepspeed_identity(loaded),
        },
        base=weights_id(config.model),
        task=text.splits.train_on.value,
        metric=heldout.metric,
        rows=len(heldout.rows),
        data=data,
        is_selected_on=data["test"]["sha256"] == data["valid"]["sha256"],
    )


def _refuse(loaded: LoadedConfig) -> None:
    refuse_contradictions(loaded)
    config = loaded.config
    if config.data.valid_path is None:
        raise ConfigError(
            loaded.place("valid_path"),
            "is absent: a learning rate is chosen by the loss on validation rows",
            "set valid_path, and evaluation.test_path for rows that choose nothing",
        )
    if config.model.initial_adapter_model_ckpt_path is not None:
        raise ConfigError(
            loaded.place("initial_adapter_model_ckpt_path"),
            "starts LoRA alone from trained weights, so the arms would not start alike",
            "merge the adapter, and set initial_base_model_ckpt_path to the result",
        )


def _rates(
    arms: Sequence[Arm], texts: Sequence[str], loaded: LoadedConfig
) -> tuple[dict[str, tuple[float, ...]], frozenset[str]]:
    own = "lora" if isinstance(loaded.config.method, LoraMethod) else "full"
    given = loaded.config.optimization.learning_rate
    rates = {arm.name: rate_grid(middle_rate(arm.method, given, own, DEFAULT_LEARNING_RATE)) for arm in arms}
    named: dict[str, tuple[float, ...]] = {}
    for text in texts:
        # An arm's own name may hold an "=": lora:r=16=1e-4,3e-4. Without one it is "", which means every arm.
        name, equals, values = text.rpartition("=")
        if equals and name not in rates:
            raise ConfigError(f"--learning-rates {text}", f"no arm {name!r}", f"arms are {', '.join(rates)}")
        if name in named:
            fault = f"gives rates for {name or 'every arm'} a second time"
            raise ConfigError(
                f"--learning-rates {text}", fault, "put them into one list, separated by commas"
            )
        named[name] = tuple(_rate(value, text) for value in values.split(","))
    for_all = named.pop("", None)
    if for_all is not None:
        named = {**dict.fromkeys(rates, for_all), **named}
    return {**rates, **named}, frozenset(named)


def _rate(text: str, place: str) -> float:
    value = parse_value(text.strip(), f"--learning-rates {place}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(
            f"--learning-rates {place}", f"{text.strip()!r} is no rate", "for example lora=1e-4,3e-4"
        )
    return float(value)


def _check_arms(arms: Sequence[Arm], base: BaseFolder) -> None:
    """Target names and PEFT's own checks, on a model without weights: an adapter is put on as it would be trained."""
    for arm in arms:
        if arm.lora_config is not None:
            with_adapter(base, arm.lora_config, f"--arms {arm.name}")


def _check_general(file: str, renderer: Renderer, context_length: int) -> None:
    """A text to see forgetting on is looked at before days of training, not after them."""
    from tunesmith.comparison.forgetting import general_rows  # torch is slow to import

    rows = fit_to_length(general_rows(file, renderer), context_length, "error")
    if not len(rows):
        raise DataError(f"--forgetting {file}", "has no text of two tokens or more", "name a longer one")


def deepspeed_identity(loaded: LoadedConfig) -> dict[str, Any]:
    """What the DeepSpeed file asks for, wherever it lies; nothing where there is none.

    The settings that it states are among those of the run already. Keys that change no result, such as what is printed,
    are left out.
    """
    group = loaded.config.cluster.deepspeed
    if group is None:
        return {}
    found = asdict(replace(read_deepspeed(group.config_path), settings={}, meanings=()))
    return {"deepspeed": found}


def token_digest(splits: Sequence[TokenizedRows]) -> str:
    """Digest of what is trained and scored on: another chat template makes other tokens of the same file."""
    digest = hashlib.sha256()
    for rows in splits:
        for part in (rows.ids, rows.trained, rows.starts):
            digest.update(f"{part.dtype} {len(part)} ".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _name(loaded: LoadedConfig) -> str:
    origins = {s.origin.rpartition(" line ")[0] for s in loaded.settings if " line " in s.origin}
    return slug(Path(min(origins)).stem) if origins else slug(loaded.config.model.model_id)


@dataclass(frozen=True)
class _Subsets:
    """Files with some of the training rows."""

    rows: TokenizedRows
    folder: Path

    def file(self, count: int) -> str:
        """``count`` rows drawn without replacement, in the order of the file; the same ones each time.

        Drawn, since files are often sorted. The draw hangs on the content alone, so every arm sees the same rows, and
        a smaller subset is part of a larger one.
        """
        seed = int.from_bytes(hashlib.sha256(self.rows.sha256.encode()).digest()[:8])
        chosen = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        wanted = {self.rows.origin(int(row)) for row in chosen}
        # Which rows there are to draw from hangs on more than the file: on context_length, say.
        digest = hashlib.sha256(
            "\n".join([self.rows.sha256, *sorted(wanted)]).encode("utf-8", "surrogateescape")
        )
        target = self.folder / f"train-{count}-{digest.hexdigest()[:12]}.jsonl"
        if target.is_file():
            return str(target)
        lines = [
            record.text
            for record in read_records(self.rows.path)
            if isinstance(record, RawRecord) and f"{record.file}:{record.line}" in wanted
        ]
        if len(lines) != count:
            raise DataError(
                self.rows.path,
                f"has changed: {len(lines):,} of {count:,} rows are where they were",
                "start again",
            )
        write_text(target, "\n".join(lines) + "\n")
        return str(target)
