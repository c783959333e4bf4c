"""A second kind of edit, known to the tests alone: a block that is dropped as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from coprune.model import edits
from coprune.model.edit import Edit
from coprune.pruning.pruner import MatrixResult
from coprune.run import prune_blocks

PREFIX = "model.layers"


class DropBlock(Edit):
    """A block of a LLaMA is left out, and the later ones move up."""

    index: int

    def apply(self, module: nn.Module) -> None:
        module.forward = lambda hidden_states, *args, **kwargs: hidden_states

    def place(self, name: str) -> str | None:
        if not name.startswith(f"{PREFIX}."):
            return name
        number, dot, rest = name.removeprefix(f"{PREFIX}.").partition(".")
        if int(number) == self.index:
            return None
        return f"{PREFIX}.{int(number) - (int(number) > self.index)}{dot}{rest}"

    def configure(self, config: dict[str, Any]) -> None:
        config["num_hidden_layers"] -= 1
        if config.get("layer_types"):
            del config["layer_types"][self.index]

    def describe(self) -> str:
        return f"block {PREFIX}.{self.index}"


def drop_blocks(patch: pytest.MonkeyPatch, *indices: int) -> None:
    """From now on let runs drop these blocks, after they pruned them."""
    fill_zeros = prune_blocks.edits_of

    def edits_of(results: Sequence[MatrixResult]) -> list[Edit]:
        number = int(results[0].name.removeprefix(f"{PREFIX}.").partition(".")[0])
        return [DropBlock(index=number)] if number in indices else fill_zeros(results)

    patch.setitem(edits.EDITS, "drop_block", DropBlock)
    patch.setattr(prune_blocks, "edits_of", edits_of)
