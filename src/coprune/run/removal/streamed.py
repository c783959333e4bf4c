"""The rehearsal of a cut where memory does not hold the model: block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.as_saved import smaller_tensors, usual_layout
from coprune.model.blocks import Block
from coprune.model.checkpoint.skeleton import forget_parameters
from coprune.model.edits import Edits
from coprune.model.folding import close
from coprune.model.removal.smaller import fill, lend_outside
from coprune.model.removal.ties import Ties
from coprune.model.walk.moves import Dense
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import BlockCall, run_without_blocks
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.walk import Walk


def same_block_by_block(
    model: ProvenModel,
    small: PreTrainedModel,
    edits: Edits,
    silent: Callable[[Block], AbstractContextManager[None]],
    ties: Ties,
    sample: Tensor,
) -> bool:
    """Compare what every silenced block gives and what its place in the small model does, both read for that alone.

    Each is called as its own model calls it; what lies outside the blocks is the same in both.

    Args:
        model: the big model.
        small: a skeleton of the small one, which gets what lies outside the blocks and has nothing of its blocks in the end.
        edits: what makes the small model of the big one.
        silent: lets a block do without what is cut, for a while.
        ties: lets the small model choose experts as the big one does, where its router does not decide.
        sample: what they are compared on.
    """
    module = model.module
    left = [block for block in model.blocks if edits.place(block.name) is not None]
    lend_outside(small, module, model.names)
    recording, called = record_batches(model, [sample]), _calls(model, small, edits, left, sample)
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if not isinstance(event, BlockDone) or event.block not in left:
            continue
        block, call, (own, own_call) = event.block, recording.calls[0][event.block.index], next(called)
        with torch.no_grad(), silent(block):
            fill(small, own, smaller_tensors(module, edits, partial(usual_layout, module), block.name), module)
            with ties.noted({block.name: block.module}):
                expected = call.run(block.module, event.before[0])
            with ties.followed({block.name: own}):
                same = close(own_call.run(own, event.before[0]), expected)
        forget_parameters(own)
        if not same:
            return False
    return True


def _calls(
    model: ProvenModel, small: PreTrainedModel, edits: Edits, left: Sequence[Block], sample: Tensor
) -> Iterator[tuple[torch.nn.Module, BlockCall]]:
    """The small model's blocks, and how it calls them on the sample."""
    names = [edits.place(block.name) or "" for block in left]
    blocks = [Block(index, name, small.get_submodule(name)) for index, name in enumerate(names)]
    answers = [model.structure.answers[block.index] for block in left]
    _, calls = run_without_blocks(small, blocks, sample, answers)
    return zip((block.module for block in blocks), calls, strict=True)
