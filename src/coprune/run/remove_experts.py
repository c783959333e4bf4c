"""Experts that a run removes: which mixtures there are, a pass that scores them, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.experts import Mixture
from coprune.model.find_experts import find_mixtures
from coprune.model.routing import Routed
from coprune.model.walk.moves import Dense
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.walk import Walk
from coprune.pruning.structure.experts import ExpertSums, coverage, expert_score_named, kept_experts
from coprune.run.session import Session

Scored = Mapping[str, Mapping[str, ExpertSums]]
"""What was summed up of every mixture, by domain and block."""


def find_experts(session: Session, dropped: Sequence[int]) -> dict[str, Mixture]:
    """The mixtures of the blocks that stay, proven on one sample. Raises UnsupportedModel where one cannot be made smaller."""
    model, found = session.model, dict[str, Mixture]()
    recording = record_batches(model, [model.structure.sample])
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if not isinstance(event, BlockDone) or event.block.index in dropped:
            continue
        block = event.block
        run = partial(recording.run, block, 0, event.before[0])
        for mixture in find_mixtures(block, model.chosen.blocks[block.index], run):
            if isinstance(mixture, str):
                raise UnsupportedModel(f"{mixture}, so experts cannot be removed")
            if block.name in found:
                raise UnsupportedModel(f"{block.name} holds more than one mixture of experts")
            found[block.name] = mixture
    if not found:
        raise UnsupportedModel("the model has no mixture of experts that tokens are routed to")
    return found


def experts_left(mixture: Mixture, share: float) -> int:
    """How many experts are kept when a share of them goes: as many of every group, and enough for a token."""
    step = mixture.groups
    kept = max(step, round(mixture.count * (1 - share) / step) * step)
    of_groups = f" in {mixture.groups} groups" if mixture.groups > 1 else ""
    if kept >= mixture.count:
        raise BadInput(
            f"{share:g} of {mixture.count} experts{of_groups} is none", field="remove", fix="give a larger share"
        )
    if kept * mixture.used < mixture.top * mixture.groups:
        where = f" of {mixture.used} of {mixture.groups} groups" if mixture.groups > 1 else ""
        raise BadInput(
            f"a token goes to {mixture.top} experts{where}, and {kept} of {mixture.count} would be left",
            field="remove",
            fix="give a smaller share",
        )
    return kept


def gather_scores(session: Session, mixtures: Mapping[str, Mixture], domains: Mapping[str, Tensor]) -> Scored:
    """Run every domain's samples through the dense model once, and sum up what comes to each expert.

    Args:
        session: the run.
        mixtures: by block.
        domains: samples by name, N × S int64.
    """
    opened, model = session.opened, session.model
    batches = [
        (name, batch)
        for name, samples in domains.items()
        for batch in opened.task.batches(opened.around.processes.share(samples))
    ]
    sums = {name: {block: ExpertSums.empty(m.count) for block, m in mixtures.items()} for name in domains}
    recording = record_batches(model, [batch for _, batch in batches], opened.activations())
    names = [name for name, _ in batches]
    with ExitStack() as watching, opened.around.reporter.bar("Scoring experts", len(model.blocks)) as advance:
        for block in model.blocks:
            if (mixture := mixtures.get(block.name)) is not None:
                see = _in_turn([sums[name][block.name] for name in names])
                watching.enter_context(mixture.watched(block.module, see))
        for _ in Walk(model.idle(), recording, None, Dense(), advance=advance):
            pass
    return _of_all(session, sums)


def _in_turn(sums: Sequence[ExpertSums]) -> Callable[[Routed], None]:
    """Adds what one batch after the other shows. sums: where to, batch by batch."""
    left = iter(sums)
    return lambda routed: next(left).update(routed)


def _of_all(session: Session, own: Scored) -> Scored:
    """What all processes saw together."""
    first, *others = session.opened.around.processes.gather(own)
    for other in others:
        for name, blocks in other.items():
            for block, sums in blocks.items():
                first[name][block].add(sums)
    return first


def choose_experts(
    session: Session, mixtures: Mapping[str, Mixture], left: Mapping[int, int], scored: Scored
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Choose the experts of every block.

    Args:
        session: the run.
        mixtures: by block.
        left: how many experts are kept, by how many there are.
        scored: as `gather_scores` gives it.

    Returns:
        E bool by block, and the share of its score that every domain keeps, in the mean over the blocks.
    """
    score = expert_score_named(session.opened.recipe.structure.score_of("experts"))
    numbers = {block.name: block.index for block in session.model.blocks}
    keeps, covered = dict[str, Tensor](), dict.fromkeys(scored, 0.0)
    for block, mixture in mixtures.items():
        scores = {name: score.score(sums[block], numbers[block]) for name, sums in scored.items()}
        keeps[block] = kept_experts(scores, left[mixture.count], mixture.groups, None)
        for name, share in coverage(scores, keeps[block]).items():
            covered[name] += share / len(mixtures)
    return keeps, covered
