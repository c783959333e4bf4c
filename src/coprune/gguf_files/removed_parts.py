"""A GGUF file without some experts or blocks, whose other tensors keep the source's bytes in whatever type they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Reporter
from coprune.gguf_files.metadata import Counts, Field, corrected
from coprune.gguf_files.slices import Slice, Sliced
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import decode
from coprune.model.edit import Configure, DropBlock, KeepExperts
from coprune.model.edits import Edits

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
"""Names of tensors of blocks: the number, and the rest."""


def by_expert(name: str) -> bool:
    """Return whether a tensor of a block has one entry per expert. name: without the block's."""
    return name.partition(".")[0] in _by_expert()


@cache
def _by_expert() -> frozenset[str]:
    """Return the format's names of tensors whose first axis is the expert."""
    from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

    kinds = ("FFN_GATE_INP", "FFN_EXP_PROBS_B", "FFN_GATE_EXP", "FFN_UP_EXP", "FFN_DOWN_EXP", "FFN_GATE_UP_EXP")
    there = [MODEL_TENSOR[kind] for kind in kinds if kind in MODEL_TENSOR.__members__]
    return frozenset(TENSOR_NAMES[one].removeprefix("blk.{bid}.") for one in there)


class GgufParts(Sliced):
    """A GGUF file, and which of its blocks are those of the model that transformers makes of it."""

    def __init__(self, file: GgufFile, blocks: Sequence[str]) -> None:
        """Open a file for blocks with these names, in order. Raises BadInput, UnsupportedModel if the file has others."""
        super().__init__(file)
        self.blocks = blocks
        there = {int(found[1]) for stored in self.tensors if (found := BLOCK.fullmatch(stored.name))}
        if there != set(range(len(blocks))):
            raise UnsupportedModel(
                f"{file.name} has {len(there)} blocks, but transformers builds {len(blocks)}; save to a folder instead"
            )

    def require_router(self, block: str, router: Tensor) -> None:
        """Raise UnsupportedModel where a block of the file has not this router: one row per expert, in the file's order."""
        name = f"blk.{self.blocks.index(block)}.ffn_gate_inp.weight"
        stored = next((stored for stored in self.tensors if stored.name == name), None)
        if stored is None or not torch.equal(decode(stored).to(router.dtype), router.detach().cpu()):
            raise UnsupportedModel(
                f"{name} of {self.file.name} is not the router that transformers makes of {block}, so it cannot be told "
                "which experts are which; name a folder to save in"
            )

    def cut(self, target: Path, edits: Edits, reporter: Reporter) -> None:
        """Write the file without the experts and blocks that went.

        Args:
            target: the new file.
            edits: what was done to the model.
            reporter: who sees the bar.

        Raises:
            BadInput: the target is taken.
            UnsupportedModel: something else was done to the model, or the metadata cannot tell of it.
            VerificationError: the bytes that were written are not the source's.
        """
        other = next((one for one in edits.all() if not isinstance(one, KeepExperts | DropBlock | Configure)), None)
        if other is not None:
            raise UnsupportedModel(
                f"{type(other).__name__} changes values, which the bytes of {self.file.name} are not"
            )
        left = [index for index, name in enumerate(self.blocks) if edits.place(name) is not None]
        experts = {
            self.blocks.index(name): one
            for name, own in edits.by_block.items()
            for one in own
            if isinstance(one, KeepExperts)
        }
        slices = dict(self._slices(left, experts))
        self.write(target, slices, self._fields(edits, left, experts), reporter)

    def _slices(self, left: Sequence[int], experts: Mapping[int, KeepExperts]) -> Iterator[tuple[str, Slice]]:
        places, cut = {old: new for new, old in enumerate(left)}, set[int]()
        for stored in self.tensors:
            found = BLOCK.fullmatch(stored.name)
            if found is None:
                yield stored.name, Slice(stored.name)
                continue
            number, rest = int(found[1]), found[2]
            if number not in places:
                continue
            edit, kept = experts.get(number), None
            if edit is not None and by_expert(rest):
                if len(stored.data) != edit.count:
                    raise UnsupportedModel(f"{stored.name} has {len(stored.data)} entries for {edit.count} experts")
                kept = np.array(edit.experts)
                cut |= {number} if "_exps." in rest else set()
            yield stored.name, Slice(f"blk.{places[number]}.{rest}", kept)
        if whole := experts.keys() - cut:
            raise UnsupportedModel(
                f"the experts of blk.{min(whole)} are no entries of one tensor in {self.file.name}; name a folder to save in"
            )

    def _fields(self, edits: Edits, left: Sequence[int], experts: Mapping[int, KeepExperts]) -> dict[str, Field]:
        changes = {
            place: value for edit in edits.all() if isinstance(edit, Configure) for place, value in edit.changes.items()
        }
        # Nothing but these two numbers is of experts and blocks, so no other of the same size is touched.
        fields = corrected(self.fields, self.arch, Counts(changes, {}, left, len(self.blocks), {}))
        wanted = [("block_count", len(left)), *(("expert_count", len(edit.experts)) for edit in experts.values())]
        for key, number in wanted:
            said = fields.get(f"{self.arch}.{key}")
            if said is None or said.value != number:
                raise UnsupportedModel(f"no change of {self.file.name}'s metadata says {key} {number}")
        return fields
