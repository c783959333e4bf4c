"""The runs of a sweep, expanded without loading the model."""

from __future__ import annotations

from typing import Any

from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import Sweep

PLAIN = {"model": "pico", "save": "out/x"}


def runs_of(**data: Any) -> list[Run]:
    return expand(Sweep.make(PLAIN | data))


def names(**data: Any) -> list[str]:
    return [run.name for run in runs_of(**data)]
