"""The YAML of ``tunesmith serve --ray``: what is served, by how many processes, and when there are more of them.

``--write-config`` writes one with every setting and what it does; it is read back with the line of each key, and an
unknown key or a value of the wrong kind is refused before anything starts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from tunesmith.config.schema import Section, key
from tunesmith.config.yaml_file import KeyPath, YamlFile, dump_yaml, read_yaml_file
from tunesmith.data.problems import closest, shorten
from tunesmith.errors import ConfigError, OutputError
from tunesmith.serving.hosts import allowed_name, hosts_of

_GB = 10**9

Count = Annotated[int, Field(ge=1, le=1_000)]
Seconds = Annotated[int, Field(ge=0, le=86_400)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _checked_host(name: str) -> str:
    try:
        allowed_name(name)
    except ValueError:
        raise ValueError("should be a name as in models.example.org, without a port") from None
    return name


_Host = Annotated[str, AfterValidator(_checked_host)]


class ReplicaSettings(Section):
    """How many processes hold one base, and what each of them may take."""

    min_replicas: Count = key(1, "processes that hold the base at least")
    max_replicas: Count = key(1, "and at most; more than the least: they come and go with the load")
    target_ongoing_requests: _Positive = key(
        8.0, "answers under way in one process before another is started"
    )
    upscale_delay_seconds: Seconds = key(30, "how long there must be too many before one is started")
    downscale_delay_seconds: Seconds = key(600, "how long there must be too few before one is ended")
    max_num_multiplexed_models_per_replica: Count = key(
        16, "adapters in one process's memory; the least recently used makes room for another"
    )
    cpus: _Positive = key(1.0, "processor cores of one process, and threads of its products")
    memory_gb: _Positive | None = key(None, "set aside for one process, in 10^9 bytes; null: nothing is")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("must have max_replicas no smaller than min_replicas")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """``memory_gb`` as Ray counts it."""
        return None if self.memory_gb is None else int(self.memory_gb * _GB)


class BaseSettings(ReplicaSettings):
    """One base: a deployment of its own."""

    base: str = Field(
        description="catalog name, folder, hub id, or tag of a full-parameter run", min_length=1
    )


class RaySettings(Section):
    """Ray itself."""

    dashboard: bool = key(False, "Ray's own web page, on 127.0.0.1")
    start_seconds: Annotated[int, Field(ge=1, le=86_400)] = key(
        300, "how long a base may take until its first process answers"
    )
    snapshots: str | None = key(None, "folder for copies of adapters in use; null: among the temporary files")


class RayConfig(Section):
    """Everything that ``tunesmith serve --ray`` does."""

    bases: tuple[BaseSettings, ...] = Field(description="each is a deployment of its own", min_length=1)
    checkpoints: ReplicaSettings = key(
        ReplicaSettings(),
        "for each full-parameter checkpoint in the loading path, deployed when it is asked for",
    )
    dynamic_lora_loading_path: str | None = key(
        None, "folder or URL of adapters and checkpoints; each in it is a model"
    )
    output_dirs: tuple[str, ...] = key(("./outputs",), "where runs and tags are looked for")
    host: str = key("127.0.0.1", "address to listen on")
    port: Annotated[int, Field(ge=0, le=65_535)] = key(8000, "0: any free one")
    allowed_hosts: tuple[_Host, ...] = key(
        (), "names that it may be asked by beside localhost and addresses; *.name: all below; *: any"
    )
    max_running: Annotated[int, Field(ge=1, le=1_024)] = key(16, "answers made at once in one process")
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = key(
        64, "answers that wait beside them for each base; more are told to come again"
    )
    grace_seconds: Seconds = key(30, "how long answers may go on after SIGTERM")
    log_requests: bool = key(False, "write prompts and answers too into the log of requests")
    ray: RaySettings = key(RaySettings(), "Ray itself")

    @field_validator("bases")
    @classmethod
    def _once(cls, bases: tuple[BaseSettings, ...]) -> tuple[BaseSettings, ...]:
        names = [base.base for base in bases]
        if len(set(names)) < len(names):
            raise ValueError("should name each base once")
        return bases

    @property
    def least_cpus(self) -> float:
        """Cores that must be there at the start."""
        return sum(base.min_replicas * base.cpus for base in self.bases)


def from_options(options: Mapping[str, Any], given: Mapping[str, str]) -> RayConfig:
    """What the command line says: the settings of its file, or those made of its options.

    Args:
        options: of ``tunesmith serve``, by the names of its parameters.
        given: those on the command line, with their flags.

    Raises:
        ConfigError: options do not go together, or as ``read_config``.
    """
    if options["engine"] != "tunesmith":
        raise ConfigError("--ray", "runs the engine of tunesmith alone", "leave out --engine")
    if "max_memory" in given:
        fault = "counts for one process; --ray has several, each with its memory_gb"
        raise ConfigError("--max-memory", fault, "set that in the YAML of --write-config")
    if (file := options["config"]) is not None:
        if not options["on_ray"]:
            raise ConfigError("--config", "is for --ray", "add --ray, or leave it out")
        others = [flag for name, flag in given.items() if name not in ("on_ray", "config")]
        if others:
            raise ConfigError(others[0], f"stands in {file}", "change it there, or leave out --config")
        return read_config(file)
    if not options["bases"]:
        raise ConfigError("--base", "is missing", "name a base, or a YAML with --config")
    if len(set(options["bases"])) < len(options["bases"]):
        raise ConfigError("--base", "names one twice", "name each once")
    hosts_of(options["host"], options["allowed_hosts"], has_key=False)  # refused by the name of the option
    return RayConfig(
        bases=tuple(BaseSettings(base=base) for base in options["bases"]),
        dynamic_lora_loading_path=options["loading_path"],
        output_dirs=tuple(map(str, options["output_dirs"])),
        host=options["host"],
        port=options["port"],
        allowed_hosts=options["allowed_hosts"],
        max_running=options["max_running"],
        max_waiting=options["max_waiting"],
        grace_seconds=options["grace_seconds"],
        log_requests=options["log_contents"],
    )


def read_config(path: Path) -> RayConfig:
    """Read and check a file.

    Raises:
        ConfigError: with file, line, key and remedy; several faults give one line each.
    """
    source = read_yaml_file(path, str(path))
    try:
        return RayConfig.model_validate(_tuples(source.values))
    except ValidationError as error:
        lines = dict.fromkeys(str(_fault(item, source)) for item in error.errors(include_url=False))
        raise ConfigError("", "\n".join(lines)) from None


def write_config(config: RayConfig, path: Path) -> None:
    """Write a new file with every setting and what it does.

    Raises:
        OutputError: it is there already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(as_yaml(config))
    except FileExistsError:
        raise OutputError(str(path), "is there already", "name another file, or remove it") from None
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})", "name another place") from error


def as_yaml(config: RayConfig) -> str:
    """The text that ``read_config`` gets ``config`` back from."""
    head = "# Settings of: tunesmith serve --ray --config THIS_FILE"
    return "\n".join([head, *_lines(config, "")]) + "\n"


def _lines(section: Section, indent: str) -> Iterator[str]:
    # Names of models first, as they are of every group here.
    fields = sorted(type(section).model_fields.items(), key=lambda item: item[0] != "base")
    for name, field in fields:
        value = getattr(section, name)
        yield f"{indent}# {field.description}"
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
            yield f"{indent}{name}:"
            for item in value:
                yield f"{indent}  -"
                yield from _lines(item, f"{indent}    ")
        else:
            shown = list(value) if isinstance(value, tuple) else value
            yield from (f"{indent}{line}" for line in dump_yaml({name: shown}).splitlines())


def _tuples(value: Any) -> Any:
    # YAML has lists only; sections hold tuples, so that frozen means frozen.
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fault(item: Any, source: YamlFile) -> ConfigError:
    path: KeyPath = tuple(item["loc"])
    place, dotted = source.place(path), ".".join(map(str, path))
    if item["type"] == "extra_forbidden":
        near = closest(str(path[-1]), _known(path[:-1]))
        remedy = f"closest is {near}" if near else "`tunesmith serve --write-config FILE` shows every setting"
        return ConfigError(place, f"no setting {shorten(dotted)}", remedy)
    if item["type"] == "missing":
        return ConfigError(place, f"setting {dotted} is missing", f"add `{path[-1]}: …`")
    message = str(item["msg"]).removeprefix("Value error, ")
    _, should, rest = message.partition("should ")
    wish = should + rest if should else message
    if isinstance(item["input"], dict):
        return ConfigError(place, f"{dotted} {wish}", "change one of them")
    return ConfigError(place, f"{dotted} is {shorten(str(item['input']))}; it {wish}", "change the value")


def _known(path: Sequence[str | int]) -> list[str]:
    """Settings of the group at ``path``."""
    groups: dict[str, type[Section]] = {
        "bases": BaseSettings, "checkpoints": ReplicaSettings, "ray": RaySettings
    }  # fmt: skip
    return list(groups.get(str(path[0]), RayConfig).model_fields if path else RayConfig.model_fields)
