"""Runtimes that load smaller models, tested on small models of the family with the same parts removed.

`runtimes.csv` has the results; `make runtimes` writes it.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from coprune.model.removed import AnyRemoval, SmallerModel

NAMES = {"vllm": "vLLM", "mlx": "mlx-lm", "openvino": "OpenVINO", "onnx": "ONNX Runtime GenAI"}
_WHOLE = "source"


@dataclass(frozen=True)
class Runtime:
    """The result of a runtime on a family's models without some parts."""

    name: str
    version: str
    refused: str | None
    """The first removed part with which it refuses the family's models or computes other values; None if it reads all."""

    @property
    def called(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


def runtimes_tried(model_type: str, parts: Collection[str]) -> list[Runtime]:
    """Return the runtimes that were tested on a family and read its unmodified models.

    Args:
        model_type: the family, as in `config.json`.
        parts: removed kinds of parts: channels, heads, blocks, experts.
    """
    found = []
    for runtime, name in NAMES.items():
        own = {row["part"]: row for row in _rows() if row["model"] == model_type and row["runtime"] == runtime}
        if _WHOLE not in own or own[_WHOLE]["reason"] or any(part not in own for part in parts):
            continue
        refused = next((part for part in parts if own[part]["reason"]), None)
        found.append(Runtime(name, own[_WHOLE]["version"], refused))
    return found


def refusals(model_type: str, parts: Collection[str]) -> str | None:
    """Return a sentence about runtimes that cannot read a family's models without some parts, or None."""
    refused = {one.called: one.refused for one in runtimes_tried(model_type, parts) if one.refused is not None}
    if not refused:
        return None
    named, fewer = " and ".join(refused), " and ".join(dict.fromkeys(refused.values()))
    others = " or ".join(part for part in ("channels", "blocks") if part not in fewer)
    return f"{named} failed on {model_type} with fewer {fewer} when tested; to serve with it, remove {others} instead."


def loads_in(model_type: str, removals: Sequence[AnyRemoval]) -> list[str]:
    """Return the runtimes besides transformers that read models of the family with the same parts removed."""
    parts: set[str] = {part.kind for one in removals if isinstance(one, SmallerModel) for part in one.parts}
    return [one.called for one in runtimes_tried(model_type, sorted(parts)) if one.refused is None]


@cache
def _rows() -> list[dict[str, str]]:
    with files("coprune.report").joinpath("runtimes.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
