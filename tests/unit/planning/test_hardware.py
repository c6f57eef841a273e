"""The data file of machines: the shipped one is whole, and a wrong one is told in one line."""

from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.planning.hardware import GIB, SHIPPED, Gpu, read_hardware

ONE = """reserved_gib: 0.5
fragmentation: 0.1
devices:
  mine:
    kind: gpu
    memory_gib: 10
    host_memory_gib: 10
    bandwidth_gb_s: 100
    link_gb_s: 10
    host_link_gb_s: 10
    peak_tflops: 50
    efficiency: 0.5
    price_per_hour: 0
"""


def test_the_shipped_file_names_what_the_product_promises():
    hardware = read_hardware(None)
    assert {"A10G", "L4", "A100-40", "A100-80", "H100", "H200"} <= set(hardware.devices)
    assert any(device.kind == "cpu" for device in hardware.devices.values())
    assert hardware.devices["H100"].peak_tflops == 989
    text = SHIPPED.read_text(encoding="utf-8")
    assert "ASSUMPTION" in text
    entries = [line for line in text.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert len(entries) == len(hardware.devices)
    assert all("  # " in line for line in entries)  # each names its source


def test_what_training_can_fill(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(ONE)
    hardware = read_hardware(file)
    device = hardware.devices["mine"]
    assert isinstance(device, Gpu)
    assert hardware.usable(device) == int(8.5 * GIB)  # nine tenths of ten, less a half
    file.write_text(ONE.replace("memory_gib: 10\n    host", "memory_gib: 0.25\n    host"))
    small = read_hardware(file)
    assert small.usable(small.devices["mine"]) == 0  # what is reserved is more than there is


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    memory_gib: 10\n", "", r"line 4: devices\.mine\.memory_gib is missing"),
        ("efficiency: 0.5", "efficiency: 1.5", r"line 12: devices\.mine\.efficiency: input should be less than"),
        ("kind: gpu", "kind: tpu", r"line 4: devices\.mine has no kind"),
        ("link_gb_s: 10\n    host", "speed: 10\n    host", r"(is missing|there is no)"),
        ("    efficiency: 0.5", "    efficiency: fast", r"devices\.mine\.efficiency: input should be a valid number"),
        ("reserved_gib: 0.5", "reserved_gib: .inf", r"line 1: reserved_gib: input should be less than or equal"),
        ("    memory_gib: 10\n", "    memory_gib: 1.0e+308\n", r"line 6: devices\.mine\.memory_gib: input should"),
        ("fragmentation: 0.1", "fragmentaton: 0.1", r"line 2: there is no fragmentaton"),
        (ONE, "devices: {}", r"line 1: devices: "),
        (ONE, "- 1", r"is not a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, old: str, new: str, message: str):
    file = tmp_path / "mine.yaml"
    assert old in ONE
    file.write_text(ONE.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_hardware(file)
    assert "\n" not in str(caught.value)


def test_no_file():
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hardware(Path("nowhere.yaml"))
