"""When, where and with what something was made, for people who find its page later."""

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
    """When, where and with what."""

    model_config = ConfigDict(frozen=True)

    date: datetime
    """When everything was measured, in UTC."""
    machine: str
    command: str | None
    """What was typed; None for a call from Python."""
    version: str = ""
    """Of coprune; empty in reports of earlier versions."""
    commit: str | None = None
    """Of coprune, where it runs from a git checkout; `-dirty` behind it where files differ from it."""

    @classmethod
    def here(cls) -> Self:
        """Of this process."""
        cores = usable_cores()
        machine = f"{platform.system()} {platform.machine()}, {cores} core{'s' if cores > 1 else ''}"
        return cls(
            date=datetime.now(UTC).replace(microsecond=0),
            machine=machine,
            command=typed_command(),
            version=installed_version("coprune") or "",  # none where it runs from its sources
            commit=commit_of(Path(__file__).parents[3]),
        )

    def line(self) -> str:
        """Date, machine, version and commit, for people."""
        return f"{self.date:%Y-%m-%d %H:%M} UTC, on {self.machine}{self._software()}"

    def _software(self) -> str:
        commit = "" if self.commit is None else f" (commit {self.commit})"
        return f", with coprune {self.version}{commit}" if self.version or commit else ""


def of_several(made: Sequence[MadeFacts | None]) -> str:
    """When, where and with what several runs were made, in one line; empty where none tells."""
    known = [one for one in made if one is not None]
    if not known:
        return ""
    first, last = (f"{found(one.date for one in known):%Y-%m-%d %H:%M}" for found in (min, max))
    when = f"{first} UTC" if first == last else f"{first} to {last} UTC"
    with_what = " and ".join(dict.fromkeys(f"on {one.machine}{one._software()}" for one in known))
    return f"{when}, {with_what}"


@functools.cache
def commit_of(checkout: Path) -> str | None:
    """The commit that a folder has checked out; None where it is no checkout, or there is no git."""
    if not (checkout / ".git").exists():
        return None
    # Without locks: looking must not get in the way of what somebody else does in the checkout.
    describe = ["git", "--no-optional-locks", "-C", str(checkout), "describe"]
    describe += ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found or None
