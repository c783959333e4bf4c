"""What a run has settled to remove, kept in its journal: choosing blocks and spreading units is slow, and may round otherwise."""

from __future__ import annotations

from typing import Any

from coprune.model.removal.parts import Kind
from coprune.run.removal.cut import Plan
from coprune.run.removal.plan import Removable
from coprune.run.session import Session


def settled_in(plan: Plan) -> dict[str, Any]:
    """What was chosen in a plan, as JSON."""
    sizes = {kind: [*map(list, keep.items())] for kind, keep in plan.keep.items()}
    experts = [*map(list, plan.experts.items())]
    return {"dropped": [*plan.dropped], "keep": sizes, "experts": experts, "uneven": dict(plan.uneven)}


def as_settled(session: Session, found: Removable, settled: dict[str, Any]) -> Plan:
    """The plan in which this was chosen.

    Args:
        session: of the run.
        found: what may go of its model.
        settled: as `settled_in` gave it.
    """
    keep: dict[Kind, dict[int, int]] = {kind: dict(sizes) for kind, sizes in settled["keep"].items()}
    rest = found.without({session.model.names[index] for index in settled["dropped"]})
    parts = {name: [part for part in own if part.kind in keep] for name, own in rest.parts.items()} if keep else {}
    return Plan(settled["dropped"], parts, keep, rest.mixtures, dict(settled["experts"]), settled["uneven"])
