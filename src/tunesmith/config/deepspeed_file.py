"""A DeepSpeed configuration file -> how a run is spread over its workers, and what each of its keys means here.

DeepSpeed itself is not used. What is said of stages, offload and groups describes PyTorch's FSDP2;
``deepspeed_use.py`` tells a run what that comes to with its number of workers. The keys are those of DeepSpeed's
documented configuration (``config-json``) and of its ZeRO section. Every key of a file is accounted for: it sets
something, it has no effect on results, or it has no equivalent; ``describe`` says which, line by line. A key that
DeepSpeed does not document is an error, for a misspelt one would change how a run is spread without a word.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tunesmith.config.yaml_file import KeyPath, parse_yaml
from tunesmith.errors import ConfigError, shown_value

Stage = Literal[0, 1, 2, 3]

_STAGES: Mapping[Stage, str] = {
    0: "nothing is split: each worker holds all weights, gradients and optimizer state",
    1: "optimizer state is split over the workers (FSDP2, which splits gradients with it, as stage 2)",
    2: "optimizer state and gradients are split over the workers (FSDP2, weights gathered once a step)",
    3: "fully sharded: weights, gradients and optimizer state are split over the workers (FSDP2)",
}


@dataclass(frozen=True)
class Meaning:
    """What one key of the file does here."""

    place: str  # FILE line N
    key: str  # dotted, such as zero_optimization.stage
    value: Any
    text: str
    is_honoured: bool = True  # False: it asks for something that has no equivalent here
    setting: str = ""  # the setting of ours that "auto" takes its value from

    def line(self, settings: Mapping[str, Any]) -> str:
        """``key value -> what it does``, an "auto" with the value it stands for."""
        text = self.text
        if self.value == "auto" and self.setting:
            known = settings.get(self.setting)
            text = f"{self.setting} of the run" + ("" if known is None else f", which is {known}")
        return f"{self.key} {shown_value(self.value)} -> {text}"


@dataclass(frozen=True)
class Sharding:
    """How a run is spread over its workers.

    ``settings`` holds what the file states for settings that the run's own file has too, under our names:
    ``optimizer.max_grad_norm``, ``precision``, ``train_batch_size_per_device`` and
    ``gradient_accumulation_steps``. What it leaves to "auto" is not in there.
    """

    stage: Stage = 0
    offload_optimizer: bool = False  # optimizer state and its step in the host's memory
    offload_parameters: bool = False  # weights in the host's memory while they are not computed with
    hpz_partition_size: int = 1  # > 1: after the forward pass weights stay gathered within groups of so many
    settings: Mapping[str, Any] = field(default_factory=dict)
    train_batch_size: int | None = None  # rows of a step over all workers; None: not stated
    meanings: tuple[Meaning, ...] = ()

    @property
    def not_honoured(self) -> tuple[Meaning, ...]:
        """Keys that ask for something without an equivalent here."""
        return tuple(meaning for meaning in self.meanings if not meaning.is_honoured)


def read_deepspeed(path: str | Path) -> Sharding:
    """Read a DeepSpeed file: JSON, at ``path`` or, where nothing lies there, one of the shipped presets.

    Raises:
        ConfigError: it cannot be read, is no JSON, has a key or value that DeepSpeed does not document, or keys
            that contradict each other; one line with file and line.
    """
    return _Reader(_read(Path(path)), str(path)).sharding()


def describe(sharding: Sharding, settings: Mapping[str, Any] | None = None) -> list[str]:
    """One line for each key of the file: ``zero_optimization.stage 3 -> fully sharded: …``.

    Args:
        sharding: what ``read_deepspeed`` found.
        settings: the run's values by dotted name, such as ``optimizer.max_grad_norm``, from which "auto" is
            resolved; without them the line names the setting alone.
    """
    return [meaning.line(settings or {}) for meaning in sharding.meanings]


def refuse_contradictions(
    sharding: Sharding, given: Mapping[str, Any], num_devices: int | None = None
) -> None:
    """Refuse a run whose own file states other values than its DeepSpeed file.

    Args:
        sharding: what ``read_deepspeed`` found.
        given: settings that the run's file or command line states, by dotted name; defaults left out.
        num_devices: number of workers, for ``train_batch_size``.

    Raises:
        ConfigError: naming the first contradiction.
    """
    places = {meaning.setting: meaning for meaning in sharding.meanings if meaning.setting}
    for setting, value in sharding.settings.items():
        if setting in given and given[setting] not in (value, "auto"):
            there = places[setting]
            raise ConfigError(
                there.place,
                f"{there.key} is {shown_value(there.value)}, but {setting} is {shown_value(given[setting])}",
                'keep one, or write "auto" there',
            )
    both = {**given, **sharding.settings}
    rows = both.get("train_batch_size_per_device")
    if sharding.train_batch_size is None or num_devices is None or not isinstance(rows, int):
        return
    step = rows * both.get("gradient_accumulation_steps", 1) * num_devices
    if step != sharding.train_batch_size:
        there = next(m for m in sharding.meanings if m.key == "train_batch_size")
        raise ConfigError(
            there.place,
            f"train_batch_size is {there.value}, but batch size, accumulation and {num_devices} workers make {step}",
            'change one of them, or write "auto"',
        )


# Keys without an effect on what is learned.
_TRAFFIC = "how data is cut up and sent, which changes no result"
_LOGGING = "what DeepSpeed prints or records; metrics.jsonl and `logger` have the run's figures"
_ZERO_TRAFFIC = (
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "mics_hierarchical_params_gather",
    "override_module_apply", "overlap_comm", "pipeline_loading_checkpoint", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "sub_group_size", "use_multi_rank_bucket_allreduce",
)  # fmt: skip
_ZERO_TRAFFIC_3 = (
    "allgather_sequential", "max_live_parameters", "max_reuse_distance", "model_persistence_threshold",
    "module_granularity_threshold", "param_persistence_threshold", "partition_stream_chunk_size",
    "prefetch_bucket_size", "use_all_reduce_for_fetch_params",
)  # fmt: skip
_ZERO_WITHOUT = {
    "elastic_checkpoint": "checkpoints load with any number of workers anyhow",
    "mics_shard_size": "no equivalent: weights are split over all workers; zero_hpz_partition_size is near it",
    "save_muon_momentum_buffer_in_memory": "no equivalent: the optimizer is AdamW",
    "zenflow": "no equivalent: optimizer steps are not postponed",
    "zero_quantized_gradients": "no equivalent: gradients are sent as they are",
    "zero_quantized_nontrainable_weights": "no equivalent: frozen weights keep the run's number format",
    "zero_quantized_weights": "no equivalent: weights are sent as they are",
    "zeropp_loco_param": "no equivalent: gradients are sent as they are",
}
_OFFLOAD_DETAILS = (
    "buffer_count", "buffer_size", "convert_grad_on_cpu", "cpuadam_cores_perc", "fast_init", "max_in_cpu",
    "nvme_path", "pin_memory", "pipeline_read", "pipeline_write", "ratio", "super_offload",
)  # fmt: skip
_TOP_LOGGING = (
    "comms_logger", "csv_monitor", "comet", "dump_state", "flops_profiler", "memory_breakdown",
    "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb",
)  # fmt: skip
_TOP_WITHOUT = {
    "activation_checkpointing": "no equivalent: set gradient_checkpointing in the run's file",
    "aio": "no equivalent: nothing is moved to NVMe",
    "amp": "no equivalent: set precision in the run's file",
    "autotuning": "no equivalent: nothing is tuned by trial",
    "checkpoint": "checkpoints are tunesmith's own",
    "communication_data_type": "no equivalent: gradients are sent as they are",
    "compile": "no equivalent: models are not compiled",
    "compression_training": "no equivalent: weights are not compressed",
    "curriculum_learning": "no equivalent: every epoch has every row",
    "data_efficiency": "no equivalent: every epoch has every row",
    "data_types": "no equivalent: gradients are summed in float32",
    "disable_allgather": "no equivalent",
    "eigenvalue": "no equivalent",
    "elasticity": "no equivalent: num_devices is fixed for a run",
    "gradient_predivide_factor": "gradients are sums, divided once by the trained tokens of the whole step",
    "optimizer": "set learning_rate and optimizer in the run's file: AdamW",
    "pipeline": "no equivalent: layers are not spread over workers",
    "prescale_gradients": "gradients are sums, divided once by the trained tokens of the whole step",
    "progressive_layer_drop": "no equivalent: every layer is computed",
    "scheduler": "set lr_scheduler_type and num_warmup_steps in the run's file",
    "sequence_parallel_size": "no equivalent: a row is computed by one worker",
    "sparse_attention": "no equivalent: attention is exact",
    "sparse_gradients": "no equivalent: gradients are dense",
    "tensor_parallel": "no equivalent: a matrix is multiplied by one worker",
    "torch_autocast": "no equivalent: set precision in the run's file",
    "zero_allow_untested_optimizer": "the optimizer is AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is PyTorch's AdamW",
}
# Said where a key has an effect that the run's own file decides: not honoured, and named as such.
_ASKS = ("optimizer", "scheduler", "checkpoint")
_FP16_DETAILS = (
    "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads", "hysteresis",
    "initial_scale_power", "loss_scale", "loss_scale_window", "min_loss_scale",
)  # fmt: skip
_BF16_DETAILS = (
    "bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "immediate_grad_update",
)  # fmt: skip


class _Reader:
    """One file being read: each method takes a section, notes what its keys mean and what they set."""

    def __init__(self, file: "_File", name: str) -> None:
        self._file, self._name = file, name
        self._meanings: list[Meaning] = []
        self._settings: dict[str, Any] = {}
        self._train_batch_size: int | None = None
        self._stage: Stage = 0
        self._offload = {"offload_optimizer": False, "offload_param": False}
        self._hpz = 1

    def sharding(self) -> Sharding:
        sections: dict[str, Callable[[KeyPath, Any], None]] = {
            "zero_optimization": self._zero,
            "bf16": self._half,
            "bfloat16": self._half,
            "fp16": self._half,
            "gradient_clipping": self._clipping,
            "gradient_accumulation_steps": self._count("gradient_accumulation_steps"),
            "train_micro_batch_size_per_gpu": self._count("train_batch_size_per_device"),
            "train_batch_size": self._whole_batch,
        }
        known = [*sections, *_TOP_LOGGING, *_TOP_WITHOUT]
        for key, value in self._file.values.items():
            if key in sections:
                sections[key]((key,), value)
            elif key in _TOP_LOGGING:
                self._note((key,), value, _LOGGING)
            elif key in _TOP_WITHOUT:
                text = _TOP_WITHOUT[key]
                asks = key in _ASKS or text.startswith("no equiv")
                self._note((key,), value, text, honoured=not asks or _is_off(value))
            else:
                raise self._unknown((key,), known)
        self._refuse_impossible()
        return Sharding(
            self._stage,
            self._offload["offload_optimizer"],
            self._offload["offload_param"],
            self._hpz,
            MappingProxyType(self._settings),
            self._train_batch_size,
            tuple(self._meanings),
        )

    def _zero(self, path: KeyPath, section: Any) -> None:
        readers: dict[str, Callable[[KeyPath, Any], None]] = {
            "stage": self._zero_stage,
            "offload_optimizer": self._offloading("offload_optimizer", "optimizer state and its step"),
            "offload_param": self._offloading("offload_param", "weights that are not in use"),
            "cpu_offload": self._old_offload("offload_optimizer", "optimizer state and its step"),
            "cpu_offload_param": self._old_offload("offload_param", "weights that are not in use"),
            "cpu_offload_use_pin_memory": lambda p, v: self._note(p, v, _TRAFFIC),
            "zero_hpz_partition_size": self._zero_hpz,
        }
        gather = ("gather_16bit_weights_on_model_save", "gather_fp16_weights_on_model_save")
        traffic = {*_ZERO_TRAFFIC, *_ZERO_TRAFFIC_3, *(f"stage3_{key}" for key in _ZERO_TRAFFIC_3)}
        gathers = {*gather, *(f"stage3_{key}" for key in gather)}
        for key, value in self._group(path, section).items():
            here = (*path, key)
            if key in readers:
                readers[key](here, value)
            elif key in gathers:
                self._note(here, value, "checkpoints always hold whole weights")
            elif key in traffic:
                self._note(here, value, _TRAFFIC)
            elif key in _ZERO_WITHOUT:
                is_off = value in (False, None, -1)
                self._note(here, value, _ZERO_WITHOUT[key], honoured=is_off or key == "elastic_checkpoint")
            else:
                raise self._unknown(here, [*readers, *traffic, *gathers, *_ZERO_WITHOUT])

    def _zero_stage(self, path: KeyPath, value: Any) -> None:
        stage = next((s for s in _STAGES if type(value) is int and value == s), None)
        if stage is None:
            raise self._wrong(path, value, "should be 0, 1, 2 or 3")
        self._stage = stage
        self._note(path, value, _STAGES[stage])

    def _zero_hpz(self, path: KeyPath, value: Any) -> None:
        if not _is_count(value):
            raise self._wrong(path, value, "should be a whole number above 0")
        self._hpz = value
        text = "weights are gathered from all workers"
        if value > 1:
            text = f"after the forward pass weights stay gathered within groups of {value} workers (FSDP2)"
        self._note(path, value, text)

    def _offloading(self, which: str, what: str) -> Callable[[KeyPath, Any], None]:
        def read(path: KeyPath, section: Any) -> None:
            for key, value in self._group(path, section).items():
                here = (*path, key)
                if key == "device":
                    self._device(here, value, which, what)
                elif key in _OFFLOAD_DETAILS:
                    partly = key == "ratio" and value != 1
                    text = "no equivalent: all of it is moved" if partly else _TRAFFIC
                    self._note(here, value, text, honoured=not partly)
                else:
                    raise self._unknown(here, ["device", *_OFFLOAD_DETAILS])

        return read

    def _device(self, path: KeyPath, value: Any, which: str, what: str) -> None:
        if value not in ("none", "cpu", "nvme"):
            raise self._wrong(path, value, 'should be "none", "cpu" or "nvme"')
        self._offload[which] = value != "none"
        if value == "none":
            self._note(path, value, "nothing is moved")
        elif value == "cpu":
            self._note(path, value, f"{what} lie in the host's memory")
        else:
            self._note(path, value, f"no equivalent: {what} lie in the host's memory instead", honoured=False)

    def _old_offload(self, which: str, what: str) -> Callable[[KeyPath, Any], None]:
        def read(path: KeyPath, value: Any) -> None:
            if not isinstance(value, bool):
                raise self._wrong(path, value, "should be true or false")
            self._offload[which] = self._offload[which] or value
            self._note(path, value, f"{what} lie in the host's memory" if value else "nothing is moved")

        return read

    def _half(self, path: KeyPath, section: Any) -> None:
        is_bf16 = path[0] != "fp16"
        details = _BF16_DETAILS if is_bf16 else _FP16_DETAILS
        for key, value in self._group(path, section).items():
            here = (*path, key)
            if key in details:
                self._note(here, value, "weights that are trained, and their optimizer state, stay float32")
            elif key != "enabled":
                raise self._unknown(here, ["enabled", *details])
            elif not (isinstance(value, bool) or value == "auto"):
                raise self._wrong(here, value, 'should be true, false or "auto"')
            elif value is False:
                self._note(here, value, "off")
            elif value == "auto" and is_bf16:
                self._note(here, value, "", setting="precision")
            elif value == "auto":
                self._note(here, value, "off: bf16 or fp32, as precision says")
            elif is_bf16:
                self._settings["precision"] = "bf16"
                self._note(here, value, "precision bf16", setting="precision")
            else:
                self._note(
                    here, value, "no equivalent: bf16 or fp32, as precision says; never fp16", honoured=False
                )

    def _clipping(self, path: KeyPath, value: Any) -> None:
        setting = "optimizer.max_grad_norm"
        if value != "auto":
            if not _is_number(value) or value < 0:
                raise self._wrong(path, value, 'should be a number, at least 0, or "auto"')
            self._settings[setting] = float(value)
        text = f"{setting} {value}" if value != 0 else f"{setting} 0: no clipping"
        self._note(path, value, text, setting=setting)

    def _count(self, setting: str) -> Callable[[KeyPath, Any], None]:
        def read(path: KeyPath, value: Any) -> None:
            if value != "auto":
                if not _is_count(value):
                    raise self._wrong(path, value, 'should be a whole number above 0, or "auto"')
                self._settings[setting] = value
            self._note(path, value, f"{setting} {value}", setting=setting)

        return read

    def _whole_batch(self, path: KeyPath, value: Any) -> None:
        if value == "auto":
            text = "train_batch_size_per_device x gradient_accumulation_steps x num_devices of the run"
            self._note(path, value, text)
            return
        if not _is_count(value):
            raise self._wrong(path, value, 'should be a whole number above 0, or "auto"')
        self._train_batch_size = value
        self._note(path, value, f"{value} rows a step over all workers, compared with the run's own numbers")

    def _refuse_impossible(self) -> None:
        needs = (
            (self._offload["offload_param"], 3, "offload_param"),
            (self._offload["offload_optimizer"], 1, "offload_optimizer"),
            (self._hpz > 1, 3, "zero_hpz_partition_size"),
        )
        for is_on, least, key in needs:
            if is_on and self._stage < least:
                wanted = "stage 3" if least == 3 else "stage 1, 2 or 3"
                place = self._file.place(("zero_optimization", key))
                raise ConfigError(place, f"{key} needs {wanted}, not {self._stage}", "change the stage")
        halves = [m for m in self._meanings if m.key.endswith("16.enabled") and m.value is True]
        if len(halves) > 1:
            names = " and ".join(half.key.partition(".")[0] for half in halves)
            raise ConfigError(halves[1].place, f"{names} are both enabled", "disable one")

    def _note(
        self, path: KeyPath, value: Any, text: str, *, honoured: bool = True, setting: str = ""
    ) -> None:
        place = self._file.place(path)
        self._meanings.append(Meaning(place, ".".join(map(str, path)), value, text, honoured, setting))

    def _group(self, path: KeyPath, section: Any) -> Mapping[str, Any]:
        if isinstance(section, dict):
            return section
        if section is None:  # written out as absent
            return {}
        raise self._wrong(path, section, "should be a group of settings")

    def _wrong(self, path: KeyPath, value: Any, wish: str) -> ConfigError:
        key = ".".join(map(str, path))
        return ConfigError(
            self._file.place(path), f"{key} is {shown_value(value)}; it {wish}", "change the value"
        )

    def _unknown(self, path: KeyPath, known: list[str]) -> ConfigError:
        near = difflib.get_close_matches(str(path[-1]), known, 1, cutoff=0.65)
        remedy = f"closest is {near[0]}" if near else "leave it out"
        key = ".".join(map(str, path))
        return ConfigError(self._file.place(path), f"DeepSpeed documents no key {key}", remedy)


@dataclass(frozen=True)
class _File:
    name: str
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def place(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name} line {self.lines[path[:length]]}"
        return self.name


def _read(path: Path) -> _File:
    name, found = str(path), _find(path)
    try:
        text = found.read_bytes().decode("utf-8-sig")
    except OSError as error:
        remedy = f"shipped files: {', '.join(_shipped())}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(name, f"cannot be read ({error.strerror})", remedy or "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name} line {error.lineno}", f"is not valid JSON: {error.msg}", "mend it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(name, f"is not valid JSON: {error}", "mend it") from error
    if not isinstance(values, dict):
        raise ConfigError(name, "is not a group of settings", "a DeepSpeed file is one JSON object")
    return _File(name, values, _lines(text))


def _find(path: Path) -> Path:
    """``path``, or the shipped preset of that name: LLMForge's files say ``deepspeed_configs/zero_3.json``."""
    with suppress(OSError):  # too long a name, which reading it says
        if not (path.exists() or path.is_absolute() or path.parent.name not in ("", "deepspeed_configs")):
            return next((f / path.name for f in _shipped_folders() if (f / path.name).is_file()), path)
    return path


def _shipped_folders() -> list[Path]:
    # As with configs/: inside an installed package, or beside src/ in a checkout.
    packaged = Path(str(resources.files("tunesmith"))) / "deepspeed_configs"
    checkout = Path(__file__).resolve().parents[3] / "deepspeed_configs"
    return [folder for folder in (packaged, checkout) if folder.is_dir()]


def _shipped() -> list[str]:
    return sorted(path.name for folder in _shipped_folders() for path in folder.glob("*.json"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{shown_value(key)} is given twice")
        seen[key] = value
    return seen


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _lines(text: str) -> Mapping[KeyPath, int]:
    # JSON is YAML once its tabs, which stand only between tokens, are blanks; the YAML reader knows lines. What it
    # cannot follow, such as a key and its colon on two lines, is then named without a line.
    try:
        return parse_yaml(re.sub("\t", " ", text), "").lines
    except ConfigError:
        return {}


def _is_off(value: Any) -> bool:
    """Whether a section or switch asks for nothing."""
    return value in (None, False) or (isinstance(value, dict) and value.get("enabled") is False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
