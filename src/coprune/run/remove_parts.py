"""A run that removes channels, heads or blocks: what there is, a rehearsal of the cut, and the walk that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.edit import Configure
from coprune.model.edits import Edits
from coprune.model.folding import find_folds, head_size
from coprune.model.parts import Kind, Part, is_apart, parts_of, together
from coprune.model.smaller import build_smaller, smaller_tensors
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.moves import Dense
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone, Past
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.reconstructed import reconstruct_cut
from coprune.pruning.structure.blocks import block_score_named
from coprune.pruning.structure.remove import remove_units
from coprune.pruning.structure.scores import score_named
from coprune.run.journal import BlockOutcome, Output
from coprune.run.prune_blocks import (
    Outcome,
    all_edits,
    finish_block,
    moves_of,
    record_to_prune,
)
from coprune.run.rehearsal import Plan, edits_of_block, rehearse
from coprune.run.remove_experts import choose_experts, experts_left, find_experts
from coprune.run.session import Session
from coprune.run.share import SharedOutput


def remove_parts(session: Session, output: Output | None) -> Outcome:
    """Remove what the recipe says, going on where an earlier run stopped.

    Raises:
        UnsupportedModel: the model has no such parts, or no configuration tells of what would be left.
    """
    opened, model = session.opened, session.model
    started = time.perf_counter()
    shared = SharedOutput(opened.around.processes, output, model.weights)
    finished = shared.finished()
    plan = _plan(session)
    configure = rehearse(session, plan)
    experts, covered = choose_experts(session, plan.mixtures, plan.experts) if plan.mixtures else ({}, {})
    with opened.around.reporter.bar("Removing", len(model.blocks)) as advance:
        walk = Walk(
            _only_consumers(model, plan),
            # Blocks that go were chosen before; without parts, only who trains the others asks for inputs.
            record_to_prune(session) if plan.parts or session.reconstruction is not None else None,
            Gram,
            moves_of(session),
            Past(finished, shared.restore),
            advance=advance,
        )
        results = _remove(session, walk, shared, plan, experts)
    earlier = [result for outcome in finished.values() for result in outcome.results]
    seconds = time.perf_counter() - started
    return Outcome(earlier + results, all_edits(session, shared, configure), seconds, covered)


def _plan(session: Session) -> Plan:
    """Find the parts, and choose the blocks that go."""
    asked, model, reporter = session.opened.recipe.structure, session.model, session.opened.around.reporter
    shares = asked.shares
    kinds: list[Kind] = [kind for kind in ("channels", "heads") if kind in shares]
    dropped: list[int] = []
    if "blocks" in shares:
        count = round(shares["blocks"] * len(model.blocks))
        if not 0 < count < len(model.blocks):
            raise BadInput(
                f"{shares['blocks']:g} of {len(model.blocks)} blocks is {count}",
                field="remove",
                fix="give another share",
            )
        dropped = sorted(_blocks_that_go(session, count))
        reporter.say(f"Blocks that go, by {asked.score_of('blocks')}: {', '.join(map(str, dropped))}.")
    parts = (
        {name: [part for part in found if part.kind in kinds] for name, found in _parts(model, dropped)}
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
    align = {"channels": asked.align, "heads": 1}
    keep = {kind: {old: kept_count(old, shares[kind], align[kind]) for old in sizes[kind]} for kind in kinds}
    mixtures = find_experts(session, dropped) if "experts" in shares else {}
    left = {mixture.count: experts_left(mixture, shares["experts"]) for mixture in mixtures.values()}
    return Plan(dropped, parts, keep, mixtures, left)


def kept_count(units: int, share: float, align: int) -> int:
    """How many units are kept: a multiple of `align`, or of the largest power of two below it that divides them."""
    step = (
        align
        if units % align == 0 and units > align
        else next(s for s in (32, 16, 8, 4, 2, 1) if units % s == 0 and s <= align)
    )
    kept = max(step, round(units * (1 - share) / step) * step)
    return min(kept, units)


def _blocks_that_go(session: Session, count: int) -> list[int]:
    """Numbers of the blocks that are missed least."""
    opened = session.opened
    assert opened.samples is not None
    score = block_score_named(opened.recipe.structure.score_of("blocks"))
    with opened.around.reporter.bar("Choosing blocks", 1.0) as advance:
        return score.choose(session.model, opened.task.batches(opened.samples.tokens), count, advance)


def _parts(model: ProvenModel, dropped: Sequence[int]) -> Iterator[tuple[str, list[Part]]]:
    """What could be removed of every block that stays, proven on one sample."""
    recording = record_batches(model, [model.structure.sample])
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if isinstance(event, BlockDone) and event.block.index not in dropped:
            groups = model.structure.groups[event.block.index]
            run = partial(recording.run, event.block, 0, event.before[0])
            folds = find_folds(groups, head_size(model.module), run)
            parts = parts_of(event.block, folds, groups)
            yield event.block.name, [part for part in parts if is_apart(event.block.module, part, run)]


def _only_consumers(model: ProvenModel, plan: Plan) -> ProvenModel:
    """The model with no other matrix than those whose inputs have to be known."""
    wanted = {m.name for parts in plan.parts.values() for part in parts for m in part.fold.consumers}
    blocks = [[matrix for matrix in own if matrix.name in wanted] for own in model.chosen.blocks]
    groups = [[g for group in own if (g := [m for m in group if m.name in wanted])] for own in model.structure.groups]
    chosen = replace(model.chosen, blocks=blocks, outside=[])
    return replace(model, chosen=chosen, structure=replace(model.structure, groups=groups))


def _remove(
    session: Session, walk: Walk, shared: SharedOutput, plan: Plan, experts: Mapping[str, Tensor]
) -> list[MatrixResult]:
    """Cut every block when the walk is through with it, and write it. experts: which are kept, by block."""
    score = score_named(session.opened.recipe.structure.score_of("units"))
    inputs: dict[str, Inputs] = {}
    results: list[MatrixResult] = []
    # Blocks before the first cut have nothing to make up for.
    cut = [b.index for b in session.model.blocks if plan.parts.get(b.name) or b.name in experts]
    first = min([*cut, *plan.dropped])
    for event in walk:
        if not isinstance(event, BlockDone):
            if event.inputs is not None:
                inputs |= dict.fromkeys((matrix.name for matrix in event.matrices), event.inputs)
            continue
        block, own, masks = event.block, list[MatrixResult](), dict[str, Tensor]()
        for part in plan.parts.get(block.name, ()):
            kept, found = remove_units(block.module, part, inputs, score, plan.count(part))
            masks = together(masks, kept)
            own += found
        if (left := experts.get(block.name)) is not None:
            plan.mixtures[block.name].never_choose(block.module, left)
        if first <= block.index and block.index not in plan.dropped:
            own = _reconstruct(session, walk, event, (masks, own))
        edits = edits_of_block(session, plan, block, masks, left)
        finish_block(session, shared, block, BlockOutcome(own, edits))
        results, inputs = results + own, {}
    return results


def _reconstruct(
    session: Session, walk: Walk, done: BlockDone, cut: tuple[Mapping[str, Tensor], list[MatrixResult]]
) -> list[MatrixResult]:
    """Train what is left of a block, if that is asked for."""
    if session.reconstruction is None or walk.recording is None:
        return cut[1]
    chosen = session.model.chosen.blocks[done.block.index]
    return reconstruct_cut(session.reconstruction, done, walk.recording, chosen, cut)


def smaller_model(session: Session, edits: Edits) -> PreTrainedModel:
    """What is left, as a model of its own in memory."""
    module = session.model.module
    changes = next(edit.changes for edit in edits.all() if isinstance(edit, Configure))
    return build_smaller(module, smaller_tensors(module, edits), changes)
