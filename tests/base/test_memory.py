"""What is said about the memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(300 * MIB)
    held[::4096] = b"1" * len(held[::4096])  # every page of it is there
    script = "from coprune.base.memory import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 * MIB < int(done.stdout) < 200 * MIB
