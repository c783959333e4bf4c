"""Copies to a device beside what it computes. Nothing else in the project names streams and events.

A stream is a queue of a device; what is in one queue knows nothing of the others, so whoever uses what a copy brings has to
wait for it. That is what `Sent.arrive` is for: it gives the tensor only together with the wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.devices import is_accelerator


class Coming(Protocol):
    """A tensor on its way."""

    def arrive(self) -> Tensor:
        """The tensor, for what is computed from now on."""
        ...


class Channel(Protocol):
    """A way to a device, for a thread that reads beside the one that computes."""

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that can be sent."""
        ...

    def send(self, held: Tensor) -> Coming:
        """Begin to copy a buffer, which nobody writes to any more."""
        ...


@dataclass(frozen=True)
class Sent:
    """A tensor that a side stream copies; implements `Coming`."""

    tensor: Tensor
    copied: torch.Event
    computing: torch.Stream

    def arrive(self) -> Tensor:
        self.computing.wait_event(self.copied)
        return self.tensor


class SideStream:
    """A queue of copies to a device beside the one that is computed in when this is made; implements `Channel`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._computing = torch.accelerator.current_stream(device)
        self._stream = torch.Stream(device)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Torch hands it out again only when what copies from it is done.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, held: Tensor) -> Sent:
        with self._stream:
            tensor = torch.empty_like(held, device=self._device)
            # Its memory may have been another block's, which was let go of while the device still computes with it.
            self._stream.wait_event(self._computing.record_event())
            tensor.copy_(held, non_blocking=True)
        return Sent(tensor, self._stream.record_event(), self._computing)


def channel_to(device: torch.device) -> Channel | None:
    """A way to a device beside what it computes; None for host memory, and for devices that have none."""
    return SideStream(device) if is_accelerator(device) else None
