"""Memory of this process: available, resident and peak."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def available_bytes() -> int | None:
    """Return the memory still available: of the machine, its control group, and the process's limits; None if unknown."""
    status = _numbers(Path("/proc/self/status"))
    left = [_numbers(Path("/proc/meminfo")).get("MemAvailable")]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        left.append(None if most == resource.RLIM_INFINITY else most - status.get(used, 0))
    left.append(_left_in_group())
    known = [value for value in left if value is not None]
    return min(known) if known else None


def _left_in_group() -> int | None:
    """Return the memory that the control group (version 2) still allows; None without a limit."""
    try:
        path = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition(":")[2]
        folder = Path("/sys/fs/cgroup") / path.lstrip("/")
        most, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
        files = int(dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["file"])
        # Cached files count as used but are freed on demand.
        return int(most) - int(used) + files
    except (OSError, ValueError, KeyError):
        return None


def resident_peak() -> tuple[int, int]:
    """Return this process's resident set now and at its peak, in bytes (zeros without /proc)."""
    status = _numbers(Path("/proc/self/status"))
    return status.get("VmRSS", 0), status.get("VmHWM", 0)


def resident_memory() -> int | None:
    """Return this process's resident set in bytes, or None without /proc."""
    return resident_peak()[0] or None


# The first line of a mapping names its file; lines of its sizes follow.
_MAPPED_WEIGHTS = re.compile(rb"\.safetensors\nSize: +(\d+) kB\n(?:\w+: .*\n)*?Rss: +(\d+) kB\n")


def unread_weights() -> int:
    """Return the bytes of mapped safetensors weights that have not been used yet (0 without /proc).

    A model loaded this way uses little memory before its first forward pass, and all of its weights after it.
    """
    try:
        # Listing mappings is fast; listing how much of each is in memory is slow.
        if b".safetensors\n" not in Path("/proc/self/maps").read_bytes():
            return 0
        told = Path("/proc/self/smaps").read_bytes()
    except OSError:
        return 0
    return 1024 * sum(int(size) - int(resident) for size, resident in _MAPPED_WEIGHTS.findall(told))


def _numbers(file: Path) -> dict[str, int]:
    """Return the kilobyte values of a file of /proc in bytes; empty without the file."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def peak_memory() -> int:
    """Return the peak of this process's resident set, in bytes."""
    # Only a fallback for /proc: getrusage also counts the parent process's memory.
    if peak := resident_peak()[1]:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_free_memory() -> None:
    """Return freed memory to the system, if the C library supports it (glibc).

    Otherwise a quarter of one phase's activations would still be there, in fragments, at the peak of the next.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Reset this process's peak memory, so that a report covers only its own run (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# Parameters of glibc's mallopt: free memory at the top of the heap above which it is returned, size from which an allocation
# gets its own mapping, and the maximum number of such mappings.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Upper limits to which glibc itself raises its thresholds while large blocks are allocated and freed."""


_depth = 0
"""Number of nested `freed_memory_kept`."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the C library for reuse if supported (glibc), and return it to the system at the end.

    Training steps, blocks of one width and windows of logits free and allocate the same large tensors again and again;
    otherwise the system clears and maps their pages each time, which took an eighth to a fifth of the time on a CPU.
    """
    global _depth
    _depth += 1
    if _depth == 1:
        _tell(_KEEPING)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _tell(_USUAL)
            return_free_memory()


def _tell(options: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):  # another C library has no such call
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


_region: tuple[mmap.mmap, int] | None = None  # the region being filled, and its first free byte
