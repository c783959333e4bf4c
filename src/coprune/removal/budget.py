"""A budget over the blocks' parameters, spread over channels, heads and blocks by what each way costs, measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.words import per_cent
from coprune.model.blocks import Block, count_parameters
from coprune.model.removed import fewer_lines
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import Dense, Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.removal.block_scores import kl_of_logits, logits_of
from coprune.removal.channels_and_heads import Kind, Part, find_parts, groups_of, put_back
from coprune.removal.cuts import Plan, fewer
from coprune.removal.rehearsal import rehearse, resized_by
from coprune.removal.removal_plan import (
    Removable,
    blocks_that_go,
    having,
    in_steps,
    kept_count,
    left_alone,
    only_consumers,
    require_align,
)
from coprune.removal.smaller_model import refusal_of
from coprune.removal.unit_scores import Score, remove_units, score_named
from coprune.run.calibrating import first_batches, record_calibration
from coprune.run.context import Run

WAYS = (8, 4)
"""Maximum numbers of block counts and of head counts to try."""

Parts = Mapping[str, Sequence[Part]]
Level = Mapping[int, int]
"""Number of kept units, by the number present."""


def find_for_budget(run: Run) -> Removable:
    """Return the parts of kinds that a configuration can express, and whether blocks are among them."""
    parts = dict(find_parts(run.model, ()))
    require_align(run, parts)
    return Removable(_removable(run, in_steps(run, parts)), blocks=_blocks_can_go(run))


def spread_budget(run: Run, share: float, found: Removable) -> Plan:
    """Try several ways to remove a share of the blocks' parameters, and choose the one that changes the model least.

    Each way removes the same number of channels, heads and blocks everywhere; the rest is refitted as in the run itself. The
    cost is the divergence from the dense model's distributions on some of the calibration data.

    Args:
        run: the run, with its model and data.
        share: of the blocks' parameters.
        found: the removable parts.

    Raises:
        UnsupportedModel: nothing of the model can be removed, or not as much.
    """
    reporter, blocks = run.reporter, len(run.model.blocks)
    most = int(share * blocks) + 1
    may_go = min(most, blocks - 1, blocks - len(run.model.chosen.untouched()))
    order = blocks_that_go(run, may_go) if may_go and found.blocks else []
    plans = list(_ways(run, found.parts, order, share))
    if not plans:
        raise UnsupportedModel(
            f"no cut of channels, heads and blocks removes {per_cent(share, 0)} of the blocks' parameters"
        )
    costs = costs_of(run, plans)
    for cost, plan in sorted(zip(costs, plans, strict=True), key=lambda pair: pair[0])[:4]:
        reporter.say(
            f"{per_cent(share, 0)} of the blocks' parameters as {', '.join(fewer_lines(fewer(plan, blocks)))}: KL {cost:.4f}."
        )
    return plans[costs.index(min(costs))]


def _removable(run: Run, found: Parts) -> dict[str, list[Part]]:
    """Return the parts of kinds that a configuration can express, tried one kind at a time."""
    kept: dict[str, list[Part]] = {name: [] for name in found}
    kinds: list[Kind] = ["channels", "heads"]
    for kind in kinds:
        own = {name: [part for part in parts if part.kind == kind] for name, parts in found.items()}
        groups = groups_of((part for parts in own.values() for part in parts), kind)
        level = {size: kept_count(size, 0.5, _align(run, kind), group) for size, group in groups.items()}
        if all(level[size] == size for size in groups):
            continue
        try:
            rehearse(run, Plan((), own, {kind: level}))
        except UnsupportedModel as error:
            why = left_alone(run, {kind: having(kind, own)}) or error
            run.reporter.say(f"Left alone, {kind}: {why}")
            continue
        for name, parts in own.items():
            kept[name] += parts
    return kept


def _blocks_can_go(run: Run) -> bool:
    try:
        rehearse(run, Plan([len(run.model.blocks) - 1]))
    except UnsupportedModel as error:
        run.reporter.say(f"Left alone, blocks: {error}")
        return False
    return True


def _align(run: Run, kind: Kind) -> int:
    return run.recipe.remove.align if kind == "channels" else 1


def _levels(parts: Parts, kind: Kind, align: int) -> list[Level]:
    """Return every number of units that may be kept, all of them first; parts of several sizes keep about the same share."""
    groups = groups_of((part for own in parts.values() for part in own), kind)
    sizes = sorted(groups)
    if not sizes:
        return [{}]
    shares = [units / sizes[-1] for units in range(0, sizes[-1], max(1, align // 4))]
    levels = [{size: size for size in sizes}, *({n: kept_count(n, s, align, groups[n]) for n in sizes} for s in shares)]
    return list({tuple(level.values()): level for level in levels}.values())


def _thinned(values: Sequence[Level], most: int) -> list[Level]:
    """Return at most `most` of the values, evenly spaced, with the first."""
    step = -(-len(values) // most)
    return list(values[::step])


def _ways(run: Run, parts: Parts, order: Sequence[int], share: float) -> Iterator[Plan]:
    """Yield every number of blocks and heads, each with the fewest removed channels that meet the budget."""
    sizes = {block.name: count_parameters(block.module) for block in run.model.blocks}
    budget = share * sum(sizes.values()) * (1 - 1e-3)
    heads = _thinned([*_sayable(run, parts, _levels(parts, "heads", 1))], WAYS[1])
    channels = _levels(parts, "channels", _align(run, "channels"))
    unit = {name: [(part, _parameters(part)) for part in own] for name, own in parts.items()}
    names, step = run.model.names, -(-(len(order) + 1) // WAYS[0])
    for count in range(0, len(order) + 1, step):
        dropped = sorted(order[:count])
        without = sum(sizes[names[index]] for index in dropped)
        gone = {names[index] for index in dropped}
        units = [pair for name, own in unit.items() if name not in gone for pair in own]
        for level in heads:
            cuts = (_cut(dropped, parts, gone, {"channels": own, "heads": level}) for own in channels)
            enough = (plan for plan in cuts if without + _removed(plan, units) >= budget)
            if (plan := next(enough, None)) is not None:
                yield plan
                if "channels" not in plan.keep:
                    break
        if without >= budget:
            break


def _sayable(run: Run, parts: Parts, levels: Sequence[Level]) -> Iterator[Level]:
    """Yield the numbers of heads that the configuration accepts."""
    for level in levels:
        plan = _cut((), parts, set(), {"heads": level})
        if not plan.keep or refusal_of(run.model.module, resized_by(run, plan)) is None:
            yield level


def _cut(dropped: Sequence[int], parts: Parts, gone: set[str], levels: Mapping[Kind, Level]) -> Plan:
    """Return a plan without the kinds that are kept whole."""
    keep = {kind: level for kind, level in levels.items() if any(old != new for old, new in level.items())}
    left = {name: [part for part in own if part.kind in keep] for name, own in parts.items() if name not in gone}
    return Plan(dropped, left if keep else {}, keep)


def _parameters(part: Part) -> int:
    """Return the number of parameters of a unit, over all experts."""
    keep = torch.arange(part.count) > 0
    return sum(int((~mask).sum()) for mask in part.masks([keep] * len(part.fold.consumers)).values())


def _removed(plan: Plan, units: Sequence[tuple[Part, int]]) -> int:
    return sum((part.count - plan.count(part)) * size for part, size in units if part.kind in plan.keep)


TOKENS = 1024
"""Minimum of calibration tokens to run through every variant (of images: one batch)."""


@dataclass(frozen=True)
class _Trial:
    """Calibration data on its way through the dense model (the first entry) and through every variant."""

    recording: Recording
    hidden: list[list[Tensor]]

    def move(self, block: Block, ways: Sequence[int]) -> None:
        for way in ways:
            self.hidden[way] = [self.recording.run(block, i, one) for i, one in enumerate(self.hidden[way])]


@torch.no_grad()
def costs_of(run: Run, plans: Sequence[Plan]) -> list[float]:
    """Return KL(dense ‖ cut) of every plan, in nats per token, with the rest refitted on the dense model's inputs.

    Several processes gather the Gram matrices together, and divide the plans.
    """
    model, processes = run.model, run.processes
    assert run.samples is not None
    tried = processes.own(plans)
    windows = first_batches(run.task.batches(run.samples.tokens), TOKENS)
    recording = record_batches(model, windows)
    trial = _Trial(recording, [list(recording.hidden) for _ in range(len(tried) + 1)])
    every: dict[str, list[Part]] = defaultdict(list)
    for plan in plans:
        for name, parts in plan.parts.items():
            every[name] += [part for part in parts if part not in every[name]]
    score = score_named(run.recipe.remove.score_of("units"))
    inputs: dict[str, Inputs] = {}
    with run.reporter.bar(f"Trying {len(plans)} ways", len(model.blocks)) as advance:
        walk = Walk(
            only_consumers(model, Plan(parts=every)),
            record_calibration(run),
            Gram,
            Dense(),
            processes=processes,
            advance=advance,
        )
        for event in walk:
            if not isinstance(event, BlockDone):
                inputs |= event.known()
                continue
            _try_block(trial, event.block, tried, inputs, score)
            inputs = {}
    return processes.in_order(_divergences(run, trial, windows))


def _try_block(trial: _Trial, block: Block, plans: Sequence[Plan], inputs: Mapping[str, Inputs], score: Score) -> None:
    """Move every way's hidden states on through the block as that way leaves it; the block is as before in the end."""
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {(): [0]}
    for way, plan in enumerate(plans, start=1):
        if block.index not in plan.dropped:
            cut = tuple((part.kind, plan.count(part)) for part in plan.parts.get(block.name, ()))
            alike.setdefault(cut, []).append(way)
    for ways in alike.values():
        plan = plans[ways[-1] - 1] if ways[-1] else Plan()
        parts = plan.parts.get(block.name, ())
        with put_back(block.module, block.name, {name for part in parts for name in part.parameters}):
            for part in parts:
                remove_units(block.module, part, inputs, score, plan.count(part))
            trial.move(block, ways)


def _divergences(run: Run, trial: _Trial, windows: Sequence[Tensor]) -> list[float]:
    model = run.model

    def logits(way: int, batch: int) -> Tensor:
        return logits_of(model, windows[batch], trial.hidden[way][batch])

    rows = 0
    found = [0.0] * (len(trial.hidden) - 1)
    for batch in range(len(windows)):
        dense = logits(0, batch)
        rows += len(dense)
        for way in range(1, len(trial.hidden)):
            found[way - 1] += kl_of_logits(dense, logits(way, batch))
    return [total / rows for total in found]
