"""The highest memory of a process is its own."""

import subprocess
import sys

import numpy as np

from tunesmith.training.loop import peak_memory_bytes


def test_the_peak_of_a_large_process_is_not_that_of_one_it_starts():
    # 1.2 GB: PyTorch and transformers alone are 0.4 GB, and up to 0.75 where more of their files is mapped at once.
    held = np.ones(150_000_000)
    code = "from tunesmith.training.loop import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory_bytes() > held.nbytes
    assert 50e6 < int(done.stdout) < held.nbytes
