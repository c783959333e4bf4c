"""Work in several processes that connect like those of torchrun, as forks, which have imported everything already."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial

from support.forking import forked

_SECONDS = 300  # after which processes that wait for each other are ended


def together(processes: int, work: Callable[[], object]) -> None:
    """Do the same work in several processes; fail if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(partial(_begin, rank, processes, port, work)) for rank in range(processes)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


def _begin(rank: int, processes: int, port: int, work: Callable[[], object]) -> None:
    signal.alarm(_SECONDS)
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in number.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work()
