"""The identity of a run, by which another one may resume it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coprune.report.run_events import ResumedOtherwise


@dataclass(frozen=True)
class Identity:
    """The identity of a run, by which another one may resume it."""

    settings: dict[str, Any]
    """Values that must be equal: recipe, model and data."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """Values that may differ, since they change only rounding."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ResumedOtherwise]:
    """Return in what an unfinished run differs from this one."""
    written = json.loads(json.dumps(now))
    return [
        ResumedOtherwise(setting=key, before=before.get(key), now=value)
        for key, value in written.items()
        if before.get(key) != value
    ]
