"""What a run will take, as an estimate: whether that fits, and how it is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from coprune.base.errors import BadInput
from coprune.base.words import Set, Sheet, Shown, Together, Words, parts_of, say
from coprune.model.walk.activations import GIB


@dataclass(frozen=True)
class Proposal:
    """What would make a run fit that does not."""

    settings: dict[str, bool | int | str]
    """By their names."""
    enough: bool
    """Whether it would fit with them, or not even then."""
    halves: bool
    """Whether weights of half the size are another way."""

    def words(self) -> Words:
        """One sentence for people."""
        together = Together(tuple(Set(name, value) for name, value in self.settings.items()))
        if self.enough:
            return ("It would with ", together)
        half = (Set("dtype", "bfloat16"), " and ") if self.halves else ()
        return ("Even ", together, " would not be enough; ", *half, "a machine with more memory would help")


BUSY = 1.5
"""A machine counts as busy where computing takes so many times its processor time: threads that wait for each other do, too."""
# An estimate may be too high by so much, so only a run that is above what there is by more is refused.
ERROR = 0.15


@dataclass(frozen=True)
class DevicePeak:
    """What a run's tensors will take on its device."""

    name: str
    peak_bytes: int
    """Of all tensors there, at most."""
    available_bytes: int | None
    """What they may still take; None if the device does not tell."""
    allocated_bytes: int
    """What they take now."""
    phases: dict[str, int] = field(default_factory=dict)
    """Peak of each phase."""

    def fits(self) -> bool:
        """As `Estimate.fits`; processes on one machine have a device each."""
        more = self.peak_bytes - self.allocated_bytes
        return self.available_bytes is None or more <= self.available_bytes * (1 + ERROR)


@dataclass(frozen=True)
class PresetCosts:
    """What a run with a preset will take, as `Estimate` has it."""

    seconds: float
    busy_seconds: float | None
    peak_bytes: int
    device_bytes: int | None
    fits: bool


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """What a run will take: as a whole process, Python and its libraries included, and on its device."""

    peak_bytes: int
    """Largest resident set of one process."""
    seconds: float
    """Of the whole run."""
    available_bytes: int | None
    """What the process may still take; None if the system does not tell."""
    resident_bytes: int
    phases: dict[str, int] = field(default_factory=dict)
    """Peak of each phase."""
    processes: int = 1
    proposal: Proposal | None = None
    """Settings with which the run would fit, if it would not."""
    device: DevicePeak | None = None
    """None for a run in host memory."""
    busy_seconds: float | None = None
    """Of the whole run if others keep the machine as busy as they did while this was estimated; None where nobody looked."""
    presets: dict[str, PresetCosts] = field(default_factory=dict)
    """What the run would take with each preset, if that was asked for."""

    @property
    def fits(self) -> bool:
        """Whether the run fits what there is, if the estimate is not wrong by more than it may be."""
        if self.device is not None and not self.device.fits():
            return False
        more = (self.peak_bytes - self.resident_bytes) * self.processes
        return self.available_bytes is None or more <= self.available_bytes * (1 + ERROR)

    def line(self) -> str:
        """One line for people."""
        several = f" in each of {self.processes} processes" if self.processes > 1 else ""
        memory = f"{_of(self.peak_bytes, self.available_bytes, self.resident_bytes)} of memory"
        if self.device is not None:
            one = self.device
            memory += f" and {_of(one.peak_bytes, one.available_bytes, one.allocated_bytes)} on {one.name}"
        return f"Estimate: {memory}{several} at most, {self.time}."

    @property
    def time(self) -> str:
        """The time, or two where others keep the machine busy."""
        return time_of(self.seconds, self.busy_seconds)

    @property
    def costs(self) -> PresetCosts:
        """What counts beside those of other presets."""
        there = None if self.device is None else self.device.peak_bytes
        return PresetCosts(self.seconds, self.busy_seconds, self.peak_bytes, there, self.fits)

    def headline(self) -> str:
        """Memory and time."""
        fits = "" if self.fits else ", which would not fit"
        return f"a run: {self.peak_bytes / GIB:.2f} GiB, {self.time}{fits}"

    def sheet(self) -> Sheet:
        """Memory at most and in every phase, the host's beside the device's, and time."""
        one = self.device
        peak, phases = (None, {}) if one is None else (one.peak_bytes, one.phases)
        rows = [("memory", f"{self._both(self.peak_bytes, peak)} at most"), ("time", self.time)]
        free = None if self.available_bytes is None else self.available_bytes + self.resident_bytes
        there = None if one is None or one.available_bytes is None else one.available_bytes + one.allocated_bytes
        if free is not None or there is not None:
            rows.append(("available", self._both(free, there)))
        rows += [(name, self._both(self.phases.get(name), phases.get(name))) for name in self.phases | phases]
        if self.proposal is not None:
            rows.append(("would not fit", say(self.proposal.words())))
        rows += [(f"preset {name}", " · ".join(_cells(one))) for name, one in self.presets.items()]
        return Sheet(self.headline(), rows)

    def _both(self, host: int | None, there: int | None) -> str:
        """What is told of the host, and beside it of the device."""
        name = "" if self.device is None else f" on {self.device.name}"
        columns = ((host, ""), (there, name))
        return ", ".join(f"{size / GIB:.2f} GiB{where}" for size, where in columns if size is not None)

    def __str__(self) -> str:
        lines = [self.line()]
        if self.phases:
            lines.append(
                f"By phase: {_by_phase(self.phases)}; {self.resident_bytes / GIB:.2f} of that are held already."
            )
        if self.device is not None:
            lines.append(f"On {self.device.name}: {_by_phase(self.device.phases)}.")
        if self.proposal is not None:
            lines.append(f"It would not fit. {say(self.proposal.words())}.")
        lines += [f"{name:<9}" + "  ".join(_cells(one)) for name, one in self.presets.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        """All figures as JSON."""
        return json.dumps(asdict(self) | {"fits": self.fits}, indent=2)

    def require(self) -> None:
        """Raise BadInput if the run would not fit."""
        if not self.fits:
            proposal = () if self.proposal is None else (*parts_of(self.proposal.words()), ". ")
            anyway = ("Or run it all the same with ", Set("check_memory", False))
            raise BadInput(f"the run would not fit. {self.line()}", field="check_memory", fix=(*proposal, *anyway))


def _by_phase(phases: dict[str, int]) -> str:
    return ", ".join(f"{phase} {size / GIB:.2f}" for phase, size in phases.items()) + " GiB"


def _of(peak: int, available: int | None, held: int) -> str:
    """A peak, and all that there is for it."""
    there = "" if available is None else f" of {(available + held) / GIB:.1f}"
    return f"{peak / GIB:.2f}{there} GiB"


def _cells(one: PresetCosts) -> list[str]:
    """Memory and time of a preset."""
    there = "" if one.device_bytes is None else f" and {one.device_bytes / GIB:.2f} GiB on the device"
    fits = "" if one.fits else ", which would not fit"
    return [f"{one.peak_bytes / GIB:6.2f} GiB{there}", f"{time_of(one.seconds, one.busy_seconds)}{fits}"]


def time_of(seconds: float, busy: float | None) -> str:
    """A time in words, with the one on a machine that stays as busy as it is, where that is much more."""
    told = f"about {duration(seconds)}"
    if busy is None or busy < BUSY * seconds:
        return told
    return f"{told}, or {duration(busy)} if others keep this machine as busy as now"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
