"""A model that can be walked: its weights, its blocks, their chosen matrices, and the results of a proof."""

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
    """A model whose blocks and matrices were found by structure, before anything has run."""

    weights: Weights
    blocks: Sequence[Block]
    chosen: Chosen
    """The matrices to inspect or prune."""
    passed: Sequence[Block] = field(default=(), kw_only=True)
    """Other blocks of the list that a forward skips (such as those for images, given text); they stay unchanged."""

    @classmethod
    def without_matrices(cls, weights: Weights) -> FoundModel:
        """Return the model without chosen matrices, to run block by block unchanged."""
        blocks = find_blocks(weights.model)
        return cls(weights, blocks, Chosen.nothing(len(blocks)))

    @property
    def module(self) -> PreTrainedModel:
        """The model itself."""
        return self.weights.model

    @property
    def every_block(self) -> list[Block]:
        """The skipped blocks, and then the others."""
        return [*self.passed, *self.blocks]

    @property
    def names(self) -> list[str]:
        """Names of the blocks, in order."""
        return [block.name for block in self.blocks]


@dataclass
class Structure:
    """The structure of the blocks, as observed in one real forward."""

    sample: Tensor
    """The sample that was run, a batch of one."""
    answers: list[Answer] = field(default_factory=list)
    """Form of every block's output."""
    groups: list[list[list[Matrix]]] = field(default_factory=list)
    """Every block's matrices grouped by input tensor, in order of first use."""
    shared: list[list[list[Matrix]]] = field(default_factory=list)
    """The same for matrices that several blocks share, which are pruned once."""
    streams: tuple[Place, ...] = ()
    """Places of the mappings in which earlier blocks leave values for later ones."""
    handed: list[Handed] = field(default_factory=list)
    """For every block, other values that it takes from or leaves for other blocks."""
    producers: frozenset[int] = frozenset()
    """Numbers of the blocks that compute values other than hidden states that later blocks read."""
    reused: list[str] = field(default_factory=list)
    """Names of matrices that are multiplied more than once in a forward."""
    folds: Mapping[str, Sequence[Fold]] = field(default_factory=dict)
    """Matrices with permutable inputs and their producers, by block; filled on first use."""


@dataclass(frozen=True)
class ProvenModel(FoundModel):
    """A model whose blocks, replayed one by one, were shown to compute the same."""

    structure: Structure

    def first_blocks(self, count: int, outside: bool) -> ProvenModel:
        """Return the model up to a block. outside: whether to include the chosen matrices after the blocks."""
        chosen = replace(self.chosen, outside=self.chosen.outside if outside else [])
        return replace(self, blocks=self.blocks[:count], chosen=chosen)

    def only(self, names: Collection[str]) -> ProvenModel:
        """Restrict the chosen matrices to these names."""
        blocks = [[matrix for matrix in block if matrix.name in names] for block in self.chosen.blocks]
        groups = [[[m for m in group if m.name in names] for group in block] for block in self.structure.groups]
        structure = replace(self.structure, groups=[[group for group in block if group] for block in groups])
        return replace(self, chosen=replace(self.chosen, blocks=blocks, outside=[]), structure=structure)

    def shared_alone(self) -> ProvenModel:
        """Return the model up to the last block with shared matrices, with those under every block's name."""
        shared = self.structure.shared
        chosen = replace(self.chosen, blocks=[[m for group in groups for m in group] for groups in shared], several=[])
        found = replace(self, chosen=chosen, structure=replace(self.structure, groups=shared, reused=[]))
        return found.first_blocks(1 + max(index for index, groups in enumerate(shared) if groups), outside=False)

    def idle(self) -> ProvenModel:
        """Return the model without chosen matrices."""
        structure = replace(self.structure, groups=[[] for _ in self.blocks], shared=[], reused=[])
        return replace(self, chosen=Chosen.nothing(len(self.blocks)), structure=structure)
