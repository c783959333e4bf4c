"""What several ways to make a model smaller cost: all of them tried in one walk over the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.removal.parts import Part, put_back
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.moves import Dense
from coprune.model.walk.recording import Recording, record_batches
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.structure.blocks import first_batches, kl_of_logits, logits_of
from coprune.pruning.structure.remove import remove_units
from coprune.pruning.structure.scores import Score, score_named
from coprune.run.calibrating import record_calibration
from coprune.run.removal.cut import Plan
from coprune.run.removal.plan import only_consumers
from coprune.run.session import Session

TOKENS = 1024
"""Of the calibration, at least so many are run through every way that is tried (of images: one batch)."""


@dataclass(frozen=True)
class _Trial:
    """Some of the calibration on its way through the dense model (the first entry) and through every way's own."""

    recording: Recording
    hidden: list[list[Tensor]]

    def move(self, block: Block, ways: Sequence[int]) -> None:
        for way in ways:
            self.hidden[way] = [self.recording.run(block, i, one) for i, one in enumerate(self.hidden[way])]


@torch.no_grad()
def costs_of(session: Session, plans: Sequence[Plan]) -> list[float]:
    """KL(dense ‖ cut) of every plan, in nats per token, with what is left solved for on the dense model's inputs.

    Several processes gather the Gram matrices together, and share out the plans.
    """
    opened, model, processes = session.opened, session.model, session.opened.around.processes
    assert opened.samples is not None
    tried = processes.own(plans)
    windows = first_batches(opened.task.batches(opened.samples.tokens), TOKENS)
    recording = record_batches(model, windows)
    trial = _Trial(recording, [list(recording.hidden) for _ in range(len(tried) + 1)])
    every: dict[str, list[Part]] = defaultdict(list)
    for plan in plans:
        for name, parts in plan.parts.items():
            every[name] += [part for part in parts if part not in every[name]]
    score = score_named(opened.recipe.structure.score_of("units"))
    inputs: dict[str, Inputs] = {}
    with opened.around.reporter.bar(f"Trying {len(plans)} ways", len(model.blocks)) as advance:
        walk = Walk(
            only_consumers(model, Plan(parts=every)),
            record_calibration(session),
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
    return processes.in_order(_divergences(session, trial, windows))


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


def _divergences(session: Session, trial: _Trial, windows: Sequence[Tensor]) -> list[float]:
    model = session.model

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
