"""Find the parts of every block of a model, in one walk over a single sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from coprune.model.folding import find_folds
from coprune.model.layouts import heads_of
from coprune.model.removal.parts import Part, parts_of
from coprune.model.walk.moves import Dense
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.walk import Walk


def find_parts(model: ProvenModel, dropped: Sequence[int]) -> Iterator[tuple[str, list[Part]]]:
    """What could be removed of every block that stays, proven on one sample."""
    recording = record_batches(model, [model.structure.sample])
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if isinstance(event, BlockDone) and event.block.index not in dropped:
            groups = model.structure.groups[event.block.index]
            run = partial(recording.run, event.block, 0, event.before[0])
            folds = find_folds(groups, heads_of(model.module), run)
            yield event.block.name, [*parts_of(event.block, folds, groups, run)]
