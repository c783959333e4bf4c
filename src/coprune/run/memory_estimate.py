"""The estimate of a run's memory: its summary, and settings that would make the run fit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from coprune.base.errors import BadInput
from coprune.base.words import Set, Sheet, Shown, Together, Words, parts_of, say
from coprune.model.walk.activations import GIB

ERROR = 0.15
"""Possible overestimate of the bound; a run is refused only if it exceeds the free memory by more."""


@dataclass(frozen=True)
class Proposal:
    """Settings that reduce the memory of a run that does not fit."""

    settings: dict[str, bool | int | str]
    enough: bool
    """Whether the run would then fit."""
    halves: bool
    """Whether a dtype of half the size would also help."""

    def words(self) -> Words:
        """Return the proposal as a sentence."""
        together = Together(tuple(Set(name, value) for name, value in self.settings.items()))
        if self.enough:
            return ("It would with ", together)
        half = (Set("dtype", "bfloat16"), " and ") if self.halves else ()
        return ("Even ", together, " would not be enough; ", *half, "a machine with more memory would help")


@dataclass(frozen=True)
class DevicePeak:
    """The peak memory of a run's tensors on its device."""

    name: str
    peak_bytes: int
    available_bytes: int | None
    allocated_bytes: int
    phases: dict[str, int] = field(default_factory=dict)

    def fits(self) -> bool:
        """Return whether the run fits, as in `Estimate.fits`; each process on a machine has its own device."""
        more = self.peak_bytes - self.allocated_bytes
        return self.available_bytes is None or more <= self.available_bytes * (1 + ERROR)


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """The peak memory of a run: of the whole process, with Python and its libraries, and on the device."""

    peak_bytes: int
    """Peak resident set size of one process."""
    available_bytes: int | None
    """Bytes that the process may still take; None if unknown."""
    resident_bytes: int
    phases: dict[str, int] = field(default_factory=dict)
    processes: int = 1
    proposal: Proposal | None = None
    """Settings with which the run would fit, if it would not."""
    device: DevicePeak | None = None
    presets: dict[str, Estimate] = field(default_factory=dict)
    """The memory of the same run with each preset, if requested."""

    @property
    def fits(self) -> bool:
        """Whether the run fits the free memory, within the bound's error."""
        if self.device is not None and not self.device.fits():
            return False
        more = (self.peak_bytes - self.resident_bytes) * self.processes
        return self.available_bytes is None or more <= self.available_bytes * (1 + ERROR)

    def line(self) -> str:
        """Return the estimate as one line."""
        several = f" in each of {self.processes} processes" if self.processes > 1 else ""
        memory = f"{_of(self.peak_bytes, self.available_bytes, self.resident_bytes)} of memory"
        if (one := self.device) is not None:
            memory += f" and {_of(one.peak_bytes, one.available_bytes, one.allocated_bytes)} on {one.name}"
        return f"Estimate: at most {memory}{several}."

    def headline(self) -> str:
        """Return the peak memory and whether it fits."""
        peak = None if self.device is None else self.device.peak_bytes
        return f"at most {self._both(self.peak_bytes, peak)}{'' if self.fits else ', which would not fit'}"

    def sheet(self) -> Sheet:
        """Return the peak memory, overall and by phase, on the host and on the device."""
        one = self.device
        free = None if self.available_bytes is None else self.available_bytes + self.resident_bytes
        there = None if one is None or one.available_bytes is None else one.available_bytes + one.allocated_bytes
        rows = [("memory", self.headline()), ("available", self._both(free, there) or "unknown")]
        phases = {} if one is None else one.phases
        rows += [(name, self._both(self.phases.get(name), phases.get(name))) for name in self.phases | phases]
        if self.proposal is not None:
            rows.append(("would not fit", say(self.proposal.words())))
        rows += [(f"preset {name}", other.headline()) for name, other in self.presets.items()]
        return Sheet(f"a run: {self.headline()}", rows)

    def _both(self, host: int | None, there: int | None) -> str:
        """Return a size on the host, followed by one on the device."""
        columns = ((host, ""), (there, "" if self.device is None else f" on {self.device.name}"))
        return ", ".join(f"{size / GIB:.2f} GiB{where}" for size, where in columns if size is not None)

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self) | {"fits": self.fits}, indent=2)

    def require(self) -> None:
        """Raise BadInput if the run would not fit."""
        if not self.fits:
            proposal = () if self.proposal is None else (*parts_of(self.proposal.words()), ". ")
            anyway = ("Or run it all the same with ", Set("check_memory", False))
            raise BadInput(f"the run would not fit. {self.line()}", field="check_memory", fix=(*proposal, *anyway))


def _of(peak: int, available: int | None, held: int) -> str:
    """Return a peak and the total memory available for it."""
    there = "" if available is None else f" of {(available + held) / GIB:.1f}"
    return f"{peak / GIB:.2f}{there} GiB"
