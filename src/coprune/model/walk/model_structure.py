"""A model that can be walked: where its weights are, its blocks, the matrices chosen in them, and what a proof showed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.weights import Weights
from coprune.model.folding import Fold
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.block_calls import Answer, Handed, Place


@dataclass(frozen=True)
class FoundModel:
    """A model whose blocks and matrices were found by structure, and nothing of it was run yet."""

    weights: Weights
    blocks: Sequence[Block]
    chosen: Chosen
    """The matrices to look at or to prune."""
    passed: Sequence[Block] = field(default=(), kw_only=True)
    """Other blocks of the list, which a forward passes by (those for images, where it is given text); they stay as they are."""

    @classmethod
    def without_matrices(cls, weights: Weights) -> FoundModel:
        """Return the model without chosen matrices, to be run block by block unchanged."""
        blocks = find_blocks(weights.model)
        return cls(weights, blocks, Chosen.nothing(len(blocks)))

    @property
    def module(self) -> PreTrainedModel:
        """The model itself."""
        return self.weights.model

    @property
    def every_block(self) -> list[Block]:
        """Those that a forward passes by, and then the blocks."""
        return [*self.passed, *self.blocks]

    @property
    def names(self) -> list[str]:
        """Names of the blocks, in order."""
        return [block.name for block in self.blocks]


@dataclass
class Structure:
    """The structure of the blocks, as one real forward showed it."""

    sample: Tensor
    """The batch of one that was sent through."""
    answers: list[Answer] = field(default_factory=list)
    """Form of every block's output."""
    groups: list[list[list[Matrix]]] = field(default_factory=list)
    """Every block's matrices grouped by input tensor, in order of first use."""
    shared: list[list[list[Matrix]]] = field(default_factory=list)
    """The same of every block's matrices that others share, which are pruned once."""
    streams: tuple[Place, ...] = ()
    """Where blocks are handed what earlier ones left for them in a mapping."""
    handed: list[Handed] = field(default_factory=list)
    """For every block, what else it is handed of what others computed."""
    producers: frozenset[int] = frozenset()
    """Numbers of the blocks that make something else than hidden states which a later one reads."""
    reused: list[str] = field(default_factory=list)
    """Names of matrices that are multiplied more than once in a forward."""
    folds: Mapping[str, Sequence[Fold]] = field(default_factory=dict)
    """Matrices with permutable inputs and their producers, by block; filled on first use."""


@dataclass(frozen=True)
class ProvenModel(FoundModel):
    """A model whose blocks, replayed one by one, were seen to be the model."""

    structure: Structure

    def first_blocks(self, count: int, outside: bool) -> ProvenModel:
        """Return the model up to a block. outside: whether to include the chosen matrices after the blocks."""
        chosen = replace(self.chosen, outside=self.chosen.outside if outside else [])
        return replace(self, blocks=self.blocks[:count], chosen=chosen)

    def only(self, names: Collection[str]) -> ProvenModel:
        """Return the model with only some of the chosen matrices. names: theirs."""
        blocks = [[matrix for matrix in block if matrix.name in names] for block in self.chosen.blocks]
        groups = [[[m for m in group if m.name in names] for group in block] for block in self.structure.groups]
        structure = replace(self.structure, groups=[[group for group in block if group] for block in groups])
        return replace(self, chosen=replace(self.chosen, blocks=blocks, outside=[]), structure=structure)

    def shared_alone(self) -> ProvenModel:
        """Return the model up to the last block with matrices that others share, as every block names them."""
        shared = self.structure.shared
        chosen = replace(self.chosen, blocks=[[m for group in groups for m in group] for groups in shared], several=[])
        found = replace(self, chosen=chosen, structure=replace(self.structure, groups=shared, reused=[]))
        return found.first_blocks(1 + max(index for index, groups in enumerate(shared) if groups), outside=False)

    def idle(self) -> ProvenModel:
        """Return the model without chosen matrices."""
        structure = replace(self.structure, groups=[[] for _ in self.blocks], shared=[], reused=[])
        return replace(self, chosen=Chosen.nothing(len(self.blocks)), structure=structure)
