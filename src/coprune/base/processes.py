"""The processes that prune one model together, as torchrun starts them, and their communication.

All processes make the same decisions in the same order; only calibration samples, the solving of a block's matrices and
evaluation windows are divided. In a run of one process all of this does nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from coprune.base import environment
from coprune.base.devices import accelerator, accelerators
from coprune.base.errors import BadInput, LostProcess

Value = TypeVar("Value")

# Longer than any process computes between two exchanges: a block of a large model takes minutes with a slow method.
TIMEOUT = timedelta(minutes=30)
_TIMEOUT_OF_TRAINING = timedelta(hours=24)  # the first process measures and saves before and after it, the others wait
_TELL_AFTER_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """One of the processes of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, samples: Tensor) -> Tensor:
        """Return this process's consecutive samples; sizes differ by at most one, and may be zero."""
        each, more = divmod(len(samples), self.size)
        start = self.rank * each + min(self.rank, more)
        return samples[start : start + each + (self.rank < more)]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Compute a value in the first process and broadcast it to the others."""
        if self.size == 1:
            return compute()
        values = [compute() if self.first else None]
        with _heard():
            dist.broadcast_object_list(values, src=0)
        value: Value = values[0]  # type: ignore[assignment]
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Value] = [value] * self.size
        with _heard():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Sequence[tuple[Tensor, int]]) -> None:
        """Overwrite tensors with those of another process. tensors: each with the rank that has it."""
        if self.size == 1:
            return
        buffers = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor, _ in tensors]
        with _heard():
            # As bytes, since not every backend knows every dtype; all at once, since most are small.
            works = [
                dist.broadcast(buffer.reshape(-1).view(torch.uint8), src=source, async_op=True)
                for buffer, (_, source) in zip(buffers, tensors, strict=True)
            ]
            for work in works:
                if work is not None:  # of a process that is not in the group; newer torch says so in its types
                    work.wait()
        for buffer, (tensor, source) in zip(buffers, tensors, strict=True):
            if buffer is not tensor and source != self.rank:
                tensor.copy_(buffer)

    def add_up(self, totals: Iterable[Tensor], count: int) -> int:
        """Sum the totals of all processes in place, and return the sum of their counts."""
        if self.size == 1:
            return count
        # gloo first: it notices a lost process at once, sums on GPUs only after the timeout.
        counts = self.gather(count)
        with _heard():
            for total in totals:
                dist.all_reduce(total)
        return sum(counts)

    def gather_rows(self, rows: Tensor, count: int, wanted: int) -> tuple[Tensor, int]:
        """Gather the rows (N × I) of all processes, subsampled to about `wanted`, and the number of tokens seen."""
        if self.size == 1:
            return rows, count
        totals = self.gather((len(rows), count))
        step = max(1, round(sum(kept for kept, _ in totals) / wanted))
        kept = [-(-number // step) for number, _ in totals]
        parts = [rows[::step] if r == self.rank else rows.new_empty(n, rows.shape[1]) for r, n in enumerate(kept)]
        self.broadcast([(part, source) for source, part in enumerate(parts) if len(part)])
        return torch.cat(parts), sum(seen for _, seen in totals)

    def own(self, jobs: Sequence[Value]) -> Sequence[Value]:
        """Return this process's jobs: every `size`-th from its rank on, perhaps none."""
        return jobs[self.rank :: self.size]

    def in_order(self, answers: Sequence[Value]) -> list[Value]:
        """Gather the results of `own` jobs from all processes, in the order of all jobs."""
        found = self.gather(list(answers))
        return [found[at % self.size][at // self.size] for at in range(sum(map(len, found)))]

    def positions(self, position: int | None) -> list[int]:
        """Gather the positions of all processes that have one."""
        return [other for other in self.gather(position) if other is not None]


ALONE = Processes()
"""The only process of a run."""


def started_processes() -> Processes:
    """Return this process and the number that torchrun or accelerate started, which may not have joined yet."""
    return Processes(environment.rank(), environment.world_size())


@contextmanager
def joined_processes(train: bool = False) -> Iterator[Processes]:
    """Join the processes started by torchrun; without torchrun, this is the only one.

    train: whether they train a model together, which needs a longer timeout.
    """
    if environment.world_size() == 1:
        yield Processes()
        return
    with _heard():
        dist.init_process_group(_backend(), timeout=_TIMEOUT_OF_TRAINING if train else TIMEOUT)
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error, when others may wait for something else


def _backend() -> str:
    """Return torch.distributed's backend: gloo on the host, and the accelerator's own (nccl) for its tensors.

    Raises BadInput where there are fewer GPUs than processes.
    """
    found, own = accelerator(), environment.local_rank()
    if found is None:
        return "gloo"
    if own >= accelerators():
        raise BadInput(
            f"process {own} on this machine has no GPU of its own: there are only {accelerators()}",
            fix="start torchrun with one process for each GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=)",
        )
    torch.accelerator.set_device_index(own)
    sums = dist.Backend.default_device_backend_map.get(found.type)
    return "gloo" if sums is None else f"cpu:gloo,{found.type}:{sums}"


@contextmanager
def _heard() -> Iterator[None]:
    """Convert a broken connection into an error of one line, and report a long wait for another process."""
    over = threading.Event()
    watch = threading.Thread(target=_log_waiting, args=(over,), daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LostProcess(
            f"another process of this run ended or did not answer ({reason[:200]})",
            fix="Its own message says why. Run the same command again to resume after the last finished block",
        ) from error
    finally:
        over.set()
        watch.join()


def _log_waiting(over: threading.Event) -> None:
    """Log repeatedly that this process is waiting; a stopped process looks like a slow one."""
    waited = 0.0
    while not over.wait(_TELL_AFTER_SECONDS):
        waited += _TELL_AFTER_SECONDS
        logger.warning(
            "process %d has waited %.0f seconds for another one, which may be slow or stopped; the run aborts after %.0f minutes",
            environment.rank(),
            waited,
            TIMEOUT.total_seconds() / 60,
        )
