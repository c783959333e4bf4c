"""What was done to a model before it is fine-tuned, as its folder tells: zeros to keep, parts that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coprune.model.blocks import find_blocks
from coprune.model.edit import DropBlock
from coprune.model.edits import Edits, history_of, pruned_names
from coprune.training.masks import Masks, find_masks


@dataclass(frozen=True)
class History:
    """What a folder tells of its model."""

    steps: Sequence[Edits] = ()
    """What was done to it, the earliest first."""

    @classmethod
    def read(cls, folder: Path) -> History:
        """What a folder tells; nothing where there is none. Raises BadInput if that is damaged."""
        return cls(history_of(folder)[1])

    @property
    def removed(self) -> list[str]:
        """What was removed, in words; nothing of a model that only has zeros."""
        return [line for edits in self.steps for line in edits.lines()]

    def counterparts(self, blocks: int, teacher: int) -> list[int] | None:
        """Which of the dense model's hidden states (the first is the embeddings) each block's output stands for.

        A block before some that went stands for the last of them.

        Args:
            blocks: how many there are.
            teacher: how many the dense model has.

        Returns:
            None where that is not known.
        """
        left = list(range(teacher))
        for edits in self.steps if teacher != blocks else ():
            gone = {int(edit.block.rpartition(".")[2]) for edit in edits.all() if isinstance(edit, DropBlock)}
            left = [block for index, block in enumerate(left) if index not in gone]
        return [*left[1:], teacher] if len(left) == blocks else None


def masks_of(model: nn.Module, folder: Path) -> Masks:
    """The masks of a folder's model; of one that parts were removed from, with its other matrices. Raises BadInput."""
    smaller = [block.name for block in find_blocks(model)] if History.read(folder).removed else []
    return find_masks(model, named=pruned_names(folder), smaller=smaller)
