"""What a run removes: the parts that there are, how many of each stay, and which blocks go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.words import Setting
from coprune.model.removal.find_parts import find_parts
from coprune.model.removal.parts import Kind, step_of
from coprune.model.walk.proven import ProvenModel
from coprune.pruning.structure.blocks import block_score_named
from coprune.run.removal.cut import Plan
from coprune.run.removal.experts import experts_left, find_experts
from coprune.run.session import Session


def plan_removal(session: Session) -> Plan:
    """Find the parts, and choose the blocks that go. Raises BadInput, UnsupportedModel."""
    asked, model, reporter = session.opened.recipe.structure, session.model, session.opened.around.reporter
    shares = asked.shares
    kinds: list[Kind] = [kind for kind in ("channels", "heads") if kind in shares]
    dropped = _blocks_of_share(session, shares["blocks"]) if "blocks" in shares else []
    parts = (
        {name: [part for part in found if part.kind in kinds] for name, found in find_parts(model, dropped)}
        if kinds
        else {}
    )
    for kind in kinds:
        without = [name for name in parts if not any(part.kind == kind for part in parts[name])]
        if len(without) == len(parts):
            raise UnsupportedModel(
                f"no {kind} of the model's blocks could be proved to be removable, so nothing was removed"
            )
        if without:
            reporter.say(
                f"Left alone: {without[0]} and {len(without) - 1} other blocks have no {kind} that can be removed."
            )
    sizes = {kind: {part.count for found in parts.values() for part in found if part.kind == kind} for kind in kinds}
    keep = {kind: _kept(kind, sizes[kind], shares[kind], asked.align) for kind in kinds}
    mixtures = find_experts(session, dropped) if "experts" in shares else {}
    left = {mixture.count: experts_left(mixture, shares["experts"]) for mixture in mixtures.values()}
    return Plan(dropped, parts, keep, mixtures, left)


def _blocks_of_share(session: Session, share: float) -> list[int]:
    """Numbers of the blocks that go, ascending. Raises BadInput where that is none, all, or more than may go."""
    opened, model = session.opened, session.model
    count, stay = round(share * len(model.blocks)), len(model.chosen.untouched())
    if not 0 < count < len(model.blocks):
        cause = f"{share:g} of {len(model.blocks)} blocks is {count}"
        raise BadInput(cause, field="remove", fix="give another share")
    if count > len(model.blocks) - stay:
        cause = f"{count} of {len(model.blocks)} blocks cannot go where {stay} are left alone"
        fix = ("give a smaller share, or loosen ", Setting("include"), " or ", Setting("exclude"))
        raise BadInput(cause, field="remove", fix=fix)
    dropped = sorted(blocks_that_go(session, count))
    score = opened.recipe.structure.score_of("blocks")
    opened.around.reporter.say(f"Blocks that go, by {score}: {', '.join(map(str, dropped))}.")
    return dropped


def _kept(kind: Kind, sizes: Collection[int], share: float, align: int) -> dict[int, int]:
    """How many units are kept, by how many there are. Raises BadInput where none goes."""
    kept = {old: kept_count(old, share, align if kind == "channels" else 1) for old in sizes}
    if all(new == old for old, new in kept.items()):
        of, fix = " and ".join(map(str, sorted(sizes))), "give a larger share, or leave it out"
        raise BadInput(f"{share:g} of {of} {kind} is none", field="remove", fix=fix)
    return kept


def kept_count(units: int, share: float, align: int) -> int:
    """How many units are kept: a multiple of `align`, or of the largest power of two below it that divides them."""
    step = step_of(units, align)
    kept = max(step, round(units * (1 - share) / step) * step)
    return min(kept, units)


def blocks_that_go(session: Session, count: int) -> list[int]:
    """Numbers of the blocks that are missed least."""
    opened = session.opened
    assert opened.samples is not None
    score = block_score_named(opened.recipe.structure.score_of("blocks"))
    with opened.around.reporter.bar("Choosing blocks", 1.0) as advance:
        batches = opened.task.batches(opened.samples.tokens)
        return score.choose(session.model, batches, count, advance, opened.around.processes)


def only_consumers(model: ProvenModel, plan: Plan) -> ProvenModel:
    """The model with no other matrix than those whose inputs have to be known."""
    wanted = {m.name for parts in plan.parts.values() for part in parts for m in part.fold.consumers}
    blocks = [[matrix for matrix in own if matrix.name in wanted] for own in model.chosen.blocks]
    groups = [[g for group in own if (g := [m for m in group if m.name in wanted])] for own in model.structure.groups]
    chosen = replace(model.chosen, blocks=blocks, outside=[])
    return replace(model, chosen=chosen, structure=replace(model.structure, groups=groups))
