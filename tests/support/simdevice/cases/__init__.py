"""The cases: for every kind of work a few in each run of the tests, and all of them by `make devices`."""

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
"""What is done with the simulated device's own switches."""
