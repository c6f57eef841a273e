"""What a DeepSpeed file comes to in a run: the values it states for settings of ours, and what is said about it.

Stages 1 to 3 split every tensor over the workers (``training/sharded_group.py``); they differ in how long weights stay
gathered. Offload puts each worker's shares of weights, gradients and optimizer state into its host's memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.config.deepspeed_file import Meaning, Sharding, refuse_contradictions
from tunesmith.errors import ConfigError

_ROWS, _TURNS = "train_batch_size_per_device", "gradient_accumulation_steps"
_STAGE = "zero_optimization.stage"
_OFFLOAD = ("zero_optimization.offload_", "zero_optimization.cpu_offload")
_GROUPS = "zero_optimization.zero_hpz_partition_size"


def stated(sharding: Sharding, given: Mapping[str, Any], num_devices: int) -> dict[str, tuple[Any, str]]:
    """Settings that the file decides, by dotted name: each value, and the key of the file that states it.

    With ``train_batch_size`` and no rows of a batch, these are what is left for each worker, as in DeepSpeed.

    Args:
        sharding: what ``read_deepspeed`` found.
        given: settings that the run's file or command line states, by dotted name; defaults left out.
        num_devices: number of workers.

    Raises:
        ConfigError: both files state a value, and not the same; or the rows cannot be shared out.
    """
    refuse_contradictions(sharding, given, num_devices)
    keys = {meaning.setting: meaning.key for meaning in sharding.meanings if meaning.setting}
    found = {setting: (value, keys[setting]) for setting, value in sharding.settings.items()}
    both = {**given, **sharding.settings}
    if sharding.train_batch_size is not None and both.get(_ROWS, "auto") == "auto":
        there = next(meaning for meaning in sharding.meanings if meaning.key == "train_batch_size")
        turns = both.get(_TURNS, 1)
        rows, left = divmod(sharding.train_batch_size, turns * num_devices)
        if left or not rows:
            fault = f"train_batch_size is {there.value}, not so many batches of {num_devices} x {turns} alike"
            raise ConfigError(there.place, fault, f"take a multiple of {num_devices * turns}")
        found[_ROWS] = (rows, "train_batch_size")
    return found


def gathering(sharding: Sharding, num_devices: int) -> bool | int | None:
    """What becomes of a layer's weights between forward and backward, as FSDP2's ``reshard_after_forward`` has it.

    True: split again (stage 3). False: they stay whole (stages 1 and 2). A number: split within groups of so many
    neighbours. None: nothing is split over the workers.
    """
    if num_devices == 1 or sharding.stage == 0:
        return None
    if sharding.stage < 3:
        return False
    return sharding.hpz_partition_size if _groups(sharding, num_devices) else True


def offloads(sharding: Sharding, num_devices: int) -> bool:
    """Whether each worker's shares lie in its host's memory: FSDP2 moves weights, gradients and optimizer together."""
    is_asked = sharding.offload_optimizer or sharding.offload_parameters
    return is_asked and gathering(sharding, num_devices) is not None


def _groups(sharding: Sharding, num_devices: int) -> bool:
    size = sharding.hpz_partition_size
    return 1 < size < num_devices and num_devices % size == 0


def notices(sharding: Sharding, settings: Mapping[str, Any], num_devices: int) -> Iterator[str]:
    """What the file means for this run: first what is split, then every other key, those of one meaning together.

    Args:
        sharding: what ``read_deepspeed`` found.
        settings: the run's values by dotted name, from which "auto" is resolved.
        num_devices: number of workers.
    """
    spread = [meaning for meaning in sharding.meanings if _spreads(meaning)]
    yield from _of_stage(sharding, spread, num_devices)
    yield from _of_offload(sharding, spread, num_devices)
    if sharding.hpz_partition_size > 1 and num_devices > 1:
        groups = next(meaning for meaning in spread if meaning.key == _GROUPS)
        named, size = (
            f"{groups.place}: {groups.key} {sharding.hpz_partition_size}",
            sharding.hpz_partition_size,
        )
        if _groups(sharding, num_devices):
            yield f"{named}: between forward and backward a layer's weights are split within groups of {size} workers"
        else:
            yield f"{named} has no effect: {num_devices} workers do not make several groups of {size}"
    alike: dict[tuple[str, bool], list[Meaning]] = {}
    for meaning in sharding.meanings:
        if not _spreads(meaning):
            text = meaning.line(settings).partition(" -> ")[2]
            alike.setdefault((text, meaning.is_honoured), []).append(meaning)
    for (text, is_honoured), same in alike.items():
        names = ", ".join(meaning.line(settings).partition(" -> ")[0] for meaning in same)
        yield f"{same[0].place}: {names} -> {'' if is_honoured else 'not honoured: '}{text}"


def _spreads(meaning: Meaning) -> bool:
    return meaning.key in (_STAGE, _GROUPS) or meaning.key.startswith(_OFFLOAD)


def _of_stage(sharding: Sharding, spread: list[Meaning], num_devices: int) -> Iterator[str]:
    stage = next((meaning for meaning in spread if meaning.key == _STAGE), None)
    if stage is None:
        return
    named, here = f"{stage.place}: {_STAGE} {sharding.stage}", f"each of the {num_devices} workers"
    if num_devices == 1:
        yield f"{named}: one process does not shard: it holds all weights, gradients and optimizer state"
    elif sharding.stage == 0:
        yield f"{named}: plain data parallelism, as here: {here} holds all weights, gradients and optimizer state"
    else:
        kept = "only while it is computed" if sharding.stage == 3 else "for a whole pass"
        yield (
            f"{named}: {here} holds its share of weights, gradients and optimizer state (FSDP2); a layer's weights are "
            f"gathered {kept}"
        )


def _of_offload(sharding: Sharding, spread: list[Meaning], num_devices: int) -> Iterator[str]:
    if not (sharding.offload_optimizer or sharding.offload_parameters):
        return
    place = next(meaning.place for meaning in spread if meaning.key.startswith(_OFFLOAD))
    if num_devices == 1:
        yield f"{place}: offload needs several workers: nothing is moved off the device, which has to hold all of it"
        return
    more = (
        "" if sharding.offload_optimizer and sharding.offload_parameters else ", which FSDP2 moves together"
    )
    yield (
        f"{place}: offload: each worker's shares of weights, gradients and optimizer state lie in its host's memory"
        f"{more}; the optimizer steps there"
    )
