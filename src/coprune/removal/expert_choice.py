"""The experts that a run removes: finding mixtures, scoring experts in one pass, choosing among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.files import read_given, write_text
from coprune.base.validation import reason
from coprune.base.words import per_cent
from coprune.data.windows import Windows
from coprune.model.carried_tensors import find_carried
from coprune.model.checkpoint.shards import read_tensor
from coprune.model.edit import KeepCarried, KeepExperts
from coprune.model.edits import Edits
from coprune.model.leftovers import lists_of
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.recording import Dense, record_batches
from coprune.model.walk.walk import Walk
from coprune.recipe.structure import Left, RemovePart
from coprune.removal.expert_calls import Routed
from coprune.removal.expert_scores import (
    AIMER,
    ExpertScore,
    ExpertSums,
    WeightSums,
    coverage,
    expert_score_named,
    kept_experts,
)
from coprune.removal.mixtures import Mixture, find_mixtures
from coprune.run.calibrating import counted_batches, record_counted
from coprune.run.context import Run


class HasExperts(Protocol):
    """The numbers of a mixture: see `Mixture`."""

    @property
    def count(self) -> int:
        """Number of experts."""
        ...

    @property
    def top(self) -> int:
        """Number of experts per token."""
        ...

    @property
    def groups(self) -> int:
        """Number of equal groups."""
        ...

    @property
    def used(self) -> int:
        """Number of groups that a token uses."""
        ...


def find_experts(run: Run) -> dict[str, Mixture]:
    """Return the mixtures of all blocks, proven on one sample. Raises UnsupportedModel if one cannot lose experts."""
    model, found = run.model, dict[str, Mixture]()
    recording = record_batches(model, [model.structure.sample])
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if not isinstance(event, BlockDone):
            continue
        block = event.block
        call = partial(recording.run, block, 0, event.before[0])
        for mixture in find_mixtures(block, model.chosen.blocks[block.index], call):
            if isinstance(mixture, str):
                raise UnsupportedModel(f"{mixture}, so experts cannot be removed")
            if block.name in found:
                raise UnsupportedModel(f"{block.name} holds more than one mixture of experts")
            found[block.name] = mixture
    if not found:
        raise _no_mixture(run)
    return found


def _no_mixture(run: Run) -> UnsupportedModel:
    listed = [path for block in run.model.blocks for path in lists_of(block)]
    beside = f"; {listed[0]} is a list of modules, but it could not be proved to be a mixture" if listed else ""
    return UnsupportedModel(f"the model has no mixture of experts that tokens are routed to{beside}")


def experts_left(mixture: HasExperts, asked: RemovePart) -> int:
    """Return the number of experts to keep: equal in all groups and enough for a token. Raises BadInput if none would go."""
    share = asked.shares["experts"]
    kept = share.count if isinstance(share, Left) else count_left(mixture.count, share, mixture.groups)
    of_groups = f" in {mixture.groups} groups" if mixture.groups > 1 else ""
    if kept >= mixture.count:
        none = f"{kept} of" if isinstance(share, Left) else f"{share:g} of"
        why = "are all of them" if isinstance(share, Left) else "rounds to none"
        fix = "keep fewer" if isinstance(share, Left) else "give a larger share"
        raise BadInput(f"{none} {mixture.count} experts{of_groups} {why}", field="remove", fix=fix)
    if kept % mixture.groups:
        fix = f"keep {max(1, kept // mixture.groups) * mixture.groups}"
        raise BadInput(
            f"{kept} experts cannot be divided equally among {mixture.groups} groups", field="remove", fix=fix
        )
    if kept * mixture.used < mixture.top * mixture.groups:
        where = f" of {mixture.used} of {mixture.groups} groups" if mixture.groups > 1 else ""
        raise BadInput(
            f"a token goes to {mixture.top} experts{where}, and {kept} of {mixture.count} would be left",
            field="remove",
            fix="give a smaller share",
        )
    return kept


def expert_scores(run: Run, mixtures: Mapping[str, Mixture]) -> Scored:
    """Return each expert's sums by domain: read from a file, or gathered in one pass over the dense model.

    Raises:
        BadInput: the named scores belong to another model.
    """
    named: dict[str, Windows] = dict(run.domains)
    if not named and run.samples is not None:
        named["calibration"] = run.samples
    counts = "" if run.recipe.calibrate.calibrate_on == "all" else " generated"
    data = {name: f"{one.fingerprint}{counts}" for name, one in named.items()}
    processes, model = run.processes, run.loaded.fingerprint(run.model.every_block)
    known = processes.from_first(lambda: known_scores(run, model, data, mixtures))
    if known is not None:
        run.reporter.say("The experts' scores are known, so no text runs through the model.")
        return known
    scored = gather_scores(run, mixtures, named)
    keep_scores(run, model, data, scored)
    return scored


def gather_scores(run: Run, mixtures: Mapping[str, Mixture], domains: Mapping[str, Windows]) -> Scored:
    """Run every domain's samples through the dense model once and sum each expert's activity.

    Args:
        run: the run.
        mixtures: by block.
        domains: samples by name.
    """
    model = run.model
    processes = run.processes
    batches = [
        (name, batch)
        for name, samples in domains.items()
        for batch in counted_batches(run.task, run.recipe, samples, processes)
    ]
    sums = {name: {block: ExpertSums.empty(m.count) for block, m in mixtures.items()} for name in domains}
    recording = record_counted(model, [batch for _, batch in batches], run.activations())
    with ExitStack() as watching, run.reporter.bar("Scoring experts", len(model.blocks)) as advance:
        for block in model.blocks:
            if (mixture := mixtures.get(block.name)) is not None:
                see = _in_turn([(sums[name][block.name], batch.counted) for name, batch in batches])
                watching.enter_context(mixture.watched(block.module, see))
        for _ in Walk(model.idle(), recording, None, Dense(), advance=advance):
            pass
    return _of_all(run, sums)


def _in_turn(places: Sequence[tuple[ExpertSums, Tensor | None]]) -> Callable[[Routed], None]:
    """Return a function that adds successive batches to their sums. places: the sums and the counted tokens of each batch."""
    left = iter(places)

    def see(routed: Routed) -> None:
        sums, counted = next(left)
        sums.update(routed, counted)

    return see


def _of_all(run: Run, own: Scored) -> Scored:
    """Merge the sums of all processes."""
    first, *others = run.processes.gather(own)
    for other in others:
        for name, blocks in other.items():
            for block, sums in blocks.items():
                first[name][block].add(sums)
    return first


def choose_experts(
    run: Run, mixtures: Mapping[str, Mixture], left: Mapping[int, int]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Choose the experts of every block.

    Args:
        run: the run.
        mixtures: by block.
        left: number of kept experts by original number.

    Returns:
        E bool by block, and the share of its score that each domain keeps, averaged over blocks.
    """
    score = expert_score_named(run.recipe.remove.score_of("experts"))
    if isinstance(score, AIMER):
        weighed = run.processes.from_first(lambda: weigh_experts(run, mixtures))
        return choose(run, mixtures, {block: {"": score.score_weights(sums)} for block, sums in weighed.items()}, left)
    numbers = {block.name: block.index for block in run.model.blocks}
    return choose(run, mixtures, by_domain(score, expert_scores(run, mixtures), numbers), left)


def weigh_experts(run: Run, mixtures: Mapping[str, Mixture]) -> dict[str, WeightSums]:
    """Sum each expert's weights, block by block. mixtures: by block."""
    model, found = run.model, dict[str, WeightSums]()
    with run.reporter.bar("Weighing experts", len(mixtures)) as advance:
        for block in model.blocks:
            if (mixture := mixtures.get(block.name)) is None:
                continue
            model.weights.acquire(block.name)
            found[block.name] = WeightSums.empty(mixture.count)
            for number, matrix in mixture.matrices(block.module):
                found[block.name].update(number, matrix)
            model.weights.release(block.name)
            advance(1)
    return found


Scores = Mapping[str, Mapping[str, Tensor]]
"""Scores of experts, E float64, by block and domain; the domain is empty if no text was read."""


def by_domain(score: ExpertScore, scored: Scored, numbers: Mapping[str, int]) -> Scores:
    """Return the scores computed from the experts' sums. numbers: of the blocks."""
    return {
        block: {name: score.score(sums[block], number) for name, sums in scored.items()}
        for block, number in numbers.items()
        if all(block in sums for sums in scored.values())
    }


def choose(
    run: Run, mixtures: Mapping[str, HasExperts], scores: Scores, left: Mapping[int, int]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Choose the experts of every block by their scores; see `choose_experts`."""
    keeps, covered = dict[str, Tensor](), dict[str, float]()
    for block, mixture in mixtures.items():
        own = scores[block]
        keeps[block] = kept_experts(own, left[mixture.count], mixture.groups, run.recipe.remove.weights)
        for name, share in coverage(own, keeps[block]).items():
            covered[name] = covered.get(name, 0.0) + share / len(mixtures)
    if "" in covered:
        return keeps, {}
    kept = ", ".join(f"{name} {per_cent(share)}" for name, share in covered.items())
    run.reporter.say(f"Share of the experts' total score that is kept: {kept}.")
    return keeps, covered


def cut_carried(run: Run, mixtures: Mapping[str, Mixture], edits: Edits) -> list[KeepCarried]:
    """Choose experts for mixtures that the model does not load, as many as in its blocks.

    Args:
        run: the run.
        mixtures: by block.
        edits: of the blocks.
    """
    entries, made = run.model.weights.carried_entries, list[KeepCarried]()
    cut = {name: edit for name, own in edits.by_block.items() for edit in own if isinstance(edit, KeepExperts)}
    for path, carried in find_carried({name: entry.shape for name, entry in entries.items()}, cut).items():
        block, like = next((name, edit) for name, edit in cut.items() if edit.count == carried.count)
        sums = WeightSums.empty(carried.count)
        for number, matrix in carried.matrices([*entries], lambda name: read_tensor(entries[name])):
            sums.update(number, matrix)
        keep = kept_experts({path: AIMER().score_weights(sums)}, len(like.experts), mixtures[block].groups, None)
        made.append(carried.edit(keep))
        run.reporter.say(f"Removing {made[-1].removal().line()}.")
    return made


EXPERTS_FILE = "experts.json"
"""File of expert scores in a run's folder."""
Scored = dict[str, dict[str, ExpertSums]]
"""Sums of each mixture's experts, by domain and block."""


class _Kept(BaseModel):
    """Sums of the experts of one block, over the tokens of one domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: list[float]
    weighted: list[float]


class ExpertScores(BaseModel):
    """Sums of experts, with fingerprints of their model and samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Fingerprint of its weights."""
    data: dict[str, str]
    """Fingerprint of the samples, by domain."""
    sums: dict[str, dict[str, _Kept]]
    """Sums by domain and block."""

    @classmethod
    def of(cls, model: str, data: dict[str, str], scored: Scored) -> Self:
        """Wrap the sums of one pass."""
        sums = {
            name: {block: _Kept(tokens=s.tokens.tolist(), weighted=s.weighted.tolist()) for block, s in blocks.items()}
            for name, blocks in scored.items()
        }
        return cls(model=model, data=data, sums=sums)

    def scored(self) -> Scored:
        """Return the sums in the form of a pass."""
        return {
            name: {
                block: ExpertSums(*(torch.tensor(values, dtype=torch.float64) for values in (s.tokens, s.weighted)))
                for block, s in blocks.items()
            }
            for name, blocks in self.sums.items()
        }

    def covers(self, block: str, mixture: HasExperts) -> bool:
        """Return whether every domain has scores of all experts of the mixture."""
        found = [own.get(block) for own in self.sums.values()]
        return bool(found) and all(
            one is not None and len(one.tokens) == len(one.weighted) == mixture.count for one in found
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises BadInput where it is missing or damaged."""
        try:
            return cls.model_validate_json(read_given(path))
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}", field="domains", value=path) from None
        except ValidationError as error:
            detail = reason(error.errors()[0])
            raise BadInput(f"{path} is not a file of expert scores: {detail}", field="domains", value=path) from None


def own_file(run: Run) -> Path:
    """Return the file of a run's scores."""
    return run.recipe.run_folder / EXPERTS_FILE


def known_scores(run: Run, model: str, data: dict[str, str], mixtures: Mapping[str, HasExperts]) -> Scored | None:
    """Return scores known without a pass: those named in the recipe, or those of this run before it was interrupted.

    Args:
        run: the run.
        model: fingerprint of its weights.
        data: fingerprints of the samples, by domain.
        mixtures: by block, those whose scores are needed.

    Raises:
        BadInput: the named file is of another model, lacks a mixture, or has other domains than the weights.
    """
    asked = run.recipe.remove
    if asked.kept_scores is not None:
        kept = ExpertScores.read(asked.kept_scores)
        if kept.model != model:
            raise BadInput(
                f"{asked.kept_scores} holds scores of another model",
                field="domains",
                value=asked.kept_scores,
                fix="name the texts of the domains, or the scores of a run on this model",
            )
        if (
            lacking := next((block for block, one in mixtures.items() if not kept.covers(block, one)), None)
        ) is not None:
            raise BadInput(
                f"{asked.kept_scores} holds no scores of the experts in {lacking}",
                field="domains",
                value=asked.kept_scores,
                fix="name the texts of the domains, or the scores of a run that removed experts alone",
            )
        if asked.weights is not None and asked.weights.keys() != kept.sums.keys():
            named = ", ".join(kept.sums)
            raise BadInput(f"blend has to give a weight for each domain ({named})", field="blend", value=asked.blend)
        return kept.scored()
    path = own_file(run)
    if not run.writes or not path.is_file():
        return None
    try:
        kept = ExpertScores.read(path)
    except BadInput:
        return None  # truncated when the run was killed, or not ours
    return kept.scored() if (kept.model, kept.data) == (model, data) else None


def keep_scores(run: Run, model: str, data: dict[str, str], scored: Scored) -> None:
    """Save a pass's sums in the run's folder, if the run writes."""
    if run.writes:
        write_text(own_file(run), ExpertScores.of(model, data, scored).model_dump_json() + "\n")


SERVED = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
"""Numbers of experts that vLLM's kernels are compiled for; others are slower or unsupported."""
_FEW = 16
"""Mixtures of at most this many experts run on one device, so any number may be kept."""
_NEAR = 0.1
"""A served number is taken if it changes the number of removed experts by at most this share."""


def count_left(count: int, share: float, groups: int = 1) -> int:
    """Return how many experts to keep when about a share of them is removed.

    A nearby served number is preferred, else one that divides well among devices: a multiple of 8, or of less for
    fewer than 64 experts.

    Args:
        count: number of experts.
        share: to remove.
        groups: which keep equally many.

    Returns:
        At least one per group; `count` if none would go.
    """
    by_itself = count > _FEW
    fine = min(8, 1 << (count // 8).bit_length() - 1) if by_itself else 1
    step, wanted = math.lcm(groups, fine), count * (1 - share)
    if by_itself:
        near = [
            served for served in SERVED if served % groups == 0 and abs(served - wanted) <= _NEAR * (count - wanted)
        ]
        if near:
            return min(near, key=lambda served: abs(served - wanted))
    kept = max(step, round(wanted / step) * step)
    return kept - step if by_itself and kept >= count > round(wanted) and count > step else min(kept, count)
