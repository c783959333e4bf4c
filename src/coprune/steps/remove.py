"""Removal of channels, heads, experts or blocks: finding parts, rehearsing the cut, and walking over the blocks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coprune.base.devices import memory_within
from coprune.base.errors import UnsupportedModel
from coprune.model.blocks import Block
from coprune.model.edit import Configure
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.block_events import BlockDone, Past
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import Dense
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation.allocation import Uniform
from coprune.pruning.block_training import BlockTraining, reconstruct_cut
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.choice import USUAL_METHOD
from coprune.recipe.recipe import Recipe
from coprune.removal.block_scores import Going
from coprune.removal.budget_loss import Candidates, Consumers, Levels, Steps
from coprune.removal.by_size import Mix
from coprune.removal.channels_and_heads import Kind, Part, parameter_of, step_of
from coprune.removal.cuts import Cut, Plan, edits_of_block
from coprune.removal.expert_choice import choose_experts, cut_carried
from coprune.removal.maps import FoundMap
from coprune.removal.mix_choice import compare_mixes
from coprune.removal.rehearsal import rehearse
from coprune.removal.removal_plan import Removable, find_maps, find_removable, only_consumers, plan_removal, say_mix
from coprune.removal.unit_scores import (
    ByError,
    cheapest,
    joined,
    largest,
    movement,
    remove_units,
    score_named,
    some_tokens,
    unit_allocation_named,
    unit_costs,
)
from coprune.report.runtimes import refusals
from coprune.run.calibrating import moves_of, record_calibration, record_to_prune
from coprune.run.context import Outcome, Run
from coprune.run.output import BlockOutcome
from coprune.run.result import Result
from coprune.run.step import Left
from coprune.stages.run_stages import run_stages
from coprune.stages.to_gguf import cut_of
from coprune.steps.recipe_step import UNIFORM, UNTOLD, StepOfRecipe, allocates_units, without_training
from coprune.steps.remove_by_bytes import cut_by_bytes, file_cut_by_bytes


class Remove(StepOfRecipe):
    """Removes parts of blocks, or whole ones."""

    name = "remove"

    @classmethod
    def is_asked(cls, recipe: Recipe) -> bool:
        return bool(recipe.remove.kinds)

    @classmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        own = without_training(recipe).model_copy(update={"remove": recipe.remove.without_vocabulary()})
        if not recipe.sets_zeros:
            return own
        zeros = {"pattern": "unstructured", "sparsity": None, "permute": False, "rotate": False, "refine": ()}
        more = {"method": USUAL_METHOD, "propagation": "block", "encoding": "source", "prompt": ""}
        allocation = recipe.prune.allocation if allocates_units(recipe) else UNIFORM
        return own.replaced(**zeros, **more, **UNTOLD, allocation=allocation)

    @classmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        return f"{', '.join(recipe.remove.parts)} of {len(blocks)} blocks, by {recipe.way}"

    def do(self, run: Run) -> Left:
        return Left.of(remove(run))


def remove(run: Run) -> Result:
    """Remove parts of a model's blocks; for a GGUF file by its bytes alone if that suffices.

    Raises:
        BadInput, NumericalError, UnsupportedModel, VerificationError: as `coprune.prune`.
    """
    if (location := file_cut_by_bytes(run)) is not None:
        return cut_by_bytes(run, location)
    return run_stages(run, _plan)


def _plan(run: Run) -> None:
    may_go = find_removable(run)
    if not may_go.mixes:
        _say_refused(run)
    run.change = partial(remove_parts, found=may_go)
    if run.first and (file := cut_of(run, may_go.routers(run.model.blocks))) is not None:
        run.write_gguf = file.cut


def _say_refused(run: Run) -> None:
    """Report the runtimes that cannot read the family's models without the parts that go."""
    told = refusals(run.loaded.model.config.model_type, run.removal.kinds)
    if told is not None and not run.recipe.output.as_gguf:
        run.reporter.say(told)


def remove_parts(run: Run, found: Removable) -> Outcome:
    """Remove what the recipe says, resuming an earlier run.

    Args:
        run: the run.
        found: the removable parts.

    Raises:
        UnsupportedModel: no configuration can describe the smaller model.
    """
    model, output, started = run.model, run.output, time.perf_counter()
    finished = output.finished()
    plan, configure = _planned(run, found)
    if found.mixes:  # which parts go is known only now
        _say_refused(run)
    run.reporter.say(f"Removing {configure.removed.line()}.")
    experts, covered = choose_experts(run, plan.mixtures, plan.experts) if plan.mixtures else ({}, {})
    maps = find_maps(run, plan, finished)
    with run.reporter.bar("Removing", len(model.blocks)) as advance:
        walk = Walk(
            only_consumers(model, plan),
            # Inputs are needed to cut parts or train the remaining blocks; the blocks to drop are already chosen.
            record_to_prune(run) if plan.parts or run.reconstruction is not None else None,
            Gram,
            moves_of(run),
            Past(finished, output.restore),
            run.processes,
            advance,
        )
        with output.settled(), memory_within(lambda: walk.at):
            output.write_skipped()
            results = _remove(run, walk, plan, experts, maps)
    earlier = [result for outcome in finished.values() for result in outcome.results]
    seconds = time.perf_counter() - started
    carried = cut_carried(run, plan.mixtures, output.edits())
    return Outcome(
        earlier + results,
        output.edits(configure, *carried),
        seconds,
        output.trainings,
        covered,
        earlier=sum(result.seconds for result in earlier),
    )


def _planned(run: Run, found: Removable) -> tuple[Plan, Configure]:
    """Return the plan, settled now or by an earlier run, and its configuration change."""
    settled, mix = run.output.settled_before() or {}, None
    if (shares := settled.get("shares")) is not None:
        mix = next(mix for mix in found.mixes if mix.shares == shares)
        found = found.of_mix(run, mix)
    if (known := settled.get("plan")) is not None:
        plan = as_settled(run, found, known)
        return plan, rehearse(run, plan)
    if found.mixes:
        even, configure, mix = _even_of_mix(run, found)
    else:
        even, configure = _even(run, found, settled.get("even"))
    chosen = {} if mix is None else {"shares": mix.shares}
    run.output.keep_settled({"even": settled_in(even), **chosen})
    plan = allocate_units(run, even)
    if plan is not even:
        configure = rehearse(run, plan)
    plan = choose_shared(run, plan)
    run.output.keep_settled({"plan": settled_in(plan), **chosen})
    return plan, configure


def _even_of_mix(run: Run, found: Removable) -> tuple[Plan, Configure, Mix]:
    """Return the even plan of the mix that loses least, its configuration change, and the mix."""
    compared = compare_mixes(run, found)
    for mix, _ in compared.losses:
        try:
            even, configure = _even(run, found.of_mix(run, mix), None, compared.going(mix))
        except UnsupportedModel:
            continue
        say_mix(run, mix, compared.losses)
        return even, configure, mix
    first = found.mixes[0]
    say_mix(run, first)
    return *_even(run, found.of_mix(run, first), None), first


def _even(
    run: Run, found: Removable, settled: dict[str, Any] | None, going: Going | None = None
) -> tuple[Plan, Configure]:
    """Return the plan with equal numbers of units in all blocks.

    settled: by an earlier run, if it got that far; going: the blocks to remove, if known.
    """
    if found.rehearsed is not None:
        return found.rehearsed
    even = plan_removal(run, found, going) if settled is None else as_settled(run, found, settled)
    return even, rehearse(run, even)


def _remove(
    run: Run, walk: Walk, plan: Plan, experts: Mapping[str, Tensor], maps: Mapping[int, FoundMap]
) -> list[MatrixResult]:
    """Cut and write each block once the walk has passed it.

    experts: the kept ones, by block; maps: of removed blocks, by the number of the block before them.
    """
    inputs: dict[str, Inputs] = {}
    results: list[MatrixResult] = []
    # Blocks before the first cut have no error to compensate.
    losing = [b.index for b in run.model.blocks if plan.parts.get(b.name) or b.name in experts]
    first = min([*losing, *plan.dropped])
    for event in walk:
        if not isinstance(event, BlockDone):
            inputs |= event.known()
            continue
        block = event.block
        if (merged := maps.get(block.index)) is not None:
            merged.merge(run.processes)
        units, own = _cut_units(run, plan, block, inputs)
        layout = partial(run.model.weights.layout, block.name)
        if (left := experts.get(block.name)) is not None:
            plan.mixtures[block.name].never_choose(block.module, left)
        cut, training = Cut(units, left), None
        if first <= block.index and block.index not in (*plan.dropped, *plan.mapped):
            own, training = _reconstruct(run, walk, event, (cut.masks, own))
        edits = edits_of_block(run, plan, block, cut, layout)
        run.finish_block(block, BlockOutcome(own, edits, training))
        results, inputs = results + own, {}
    return results


def _cut_units(
    run: Run, plan: Plan, block: Block, inputs: Mapping[str, Inputs]
) -> tuple[list[tuple[Part, list[Tensor]]], list[MatrixResult]]:
    """Cut a block's parts in place, each by one process, which shares the result with the others."""
    score = score_named(run.recipe.remove.score_of("units"))
    parts, processes = plan.parts.get(block.name, ()), run.processes
    apart = sum(len(part.parameters) for part in parts) == len({name for part in parts for name in part.parameters})
    jobs = [[part] for part in parts] if apart else [[*parts]]

    def cut(part: Part) -> tuple[list[Tensor], list[MatrixResult]]:
        chosen = plan.chosen.get(part.name, ())
        kept, results = remove_units(block.module, part, inputs, score, plan.count(part), chosen)
        return [own.cpu() for own in kept], results

    done = [
        one for job in processes.in_order([[cut(part) for part in job] for job in processes.own(jobs)]) for one in job
    ]
    changed = {name: at % processes.size for at, job in enumerate(jobs) for part in job for name in part.parameters}
    processes.broadcast(
        [(parameter_of(block.module, block.name, name).detach(), changed[name]) for name in sorted(changed)]
    )
    units = [(part, kept) for part, (kept, _) in zip(parts, done, strict=True)]
    return units, [result for _, results in done for result in results]


def _reconstruct(
    run: Run, walk: Walk, done: BlockDone, cut: tuple[Mapping[str, Tensor], list[MatrixResult]]
) -> tuple[list[MatrixResult], BlockTraining | None]:
    """Train the remaining block if requested."""
    if run.reconstruction is None or walk.recording is None:
        return cut[1], None
    chosen = run.model.chosen.blocks[done.block.index]
    return reconstruct_cut(run.reconstruction, done, walk.recording, chosen, cut, run.output.trainings)


def settled_in(plan: Plan) -> dict[str, Any]:
    """Return a plan's choices as JSON."""
    sizes = {kind: [*map(list, keep.items())] for kind, keep in plan.keep.items()}
    experts = [*map(list, plan.experts.items())]
    chosen = {name: [*own] for name, own in plan.chosen.items()}
    return {
        "dropped": [*plan.dropped],
        "mapped": [*plan.mapped],
        "keep": sizes,
        "experts": experts,
        "uneven": dict(plan.uneven),
        "chosen": chosen,
    }


def as_settled(run: Run, found: Removable, settled: dict[str, Any]) -> Plan:
    """Return the plan from its saved choices.

    Args:
        run: the run.
        found: the removable parts of its model.
        settled: from `settled_in`.
    """
    keep: dict[Kind, dict[int, int]] = {kind: dict(sizes) for kind, sizes in settled["keep"].items()}
    rest = found.without({run.model.names[index] for index in settled["dropped"]})
    parts = {name: [part for part in own if part.kind in keep] for name, own in rest.parts.items()} if keep else {}
    experts, chosen = dict(settled["experts"]), settled["chosen"]
    mapped = settled["mapped"]
    return Plan(settled["dropped"], mapped, parts, keep, rest.mixtures, experts, settled["uneven"], chosen)


@torch.no_grad()
def choose_shared(run: Run, plan: Plan) -> Plan:
    """Choose the heads of parts that must keep the same ones, by their total cost to these parts in the dense model."""
    parts = {name: shared for name, own in plan.parts.items() if (shared := [part for part in own if part.shared])}
    if not parts:
        return plan
    score, model, processes = score_named(run.recipe.remove.score_of("units")), run.model, run.processes
    costs, inputs = defaultdict[str | None, Tensor](lambda: torch.zeros(())), dict[str, Inputs]()
    with run.reporter.bar("Choosing heads that blocks share", len(model.blocks)) as advance:
        shown = only_consumers(model, replace(plan, parts=parts))
        for event in Walk(shown, record_calibration(run), Gram, Dense(), processes=processes, advance=advance):
            if not isinstance(event, BlockDone):
                inputs |= event.known()
                continue
            for part in parts.get(event.block.name, ()):
                for consumer in part.fold.consumers:
                    units = part.grouped.to(consumer.stored().device)
                    costs[part.shared] = costs[part.shared] + unit_costs(
                        score, consumer, inputs.get(consumer.name), units
                    )
            inputs = {}
    # The first process decides, since another machine may round differently.
    known = processes.from_first(lambda: dict(costs))
    kept = {
        part.name: part.ungrouped(largest(known[part.shared], plan.count(part) // part.group)).nonzero().flatten()
        for own in parts.values()
        for part in own
    }
    return replace(plan, chosen={name: numbers.tolist() for name, numbers in kept.items()})


def allocate_units(run: Run, plan: Plan) -> Plan:
    """Allocate different numbers of units to blocks, with a rehearsed plan's total, if the recipe asks for it."""
    asked = unit_allocation_named(run.recipe.prune.allocation)
    if isinstance(asked, Uniform):
        return plan
    if not any(plan.parts.values()):
        run.reporter.say("Only blocks are removed, so there is nothing to allocate.")
        return plan
    levels = _measured(run, plan)
    alike = alike_parts(levels)
    even = tuple(own.steps_to(plan.count(own.part)) for own in levels)
    scales = _scales(run, plan, levels, even, asked)
    # The first process decides, since another machine may round differently.
    steps = run.processes.from_first(lambda: least_error(levels, alike, even, scales))
    return unevenly(plan, levels, steps)


def _scales(run: Run, plan: Plan, levels: Sequence[Levels], even: Steps, asked: ByError) -> list[float]:
    """Return the weights of the parts' errors."""
    if not asked.tokens or run.model.weights.streams:
        if asked.tokens:
            run.reporter.say("The model is streamed, so blocks are weighted by how much they change the hidden states.")
        return [own.moved for own in levels]
    found, none, processes = [], [0] * len(levels), run.processes
    jobs = processes.own(range(len(levels)))
    with (
        Candidates.of(run, Consumers.of(run, levels), plan.dropped, asked.tokens) as candidates,
        run.reporter.bar("Weighing blocks", len(jobs)) as advance,
    ):
        base = candidates.cost(tuple(none)) if plan.dropped else 0.0
        for at in jobs:
            alone = (*none[:at], even[at], *none[at + 1 :])
            lost = max(candidates.cost(alone) - base, 0.0)
            found.append(lost / max(levels[at].costs[even[at]], 1e-12))
            advance(1.0)
    return processes.in_order(found)


def unevenly(plan: Plan, levels: Sequence[Levels], steps: Steps) -> Plan:
    """Return the plan with steps per part; each part is saved as wide as the widest of its size."""
    counts = {own.part.name: own.counts[taken] for own, taken in zip(levels, steps, strict=True)}
    widest: dict[Kind, dict[int, int]] = {kind: dict(keep) for kind, keep in plan.keep.items()}
    for kind, keep in widest.items():
        for size in keep:
            own = [counts[one.part.name] for one in levels if (one.part.kind, one.part.count) == (kind, size)]
            keep[size] = max(own, default=keep[size])
    alike = all(counts[own.part.name] == widest[own.part.kind][own.part.count] for own in levels)
    return replace(plan, keep=widest, uneven={} if alike else counts)


def alike_parts(levels: Sequence[Levels]) -> list[list[int]]:
    """Return groups of parts that can exchange steps: of one kind, with the same number and size of units.

    A part that must keep the same units as others exchanges none.
    """
    found: dict[tuple[str, int, int, str], list[int]] = defaultdict(list)
    for at, own in enumerate(levels):
        consumers = own.part.fold.consumers
        alone = own.part.name if own.part.shared else ""
        found[own.part.kind, own.part.count, len(consumers) * consumers[0].shape[0], alone].append(at)
    return list(found.values())


def least_error(
    levels: Sequence[Levels], alike: Sequence[Sequence[int]], even: Steps, scales: Sequence[float]
) -> Steps:
    """Allocate the even plan's total of steps at the lowest cost. scales: weights of the parts' errors."""
    steps = [0] * len(levels)
    for group in alike:
        costs = [[cost * scales[at] for cost in levels[at].costs] for at in group]
        for at, taken in zip(group, cheapest(costs, sum(even[at] for at in group)), strict=True):
            steps[at] = taken
    return tuple(steps)


@torch.no_grad()
def _measured(run: Run, plan: Plan) -> list[Levels]:
    """Measure each part's cost of keeping fewer units, in one walk over the dense model."""
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
                step = step_of(part.count, align if part.kind == "channels" else 1, part.group)
                counts = list(range(part.count // part.group * part.group, 0, -step))
                levels.append(Levels.of(event.block, part, counts, inputs, score, moved))
            inputs = {}
    return levels
