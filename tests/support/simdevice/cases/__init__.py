"""The cases: a few of every kind of work in each test run, and all of them in `make devices`."""

from __future__ import annotations

from support.simdevice.cases import measuring, pruning, removing, training
from support.simdevice.cases.case import Case

CASES: dict[str, tuple[Case, ...]] = {
    "methods": pruning.methods(),
    "walk": pruning.walks(),
    "families": pruning.families(),
    "removal": removing.removals(),
    "fine-tuning": training.trainings(),
    "evaluation": measuring.evaluations(),
    "images": measuring.images(),
    "memory": measuring.memory(),
}
SIMULATED_ONLY = frozenset({"memory"})
"""Cases that use the simulated device's own switches."""
