"""Where an interrupted run goes on, and whether it can go on to the same bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.assembly import DEFAULT_TRAIN_ROWS, rows_per_step
from tunesmith.checkpoints.locate import REPORT_NAME, run_status
from tunesmith.checkpoints.lock import is_locked, lock_holder, wait_until_free
from tunesmith.checkpoints.manifest import BaseWeights, Manifest, verify
from tunesmith.checkpoints.store import checkpoints_newest_first
from tunesmith.config.load import LoadedConfig
from tunesmith.config.yaml_file import read_yaml_file
from tunesmith.errors import CheckpointError, ConfigError, UserError
from tunesmith.paths import expanded
from tunesmith.run_state import GRADIENTS, THREADS, WORKERS, RunState, read_state

# Settings that change where results go, not what they are. Data files are compared by content.
_FREE = (
    "output_dir", "logger", "custom_model_tag", "forward_checkpoint_config", "num_checkpoints_to_keep",
    "train_path", "valid_path", "worker_resources", "trainer_resources",
)  # fmt: skip
# That workers may take to end after their driver was killed: they finish the operation at hand.
DYING_SECONDS = 30.0
_DEVICES, _BATCH, _TURNS = "num_devices", "train_batch_size_per_device", "gradient_accumulation_steps"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        folder: of the run.
        checkpoint, manifest, state: the newest good checkpoint; None: from the beginning.
        notices: checkpoints that were passed over, and why.
        damaged: those of them that will not be made again, and so must not count as the best.
    """

    folder: Path
    checkpoint: Path | None
    manifest: Manifest | None
    state: RunState | None
    notices: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest else 0


def find_run_folder(reference: str, output_dir: Path) -> Path:
    """The folder of the run ``reference``: a path, or a name in ``output_dir``.

    Raises:
        UserError: there is no such run.
    """
    for folder in (expanded(reference), output_dir / reference):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(reference, f"no run folder, here or in {output_dir}", "see: tunesmith models")


def unfinished_run(
    output_dir: Path, resolved: Mapping[str, Any], say: Callable[[str], None] = lambda _text: None
) -> Path | None:
    """The newest unfinished run of this configuration in ``output_dir`` that no process holds, or None.

    The newest of all is waited for where it is held, for ``DYING_SECONDS`` at most: its process may be about to end.
    That it is waited for, and passed over in the end, is said.
    """
    found = _unfinished(output_dir, resolved)
    if found and (holder := lock_holder(found[0])) is not None:
        say(f"{found[0]} is in use by process {holder}: waiting {DYING_SECONDS:g} s at most for its end")
        if not wait_until_free(found[0], DYING_SECONDS):
            say(f"{found[0]} is still in use: passed over")
        found = _unfinished(output_dir, resolved)  # it may have finished
    return next((folder for folder in found if not is_locked(folder)), None)


def _unfinished(output_dir: Path, resolved: Mapping[str, Any]) -> list[Path]:
    """Unfinished runs of this configuration, the newest first."""
    if not output_dir.is_dir():
        return []
    found: list[tuple[float, Path]] = []
    for folder in sorted(output_dir.iterdir()):
        # Another run's folder may be damaged, closed, or removed at this moment: it hides none beside it.
        with suppress(OSError, ConfigError):
            if not (folder / "config.yaml").is_file() or run_status(folder) == "finished":
                continue
            then = _config_of(folder)
            if not list(config_differences(then, _on_devices_of(then, resolved))):
                found.append((folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(found, key=lambda item: item[0], reverse=True)]


def resume_point(folder: Path) -> ResumePoint:
    """The newest checkpoint of the run that is whole and can be trained on; damaged ones are passed over, and said.

    Older ones are looked at too: the best of them is what the run ends with.

    Raises:
        UserError: the run is finished.
    """
    if run_status(folder) == "finished":
        raise UserError(
            str(folder),
            f"is finished ({REPORT_NAME})",
            "continue its checkpoint in a new run, or start afresh",
        )
    notices: list[str] = []
    point, damaged = ResumePoint(folder, None, None, None), []
    for path, manifest in checkpoints_newest_first(folder, notices):
        try:
            verify(path)
            if point.checkpoint is None:
                point = ResumePoint(folder, path, manifest, read_state(path))
        except CheckpointError as error:
            notices.append(f"passed over: {error}")
            if point.checkpoint is not None:
                damaged.append(path)
    return replace(point, notices=tuple(notices), damaged=tuple(damaged))


def with_step_of(folder: Path, loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with which the run in ``folder`` goes on.

    Where it differs from the run's own in the number of devices alone, a step keeps its rows: each device takes more
    or fewer of them.

    Raises:
        ConfigError: the rows of a step cannot be shared out evenly.
    """
    then, optimization = _config_of(folder), loaded.config.optimization
    devices = loaded.config.cluster.num_devices
    if devices == then.get(_DEVICES, 1) or _differs(then, loaded.resolved(), (_BATCH, _TURNS)):
        return loaded
    rows = _step_rows(then)
    each, left = divmod(rows, devices)
    if left:
        fault = f"are {devices}, which cannot share the {rows} rows of this run's steps evenly"
        raise ConfigError(loaded.place(_DEVICES), fault, "take a number that divides them")
    batch = optimization.train_batch_size_per_device
    turns, left = divmod(each, DEFAULT_TRAIN_ROWS if batch == "auto" else batch)
    changed = {_TURNS: turns} if not left else {_BATCH: each, _TURNS: 1}
    changed_config = loaded.config.model_copy(
        update={"optimization": optimization.model_copy(update=changed)}
    )
    return replace(loaded, config=changed_config)


def moved(point: ResumePoint, environment: Mapping[str, str]) -> str | None:
    """What to say where the run began on another number of workers."""
    then = point.state.environment.get(WORKERS, "1") if point.state else environment[WORKERS]
    if then == environment[WORKERS]:
        return None
    return (
        f"began with {then} workers, goes on with {environment[WORKERS]}: steps keep their rows, and losses may differ "
        "in their last digits"
    )


def other_settings(point: ResumePoint, resolved: Mapping[str, Any]) -> list[str]:
    """Settings that differ from the run's own."""
    then = point.manifest.config if point.manifest else _config_of(point.folder)
    return list(config_differences(then, resolved))


def differences(
    point: ResumePoint,
    resolved: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    base: BaseWeights,
    environment: Mapping[str, str],
    token_budget: int | None,
    *,
    may_move: bool = False,
) -> list[str]:
    """What differs from when the checkpoint was saved and decides the bits of what follows.

    With ``may_move`` another number of workers is let pass: see ``moved``.
    """
    found = other_settings(point, resolved)
    if point.manifest is None or point.state is None:
        return found
    for name in ("train", "valid", "test"):
        then, now = (facts.get(name, {}).get("sha256") for facts in (point.manifest.data, data))
        if then != now:
            found.append(f"{name} data: SHA-256 {_short(then)} then, {_short(now)} now")
    if point.manifest.base.fingerprint != base.fingerprint:
        found.append(
            f"base weights: {_short(point.manifest.base.fingerprint)} then, {_short(base.fingerprint)} now"
        )
    is_moved = may_move and moved(point, environment) is not None
    # One process cannot split weights, and by the kernels it goes in other micro-batches.
    free = (WORKERS, THREADS, GRADIENTS) if is_moved else ()
    for name, was in point.state.environment.items():
        if environment.get(name) != was and name not in free:
            found.append(f"{name}: {was} then, {environment.get(name)} now")
    if point.state.token_budget != token_budget and not is_moved:
        found.append(f"tokens in a micro-batch: {point.state.token_budget} then, {token_budget} now")
    return found


def refuse(folder: Path, found: list[str]) -> None:
    """Raises ConfigError: naming every difference, where there is one."""
    if found:
        fault = f"would not go on to the same bits: {'; '.join(found)}"
        raise ConfigError(str(folder), fault, "undo this, or give --force-resume")


def config_differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ, as "name: value then, value now"."""
    by_rows = not prefix and _differs(then, now, (_DEVICES,))
    if by_rows and _step_rows(then) != _step_rows(now):
        yield f"rows of a step: {_step_rows(then)} then, {_step_rows(now)} now"
    for name in sorted(then.keys() | now.keys()):
        if not prefix and (name in _FREE or name == _DEVICES or (by_rows and name in (_BATCH, _TURNS))):
            continue
        was, is_now, full = then.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            yield from config_differences(was, is_now, f"{full}.")
        elif _plain(was) != _plain(is_now):
            yield f"{full}: {was} then, {is_now} now"


def _on_devices_of(then: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """``now`` on as many devices as ``then``, where their number is all that changed of a step."""
    if _differs(then, now, (_BATCH, _TURNS)):
        return now
    return {**now, _DEVICES: then.get(_DEVICES, 1)}


def _differs(then: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> bool:
    # Runs of before there were workers have no num_devices: they had one.
    return any(then.get(name, 1) != now.get(name, 1) for name in names)


def _step_rows(values: Mapping[str, Any]) -> int:
    return rows_per_step(values.get(_BATCH, "auto"), values.get(_TURNS, 1), values.get(_DEVICES, 1))


def _config_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.yaml"
    values: Mapping[str, Any] = read_yaml_file(file, str(file)).values
    return values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(digest: object) -> str:
    return str(digest)[:12] if digest else "none"
