"""What a run asks of a Ray cluster, and whether the cluster can ever give it. Knows nothing of Ray itself."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tunesmith.errors import ConfigError

_SHAPE = re.compile(r"anyscale/accelerator_shape:\d+x(.+)")
_TYPE = "accelerator_type:"
_UNITS = {"memory": (1e9, " GB of memory"), "CPU": (1, " CPUs"), "GPU": (1, " GPUs")}
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """``workers`` times ``each``, and ``beside`` once."""

    workers: int
    each: Resources
    beside: Resources

    @property
    def uses_gpus(self) -> bool:
        return self.each.get("GPU", 0) > 0

    def total(self) -> dict[str, float]:
        """All of it."""
        names = {**self.each, **self.beside}
        return {n: self.workers * self.each.get(n, 0) + self.beside.get(n, 0) for n in names}

    def shown(self) -> str:
        """For people: ``2 CPUs, 5 GB of memory``."""
        total = self.total()
        return _amounts([name for name, amount in total.items() if amount], total)


def request_of(workers: int, worker: Resources, beside: Resources, cluster: Resources) -> Request:
    """What these settings ask of a cluster that has ``cluster``.

    Each worker gets a GPU where the cluster has any or the settings name one, else a CPU. A shape of Anyscale's
    (``anyscale/accelerator_shape:4xA10G``) means its accelerator on a cluster that does not know it.
    """
    given = {_known(name, cluster): amount for name, amount in worker.items()}
    wants_gpu = any(name.startswith((_TYPE, "anyscale/accelerator_shape:")) for name in given)
    gpu = {"GPU": 1.0} if wants_gpu or cluster.get("GPU", 0) > 0 else {}
    each = {"CPU": 1.0, **gpu, **given}
    return Request(workers, each, {_known(name, cluster): amount for name, amount in beside.items()})


def refuse_nothing(request: Request, place: str) -> None:
    """Raises ConfigError where a worker asks for none of anything: Ray has no place for such a one.

    Args:
        request: what is asked for.
        place: of the setting, for the error.
    """
    if not any(request.each.values()):
        fault = f"leaves a worker nothing ({_amounts(request.each, request.each)}), and Ray places none of that kind"
        raise ConfigError(place, fault, "ask for CPU, GPU or another resource above 0")


def refuse_impossible(request: Request, nodes: list[Resources], place: str) -> None:
    """Raises ConfigError where not all of ``request`` fits into the nodes even when nothing else runs there.

    Args:
        nodes: what each node has.
        place: of the setting, for the error.
    """
    fault = _fault(request, nodes)
    if fault is not None:
        remedy = "ask for less, or add nodes (TUNESMITH_CLUSTER_GROWS=1: the cluster adds them itself)"
        raise ConfigError(place, fault, remedy)


def node_beside(request: Request, nodes: Mapping[str, Resources], here: str) -> str | None:
    """The node for what is asked for once, such that all workers fit beside it; ``here`` where that will do.

    None: there is no such node.
    """
    for name in sorted(nodes, key=lambda name: name != here):
        if _workers_beside(request, list(nodes.values()), list(nodes).index(name)) >= request.workers:
            return name
    return None


def _fault(request: Request, nodes: list[Resources]) -> str | None:
    has: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            has[name] = has.get(name, 0.0) + amount
    asked = request.total()
    if short := [name for name, amount in asked.items() if amount > has.get(name, 0.0)]:
        return f"asks for {_amounts(short, asked)}; the cluster has {_amounts(short, has)}"
    there = _amounts(request.each, has)
    fitting = sum(_times(request.each, node) for node in nodes)
    if fitting < request.workers:
        return f"asks for {request.workers} workers; the cluster's nodes have room for {fitting} ({there})"
    beside = max((_workers_beside(request, nodes, index) for index in range(len(nodes))), default=-1)
    if beside < 0:
        most = {name: max(node.get(name, 0.0) for node in nodes) for name in request.beside}
        once, largest = _amounts(request.beside, request.beside), _amounts(most, most)
        return f"asks for once {once} on one node; the cluster's nodes have {largest} at most"
    if beside < request.workers:
        once = _amounts(request.beside, request.beside)
        room = "1 worker" if beside == 1 else f"{beside} workers"
        return (
            f"asks for {request.workers} workers and once {once} beside them; the cluster's nodes have room for {room} "
            f"beside that ({there})"
        )
    return None


def _workers_beside(request: Request, nodes: list[Resources], index: int) -> int:
    """How many workers fit where this node holds what is asked for once; -1: it has no room for that."""
    left = {name: amount - request.beside.get(name, 0.0) for name, amount in nodes[index].items()}
    if any(amount > nodes[index].get(name, 0.0) for name, amount in request.beside.items()):
        return -1
    return sum(_times(request.each, left if i == index else node) for i, node in enumerate(nodes))


def _times(each: Resources, node: Resources) -> int:
    """How often ``each`` fits into one node."""
    return min(
        (int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount > 0),
        default=10**9,
    )


def _known(name: str, cluster: Resources) -> str:
    shape = _SHAPE.fullmatch(name)
    return f"{_TYPE}{shape[1]}" if shape and name not in cluster else name


def _amounts(names: Iterable[str], amounts: Resources) -> str:
    return ", ".join(_amount(name, amounts.get(name, 0.0)) for name in names)


def _amount(name: str, amount: float) -> str:
    unit, word = _UNITS.get(name, (1, f" {name}"))
    return f"{amount / unit:g}{word}"
