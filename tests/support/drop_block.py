"""The edit of docs/adding-an-edit.md, known only to the tests: dropping a whole block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from coprune.model import edits
from coprune.model.edit import Edit
from coprune.pruning.pruner import MatrixResult
from coprune.steps import prune as prune_blocks
from support.page_code import named_in

PREFIX = "model.layers"
DropBlock = named_in("adding-an-edit.md", "DropBlock")


def drop_blocks(patch: pytest.MonkeyPatch, *indices: int) -> None:
    """Make runs drop these blocks after pruning."""
    fill_zeros = prune_blocks.edits_of

    def edits_of(results: Sequence[MatrixResult]) -> list[Edit]:
        number = int(results[0].name.removeprefix(f"{PREFIX}.").partition(".")[0])
        return [DropBlock(index=number)] if number in indices else fill_zeros(results)

    patch.setitem(edits.EDITS, "drop_block", DropBlock)
    patch.setattr(prune_blocks, "edits_of", edits_of)
