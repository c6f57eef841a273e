"""Where an interrupted run goes on, and whether it can go on to the same bits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.locate import REPORT_NAME, run_status
from tunesmith.checkpoints.lock import is_locked
from tunesmith.checkpoints.manifest import BaseWeights, Manifest, verify
from tunesmith.checkpoints.store import checkpoints_newest_first
from tunesmith.config.yaml_file import read_yaml_file
from tunesmith.errors import CheckpointError, ConfigError, UserError
from tunesmith.run_state import RunState, read_state

# Settings that change where results go, not what they are. Data files are compared by content.
_FREE = (
    "output_dir", "logger", "custom_model_tag", "forward_checkpoint_config", "num_checkpoints_to_keep",
    "train_path", "valid_path",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        folder: of the run.
        checkpoint, manifest, state: the newest good checkpoint; None: from the beginning.
        notices: checkpoints that were passed over, and why.
    """

    folder: Path
    checkpoint: Path | None
    manifest: Manifest | None
    state: RunState | None
    notices: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest else 0


def find_run_folder(reference: str, output_dir: Path) -> Path:
    """The folder of the run ``reference``: a path, or a name in ``output_dir``.

    Raises:
        UserError: there is no such run.
    """
    for folder in (Path(reference).expanduser(), output_dir / reference):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(reference, f"no run folder, here or in {output_dir}", "see: tunesmith models")


def unfinished_run(output_dir: Path, resolved: Mapping[str, Any]) -> Path | None:
    """The newest unfinished run of this configuration in ``output_dir`` that no process holds, or None."""
    if not output_dir.is_dir():
        return None
    found = [
        folder
        for folder in output_dir.iterdir()
        if (folder / "config.yaml").is_file()
        and run_status(folder) != "finished"
        and not is_locked(folder)
        and not list(config_differences(_config_of(folder), resolved))
    ]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def resume_point(folder: Path) -> ResumePoint:
    """The newest checkpoint of the run that is whole and can be trained on; a damaged one is passed over, and said.

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
    for path, manifest in checkpoints_newest_first(folder, notices):
        try:
            verify(path)
            return ResumePoint(folder, path, manifest, read_state(path), tuple(notices))
        except CheckpointError as error:
            notices.append(f"passed over: {error}")
    return ResumePoint(folder, None, None, None, tuple(notices))


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
) -> list[str]:
    """What differs from when the checkpoint was saved and decides the bits of what follows."""
    found = other_settings(point, resolved)
    if point.manifest is None or point.state is None:
        return found
    for name in ("train", "valid"):
        then, now = (facts.get(name, {}).get("sha256") for facts in (point.manifest.data, data))
        if then != now:
            found.append(f"{name} data: SHA-256 {_short(then)} then, {_short(now)} now")
    if point.manifest.base.fingerprint != base.fingerprint:
        found.append(
            f"base weights: {_short(point.manifest.base.fingerprint)} then, {_short(base.fingerprint)} now"
        )
    for name, was in point.state.environment.items():
        if environment.get(name) != was:
            found.append(f"{name}: {was} then, {environment.get(name)} now")
    if point.state.token_budget != token_budget:
        found.append(f"tokens in a micro-batch: {point.state.token_budget} then, {token_budget} now")
    return found


def refuse(folder: Path, found: list[str]) -> None:
    """Raises ConfigError: naming every difference, where there is one."""
    if found:
        fault = f"would not go on to the same bits: {'; '.join(found)}"
        raise ConfigError(str(folder), fault, "undo this, or give --force-resume")


def config_differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ, as "name: value then, value now"."""
    for name in sorted(then.keys() | now.keys()):
        if not prefix and name in _FREE:
            continue
        was, is_now, full = then.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            yield from config_differences(was, is_now, f"{full}.")
        elif _plain(was) != _plain(is_now):
            yield f"{full}: {was} then, {is_now} now"


def _config_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.yaml"
    values: Mapping[str, Any] = read_yaml_file(file, str(file)).values
    return values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(digest: object) -> str:
    return str(digest)[:12] if digest else "none"
