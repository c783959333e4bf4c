"""A rehearsal of a removal, which finds the new configuration and refuses a removal that cannot work before the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import CopruneError, UnsupportedModel
from coprune.model.blocks import Block, by_list
from coprune.model.checkpoint.lazy import forget_parameters
from coprune.model.checkpoint.load import prepare, quiet_transformers
from coprune.model.edit import Configure
from coprune.model.edits import Edits
from coprune.model.folding import close, distances, head_size
from coprune.model.proven_folds import first_tokens
from coprune.model.removed import SmallerModel
from coprune.model.routing import Ties
from coprune.model.saved_slices import smaller_tensors, usual_layout
from coprune.model.walk.block_calls import BlockCall, forward_logits, replaced_forwards, run_without_blocks
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, record_batches
from coprune.model.walk.walk import Walk
from coprune.removal.channels_and_heads import put_back, silence
from coprune.removal.cuts import Cut, Plan, anywhere, dropped, edits_of_block, fewer
from coprune.removal.smaller_model import (
    Resized,
    Shortened,
    build_smaller,
    fill,
    lend_outside,
    possible_changes,
    ratio_of,
    refusal_of,
    smaller_skeleton,
)
from coprune.run.context import Run

_OF_A_HEAD = re.compile(r"head_dim|head_size|d_head|d_kv|kv_channels")
"""Names of settings for the width of a head."""
_ROUNDING = 1e-3


def rehearse(run: Run, plan: Plan) -> Configure:
    """Cut the model at arbitrary places, build the smaller model, compare the two, and restore everything.

    This finds the configuration and refuses whatever cannot work before anything slow. Raises UnsupportedModel.
    """
    model, module = run.model, run.model.module
    cuts = {block.name: anywhere(plan, block) for block in model.blocks}
    layout = partial(usual_layout, module) if model.weights.streams else None
    edits = Edits({b.name: edits_of_block(run, plan, b, cuts[b.name], layout) for b in model.blocks})
    cut = Rehearsed(run, plan, cuts, edits)
    shapes = {name: tuple(tensor.shape) for name, tensor in smaller_tensors(module, edits, layout).items()}
    # Logits of half precision hide small differences: its rounding grows over the blocks.
    whole = layout is None and module.dtype.itemsize >= 4
    proof: Proof = cut.as_a_whole if whole else cut.block_by_block
    changes, after = _proven_changes(run, plan, shapes, proof)
    written = model.weights.in_file(changes)
    if written is None:
        raise UnsupportedModel(f"config.json of {model.weights.model.name_or_path} cannot express {_told(changes)}")
    padding = sum(own.padding(plan) for own in cuts.values()) if plan.uneven else 0
    share = run.removal.shares.get("experts")
    parts = tuple(fewer(plan, len(model.blocks), share))
    removed = SmallerModel(parts=parts, before=module.num_parameters(), saved=after, padding=padding)
    worded = None if written == changes else written
    return Configure(changes=changes, written=worded, removed=removed, parameters=after - padding, padding=padding)


def _told(changes: Mapping[str, Any]) -> str:
    """Return configuration changes in words."""
    return ", ".join(f"{place} = {value}" for place, value in changes.items())


Proof = Callable[[Mapping[str, Any]], int | None]
"""Builds the model of a changed configuration and returns its parameter count, or None if it is not the wanted model."""


@dataclass(frozen=True)
class Rehearsed:
    """A model cut at arbitrary places, and the means to compare it with the silenced one."""

    run: Run
    plan: Plan
    cuts: Mapping[str, Cut]
    """Cuts by block."""
    edits: Edits

    @contextmanager
    def _silent(self, block: Block) -> Iterator[None]:
        """Silence the cut parts of a block within the body."""
        cut = self.cuts[block.name]
        with ExitStack() as ended:
            ended.enter_context(put_back(block.module, block.name, cut.masks))
            silence(block.module, block.name, cut.masks)
            if cut.experts is not None:
                ended.enter_context(self.plan.mixtures[block.name].silent(block.module, cut.experts))
            yield

    def as_a_whole(self, changes: Mapping[str, Any]) -> int | None:
        """Compare the logits of the silenced and the small model."""
        model, module = self.run.model, self.run.model.module
        idle = [block for block in model.blocks if block.index in self.plan.dropped]
        with ExitStack() as ended:
            ended.enter_context(replaced_forwards(idle, lambda block: dropped(self.run, block.index).idle))
            for block in model.blocks:
                ended.enter_context(self._silent(block))
            small = build_smaller(module, smaller_tensors(module, self.edits), changes)
            ties, left = self._ties(), {block.name: self.edits.place(block.name) for block in model.blocks}
            # The small model shares all uncut tensors, so it runs while the parts are silent.
            big = {block.name: block.module for block in model.blocks}
            own = {name: small.get_submodule(place) for name, place in left.items() if place is not None}

            def same_on(sample: Tensor) -> bool:
                with ties.noted(big):
                    expected = forward_logits(module, sample)
                with ties.followed(own):
                    return alike(forward_logits(small, sample), expected)

            same = same_on(model.structure.sample)
            for _ in self._otherwise((small, module)) if same else ():
                same = same and same_on(first_tokens(model.structure.sample))
        return small.num_parameters() if same else None

    def block_by_block(self, changes: Mapping[str, Any]) -> int | None:
        """Rehearse without the whole model in memory."""
        model, module = self.run.model, self.run.model.module
        small = prepare(smaller_skeleton(module, changes))
        small.tie_weights()  # so that its parameters are counted once
        sample = model.structure.sample
        same = same_block_by_block(model, small, self.edits, self._silent, self._ties(), sample)
        for _ in self._otherwise((small, module)) if same else ():
            same = same and same_block_by_block(
                model, small, self.edits, self._silent, self._ties(), first_tokens(sample)
            )
        return small.num_parameters() if same else None

    def _ties(self) -> Ties:
        kept = {n: c.experts.nonzero().flatten().tolist() for n, c in self.cuts.items() if c.experts is not None}
        return Ties(kept, self.run.model.module.dtype)

    def _otherwise(self, both: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Yield once per other attention implementation, since each reads different numbers of the configuration."""
        ways = [*ATTENTION] if "heads" in self.plan.keep else []
        for way in ways:
            if way != both[0].config._attn_implementation and all(one._supports_sdpa or way == "eager" for one in both):
                with ExitStack() as ended, quiet_transformers():
                    for one in both:
                        ended.enter_context(attending(one, way))
                    yield


ATTENTION = ("eager", "sdpa")
"""Attention implementations of transformers that need no other package."""


@contextmanager
def attending(model: PreTrainedModel, way: str) -> Iterator[None]:
    """Use another of transformers' attention implementations within the body."""
    own = {key: getattr(model.config, key) for key in model.config.sub_configs}
    before = {key: one._attn_implementation for key, one in own.items() if one is not None}
    before[""] = model.config._attn_implementation
    model.set_attn_implementation(way)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _proven_changes(
    run: Run, plan: Plan, shapes: Mapping[str, tuple[int, ...]], proof: Proof
) -> tuple[dict[str, Any], int]:
    """Return the configuration changes under which a model of these shapes matches the silenced one, and its size."""
    module, resized = run.model.module, resized_by(run, plan)
    fitting, said = 0, ""
    layout = usual_layout if run.model.weights.streams else None
    for changes in possible_changes(module, shapes, resized, layout):
        fitting += 1
        try:
            after = proof(changes)
        except (CopruneError, MemoryError):
            raise
        except Exception as error:  # a model's code may raise anything for a configuration that only fits its shapes
            said = f" (its code says: {str(error).partition(chr(10))[0]})"
            continue
        if after is not None:
            return changes, after
    refused = refusal_of(module, resized)
    if refused is not None:
        raise UnsupportedModel(f"no configuration describes the smaller model: {refused.rstrip('.')}")
    if fitting:
        raise UnsupportedModel(
            "a smaller model with the same weights computes other outputs than this model with the parts silenced, so they "
            f"cannot be removed{said}"
        )
    cause = f"no setting of the configuration of {type(module).__name__} gives the smaller shapes"
    if "heads" in plan.keep and not any(map(_OF_A_HEAD.search, module.config.get_text_config().to_dict())):
        cause = (
            f"the configuration of {type(module).__name__} has no head width; it is derived from the number of heads"
        )
    asked = {*plan.keep, *(("blocks",) if plan.dropped else ())}
    others = [part for part in ("channels", "heads", "blocks") if part not in asked]
    fix = f"try to remove {' or '.join(others)}" if others else None
    raise UnsupportedModel(f"{cause}, so the result could not be loaded", fix=fix)


def resized_by(run: Run, plan: Plan) -> Resized:
    """Return the sizes that the configuration has to change for a plan."""
    head = head_size(run.model.module)
    unsaid = {"head_dim": head} if head is not None and "heads" in plan.keep else {}
    lists = [own for own in _shortened(run.model.blocks, plan.dropped) if own.dropped]
    return Resized(plan.sizes(), lists, unsaid, _arguments(plan, len(run.model.blocks)))


def _shortened(blocks: Sequence[Block], dropped: Sequence[int]) -> Iterator[Shortened]:
    """Yield the lists of blocks with their removed blocks. dropped: numbers over all lists."""
    for own in by_list(blocks):
        numbers = [block.index for block in own]
        yield Shortened(len(numbers), [at for at, number in enumerate(numbers) if number in dropped])


def _arguments(plan: Plan, blocks: int) -> dict[str, float]:
    """Return a plan as a library's model arguments, as timm names them. blocks: number of blocks."""
    channels = [part for parts in plan.parts.values() for part in parts if part.kind == "channels"]
    ratios = {ratio_of(plan.saved(part), part.fold.consumers[0].shape[0]) for part in channels}
    found: dict[str, float] = {"mlp_ratio": ratios.pop()} if len(ratios) == 1 else {}
    return found | ({"depth": blocks - len(plan.dropped)} if plan.dropped else {})


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether logits of float32 are equal up to rounding.

    Many half-removed blocks accumulate a hundred times the rounding of one; a configuration that only fits the shapes is
    off by at least a hundredth.
    """
    apart, norms = distances(found, expected)
    return close(found, expected) or bool(apart.norm() <= _ROUNDING * norms.norm())


def same_block_by_block(
    model: ProvenModel,
    small: PreTrainedModel,
    edits: Edits,
    silent: Callable[[Block], AbstractContextManager[None]],
    ties: Ties,
    sample: Tensor,
) -> bool:
    """Compare every silenced block with its counterpart in the small model, loading both for that alone.

    Each block is called as its own model calls it; everything outside the blocks is shared.

    Args:
        model: the big model.
        small: a skeleton of the small model; receives what is outside the blocks, and its blocks are empty again at the end.
        edits: turn the big model into the small one.
        silent: silences the cut parts of a block within its body.
        ties: makes the small model choose the big one's experts where routing ties.
        sample: compared on this.
    """
    module = model.module
    left = [block for block in model.blocks if edits.place(block.name) is not None]
    lend_outside(small, module, model.names)
    recording, called = record_batches(model, [sample]), _calls(model, small, edits, left, sample)
    # Values passed between the small model's blocks shrink with them.
    part, streams = model.blocks[0].part, recording.streams_of(0)
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if not isinstance(event, BlockDone):
            continue
        if event.block.part != part:
            part, streams = event.block.part, recording.streams_of(0)
        if event.block not in left:
            continue
        block, (own, own_call) = event.block, next(called)
        with torch.no_grad(), silent(block):
            fill(small, own, smaller_tensors(module, edits, partial(usual_layout, module), block.name), module)
            with ties.noted({block.name: block.module}):
                expected = recording.run(block, 0, event.before[0])
            with ties.followed({block.name: own}):
                same = close(own_call.run(own, event.before[0], streams), expected)
        forget_parameters(own)
        if not same:
            return False
    return True


def _calls(
    model: ProvenModel, small: PreTrainedModel, edits: Edits, left: Sequence[Block], sample: Tensor
) -> Iterator[tuple[torch.nn.Module, BlockCall]]:
    """Yield the small model's blocks with their calls on the sample."""
    names = [edits.place(block.name) or "" for block in left]
    blocks = [Block(index, name, small.get_submodule(name)) for index, name in enumerate(names)]
    answers = [model.structure.answers[block.index] for block in left]
    _, calls = run_without_blocks(small, blocks, sample, answers)
    handed = (model.structure.handed[block.index] for block in left)
    called = (call.with_streams(model.structure.streams, own) for call, own in zip(calls, handed, strict=True))
    return zip((block.module for block in blocks), called, strict=True)
