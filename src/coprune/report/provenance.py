"""When, where and with which version something was made."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from coprune.base.environment import installed_version, typed_command, usable_cores


class MadeFacts(BaseModel):
    """Date, machine, command and version."""

    model_config = ConfigDict(frozen=True)

    date: datetime
    """Date of the measurements, in UTC."""
    machine: str
    command: str | None
    """Command line of the run; None for a call from Python."""
    version: str
    """Version of coprune; empty if it is not installed."""
    commit: str | None = None
    """Commit of coprune, if it runs from a git checkout; with `-dirty` if files differ from it."""

    @classmethod
    def here(cls) -> Self:
        """Describe this process."""
        cores = usable_cores()
        machine = f"{platform.system()} {platform.machine()}, {cores} core{'s' if cores > 1 else ''}"
        return cls(
            date=datetime.now(UTC).replace(microsecond=0),
            machine=machine,
            command=typed_command(),
            version=installed_version("coprune") or "",  # None if it runs from its sources
            commit=commit_of(Path(__file__).parents[3]),
        )

    def line(self) -> str:
        """Return date, machine, version and commit as a line."""
        return f"{self.date:%Y-%m-%d %H:%M} UTC, on {self.machine}{self._software()}"

    def _software(self) -> str:
        commit = "" if self.commit is None else f" (commit {self.commit})"
        return f", with coprune {self.version}{commit}" if self.version or commit else ""


def of_several(known: Sequence[MadeFacts]) -> str:
    """Return dates, machines and versions of several runs in one line."""
    first, last = (f"{found(one.date for one in known):%Y-%m-%d %H:%M}" for found in (min, max))
    when = f"{first} UTC" if first == last else f"{first} to {last} UTC"
    with_what = " and ".join(dict.fromkeys(f"on {one.machine}{one._software()}" for one in known))
    return f"{when}, {with_what}"


@functools.cache
def commit_of(checkout: Path) -> str | None:
    """Return the commit checked out in a folder, or None without a checkout or git."""
    if not (checkout / ".git").exists():
        return None
    # Without locks, to not disturb other work in the checkout.
    describe = ["git", "--no-optional-locks", "-C", str(checkout), "describe"]
    describe += ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found or None
