"""What the numbers of a plan say, in a few sentences."""

from collections.abc import Iterator
from dataclasses import replace

from tunesmith.planning.clusters import Cluster, gpus, smallest
from tunesmith.planning.formulae import PLAIN
from tunesmith.planning.hardware import GIB
from tunesmith.planning.machines import OnMachine
from tunesmith.planning.plan import NAMES, Kind, Plan


def verdict(plan: Plan) -> tuple[str, ...]:
    """Sentences for people, the most important first."""
    return (
        *_as_asked(plan),
        *_ratio(plan),
        *(sentence for kind in plan.kinds for sentence in _on_gpus(plan, kind)),
        *_lighter(plan),
        *(sentence for kind in plan.kinds for sentence in _here(plan, kind)),
    )


def asked_for(plan: Plan) -> str:
    """``LoRA on 4 GPUs with ZeRO-3``."""
    devices, sharding = plan.asked.devices, plan.asked.sharding
    how = (
        f" with {sharding.name}" if sharding != PLAIN else ", each holding everything" if devices > 1 else ""
    )
    return f"{NAMES[plan.configured]} on {devices} GPU{'s' if devices > 1 else ''}{how}"


def gib(number: int) -> str:
    """Bytes as GiB, for people."""
    return f"{number / GIB:,.1f}" if number < 1000 * GIB else f"{number / GIB:,.0f}"


def duration(seconds: float) -> str:
    """For people: ``4 min``, ``2.5 h``, ``12 days``."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} days"


def _as_asked(plan: Plan) -> Iterator[str]:
    found = sorted(plan.asked.clusters.values(), key=lambda c: (c.usable, c.gpu))
    if not plan.asked.is_given or not found:
        return
    fitting, too_small = [c for c in found if c.fits], [c.gpu for c in found if not c.fits]
    what = f"What CONFIG asks for, {asked_for(plan)},"
    if not fitting:
        yield f"{what} fits on none of the named GPUs: on {found[-1].gpu} it takes {_parts(found[-1])}."
        return
    least, cost = fitting[0], fitting[0].cost
    text = f"{what} fits on {least.gpu} ({_parts(least)}): {duration(cost.seconds)}, {money(cost.money)}"
    yield f"{text}; too small: {', '.join(too_small)}." if too_small else f"{text}."


def _parts(cluster: Cluster) -> str:
    parts = f"{gib(cluster.footprint.total)} of {gib(cluster.usable)} GiB"
    if not cluster.footprint.host:
        return parts
    return f"{parts}, {gib(cluster.footprint.host)} of {gib(cluster.host)} GiB of main memory"


def _ratio(plan: Plan) -> Iterator[str]:
    lora, full = plan.methods["lora"], plan.methods["full"]
    yield (
        f"At {plan.workload.longest:,} tokens a row, LoRA needs {gib(lora.gpu.total)} GiB on one GPU and "
        f"full-parameter {gib(full.gpu.total)} GiB: {_share(lora.gpu.total, full.gpu.total)} of the memory for "
        f"{_share(lora.trained, full.trained)} of the trained parameters (formula, not measured)."
    )


def _share(part: float, whole: float) -> str:
    share = part / whole
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def _on_gpus(plan: Plan, kind: Kind) -> Iterator[str]:
    there = [c for name, _ in gpus(plan.hardware) if (c := plan.methods[kind].best(name)) is not None]
    name = NAMES[kind][0].upper() + NAMES[kind][1:]
    if not there:
        if any(True for _ in gpus(plan.hardware)):
            yield f"{name} fits on no cluster of up to 64 of the named GPUs."
        return
    least = min(there, key=lambda c: (c.sharding.offload != "none", c.usable * c.devices, c.devices))
    verb = "fits on" if least.devices == 1 else "needs"
    text = f"{name} {verb} {_told(least)}"
    alone = [c for c in there if c.devices == 1 and c.sharding.offload == "none"]
    if least.devices > 1 and alone:
        text += f", or {_told(min(alone, key=lambda c: c.usable))}"
    cheapest = min(there, key=lambda c: c.cost.money)
    yield f"{text}; cheapest on {cheapest.name}: {duration(cheapest.cost.seconds)}, {money(cheapest.cost.money)}."


def _told(cluster: Cluster) -> str:
    name = f"one {cluster.gpu}" if cluster.devices == 1 else cluster.name
    if cluster.devices == 1 and cluster.sharding.offload != "none":
        name += f" with {cluster.sharding.name}"
    return f"{name} ({gib(cluster.footprint.total)} of {gib(cluster.usable)} GiB)"


def _lighter(plan: Plan) -> Iterator[str]:
    """What computing layers again would save, where it lets LoRA onto a smaller GPU."""
    if plan.batch.checkpointing:
        return
    batch, method = replace(plan.batch, checkpointing=True), plan.methods["lora"]
    for name, gpu in sorted(
        gpus(plan.hardware), key=lambda item: (item[1].memory_gib, item[1].price_per_hour)
    ):
        if method.clusters[name][PLAIN] is not None:
            return
        found = smallest(
            name, gpu, plan.hardware, plan.shape, method.adapter, plan.workload, batch, PLAIN, counts=(1,)
        )
        if found is not None:
            yield f"With gradient_checkpointing: true LoRA fits on {_told(found)}."
            return


def _here(plan: Plan, kind: Kind) -> Iterator[str]:
    row = plan.methods[kind].machines[0]
    has = "" if row.machine.memory_bytes is None else f" of {gib(row.machine.memory_bytes)}"
    if row.footprint.fits:
        yield (
            f"On this machine {NAMES[kind]} fits: {gib(row.footprint.total)}{has} GiB, "
            f"{_about(row.seconds)} of training{_priced(row)} ({row.time_basis})."
        )
        return
    remedy = f"; {plan.remedy}" if kind == plan.configured and plan.remedy else ""
    yield f"On this machine {NAMES[kind]} does not fit: {gib(row.footprint.total)}{has} GiB{remedy}."


def _about(seconds: float) -> str:
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def _priced(row: OnMachine) -> str:
    return f", {money(row.money)}" if row.money is not None else ""


def money(amount: float) -> str:
    """For people, in the data file's currency."""
    if 0 < amount < 0.01:
        return "under 0.01"
    return f"{amount:,.2f}" if amount < 1000 else f"{amount:,.0f}"
