"""Channels and heads spread unevenly over the blocks, by what each block loses when it keeps fewer and fewer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import Dense
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation.allocation import Uniform
from coprune.pruning.evolution import Exchanges, Steps
from coprune.removal.candidates import Candidates, Consumers, Finds, Levels, search_steps
from coprune.removal.channels_and_heads import Kind, Part, step_of
from coprune.removal.cuts import Plan
from coprune.removal.shares import only_consumers
from coprune.removal.unit_scores import (
    ByError,
    Score,
    Search,
    by_norm,
    cheapest,
    curve,
    energy,
    joined,
    movement,
    score_named,
    some_tokens,
    spreading_named,
)
from coprune.run.calibrating import record_calibration
from coprune.run.context import Run


def spread_units(run: Run, plan: Plan) -> Plan:
    """Allocate different numbers of units to blocks, with a rehearsed plan's total, if the recipe asks for it."""
    asked = spreading_named(run.recipe.prune.allocation)
    if isinstance(asked, Uniform):
        return plan
    if not any(plan.parts.values()):
        run.reporter.say("Only blocks go, so there is nothing to spread over the others.")
        return plan
    levels = _measured(run, plan)
    alike = alike_parts(levels)
    even = tuple(own.steps_to(plan.count(own.part)) for own in levels)
    scales = _scales(run, plan, levels, even, asked if isinstance(asked, ByError) else ByError())
    # The first process decides, since another machine may round differently.
    steps = run.processes.from_first(lambda: least_error(levels, alike, even, scales))
    if isinstance(asked, Search):
        exchanges = Exchanges(alike, [len(own.counts) - 1 for own in levels])
        candidates = Candidates.of(run, Consumers.of(run, levels), plan.dropped, asked.tokens)
        steps = search_steps(run, asked, Finds.of(run), exchanges, [even, steps], candidates)
    return unevenly(plan, levels, steps)


def _scales(run: Run, plan: Plan, levels: Sequence[Levels], even: Steps, asked: ByError) -> list[float]:
    """Return the weights of the parts' errors."""
    if not asked.tokens or run.model.weights.streams:
        if asked.tokens:
            run.reporter.say("A streamed model's blocks count by what they change in the hidden states.")
        return [own.moved**asked.movement for own in levels]
    found, none, processes = [], [0] * len(levels), run.processes
    jobs = processes.own(range(len(levels)))
    with (
        Candidates.of(run, Consumers.of(run, levels), plan.dropped, asked.tokens) as candidates,
        run.reporter.bar("Weighing blocks", len(jobs)) as advance,
    ):
        base = candidates.cost(tuple(none), None) if plan.dropped else 0.0
        for at in jobs:
            alone = (*none[:at], even[at], *none[at + 1 :])
            lost = max(candidates.cost(alone, None) - base, 0.0)
            found.append(lost / max(levels[at].costs[even[at]], 1e-12))
            advance(1.0)
    return processes.in_order(found)


def unevenly(plan: Plan, levels: Sequence[Levels], steps: Steps) -> Plan:
    """Return the plan with steps per part, each saved as wide as the widest of its size."""
    counts = {own.part.name: own.counts[taken] for own, taken in zip(levels, steps, strict=True)}
    widest: dict[Kind, dict[int, int]] = {kind: dict(keep) for kind, keep in plan.keep.items()}
    for kind, keep in widest.items():
        for size in keep:
            own = [counts[one.part.name] for one in levels if (one.part.kind, one.part.count) == (kind, size)]
            keep[size] = max(own, default=keep[size])
    alike = all(counts[own.part.name] == widest[own.part.kind][own.part.count] for own in levels)
    return replace(plan, keep=widest, uneven={} if alike else counts)


def alike_parts(levels: Sequence[Levels]) -> list[list[int]]:
    """Return groups of parts among which steps can be exchanged: of one kind, with as many units of the same size."""
    found: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for at, own in enumerate(levels):
        consumers = own.part.fold.consumers
        found[own.part.kind, own.part.count, len(consumers) * consumers[0].shape[0]].append(at)
    return list(found.values())


def least_error(
    levels: Sequence[Levels], alike: Sequence[Sequence[int]], even: Steps, scales: Sequence[float]
) -> Steps:
    """Allocate steps at the lowest cost, as many as evenly. scales: weights of the parts' errors."""
    steps = [0] * len(levels)
    for group in alike:
        costs = [[cost * scales[at] for cost in levels[at].costs] for at in group]
        for at, taken in zip(group, cheapest(costs, sum(even[at] for at in group)), strict=True):
            steps[at] = taken
    return tuple(steps)


@torch.no_grad()
def _measured(run: Run, plan: Plan) -> list[Levels]:
    """Measure what keeping fewer units costs every part, in one walk over the dense model."""
    model, align = run.model, run.recipe.remove.align
    score = score_named(run.recipe.remove.score_of("units"))
    recording = record_calibration(run)
    batches = 0 if recording is None else len(recording.hidden)
    keep = partial(some_tokens, batches=batches, total=None if recording is None else recording.uneven)
    levels: list[Levels] = []
    inputs: dict[str, Inputs] = {}
    with run.reporter.bar("Measuring what blocks lose", len(model.blocks)) as advance:
        processes = run.processes
        walk = Walk(
            only_consumers(model, plan), recording, Gram, Dense(keep=keep), processes=processes, advance=advance
        )
        for event in walk:
            if not isinstance(event, BlockDone):
                inputs |= event.known()
                continue
            after = [keep(hidden) for hidden in event.after]
            moved = movement(joined(event.before), joined(after), processes)
            for part in plan.parts.get(event.block.name, ()):
                counts = list(
                    range(part.count, 0, -step_of(part.count, align if part.kind == "channels" else 1, part.group))
                )
                levels.append(_levels(event.block, part, counts, inputs, (score, moved)))
            inputs = {}
    return levels


def _levels(
    block: Block, part: Part, counts: list[int], inputs: Mapping[str, Inputs], how: tuple[Score, float]
) -> Levels:
    """Choose the units of a part at every level, with the relative cost. how: the score, and how far its block moves."""
    keeps: list[list[Tensor]] = [[] for _ in counts]
    costs, total = [0.0] * len(counts), 0.0
    for consumer in part.fold.consumers:
        weight, known = consumer.read(), inputs.get(consumer.name)
        statistic = None if known is None else known.statistic
        units, numbers = part.grouped.to(weight.device), [count // part.group for count in counts]
        if not isinstance(statistic, Gram) or not statistic.count:
            for own, count in zip(keeps, numbers, strict=True):
                own.append(part.ungrouped(by_norm(weight, units, count)))
            continue
        total += statistic.count * energy(weight, statistic)
        for at, (keep, cost) in enumerate(curve(how[0], weight, statistic, units, numbers)):
            keeps[at].append(part.ungrouped(keep))
            costs[at] += statistic.count * cost
    seen = {consumer.name: inputs[consumer.name] for consumer in part.fold.consumers if consumer.name in inputs}
    return Levels(block, part, counts, keeps, [cost / total if total else 0.0 for cost in costs], how[1], seen)
