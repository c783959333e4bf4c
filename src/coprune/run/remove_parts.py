"""A run that removes channels, heads or blocks: what there is, a rehearsal of the cut, and the walk that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.checkpoint.writer import REST
from coprune.model.edit import Configure, DropBlock, Edit, Edits, KeepSlices
from coprune.model.folding import close, find_folds, head_size
from coprune.model.parts import Kind, Part, is_apart, parts_of, silence
from coprune.model.smaller import Resized, build_smaller, possible_changes, slices_kept, smaller_tensors
from coprune.model.walk.moves import ByBlock, Dense
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import forward_logits, replaced_forwards
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone, Past
from coprune.model.walk.statistics import Gram, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.structure.remove import block_influence, remove_units
from coprune.pruning.structure.scores import score_named
from coprune.run.events import BlockPruned
from coprune.run.journal import BlockOutcome, Output
from coprune.run.prune_blocks import Outcome, record_calibration
from coprune.run.session import Session
from coprune.run.share import SharedOutput


@dataclass(frozen=True)
class Plan:
    """What a run removes, as far as that is known before the walk."""

    dropped: Sequence[int] = ()
    """Numbers of the blocks that go."""
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """What may get smaller, by block."""
    keep: Mapping[Kind, Mapping[int, int]] = field(default_factory=dict)
    """How many units of a part are kept, by kind and by how many there are."""

    def count(self, part: Part) -> int:
        """Units of a part that are kept."""
        return self.keep[part.kind][part.count]

    def sizes(self) -> dict[int, int]:
        """New numbers by old ones that the configuration has to tell: units, and query heads. Raises UnsupportedModel."""
        found: dict[int, int] = {}
        for part in (part for parts in self.parts.values() for part in parts):
            for times in (1, part.repeats):
                old, new = part.count * times, self.count(part) * times
                if found.setdefault(old, new) != new:
                    raise UnsupportedModel(
                        f"{old} would become {new} and {found[old]}, so the cut is not one of the model"
                    )
        return found


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
    configure = _rehearse(session, plan)
    with opened.around.reporter.bar("Removing", len(model.blocks)) as advance:
        walk = Walk(
            _only_consumers(model, plan),
            record_calibration(session),
            Gram,
            ByBlock(keep_inputs=True),
            Past(finished, shared.restore),
            advance=advance,
        )
        results = _remove(session, walk, shared, plan)
    earlier = [result for outcome in finished.values() for result in outcome.results]
    edits: dict[str, list[Edit]] = {name: list(shared.outcomes[name].edits) for name in model.names}
    edits[REST] = [configure]
    return Outcome(earlier + results, Edits(edits), time.perf_counter() - started)


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
        influence = _influences(session)
        dropped = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
        reporter.say(f"Blocks that change their inputs least, and go: {', '.join(map(str, dropped))}.")
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
    return Plan(dropped, parts, keep)


def kept_count(units: int, share: float, align: int) -> int:
    """How many units are kept: a multiple of `align`, or of the largest power of two below it that divides them."""
    step = (
        align
        if units % align == 0 and units > align
        else next(s for s in (32, 16, 8, 4, 2, 1) if units % s == 0 and s <= align)
    )
    kept = max(step, round(units * (1 - share) / step) * step)
    return min(kept, units)


def _influences(session: Session) -> list[float]:
    recording = record_calibration(session)
    walk = Walk(session.model.idle(), recording, None, Dense(keep=Tensor.clone))
    return [block_influence(event.before, list(event.after)) for event in walk if isinstance(event, BlockDone)]


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


def _remove(session: Session, walk: Walk, shared: SharedOutput, plan: Plan) -> list[MatrixResult]:
    """Cut every block when the walk is through with it, and write it."""
    score = score_named(session.opened.recipe.structure.score)
    statistics: dict[str, Statistic] = {}
    results: list[MatrixResult] = []
    for event in walk:
        if not isinstance(event, BlockDone):
            if event.inputs is not None and event.inputs.statistic is not None:
                statistics |= dict.fromkeys((matrix.name for matrix in event.matrices), event.inputs.statistic)
            continue
        block, own, masks = event.block, list[MatrixResult](), dict[str, Tensor]()
        for part in plan.parts.get(block.name, ()):
            kept, found = remove_units(block.module, part, statistics, score, plan.count(part))
            masks |= {name: mask & masks[name] if name in masks else mask for name, mask in kept.items()}
            own += found
        edits = _edits(session, plan, block.index, masks)
        for edit in edits:
            edit.apply(block.module)
        shared.write_block(block, BlockOutcome(own, edits))
        session.opened.around.reporter.tell(BlockPruned(block.name, tuple(own)))
        results, statistics = results + own, {}
    return results


def _edits(session: Session, plan: Plan, index: int, masks: Mapping[str, Tensor]) -> list[Edit]:
    model = session.model
    if index in plan.dropped:
        return [DropBlock(block=model.names[index], entries=model.structure.answers[index].entries)]
    return [KeepSlices(kept=slices_kept(model.module, model.names[index], masks))] if masks else []


def _rehearse(session: Session, plan: Plan) -> Configure:
    """Cut the model at arbitrary places, build what results, and compare the two; then put everything back.

    So the configuration is found, and everything that could not work is refused before anything slow.
    """
    model, module = session.model, session.model.module
    edits: dict[str, list[Edit]] = {}
    idle = [block for block in model.blocks if block.index in plan.dropped]
    with _put_back(session, plan), replaced_forwards(idle, lambda block: _idle(session, block.index)):
        for block in model.blocks:
            masks: dict[str, Tensor] = {}
            for part in plan.parts.get(block.name, ()):
                kept = part.masks([_spread(part, plan.count(part), i) for i in range(len(part.fold.consumers))])
                silence(block.module, block.name, kept)
                masks |= {name: mask & masks[name] if name in masks else mask for name, mask in kept.items()}
            edits[block.name] = _edits(session, plan, block.index, masks)
        tensors = smaller_tensors(module, Edits(edits))
        changes, after = _proven_changes(session, tensors, plan)
    before = module.num_parameters()
    removed = (
        f"{', '.join(_words(plan, len(model.blocks)))}: {before:,} → {after:,} parameters ({after / before - 1:+.1%})"
    )
    session.opened.around.reporter.say(f"Removing {removed}.")
    return Configure(changes=changes, removed=removed)


def _proven_changes(session: Session, tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Any], int]:
    """The change of the configuration with which a model of these tensors computes what the silenced model does; its size."""
    model, module = session.model, session.model.module
    head = head_size(module)
    said = {"head_dim": head} if head is not None and "heads" in plan.keep else {}
    resized = Resized(plan.sizes(), len(model.blocks), plan.dropped, said)
    expected, fitting = forward_logits(module, model.structure.sample), 0
    for changes in possible_changes(module, {name: tensor.shape for name, tensor in tensors.items()}, resized):
        fitting += 1
        small = build_smaller(module, tensors, changes)
        try:
            same = close(forward_logits(small, model.structure.sample), expected)
        except Exception:  # whatever a model's code says to a configuration that fits its shapes alone
            continue
        if same:
            return changes, small.num_parameters()
    if fitting:
        raise UnsupportedModel(
            "a smaller model with the same weights computes something else than the model with these parts silenced, so they "
            "cannot be removed"
        )
    raise UnsupportedModel(
        f"no change of the configuration of {type(module).__name__} gives the smaller shapes, so what would result could not be "
        "loaded"
    )


def _idle(session: Session, index: int):  # type: ignore[no-untyped-def]
    answer = session.model.structure.answers[index]

    def forward(*args: object, **kwargs: object) -> object:
        hidden = args[0] if args and isinstance(args[0], Tensor) else kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return answer.wrap(hidden)

    return forward


def _spread(part: Part, count: int, shift: int) -> Tensor:
    """Units all over a part, other ones for every expert, so that what belongs together by its place alone would show."""
    keep = torch.zeros(part.count, dtype=torch.bool)
    keep[torch.linspace(0, part.count - 1, count).round().long()] = True
    return keep.roll(shift)


@contextmanager
def _put_back(session: Session, plan: Plan) -> Iterator[None]:
    """Give the parameters that a rehearsal changes their values again."""
    modules = {block.name: block.module for block in session.model.blocks}
    kept = {
        (block, name): modules[block].get_parameter(name.removeprefix(f"{block}.")).detach().clone()
        for block, parts in plan.parts.items()
        for part in parts
        for name in part.masks([torch.ones(part.count, dtype=torch.bool)] * len(part.fold.consumers))
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for (block, name), values in kept.items():
                modules[block].get_parameter(name.removeprefix(f"{block}.")).copy_(values)


def _words(plan: Plan, blocks: int) -> Iterator[str]:
    for kind, keep in plan.keep.items():
        counts = " and ".join(f"{old} → {new}" for old, new in sorted(keep.items()))
        yield f"{'key-value heads with their query heads' if kind == 'heads' else kind} {counts} of every block"
    if plan.dropped:
        yield f"blocks {blocks} → {blocks - len(plan.dropped)}"


def smaller_model(session: Session, edits: Edits) -> PreTrainedModel:
    """What is left, as a model of its own in memory."""
    module = session.model.module
    changes = next(edit.changes for edit in edits.all() if isinstance(edit, Configure))
    return build_smaller(module, smaller_tensors(module, edits), changes)
