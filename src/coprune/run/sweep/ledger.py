"""What a sweep took, kept in its folder over all its sittings: wall time, and the work that its runs did not do anew."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from coprune.base.files import write_text
from coprune.run.estimate.found import duration
from coprune.run.sweep.sharing import SHARED_FOLDER

_FILE = "ledger.json"
_NAMES = {
    "dense": "measuring the dense model",
    "statistics": "gathering statistics",
    "estimate": "estimating",
    "tokens": "tokenising",
}


class Ledger(BaseModel):
    """Seconds of a sweep."""

    wall: list[float] = []
    """Of every sitting, from the first job to the last."""
    saved: dict[str, dict[str, float]] = {}
    """By run and by kind: the work that it took over from others."""
    runs: dict[str, float] = {}
    """Of every run, loading included."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The ledger in a sweep's folder, or an empty one."""
        try:
            return cls.model_validate_json((folder / SHARED_FOLDER / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        write_text(folder / SHARED_FOLDER / _FILE, self.model_dump_json(indent=2) + "\n")

    def line(self) -> str:
        """One sentence or two for people; empty before anything was done."""
        if not self.wall:
            return ""
        sittings = "" if len(self.wall) == 1 else f" in {len(self.wall)} sittings"
        told = f"The sweep took {duration(sum(self.wall))}{sittings}; its runs together {duration(sum(self.runs.values()))}."
        kinds = {kind: sum(one.get(kind, 0.0) for one in self.saved.values()) for kind in _NAMES}
        parts = [f"{seconds:.0f} s of {_NAMES[kind]}" for kind, seconds in kinds.items() if seconds >= 0.5]
        return f"{told} Taken over from other runs instead of done again: {', '.join(parts)}." if parts else told
