"""Write a GGUF file without some experts or blocks; the other tensors keep the source's bytes, whatever their type."""

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
"""Names of blocks' tensors: the block's number, and the rest."""


def by_expert(name: str) -> bool:
    """Return whether a block's tensor has one entry per expert. name: without the block's prefix."""
    return name.partition(".")[0] in _by_expert()


@cache
def _by_expert() -> frozenset[str]:
    """Return the format's names of tensors whose first axis is the expert."""
    from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

    kinds = ("FFN_GATE_INP", "FFN_EXP_PROBS_B", "FFN_GATE_EXP", "FFN_UP_EXP", "FFN_DOWN_EXP", "FFN_GATE_UP_EXP")
    there = [MODEL_TENSOR[kind] for kind in kinds if kind in MODEL_TENSOR.__members__]
    return frozenset(TENSOR_NAMES[one].removeprefix("blk.{bid}.") for one in there)


class GgufParts(Sliced):
    """A GGUF file, with its blocks matched to those of the model that transformers builds from it."""

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
        """Raise UnsupportedModel unless a block of the file has this router: one row per expert, in the file's order."""
        name = f"blk.{self.blocks.index(block)}.ffn_gate_inp.weight"
        stored = next((stored for stored in self.tensors if stored.name == name), None)
        if stored is None or not torch.equal(decode(stored).to(router.dtype), router.detach().cpu()):
            raise UnsupportedModel(
                f"{name} of {self.file.name} differs from the router that transformers reads for {block}, so the experts "
                "cannot be matched; save to a folder instead"
            )

    def cut(self, target: Path, edits: Edits, reporter: Reporter) -> None:
        """Write the file without the removed experts and blocks.

        Args:
            target: the new file.
            edits: the model's edits.
            reporter: shows the progress.

        Raises:
            BadInput: the target exists.
            UnsupportedModel: the model was edited in other ways, or the metadata cannot express the edits.
            VerificationError: the written bytes differ from the source's.
        """
        other = next((one for one in edits.all() if not isinstance(one, KeepExperts | DropBlock | Configure)), None)
        if other is not None:
            raise UnsupportedModel(
                f"{type(other).__name__} changes values, but the bytes of {self.file.name} are copied unchanged"
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
                f"the experts of blk.{min(whole)} are not entries of one tensor in {self.file.name}; save to a folder instead"
            )

    def _fields(self, edits: Edits, left: Sequence[int], experts: Mapping[int, KeepExperts]) -> dict[str, Field]:
        changes = {
            place: value for edit in edits.all() if isinstance(edit, Configure) for place, value in edit.changes.items()
        }
        # Only these two numbers describe experts and blocks, so others of the same size stay.
        fields = corrected(self.fields, self.arch, Counts(changes, {}, left, len(self.blocks), {}))
        wanted = [("block_count", len(left)), *(("expert_count", len(edit.experts)) for edit in experts.values())]
        for key, number in wanted:
            said = fields.get(f"{self.arch}.{key}")
            if said is None or said.value != number:
                raise UnsupportedModel(f"{self.file.name}'s metadata cannot be changed to say {key} {number}")
        return fields
