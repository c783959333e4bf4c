"""A command that is stopped, by Ctrl-C or by what ends processes politely (SIGTERM): it tidies up, and says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from coprune.base.environment import rank, world_size
from coprune.base.errors import BadInput
from coprune.commands.show import tell

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_AGAIN_SECONDS = 1.0
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
        signal.signal(signal.SIGALRM, self._insist)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        raise KeyboardInterrupt

    def _insist(self, number: int, frame: object) -> None:
        """Raise once more where a library swallowed the first: a callback from C, a finaliser, an `except` for everything."""
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                return  # somebody is tidying up
            error = error.__context__
        raise KeyboardInterrupt


@contextmanager
def stopped_alike(stop: Stop) -> Iterator[None]:
    """Let SIGTERM stop the body as Ctrl-C does. stop: notes that it came.

    Among several processes it ends this one with a line: whoever started them ends all when one is lost, which may be within a
    call that no signal handler interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _is_alone():
        _end_when_told()
        yield
        return
    before = signal.signal(signal.SIGTERM, stop._take)
    try:
        yield
    finally:
        if stop.terminated:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def _end_when_told() -> None:
    """End this process at SIGTERM wherever it is, by a thread that hears of the signal when it comes."""
    hear, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # so that Python takes note of it

    def wait() -> None:
        while signal.SIGTERM not in os.read(hear, 1):
            pass
        tell(
            f"coprune: process {rank()} was told to stop, as all are when one of them ended. "
            "The same command goes on where it stopped."
        )
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()


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
