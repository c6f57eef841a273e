"""The whole plan of a configuration: LoRA and full-parameter, on this machine and on those of the data file."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.assembly import TRAIN_TOKEN_BUDGET, refuse_contradictions
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import LoraMethod
from tunesmith.data.rows import TokenizedRows
from tunesmith.free_memory import resident_bytes
from tunesmith.memory_plan import TOKEN_BUDGETS, added_bytes, shapes_beside
from tunesmith.models.base import BaseFolder, choose_dtype
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.method import prepare_full
from tunesmith.planned_adapter import skeleton, with_adapter
from tunesmith.planning.clusters import Cluster, MicroBatch, best, clusters, gpus, micro_batch, of_size
from tunesmith.planning.cost import workload_flops
from tunesmith.planning.formulae import PLAIN, Footprint, Offload, Sharding, gpu_footprint
from tunesmith.planning.hardware import Hardware, read_hardware
from tunesmith.planning.machines import THIS, Machine, OnMachine, Trained, machines, on_machine, trained
from tunesmith.planning.nearest import Beside, nearest
from tunesmith.planning.probe import Measured, probe
from tunesmith.planning.shapes import (
    Adapter,
    ModelShape,
    adapter_shape,
    model_shape,
    shape_folder,
    stored_numbers,
)
from tunesmith.planning.workload import Workload, read_workload
from tunesmith.serving.findings import read_json
from tunesmith.starting_points import adapter_to_continue, weights_id

Kind = Literal["lora", "full"]
KINDS: tuple[Kind, Kind] = ("lora", "full")


@dataclass(frozen=True)
class PlanOptions:
    """What the command was asked for, beside the configuration.

    Attributes:
        rows: so many rows of ``context_length`` tokens instead of those of ``train_path``.
        hardware: a data file in place of the shipped one.
        price_per_hour: of this machine.
        probe: whether to train a few real steps.
    """

    rows: int | None = None
    hardware: Path | None = None
    price_per_hour: float | None = None
    probe: bool = False
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class MethodPlan:
    """One method.

    Attributes:
        adapter: None: full-parameter.
        trained: parameters.
        gpu: on one GPU that shares with none.
        clusters: by GPU and way to shard, the fewest that hold it.
        machines: without a GPU, this one first.
    """

    kind: Kind
    adapter: Adapter | None
    trained: int
    gpu: Footprint
    clusters: Mapping[str, Mapping[Sharding, Cluster | None]]
    machines: tuple[OnMachine, ...]

    def best(self, gpu: str) -> Cluster | None:
        """The cluster to take of a kind of GPU."""
        return best(self.clusters[gpu])


@dataclass(frozen=True)
class Asked:
    """What the configuration asks for, on each GPU: so many devices, shared out in one way.

    ``is_given``: the file names a number of devices or a DeepSpeed file.
    """

    devices: int
    sharding: Sharding
    is_given: bool
    clusters: Mapping[str, Cluster]


@dataclass(frozen=True)
class Plan:
    """All that ``tunesmith plan`` tells.

    Attributes:
        configured: the method of the file; ``asked``: its devices; ``measured``: by its probe.
        remedy: what would make the configured method fit on this machine; empty where it fits, or nobody knows.
    """

    model_id: str
    shape: ModelShape
    configured: Kind
    asked: Asked
    workload: Workload
    batch: MicroBatch
    hardware: Hardware
    methods: Mapping[Kind, MethodPlan]
    measured: Measured | None
    notices: tuple[str, ...]
    remedy: str = ""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The configured method, then the other."""
        return tuple(sorted(KINDS, key=lambda kind: kind != self.configured))


def make_plan(loaded: LoadedConfig, options: PlanOptions, say: Callable[[str], None]) -> Plan:
    """Plan a configuration; no weights are read, unless a probe is asked for.

    Raises:
        ConfigError, DataError, ModelError: what the configuration or the options name cannot be used.
        RunError: the probe failed.
    """
    refuse_contradictions(loaded)
    hardware = read_hardware(options.hardware)
    with shape_folder(weights_id(loaded.config.model)) as base:
        workload = read_workload(loaded, base, options.rows, skip_bad_rows=options.skip_bad_rows, say=say)
        methods, notices = _methods(loaded, base, workload)
    measured = None
    if options.probe:
        say("Training a few steps as configured")
        measured = probe(loaded, skip_bad_rows=options.skip_bad_rows)
    found = list(machines(hardware, options.price_per_hour))
    program, seed = resident_bytes(), loaded.config.optimization.seed
    shape, checkpointing = methods["full"].shape, loaded.config.model.gradient_checkpointing
    batch = micro_batch(workload, TRAIN_TOKEN_BUDGET, checkpointing)
    planned = {
        kind: _method(kind, method, workload, batch, hardware, found, seed, program)
        for kind, method in methods.items()
    }
    configured: Kind = "lora" if isinstance(loaded.config.method, LoraMethod) else "full"
    if measured is not None:
        planned = _with_measured(planned, configured, measured, workload, shape, checkpointing)
    remedy = _remedy(methods[configured], planned[configured].machines[0], workload, seed, program)
    asked, more = _asked(loaded, hardware, methods[configured], workload, batch)
    return Plan(
        loaded.config.model.model_id, shape, configured, asked, workload, batch, hardware, planned, measured,
        (*notices, *more), remedy,
    )  # fmt: skip


def _asked(
    loaded: LoadedConfig, hardware: Hardware, method: Trained, workload: Workload, batch: MicroBatch
) -> tuple[Asked, tuple[str, ...]]:
    """The configuration's own devices and DeepSpeed file, and what is to be known of them."""
    settings, sharding = loaded.config.cluster, PLAIN
    devices, notices = settings.num_devices, list[str]()
    if settings.deepspeed is not None:
        found = read_deepspeed(settings.deepspeed.config_path)
        offload: Offload = "optimizer" if found.offload_optimizer else "none"
        if found.offload_parameters:
            offload = "all" if found.offload_optimizer else "weights"
        sharding = Sharding(found.stage, offload)
        place = loaded.place("deepspeed.config_path")
        if found.stage:
            notices.append(
                f"{place}: planned as the file says; `tunesmith check` tells what a run does of it today"
            )
        if found.hpz_partition_size > 1:
            notices.append(f"{place}: zero_hpz_partition_size is not counted; weights would take more memory")
    if devices > 1:
        notices.append(
            f"{loaded.place('num_devices')} is {devices}: rows of machines without a GPU are of one process that "
            "does the work of all; so many workers on one machine take as many times the memory"
        )
    of_gpus = {
        name: of_size(
            name, gpu, hardware, method.shape, method.adapter, workload, batch, sharding, devices
        )
        for name, gpu in gpus(hardware)
    }  # fmt: skip
    is_given = loaded.is_given("num_devices") or settings.deepspeed is not None
    return Asked(devices, sharding, is_given, of_gpus), tuple(notices)


def _methods(
    loaded: LoadedConfig, base: BaseFolder, workload: Workload
) -> tuple[Mapping[Kind, Trained], tuple[str, ...]]:
    checkpointing = loaded.config.model.gradient_checkpointing
    dtype, _ = choose_dtype(loaded.config.model.precision, torch.device("cpu"))
    why_not = "" if dtype == torch.float32 else f"products are {str(dtype).removeprefix('torch.')}"
    whole = skeleton(base)
    shape = model_shape(whole, base.model_id)
    settings = _lora_settings(loaded, base)
    adapted = with_adapter(base, settings, loaded.place("lora_config"))
    adapter = adapter_shape(adapted, shape.layers)
    notices = []
    if torch.cuda.is_available():
        notices.append(
            "this machine has a GPU, which a run takes; the rows of this machine are its processor's"
        )
    if settings.get("use_dora"):
        notices.append("use_dora: what DoRA holds beside LoRA is not counted, nor its time; both are more")
    stored = stored_numbers(base)
    if stored is not None and stored not in (shape.parameters, shape.parameters + shape.head):
        notices.append(
            f"its *.safetensors hold {stored:,} numbers where config.json describes {shape.parameters:,} parameters"
        )
    return {
        "lora": trained(adapted, shape, adapter, workload, checkpointing, why_not),
        "full": trained(prepare_full(whole), shape, None, workload, checkpointing, why_not),
    }, tuple(notices)


def _lora_settings(loaded: LoadedConfig, base: BaseFolder) -> Mapping[str, Any]:
    """The file's ``lora_config``, those of the adapter that is continued, or the documented defaults."""
    method, start = loaded.config.method, loaded.config.model.initial_adapter_model_ckpt_path
    if not isinstance(method, LoraMethod):
        return {}
    if start is None:
        return method.lora_config
    folder = adapter_to_continue(start, base, method.lora_config, loaded.place("lora_config"))
    saved = read_json(folder / "adapter_config.json")
    return {key: value for key, value in saved.items() if value is not None and key in _SIZES}


# Settings that decide how large an adapter is.
_SIZES = (
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "modules_to_save", "bias", "lora_bias", "use_dora", "lora_dropout", "target_parameters",
)  # fmt: skip


def _method(
    kind: Kind, method: Trained, workload: Workload, batch: MicroBatch, hardware: Hardware,
    found: list[Machine], seed: int, program_bytes: int,
) -> MethodPlan:  # fmt: skip
    shape, adapter = method.shape, method.adapter
    return MethodPlan(
        kind,
        adapter,
        adapter.parameters if adapter else shape.parameters,
        gpu_footprint(shape, adapter, batch.tokens, batch.targets, batch.checkpointing),
        clusters(hardware, shape, adapter, workload, batch),
        tuple(on_machine(machine, method, workload, seed, program_bytes) for machine in found),
    )


def _remedy(method: Trained, here: OnMachine, workload: Workload, seed: int, program_bytes: int) -> str:
    trainer, memory = method.trainer, here.machine.memory_bytes
    if here.footprint.fits or trainer is None or memory is None:
        return ""

    def needs(decoder: Decoder, rows: TokenizedRows, trained_bytes: int, beside: Beside) -> int:
        shapes = shapes_beside(rows, workload.rows_of_step, seed, TOKEN_BUDGETS[-1], beside)
        return added_bytes(decoder, shapes, trained_bytes, beside.answering)

    free = memory - program_bytes - trainer.weight_bytes
    beside = replace(workload.beside, answering=trainer.answering_bytes)
    return nearest(needs, trainer.decoder, workload.examples, trainer.trained_bytes, free, beside)


def _with_measured(
    planned: Mapping[Kind, MethodPlan], configured: Kind, measured: Measured, workload: Workload, shape: ModelShape,
    checkpointing: bool,
) -> dict[Kind, MethodPlan]:  # fmt: skip
    """Time on this machine from what was measured; of the other method in proportion to its FLOPs."""
    seconds = measured.seconds_per_token * workload.tokens * workload.configured.epochs
    flops = {
        kind: workload_flops(shape, method.adapter, workload, checkpointing, workload.num_devices)
        for kind, method in planned.items()
    }
    result = {}
    for kind, method in planned.items():
        basis = f"measured in {measured.steps} steps"
        if kind != configured:
            basis = f"from the measured steps of {NAMES[configured]}, by FLOPs"
        there = [
            replace(row, seconds=seconds * flops[kind] / flops[configured], time_basis=basis)
            if row.machine.name == THIS
            else row
            for row in method.machines
        ]
        result[kind] = replace(method, machines=tuple(there))
    return result


NAMES: Mapping[Kind, str] = {"lora": "LoRA", "full": "full-parameter"}


def plan_facts(plan: Plan, verdict: tuple[str, ...]) -> dict[str, Any]:
    """The same, JSON-serialisable; bytes, seconds."""
    workload = plan.workload
    return {
        "model": plan.model_id,
        "configured": plan.configured,
        "parameters": plan.shape.parameters,
        "shape": asdict(plan.shape),
        "workload": {
            "source": workload.source,
            "rows": workload.rows,
            "tokens": workload.tokens,
            "trained_tokens": workload.targets,
            "longest": workload.longest,
            "context_length": workload.context_length,
            "computed_share": workload.computed,
            "rows_per_step": workload.rows_of_step,
            "epochs": workload.configured.epochs,
            "steps": workload.configured.total_steps,
        },
        "asked": {
            "devices": plan.asked.devices,
            "zero_stage": plan.asked.sharding.stage,
            "offload": plan.asked.sharding.offload,
            "clusters": [
                _cluster_facts(gpu, plan.asked.sharding, cluster)
                for gpu, cluster in plan.asked.clusters.items()
            ],
        },
        "gpu_micro_batch": asdict(plan.batch),
        "hardware": plan.hardware.name,
        "methods": {kind: _method_facts(method) for kind, method in plan.methods.items()},
        "probe": asdict(plan.measured) if plan.measured else None,
        "notices": list(plan.notices),
        "verdict": list(verdict),
    }


def _method_facts(method: MethodPlan) -> dict[str, Any]:
    return {
        "trained_parameters": method.trained,
        "one_gpu": {**asdict(method.gpu), "total": method.gpu.total, "basis": "formula, not measured"},
        "clusters": [
            _cluster_facts(gpu, sharding, cluster)
            for gpu, found in method.clusters.items()
            for sharding, cluster in found.items()
        ],
        "machines": [
            {
                "name": row.machine.name,
                "memory_bytes": row.machine.memory_bytes,
                **asdict(row.footprint),
                "total": row.footprint.total,
                "basis": row.basis,
                "seconds": row.seconds,
                "time_basis": row.time_basis,
                "money": row.money,
            }
            for row in method.machines
        ],
    }


def _cluster_facts(gpu: str, sharding: Sharding, cluster: Cluster | None) -> dict[str, Any]:
    plain: dict[str, Any] = {"gpu": gpu, "zero_stage": sharding.stage, "offload": sharding.offload}
    if cluster is None:
        return plain | {"devices": None}
    return plain | {
        "devices": cluster.devices,
        **asdict(cluster.footprint),
        "total": cluster.footprint.total,
        "usable": cluster.usable,
        "fits": cluster.fits,
        "steps": cluster.cost.steps,
        "seconds": cluster.cost.seconds,
        "money": cluster.cost.money,
        "basis": "formula, not measured",
    }
