"""When, where and with what a run was made, for people who find its page later."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Self

from pydantic import BaseModel, ConfigDict

from coprune.base.environment import typed_command, usable_cores


class MadeFacts(BaseModel):
    """When, where and with what."""

    model_config = ConfigDict(frozen=True)

    date: datetime
    """When the run had measured everything, in UTC."""
    machine: str
    command: str | None
    """What was typed; None for a call from Python."""

    @classmethod
    def here(cls) -> Self:
        """Of this process."""
        machine = f"{platform.system()} {platform.machine()}, {usable_cores()} cores"
        return cls(date=datetime.now(UTC).replace(microsecond=0), machine=machine, command=typed_command())

    def line(self) -> str:
        """Date and machine, for people."""
        return f"{self.date:%Y-%m-%d %H:%M} UTC, on {self.machine}"
