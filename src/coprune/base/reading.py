"""Reads of device values by the host, batched, since each read waits for all queued work.

Values in host memory are read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from coprune.base.devices import buffer_for, in_host_memory
from coprune.base.errors import NumericalError

State = TypeVar("State")


class _Doubt(NamedTuple):
    """An error, and the condition (a scalar bool on a device) under which it is raised."""

    condition: Tensor
    error: NumericalError


class Reading:
    """Deferred error checks, evaluated at the next read."""

    def __init__(self) -> None:
        self._doubts: list[_Doubt] = []

    def add(self, condition: Tensor, error: NumericalError) -> None:
        """Raise the error at the next read if the condition holds."""
        self._doubts.append(_Doubt(condition, error))

    def read(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Return the tensors in host memory (None stays None). Raises the first error whose condition holds."""
        doubts, self._doubts = self._doubts, []
        conditions = torch.stack([doubt.condition for doubt in doubts]) if doubts else None
        *found, held = to_host(*tensors, conditions)
        for doubt, holds in zip(doubts, [] if held is None else held.tolist(), strict=True):
            if holds:
                raise doubt.error
        return found


_WAITING: ContextVar[Reading | None] = ContextVar("waiting", default=None)


@contextmanager
def reading_later() -> Iterator[Reading]:
    """Defer the conditions of `refuse_if` on a device until a `read`, or the end of the body."""
    reading = Reading()
    token = _WAITING.set(reading)
    try:
        yield reading
    finally:
        _WAITING.reset(token)
    reading.read()


def refuse_if(condition: Tensor, error: NumericalError) -> None:
    """Raise an error if a condition holds: now, or for a device at the next read within `reading_later`.

    condition: bool without dimensions.
    """
    waiting = _WAITING.get()
    if waiting is not None and not in_host_memory(condition.device):
        waiting.add(condition, error)
    elif bool(condition):
        raise error


def to_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy tensors to host memory (None stays None), with one copy for all on a device."""
    there = [tensor for tensor in tensors if tensor is not None and not in_host_memory(tensor.device)]
    if not there:
        return list(tensors)
    whole = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in there]).cpu()
    pieces = iter(whole.split([tensor.numel() * tensor.element_size() for tensor in there]))

    def read(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or in_host_memory(tensor.device):
            return tensor
        # A copy begins at an address that suits its type.
        piece: Tensor = next(pieces).clone()
        return piece.view(tensor.dtype).view(tensor.shape)

    return [read(tensor) for tensor in tensors]


def on_its_way(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to host memory.

    Returns a function that waits for the copy, but not for work queued later, and returns it.
    """
    if in_host_memory(tensor.device):
        return lambda: tensor
    copy, arrived = buffer_for(tensor), torch.Event(tensor.device)
    copy.copy_(tensor.detach(), non_blocking=True)
    arrived.record()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


class Questions(Generic[State]):
    """The stopping test of an iteration on a device.

    The next rounds are queued before the last answer is read, so that the device never idles. Surplus rounds are
    discarded: the result is the state at the first positive answer.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[Callable[[], Tensor], State]] = deque()

    def ask(self, over: Tensor, state: State) -> State | None:
        """Queue the next test, and read an earlier answer (in host memory this one).

        Args:
            over: bool without dimensions.
            state: the state now, not modified later.

        Returns:
            The state of the first positive answer, or None.
        """
        self._open.append((on_its_way(over), state))
        return self._hear(0 if in_host_memory(over.device) else 1)

    def rest(self) -> State | None:
        """Read all remaining answers. Returns as `ask`."""
        return self._hear(0)

    def _hear(self, left: int) -> State | None:
        while len(self._open) > left:
            answer, state = self._open.popleft()
            if bool(answer()):
                return state
        return None
