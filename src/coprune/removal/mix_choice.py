"""The choice between mixes of channels and blocks of one size: the one whose model predicts most like the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Advance, scaled
from coprune.model.blocks import Block, by_list
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.recipe.structure import COMPARED_BY_KL, REFIT_TOKENS
from coprune.removal.block_scores import Going, Mapped, SpanErrors, block_score_named, kl_of_logits, logits_of
from coprune.removal.budget_loss import Consumers, Levels
from coprune.removal.by_size import Mix
from coprune.removal.channels_and_heads import Part, put_back
from coprune.removal.cuts import Plan
from coprune.removal.maps import MapWalk, Span, Writers
from coprune.removal.removal_plan import Removable, only_consumers
from coprune.removal.unit_scores import OBS, score_named
from coprune.run.calibrating import first_batches
from coprune.run.context import Run

_STEPS = 8
"""Maximum number of steps in which `obs` removes the units; 32 cost more than all refits and order mixes alike."""


@dataclass(frozen=True)
class Trial:
    """A mix as it is tried: the plan of its cut, and the spans of blocks that go."""

    mix: Mix
    plan: Plan
    spans: Sequence[Span]


@dataclass(frozen=True)
class Compared:
    """What the mixes of a size lose."""

    losses: Sequence[tuple[Mix, float]]
    """From the least on: KL(dense ‖ cut) in nats per token."""
    score: Mapped
    measured: SpanErrors
    batches: Sequence[Tensor]

    def going(self, mix: Mix) -> Going | None:
        """Choose the blocks that go in one of the mixes; None if none do."""
        counts = mix.blocks_gone(_lists(self.measured.walk.model))
        return self.score.choose_among(self.measured, self.batches, counts) if any(counts) else None


def compare_mixes(run: Run, found: Removable) -> Compared:
    """Measure what each mix of a size loses, on some of the calibration tokens.

    Args:
        run: the run, before its first block is changed.
        found: its removable parts, with several mixes.

    Returns:
        The comparison. Mixes whose blocks no map can replace are left out, since without one blocks cost more than channels.
    """
    assert run.samples is not None
    score = block_score_named(run.recipe.remove.score_of("blocks"))
    assert isinstance(score, Mapped)
    batches, lists = [*run.task.inputs.batches(run.samples.tokens)], _lists(run.model)
    most = [max(own) for own in zip(*(mix.blocks_gone(lists) for mix in found.mixes), strict=True)]
    with run.reporter.bar("Comparing mixes", 1.0) as advance:
        measured = score.measure(run.model, batches, most, scaled(advance, 0.4), run.processes)
        trials = [*_trials(found, score, measured, lists)]
        if len(trials) < 2:
            return Compared([], score, measured, batches)
        losses = losses_of(run, trials, batches, measured.walk.writers, scaled(advance, 0.6))
    pairs = [(trial.mix, loss) for trial, loss in zip(trials, losses, strict=True)]
    return Compared(sorted(pairs, key=lambda pair: pair[1]), score, measured, batches)


def _lists(model: ProvenModel) -> list[int]:
    return [len(own) for own in by_list(model.blocks)]


def _trials(found: Removable, score: Mapped, measured: SpanErrors, lists: Sequence[int]) -> Iterator[Trial]:
    """Yield the trials of the mixes whose blocks maps can replace, each with the spans of the least errors."""
    for mix in found.mixes:
        try:
            sets = measured.least(mix.blocks_gone(lists), score.spans, 1)
        except UnsupportedModel:
            continue
        spans = [span for own in sets if own for span in min(own, key=measured.error)]
        gone, keep = [index for span in spans for index in span.gone], mix.keep
        left = {name: own for index, (name, own) in enumerate(found.every.items()) if index not in gone}
        parts = {name: [part for part in own if part.kind in keep] for name, own in left.items()}
        yield Trial(mix, Plan(gone, [span.before for span in spans], parts, keep), spans)


@torch.no_grad()
def losses_of(
    run: Run, trials: Sequence[Trial], batches: Sequence[Tensor], writers: Mapping[int, Writers], advance: Advance
) -> list[float]:
    """Return KL(dense ‖ cut) of each trial, in nats per token, on batches that its refits have not seen if there are enough.

    Maps are solved as the run solves its own: on more tokens than errors are, and from inputs where possible. All trials
    pass through the blocks together, so each block is loaded once, and its units are scored once.
    """
    model, own, plans = run.model, run.processes.own(range(len(trials))), [trial.plan for trial in trials]
    solving = MapWalk(model, writers, run.processes.own(first_batches(batches, REFIT_TOKENS)), run.processes)
    solved = dict(solving.of_outputs({span for trial in trials for span in trial.spans}, of_inputs=True))
    base = record_batches(model, first_batches(batches[::-1], COMPARED_BY_KL))
    ways, inputs = dict[int, Recording](), dict[str, Inputs]()
    walk = Walk(
        only_consumers(model, Plan(parts={block.name: _cut(plans, block.name) for block in model.blocks})),
        record_batches(model, first_batches(batches, REFIT_TOKENS)),
        Gram,
        Dense(),
        advance=scaled(advance, 1 / len(model.blocks)),
    )
    for event in walk:
        if not isinstance(event, BlockDone):
            inputs |= event.known()
            continue
        block = event.block
        cuts, inputs = _Cuts.of(run, block, [trials[at].plan for at in own], inputs), {}
        for at in own:
            trial = trials[at]
            maps = [span for span in trial.spans if span.before == block.index]
            if maps or trial.plan.parts.get(block.name):
                ways.setdefault(at, base.apart())
            if at in ways:
                with ExitStack() as ended:
                    for span in maps:
                        ended.enter_context(writers[block.index].merged(solved[span]))
                    ended.enter_context(cuts.made(run, trial.plan))
                    ways[at].go_past(model, block, runs=block.index not in trial.plan.dropped)
        base.go_past(model, block)
    lost, count = dict.fromkeys(own, 0.0), 0
    for batch, tokens in enumerate(base.tokens):
        dense = logits_of(model, tokens, base.hidden[batch])
        count += len(dense)
        for at in own:
            lost[at] += kl_of_logits(dense, logits_of(model, tokens, ways[at].hidden[batch]))
    return run.processes.in_order([lost[at] / count for at in own])


@dataclass(frozen=True)
class _Cuts:
    """The cuts of one block in several plans."""

    block: Block
    levels: Sequence[Levels]

    @classmethod
    def of(cls, run: Run, block: Block, plans: Sequence[Plan], inputs: Mapping[str, Inputs]) -> Self:
        """Choose the units that the plans keep of a block's parts. inputs: of the consumers, by name."""
        score, found = score_named(run.recipe.remove.score_of("units")), list[Levels]()
        if isinstance(score, OBS):
            score = replace(score, steps=min(score.steps, _STEPS))
        for part in _cut(plans, block.name):
            counts = {plan.count(part) for plan in plans if part in plan.parts.get(block.name, ())}
            found.append(Levels.of(block, part, sorted({part.count, *counts}, reverse=True), inputs, score))
        return cls(block, found)

    @contextmanager
    def made(self, run: Run, plan: Plan) -> Iterator[None]:
        """Cut the block as it is now, perhaps with a map merged, as in a plan, within the body."""
        own = {part.name for part in plan.parts.get(self.block.name, ())}
        consumers = Consumers.of(run, [one for one in self.levels if one.part.name in own])
        with put_back(self.block.module, self.block.name, _parameters(consumers)):
            for at, one in enumerate(consumers.levels):
                consumers.write(at, one.steps_to(plan.count(one.part)))
            yield


def _parameters(consumers: Consumers) -> set[str]:
    return {consumer.parameter for one in consumers.levels for consumer in one.part.fold.consumers}


def _cut(plans: Sequence[Plan], block: str) -> Sequence[Part]:
    """Return the parts of a block that any of the plans cuts: those of the plan with the most."""
    return max((plan.parts.get(block, ()) for plan in plans), key=len, default=())
