"""A plan as tables that fit 100 columns."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.planning.clusters import Cluster, gpus
from tunesmith.planning.formulae import SHARDINGS, Sharding
from tunesmith.planning.plan import Kind, Plan
from tunesmith.planning.verdict import asked_for, duration, gib, money, verdict

ABSENT = "–"
_FORMULA = "formula, not measured"
_NONE = (ABSENT, "", "", "fits on none", "")
_SHORT: dict[Kind, str] = {"lora": "LoRA", "full": "full"}
_BUSY = 0.1  # share of the processors that other programs have, from which on a measured speed says less
_KEPT = {"none": "", "optimizer": "\n+ opt.", "all": "\n+ all"}


def print_plan(console: Console, plan: Plan) -> None:
    """Header, memory, clusters, time and money, verdict."""
    for line in _header(plan):
        console.print(Text(line), soft_wrap=True)
    for notice in plan.notices:
        console.print(Text(f"Note: {notice}", style="yellow"), soft_wrap=True)
    if plan.asked.is_given and plan.asked.clusters:
        console.print(_asked(plan))
    console.print(_memory(plan))
    if any(True for _ in gpus(plan.hardware)):
        console.print(_clusters(plan))
    console.print(_costs(plan))
    if plan.measured is not None:
        console.print(Text(_probed(plan)), soft_wrap=True)
    console.print(
        Text(
            "Rows of GPUs are formulae, not measured; memory, speed, efficiency and prices in "
            f"{plan.hardware.name} are assumptions (--hardware FILE)."
        ),
        soft_wrap=True,
    )
    for sentence in verdict(plan):
        console.print(Text(sentence, style="bold"), soft_wrap=True)


def _header(plan: Plan) -> Iterator[str]:
    workload, steps, lora = plan.workload, plan.workload.configured, plan.methods["lora"]
    yield (
        f"{plan.model_id}: {plan.shape.parameters:,} parameters; LoRA trains {lora.trained:,} "
        f"({lora.trained / plan.shape.parameters:.2%})"
    )
    yield (
        f"{workload.source}; longest {workload.longest:,} tokens, {workload.tokens:,} in all; "
        f"{steps.total_steps:,} steps of {steps.rows_per_step} rows, epochs: {steps.epochs}"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold")


def _asked(plan: Plan) -> Table:
    table = _table(f"What CONFIG asks for: {asked_for(plan)} ({_FORMULA})")
    table.add_column("GPU", no_wrap=True)
    for heading in ("GiB each", "of", "main memory each", "of", "steps", "time", "money"):
        table.add_column(heading, justify="right")
    for name, cluster in plan.asked.clusters.items():
        cost = cluster.cost
        told = (duration(cost.seconds), money(cost.money)) if cluster.fits else ("does not fit", "")
        table.add_row(
            name, gib(cluster.footprint.total), gib(cluster.usable), gib(cluster.footprint.host), gib(cluster.host),
            f"{cost.steps:,}", *told, style=None if cluster.fits else "red",
        )  # fmt: skip
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of one device in GiB, without sharding")
    table.add_column("where")
    table.add_column("method")
    for heading in ("weights", "grads", "optim.", "activ.", "head", "other", "total", "has"):
        table.add_column(heading, justify="right")
    for kind in plan.kinds:
        gpu = plan.methods[kind].gpu
        parts = (gpu.weights, gpu.gradients, gpu.optimizer, gpu.activations, gpu.head)
        table.add_row(
            "GPU (formula)", _SHORT[kind], *map(gib, parts), ABSENT, gib(gpu.total), ABSENT,
            end_section=kind == plan.kinds[-1],
        )  # fmt: skip
    count = len(plan.methods[plan.configured].machines)
    for number in range(count):
        for kind in plan.kinds:
            row = plan.methods[kind].machines[number]
            f, memory = row.footprint, row.machine.memory_bytes
            all_parts = (f.weights, f.gradients, f.optimizer, f.activations, f.head, f.other, f.total)
            name = row.machine.name + (" (formula)" if row.basis.startswith("formula") else "")
            table.add_row(
                name, _SHORT[kind], *map(gib, all_parts), gib(memory) if memory is not None else ABSENT,
                style=None if f.fits else "red", end_section=kind == plan.kinds[-1],
            )  # fmt: skip
    return table


def _clusters(plan: Plan) -> Table:
    table = _table(f"Fewest GPUs that hold it, by ZeRO stage and offload ({_FORMULA})")
    table.add_column("GPU", no_wrap=True)
    table.add_column("method")
    for sharding in SHARDINGS:
        table.add_column(_heading(sharding), justify="right")
    for name, gpu in gpus(plan.hardware):
        for kind in plan.kinds:
            found = plan.methods[kind].clusters[name]
            cells = [str(c.devices) if (c := found[sharding]) else ABSENT for sharding in SHARDINGS]
            label = f"{name}, {gpu.memory_gib:g} GiB" if kind == plan.configured else ""
            table.add_row(label, _SHORT[kind], *cells, end_section=kind == plan.kinds[-1])
    return table


def _heading(sharding: Sharding) -> str:
    return (f"ZeRO-{sharding.stage}" if sharding.stage else "none") + _KEPT[sharding.offload]


def _costs(plan: Plan) -> Table:
    table = _table("Time and money of the training, without evaluation")
    for heading in ("on", "method"):
        table.add_column(heading)
    for heading in ("GiB each", "of", "steps", "time", "money"):
        table.add_column(heading, justify="right")
    for name, _ in gpus(plan.hardware):
        for kind in plan.kinds:
            cluster = plan.methods[kind].best(name)
            table.add_row(
                *(_cluster_cells(cluster, kind) if cluster else (name, _SHORT[kind], *_NONE)),
                end_section=kind == plan.kinds[-1],
            )  # fmt: skip
    count = len(plan.methods[plan.configured].machines)
    for number in range(count):
        for kind in plan.kinds:
            row = plan.methods[kind].machines[number]
            memory = row.machine.memory_bytes
            fits = row.footprint.fits
            table.add_row(
                row.machine.name, _SHORT[kind], gib(row.footprint.total), gib(memory) if memory is not None else ABSENT,
                f"{plan.workload.configured.total_steps:,}", duration(row.seconds) if fits else "does not fit",
                _money(row.money) if fits else "",
                end_section=kind == plan.kinds[-1],
            )  # fmt: skip
    return table


def _cluster_cells(cluster: Cluster, kind: Kind) -> tuple[str, ...]:
    name = f"{cluster.devices} x {cluster.gpu}"
    if cluster.sharding.stage:
        name += f", {cluster.sharding.name}"
    return (
        name, _SHORT[kind], gib(cluster.footprint.total), gib(cluster.usable), f"{cluster.cost.steps:,}",
        duration(cluster.cost.seconds), _money(cluster.cost.money),
    )  # fmt: skip


def _money(amount: float | None) -> str:
    return ABSENT if amount is None else money(amount)


def _probed(plan: Plan) -> str:
    measured = plan.measured
    assert measured is not None
    predicted = plan.methods[plan.configured].machines[0].footprint.total
    text = (
        f"Probe of {_SHORT[plan.configured]}: {measured.steps} steps, "
        f"{1 / measured.seconds_per_token:,.0f} real tokens/s, "
        f"peak {gib(measured.peak_bytes)} GiB (planned {gib(predicted)})"
    )
    if measured.taken_by_others < _BUSY:
        return text
    return (
        f"{text}; other programs took {measured.taken_by_others:.0%} of this machine's processors meanwhile, so on a "
        "quiet one training is faster"
    )
