"""Events of a training for the listeners of its reporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from coprune.base.progress import Event


@dataclass(frozen=True)
class Trained(Event):
    """A training took its last step."""

    kind: ClassVar[str] = "trained"
    seconds: float
    """Of this process, without those before a resume."""
