"""Timing alternatives against each other on a machine that does other things too.

Alternatives take turns within one process, so that what disturbs one disturbs the others; medians and quartiles are
compared, and only ratios mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.native.build import load_kernels
from coprune.base.pages import on_large_pages


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over the repeats."""

    median: float
    low: float
    high: float


Clock = Callable[[], float]


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Call each alternative `repeats` times, in turns, after one unmeasured call of each.

    clock: of seconds; time.process_time counts only what one thread computes, where others take the processor away.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(time_once(call, clock))
    return {name: summarise(values) for name, values in seconds.items()}


def time_once(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Return the seconds of one call, including the GPU's work."""
    wait_for_device()
    start = clock()
    call()
    wait_for_device()
    return clock() - start


def summarise(seconds: list[float]) -> Timing:
    """Return median and quartiles of a few measurements."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high)


def wait_for_device() -> None:
    """Wait for the GPU's queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure_bandwidth(repeats: int = 9, clock: Clock = time.perf_counter) -> float:
    """Measure the memory bandwidth of PyTorch's threads in bytes per second: the best of several reads.

    Reads 256 MiB on large pages, far more than the caches hold, and does nothing else.
    """
    size = 256 << 20
    data = on_large_pages(torch.ones(size, dtype=torch.uint8))
    library = load_kernels()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        if library is None:
            data.view(torch.int64).sum()
        else:
            library.coprune_read(data.data_ptr(), size // 8, torch.get_num_threads())
        best = min(best, clock() - start)
    return size / best


REPEATS = 5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Tolerance relative to the largest output; both ways sum in different orders."""

Product = Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """Products that take about equally long."""

    way: str
    """Name of the candidate that is compared with an unpacked copy."""
    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    twentieths: int
    """Twentieths of the weights that are kept."""
    inputs: int
    """Number of inputs, or its bit length."""


TRIED: dict[Kind, bool] = {}
"""Whether the candidate won, for every kind tried so far."""


def by_the_faster(kind: Kind, candidate: Product, known: Product, x: Tensor) -> Tensor:
    """Make a product in the way that is faster here. The first of a kind is made both ways, in turns.

    Args:
        kind: of the product.
        candidate: the way that has to prove itself. It may fail.
        known: the other way.
        x: T × I.

    Returns:
        T × O.
    """
    if kind not in TRIED:
        TRIED[kind] = wins(candidate, known, x)
    return candidate(x) if TRIED[kind] else known(x)


def wins(candidate: Product, known: Product, x: Tensor) -> bool:
    """Return whether a candidate gives the known product's result in less time. It may fail."""
    if not gives_the_same(candidate, known, x):
        return False
    times = time_in_turns({"candidate": partial(candidate, x), "known": partial(known, x)}, REPEATS)
    return times["candidate"].median < times["known"].median


def gives_the_same(candidate: Product, known: Product, x: Tensor) -> bool:
    """Return whether a candidate gives the known product's result, up to rounding. It may fail."""
    wanted = known(x)
    try:
        found = candidate(x)
    except Exception:  # of torch, the driver, Triton's compiler or the one that it calls: each has its own types
        return False
    return float((found - wanted).abs().max()) <= TOLERANCE[x.dtype] * float(wanted.abs().max())  # NaN is not
