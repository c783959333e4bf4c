"""The size in bytes of the model that a run saves, computed from the shapes of its source."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.blocks import Block, by_list
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, Location, holds_weights
from coprune.model.checkpoint.shards import DTYPES, shard_files, stored_entries
from coprune.model.folding import bias_of
from coprune.model.leftovers import lists_of
from coprune.model.loaded_model import Loaded
from coprune.model.matrices import Matrix, embeddings_and_head, find_matrices
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import Left, Removable, RemovePart
from coprune.recipe.vocabulary_cut import Loss, Target
from coprune.removal.channels_and_heads import Kind, kept_count
from coprune.removal.expert_choice import count_left

_TABLES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class SavedSize:
    """Bytes of a model's weights before and after a run."""

    before: int
    after: int | None
    """None if it depends on the run's measurements."""
    is_exact: bool = True
    """Whether `after` is exact; else it is approximate."""
    at_most: bool = False

    def line(self) -> str:
        """Return both in words."""
        if self.after is None:
            return f"{self.before:,} before; after: known once the run has chosen what to remove"
        about = "at most " if self.at_most else "" if self.is_exact else "about "
        return f"{self.before:,} of weights before, {about}{self.after:,} after"


def stored_bytes(location: Location, loaded: Loaded) -> int:
    """Return the bytes of a model's tensors in its files, or computed from the configuration if there are no files."""
    if isinstance(location, GgufFile):
        return location.path.stat().st_size
    if not holds_weights(location) or not shard_files(location.path):
        return int(loaded.weights.total_bytes * loaded.weights.stored_share)
    return sum(entry.nbytes for entry in stored_entries(location.path).values())


def saved_size(recipe: Recipe, location: Location, loaded: Loaded, blocks: Sequence[Block]) -> SavedSize:
    """Return the bytes before and after a run.

    Zeros and training do not change the size. Channels, heads and experts are counted as the run would cut them, if the
    shapes show their widths. For what is only known later (a vocabulary cut by loss, blocks of different sizes) a bound is
    returned.

    Args:
        recipe: the run's recipe.
        location: its model's files.
        loaded: its model, with or without weights.
        blocks: the model's blocks.
    """
    before, asked = stored_bytes(location, loaded), recipe.remove
    dense = sum(parameter.numel() for parameter in loaded.model.parameters())
    item = _item_bytes(recipe, location, loaded, before, dense)
    stored = _stored_item(location, loaded, before, dense)
    start = before if item is None else before + round((item - stored) * dense)
    exact, item = item is not None, item or stored
    if not asked.parts:
        return SavedSize(before, start, is_exact=exact or start == before)
    gone, at_most = 0.0, False
    if asked.vocabulary is not None:
        rows = _rows_gone(asked.vocabulary, loaded)
        at_most = rows is None
        of_row = item if not recipe.output.as_gguf else _item_of_tables(location)
        gone += (rows or 0) * of_row / item
    if asked.size is not None:
        most = asked.size.most(dense - round(gone), math.ceil(item))
        return SavedSize(before, min(start, round(most * item)), at_most=True)
    left = _of_blocks(asked, loaded, blocks)
    if left is None:
        return SavedSize(before, None)
    of_blocks, alike = left
    spread = asked.removes_units and recipe.prune.allocation.name != "uniform"
    after = round(start - (gone + of_blocks) * item)
    return SavedSize(before, after, is_exact=exact and alike and not spread, at_most=at_most)


def parameters_gone(part: str, loaded: Loaded, blocks: Sequence[Block]) -> int:
    """Return how many parameters go with a part such as `channels=0.25`; 0 where the model has none or its shapes do not tell."""
    asked = RemovePart(parts=(part,))
    rows = 0 if asked.vocabulary is None else _rows_gone(asked.vocabulary, loaded) or 0
    of_blocks = _of_blocks(asked, loaded, blocks)
    return rows if of_blocks is None else rows + round(of_blocks[0])


def _item_bytes(recipe: Recipe, location: Location, loaded: Loaded, before: int, dense: int) -> float | None:
    """Return the bytes per parameter of the saved model; None if they are the source's."""
    dtype = loaded.model.dtype.itemsize
    if isinstance(location, GgufFile):
        return None if recipe.output.as_gguf else dtype
    quantised = before < dense * dtype * 0.9
    if recipe.output.encoding == "dense" or recipe.model.dtype != "auto" or not quantised:
        return dtype
    return None


def _stored_item(location: Location, loaded: Loaded, before: int, dense: int) -> float:
    """Return the bytes per parameter of the source: of its single dtype, or on average."""
    own = loaded.model.dtype.itemsize
    if isinstance(location, GgufFile) or before < dense * own * 0.9:
        return before / dense
    dtypes = {entry.dtype for entry in stored_entries(location.path).values()} if holds_weights(location) else set()
    return DTYPES[dtypes.pop()].itemsize if len(dtypes) == 1 else own


def _rows_gone(target: Target, loaded: Loaded) -> int | None:
    """Return the number of parameters in the removed vocabulary rows; None if a loss limit decides."""
    if isinstance(target, Loss):
        return None
    shapes = {id(table): tuple(table.shape) for table in _tables(loaded.model)}
    return sum(max(0, rows - target.kept(rows)) * width for rows, width in shapes.values())


def _item_of_tables(location: Location) -> float:
    """Return the mean bytes per value in the embeddings and the head of a GGUF file."""
    tables = [t for t in gguf_reader(location.path, field="model").tensors if t.name in _TABLES]
    return sum(int(t.n_bytes) for t in tables) / max(1, sum(int(t.n_elements) for t in tables))


def _tables(model: PreTrainedModel) -> list[Tensor]:
    found = [getattr(module, "weight", None) for module in embeddings_and_head(model)]
    return [one for one in found if isinstance(one, Tensor)]


def _of_blocks(asked: RemovePart, loaded: Loaded, blocks: Sequence[Block]) -> tuple[float, bool] | None:
    """Return the number of parameters that blocks lose, and whether it is the same whichever go; None if unknown."""
    shares = asked.shares
    sizes, whole = [], [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    for block in blocks:
        size = _left_of(block, shares, loaded, asked.align)
        if size is None:
            return None
        sizes.append(size)
    gone, alike = float(sum(whole) - sum(sizes)), True
    if (share := shares.get("blocks")) is not None:
        assert not isinstance(share, Left)
        for own in by_list(blocks):
            left = [sizes[block.index] for block in own]
            alike = alike and len({*left}) == 1
            gone += round(share * len(own)) * sum(left) / len(left)
    return gone, alike


def _left_of(block: Block, shares: Mapping[Removable, float | Left], loaded: Loaded, align: int) -> float | None:
    """Return the number of parameters that a block keeps; None if its shapes do not show it."""
    config = loaded.model.config.get_text_config()
    kept = _share_of_experts(block, shares.get("experts"))
    if kept is None:
        return None
    size = {name: float(p.numel()) for name, p in block.module.named_parameters(block.name)}
    for name in size:
        size[name] *= kept.get(name, 1.0)
    seen = {"channels": False, "heads": False}
    for group in _groups(block):
        kind = group.kind
        share = None if kind is None else shares.get(kind)
        if kind is None or share is None:
            continue
        seen[kind] = True
        units = group.width if kind == "channels" else _kv_heads(config)
        if not units:
            return None
        lost = 1 - kept_count(units, float(share), align if kind == "channels" else 1) / units  # type: ignore[arg-type]
        for name, count in group.counted():
            size[name] -= count * lost * kept.get(name, 1.0)
    if any(kind in shares and not found for kind, found in seen.items()):
        return None
    return sum(size.values())


def _kv_heads(config: object) -> int:
    found = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    return found if isinstance(found, int) else 0


@dataclass(frozen=True)
class _Group:
    """Matrices of one module: one that writes hidden states, and those whose outputs it reads."""

    writes: Matrix
    reads: Sequence[Matrix]

    @property
    def width(self) -> int:
        """Number of inputs of the writing matrix."""
        return self.writes.shape[1]

    @property
    def kind(self) -> Kind | None:
        """Channels if one or two matrices of the writing matrix's width feed it; heads if they are wider together."""
        rows = sum(matrix.shape[0] for matrix in self.reads)
        if rows in (self.width, 2 * self.width) and len({m.shape[0] for m in self.reads}) == 1:
            return "channels"
        return "heads" if rows > self.width else None

    def counted(self) -> Iterator[tuple[str, int]]:
        """Yield the parameters that lose values, with their sizes."""
        yield self.writes.parameter, math.prod(self.writes.shape)
        for matrix in self.reads:
            yield matrix.parameter, math.prod(matrix.shape)
            if matrix.expert is not None and hasattr(matrix.owner, f"{matrix.attribute}_bias"):
                yield f"{matrix.parameter}_bias", matrix.shape[0]
            elif matrix.expert is None and bias_of(matrix) is not None:
                yield f"{matrix.name}.bias", matrix.shape[0]


def _groups(block: Block) -> Iterator[_Group]:
    by_module = defaultdict[tuple[str, int | None], list[Matrix]](list)
    for matrix in find_matrices(block.module, block.name):
        by_module[matrix.name.rpartition(".")[0], matrix.expert].append(matrix)
    for own in by_module.values():
        if len(own) > 1:  # the last one writes hidden states, which the others read
            hidden = own[-1].shape[0]
            reads = [matrix for matrix in own[:-1] if matrix.shape[1] == hidden]
            if reads:
                yield _Group(own[-1], reads)


def _share_of_experts(block: Block, asked: float | Left | None) -> dict[str, float] | None:
    """Return the kept share of each parameter that loses experts, by name; None if experts differ in number."""
    if asked is None:
        return {}
    lists, found = lists_of(block), dict[str, float]()
    stacked = {one.parameter: one.stacked for one in find_matrices(block.module, block.name) if one.expert is not None}
    counts = {*lists.values(), *stacked.values()}
    if len(counts) != 1:
        return None if counts else {}
    (count,) = counts
    left = (asked.count if isinstance(asked, Left) else count_left(count, asked)) / count
    for name, parameter in block.module.named_parameters(block.name):
        in_list = any(name.startswith(f"{path}.") for path in lists)
        if in_list or parameter.shape[0] == count:  # experts, and the router's rows
            found[name] = left
    return found
