"""Jobs that worker processes of a pool can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.files import write_durably
from coprune.base.words import Setting


@dataclass(frozen=True)
class Doing:
    """A job that records each try with its process id in a folder, and then behaves as named."""

    name: str
    folder: Path
    threads: int = 1
    gpu: bool = False
    memory: int | None = 0

    def do(self) -> Any:
        """Record the try and behave."""
        with (self.folder / f"{self.name}.tries").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return _BEHAVING[self.name.partition(" ")[0]](self)

    def tries(self) -> list[int]:
        """Return the processes that tried it."""
        file = self.folder / f"{self.name}.tries"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


def _work(job: Doing) -> str:
    time.sleep(0.2)
    return "done"


def _die(job: Doing) -> None:
    if job.name == "dies" or len(job.tries()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(job: Doing) -> None:
    raise BadInput("nothing is left", field="nsamples", value=0, fix=("take more with ", Setting("nsamples")))


def _break(job: Doing) -> None:
    raise RuntimeError("out of luck")


def _write(job: Doing) -> None:
    """Write half a file and wait to be stopped."""

    def write(file: Path) -> None:
        file.write_bytes(b"half")
        (job.folder / "half").touch()
        time.sleep(600)

    write_durably(job.folder / "written", write)


_BEHAVING: dict[str, Callable[[Doing], Any]] = {
    "works": _work,
    "dies": _die,
    "refuses": _refuse,
    "breaks": _break,
    "returns": lambda job: lambda: None,  # cannot be pickled
    "writes": _write,
}
