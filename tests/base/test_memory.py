"""The reported memory of a process."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from coprune.base.memory import unread_weights

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(300 * MIB)
    held[::4096] = b"1" * len(held[::4096])  # touch every page
    script = "from coprune.base.memory import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 * MIB < int(done.stdout) < 200 * MIB


_KEPT = """
import torch
from coprune.base.memory import freed_memory_kept, resident_memory

def take_and_free():
    before = resident_memory()
    torch.ones(64 << 20, dtype=torch.uint8)
    return resident_memory() - before >> 20

usual = take_and_free()
start = resident_memory()
with freed_memory_kept():
    kept = take_and_free()
    with freed_memory_kept():  # the inner one gives nothing back
        pass
    again = take_and_free()
left = resident_memory() - start >> 20
print(usual, kept, again, left, take_and_free())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells the C library of Linux")
def test_freed_memory_is_reused_and_finally_returned() -> None:
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=True)
    usual, kept, again, left, after = map(int, done.stdout.split())
    assert usual < 8
    assert kept > 56
    assert again < 8  # the memory was still held
    assert left < 8
    assert -72 < after < 8


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_mapped_weights_are_unread_until_they_are_used(tmp_path: Path) -> None:
    size = 64 * mmap.PAGESIZE
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    before = unread_weights()
    with (tmp_path / "model.safetensors").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert unread_weights() == before + size
            assert not any(mapped[:: mmap.PAGESIZE])
            assert unread_weights() == before
        assert unread_weights() == before
