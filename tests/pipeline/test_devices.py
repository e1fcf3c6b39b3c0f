"""Tests that freed memory is kept: in a process of its own, by the page faults that large blocks cost."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROBE = """
import resource, sys
import numpy as np
from echoshift.pipeline.devices import keep_freed_memory
if sys.argv[1] != "untouched":
    assert keep_freed_memory(sys.argv[1] == "kept")
np.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone has these settings")
def test_a_large_block_is_faulted_in_once() -> None:
    def run(mode: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, mode], capture_output=True, text=True, timeout=60, check=True,
            env={"NUMPY_MADVISE_HUGEPAGE": "0", "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        return [int(line) for line in done.stdout.split()]

    n_pages = 4 * (128 << 20) // 4096
    kept, restored, untouched = run("kept"), run("restored"), run("untouched")
    assert kept[0] < n_pages / 100
    assert restored[0] > n_pages * 0.9 and untouched[0] > n_pages * 0.9
    assert kept[1] < untouched[1] * 1.2  # and the process is no larger for it
