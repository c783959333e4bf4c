"""How long each phase of a run took, and how much memory it left occupied."""

from __future__ import annotations

import time

import torch

from coprune.base.devices import device_memory, reset_peak
from coprune.base.memory import resident_memory, return_free_memory
from coprune.base.progress import Reporter
from coprune.report.schema import PhaseFacts
from coprune.run.events import Phase, PhaseDone


class Phases:
    """Notes every phase as it ends, and tells whoever listens to the reporter."""

    def __init__(self, reporter: Reporter, device: torch.device, began: float | None = None) -> None:
        """device: that the run computes on, whose peak is counted from now on; began: when the run did, if not now."""
        reset_peak(device)
        self.began = time.perf_counter() if began is None else began
        self._device = device
        self.facts: list[PhaseFacts] = []
        self._reporter = reporter
        self._started = time.perf_counter()

    @property
    def now(self) -> str:
        """What the run is doing: the phase that has not ended, or what comes after all of them."""
        return next((phase.value for phase in list(Phase)[len(self.facts) :]), "finish the report")

    def done(self, phase: Phase) -> None:
        """Note that a phase has just ended, and give back what it left free."""
        return_free_memory()
        now = time.perf_counter()
        there = device_memory(self._device)
        device = None if there is None else there.allocated
        seconds, self._started = now - self._started, now
        facts = PhaseFacts(name=phase.value, seconds=seconds, resident_bytes=resident_memory(), device_bytes=device)
        self.facts.append(facts)
        self._reporter.tell(PhaseDone(phase, facts))
