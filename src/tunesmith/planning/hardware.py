"""Machines that are planned for: what the data file says of each, which the user may replace."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.config.yaml_file import YamlFile, read_yaml_file
from tunesmith.errors import ConfigError

SHIPPED = Path(__file__).with_name("hardware.yaml")
GIB = 2**30
_MOST = 1e9  # of any size: beyond it there are no machines, and soon no numbers
Size = Annotated[float, Field(gt=0, le=_MOST)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(_Entry):
    """A GPU; units as in ``hardware.yaml``."""

    kind: Literal["gpu"]
    memory_gib: Size
    host_memory_gib: Size
    bandwidth_gb_s: Size
    link_gb_s: Size
    host_link_gb_s: Size
    peak_tflops: Size
    efficiency: Share
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CpuBox(_Entry):
    """A machine without a GPU; units as in ``hardware.yaml``."""

    kind: Literal["cpu"]
    memory_gib: Size
    bandwidth_gb_s: Size
    peak_tflops: Size
    efficiency: Share
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _File(_Entry):
    reserved_gib: Annotated[float, Field(ge=0, le=_MOST)] = 1.0
    fragmentation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    system_gib: Annotated[float, Field(ge=0, le=_MOST)] = 1.0
    this_machine_efficiency: Share = 0.7
    devices: Mapping[str, Annotated[Gpu | CpuBox, Field(discriminator="kind")]] = Field(min_length=1)


@dataclass(frozen=True)
class Hardware:
    """What a data file says; ``name``: of the file, for people."""

    name: str
    reserved_gib: float
    fragmentation: float
    system_gib: float
    this_machine_efficiency: float
    devices: Mapping[str, Gpu | CpuBox]

    def usable(self, device: Gpu | CpuBox) -> int:
        """Bytes that training can fill."""
        if isinstance(device, Gpu):
            return max(0, int((device.memory_gib * (1 - self.fragmentation) - self.reserved_gib) * GIB))
        return max(0, int((device.memory_gib - self.system_gib) * GIB))


def read_hardware(path: Path | None) -> Hardware:
    """The data file that is named, or the shipped one.

    Raises:
        ConfigError: it cannot be read, or an entry has an unknown, missing or impossible value.
    """
    file = read_yaml_file(path or SHIPPED, str(path or SHIPPED.name))
    try:
        found = _File.model_validate(file.values)
    except ValidationError as error:
        raise _fault(file, error.errors()[0]) from error
    return Hardware(
        file.name, found.reserved_gib, found.fragmentation, found.system_gib, found.this_machine_efficiency,
        found.devices,
    )  # fmt: skip


def _fault(file: YamlFile, item: Any) -> ConfigError:
    # pydantic puts the kind of an entry into the path of its faults.
    loc = [part for number, part in enumerate(item["loc"]) if not (number == 2 and part in ("gpu", "cpu"))]
    dotted = ".".join(map(str, loc)) or "the file"
    if item["type"] == "missing":
        return ConfigError(file.place(tuple(loc)), f"{dotted} is missing", "see the shipped hardware.yaml")
    if item["type"] == "extra_forbidden":
        return ConfigError(
            file.place(tuple(loc)), f"there is no {dotted}", "see the shipped hardware.yaml for the names"
        )
    if item["type"].startswith("union_tag"):
        return ConfigError(file.place(tuple(loc)), f"{dotted} has no kind", "write kind: gpu or kind: cpu")
    reason = str(item["msg"])[0].lower() + str(item["msg"])[1:]
    return ConfigError(file.place(tuple(loc)), f"{dotted}: {reason}", "change the value")
