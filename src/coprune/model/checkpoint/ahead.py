"""The next block on its way to a device while this one computes: read in a thread, copied in a queue of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from coprune.base.devices import device_memory, is_accelerator, is_out_of_memory
from coprune.base.side_stream import Channel, Coming, channel_to
from coprune.model.checkpoint.shards import TensorEntry, read_tensor

SHARE = 8
"""A block is fetched beside another only if it takes no more than this part of what is free on the device."""


def has_room(nbytes: int, device: torch.device) -> bool:
    """Whether a block of so many bytes is fetched to a device beside another one."""
    there = device_memory(device)
    return there is not None and there.available is not None and nbytes * SHARE <= there.available


def fetches(nbytes: int, device: torch.device) -> bool:
    """Whether blocks of so many bytes are fetched to a device as `Ahead` does."""
    return is_accelerator(device) and has_room(nbytes, device)


class Ahead:
    """Fetches tensors of files that will be wanted soon."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel, self._device = channel, device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coprune-ahead")
        self._coming: dict[TensorEntry, Future[Coming]] = {}

    def begin(self, entries: Sequence[TensorEntry]) -> bool:
        """Begin to fetch tensors, and forget those that were fetched and not taken; whether there is room for them."""
        for future in self._coming.values():
            future.cancel()
        self._coming = {}
        if not has_room(sum(entry.nbytes for entry in entries), self._device):
            return False
        self._coming = {entry: self._reader.submit(self._fetch, entry) for entry in entries}
        return True

    def take(self, entry: TensorEntry) -> Tensor | None:
        """A tensor on the device; None if it was not fetched. Raises as `read_tensor`."""
        future = self._coming.pop(entry, None)
        if future is None:
            return None
        try:
            return future.result().arrive()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None  # there may be room now, since the block before this one is gone
            raise

    def _fetch(self, entry: TensorEntry) -> Coming:
        return self._channel.send(read_tensor(entry, self._channel.buffer))


def ahead_to(device: torch.device) -> Ahead | None:
    """What fetches blocks for a device; None for host memory."""
    channel = channel_to(device)
    return None if channel is None else Ahead(channel, device)
