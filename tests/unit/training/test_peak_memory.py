"""The highest memory of a process is its own."""

import subprocess
import sys

import numpy as np

from tunesmith.training.loop import peak_memory_bytes


def test_the_peak_of_a_large_process_is_not_that_of_one_it_starts():
    held = np.ones(80_000_000)  # 640 MB
    code = "from tunesmith.training.loop import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory_bytes() > held.nbytes
    assert 50e6 < int(done.stdout) < held.nbytes
