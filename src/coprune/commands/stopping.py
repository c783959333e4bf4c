"""A command that is stopped, by Ctrl-C or by what ends processes politely (SIGTERM): it tidies up, and says how to go on."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from coprune.base.environment import world_size
from coprune.base.errors import BadInput

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# What was done so far is taken over by the same command.
_GOES_ON = ("prune", "finetune", "sweep", "compare")


class Stop:
    """Whether SIGTERM came."""

    def __init__(self) -> None:
        self.terminated = False

    @property
    def code(self) -> int:
        """The exit code of a command that was stopped."""
        return TERMINATED if self.terminated else INTERRUPTED

    def _take(self, number: int, frame: object) -> None:
        # A second one ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.terminated = True
        raise KeyboardInterrupt


@contextmanager
def stopped_alike() -> Iterator[Stop]:
    """Let SIGTERM stop the body as Ctrl-C does.

    Not among several processes: whoever started them ends all when one is lost, which may be within a call that no signal
    handler interrupts.
    """
    stop = Stop()
    if not _is_alone() or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop._take)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_alone() -> bool:
    try:
        return world_size() == 1
    except BadInput:  # which the command will say
        return True


def how_to_go_on(arguments: Sequence[str]) -> str:
    """What to say of a command that was stopped. arguments: what was typed after `coprune`."""
    said = "stopped; nothing half-written was left under its final name."
    if not arguments or arguments[0] not in _GOES_ON:
        return said
    if not _is_alone():
        return f"{said} The same command goes on where it stopped."
    return f"{said} To go on, type: coprune {shlex.join(arguments)}"
