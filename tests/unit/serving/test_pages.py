"""Memory from the system: what is small takes what is used, what is huge begins where its pages do."""

import mmap
from pathlib import Path

import pytest
import torch

from tunesmith.serving.pages import HugePages, small_pages

_HUGE = 2 << 20
linux = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="tells of pages on Linux alone")


def mapping_of(tensor: torch.Tensor) -> dict[str, list[str]]:
    """What /proc/self/smaps says of the mapping in which a tensor begins."""
    found, is_within = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if ":" not in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            is_within = begin <= tensor.data_ptr() < end
        elif is_within:
            found[first] = rest
    return found


def test_small_pages_are_zeros_of_the_shape():
    zeros = small_pages(3, 5)
    assert zeros.shape == (3, 5)
    assert zeros.dtype == torch.float32
    assert not zeros.any()
    assert small_pages(4, 0).shape == (4, 0)


@linux
def test_small_pages_take_memory_where_they_are_written_to():
    zeros = small_pages(64, _HUGE // 4)  # 128 MB
    zeros[::8, 0] = 1
    assert mapping_of(zeros)["Rss:"] == ["32", "kB"]


def test_tensors_lie_one_behind_the_other_at_whole_lines():
    memory = HugePages()
    first, second = memory.empty(3, 7), memory.empty(20)
    assert first.shape == (3, 7)
    assert first.dtype == torch.float32
    assert first.data_ptr() % _HUGE == 0
    assert second.data_ptr() == first.data_ptr() + 128  # 84 bytes are two lines
    first.fill_(1)
    second.fill_(2)
    assert first.eq(1).all()


def test_what_does_not_fit_begins_a_mapping_of_its_own():
    memory = HugePages()
    first, large, last = memory.empty(16), memory.empty(40, _HUGE // 4), memory.empty(16)
    large.fill_(3)
    assert large.data_ptr() % _HUGE == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in (first, large, last)}) == 3


@linux
def test_pages_are_huge_where_the_system_has_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text() or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no huge pages")
    tensor = HugePages().empty(4, _HUGE // 4)
    tensor.fill_(1)
    # Asked for; whether the system had some free is its own affair.
    assert "hg" in mapping_of(tensor)["VmFlags:"]
