"""Which rows of a batch get which LoRA terms, and how they are computed: chosen batch by batch."""

from collections.abc import Sequence

from tunesmith.serving.base_weights import BaseWeights
from tunesmith.serving.grouped_lora import Grouped, is_grouped
from tunesmith.serving.mixed_lora import MOST_STACKED_RANK, Adapter, Plan, Stack, Stacked, segments
from tunesmith.serving.seam import AdapterKey


class Planner:
    """Plans for the batches of an engine; what a plan needs is kept while the same adapters are at work."""

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self._stack: Stack | None = None
        self._last: tuple[tuple[AdapterKey | None, ...], Plan] = ((), Plan())

    def rows(self, rows: Sequence[Adapter | None]) -> Plan:
        """For single rows, sorted by adapter, so that those too many to be stacked lie together."""
        keys = tuple(adapter.key if adapter else None for adapter in rows)
        if keys != self._last[0]:
            self._last = (keys, self._plan(rows))
        return self._last[1]

    def stretches(self, stretches: Sequence[tuple[int, Adapter | None]]) -> Plan:
        """For stretches of rows, (length, adapter) in order, neighbours by adapter."""
        return Grouped(stretches) if is_grouped(self._base) else segments(stretches)

    def _plan(self, rows: Sequence[Adapter | None]) -> Plan:
        if is_grouped(self._base):
            return Grouped([(1, adapter) for adapter in rows])
        active = {adapter.key: adapter for adapter in rows if adapter is not None}
        rank = sum(adapter.rank for adapter in active.values())
        if len({id(adapter) for adapter in rows}) <= 1 or rank > MOST_STACKED_RANK:
            return segments([(1, adapter) for adapter in rows])
        stack = self._stack
        if stack is None or not active.keys() <= stack.numbers.keys() or stack.rank > 2 * rank:
            self._stack = stack = Stack(list(active.values()), self._base)
        return Stacked(stack, rows)

    def forget(self, key: AdapterKey) -> None:
        """Let go of an adapter's tensors."""
        if self._stack is not None and key in self._stack.numbers:
            self._stack = None
        if key in self._last[0]:
            self._last = ((), Plan())
