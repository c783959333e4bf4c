"""Parts of a block that can be removed as a whole: channels of an MLP, key-value heads with their query heads.

A part is a fold (`coprune.model.folding`): a consumer's input channels come from certain rows of certain producers, proven
on the block's output. Removing a channel removes those rows and the consumer's column. Removing a head also removes the rows
of its query and key, which are the matrices with the same input as its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coprune.model.blocks import Block
from coprune.model.folding import Fold, bias_of, close
from coprune.model.matrices import Matrix
from coprune.model.proven_folds import OnSample, folds_of_blocks
from coprune.model.walk.block_calls import Handed, Place
from coprune.model.walk.model_structure import ProvenModel

Kind = Literal["channels", "heads"]


@dataclass(frozen=True)
class Part:
    """Units of one kind that can be removed from a block, equally many from each consumer (each expert)."""

    block: str
    kind: Kind
    fold: Fold
    beside: tuple[tuple[Matrix, int], ...] = ()
    """Other matrices that lose rows with a unit, with the number of rows per unit."""
    vectors: tuple[tuple[str, nn.Parameter], ...] = ()
    """Parameters with one value per query head, and tables with one column per query head."""
    group: int = 1
    """Number of units that are kept or removed together."""
    shared: str | None = None
    """Name of a value passed between blocks with a slice per head (position biases); parts that share it keep the same heads."""

    @property
    def name(self) -> str:
        """The name of its first consumer, unique among parts."""
        return self.fold.consumers[0].name

    @property
    def count(self) -> int:
        """Number of units."""
        return self.fold.layout.size if self.kind == "channels" else self.fold.layout.segments

    @property
    def repeats(self) -> int:
        """Query heads of a unit; 1 for channels."""
        return self.fold.layout.repeats

    @cached_property
    def units(self) -> Tensor:
        """The consumer's columns by unit: U × K int64."""
        layout = self.fold.layout
        if self.kind == "channels":
            return torch.arange(layout.size)[:, None]
        return torch.arange(layout.segments * layout.repeats * layout.size).view(layout.segments, -1)

    @property
    def grouped(self) -> Tensor:
        """The consumer's columns by group: U // group × K · group int64. Ungrouped remaining units go first."""
        groups = self.count // self.group
        return self.units[: groups * self.group].reshape(groups, -1)

    def ungrouped(self, keep: Tensor) -> Tensor:
        """Expand a mask of groups (U // group bool) to units (U bool), dropping the ungrouped rest."""
        return nn.functional.pad(keep.repeat_interleave(self.group), (0, self.count % self.group))

    def columns(self, keep: Tensor) -> Tensor:
        """Return the kept columns of the consumer: C bool. keep: U bool."""
        return keep.repeat_interleave(self.units.shape[1])

    def masks(self, keeps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the mask of each affected parameter: bool, by name. keeps: U bool for each consumer."""
        found: dict[str, Tensor] = {}
        for consumer, producers, keep in zip(self.fold.consumers, self.fold.producers, keeps, strict=True):
            _mask(found, consumer, self.columns(keep), inputs=True)
            for producer in producers:
                _mask(found, producer, self.fold.layout.rows_of(keep), inputs=False)
        for matrix, rows in self.beside:
            _mask(found, matrix, keeps[0].repeat_interleave(rows), inputs=False)
        for name, parameter in self.vectors:
            found[name] = keeps[0].repeat_interleave(self.repeats).to(_place_of(parameter)).expand(parameter.shape)
        return found

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters affected by removing a unit."""
        return frozenset(self.masks([torch.ones(self.count, dtype=torch.bool)] * len(self.fold.consumers)))

    def silent(self) -> list[Tensor]:
        """Return the units whose weights and biases are all zero: U bool for each consumer. The block must be in memory."""
        units = torch.arange(self.count)
        found = []
        for consumer, producers in zip(self.fold.consumers, self.fold.producers, strict=True):
            heard = [self.columns(units)[_any_number(consumer.read().T)]]
            heard += [self.fold.layout.rows_of(units)[_nonzero_outputs(producer)] for producer in producers]
            heard += [units.repeat_interleave(rows)[_nonzero_outputs(matrix)] for matrix, rows in self.beside]
            found.append(torch.ones(self.count, dtype=torch.bool).index_fill(0, torch.cat(heard), False))
        return found


def _nonzero_outputs(matrix: Matrix) -> Tensor:
    """Return which outputs of a matrix can be nonzero: bool."""
    bias = bias_of(matrix)
    speaks = _any_number(matrix.read())
    return speaks if bias is None else speaks | (bias != 0).cpu()


def _any_number(rows: Tensor) -> Tensor:
    return (rows != 0).any(dim=1).cpu()


def _mask(found: dict[str, Tensor], matrix: Matrix, keep: Tensor, inputs: bool) -> None:
    """Record the kept inputs or outputs of a matrix, and the biases of its outputs."""
    parameter: Tensor = getattr(matrix.owner, matrix.attribute)
    keep = keep.to(_place_of(parameter))
    whole = found.setdefault(matrix.parameter, torch.ones(parameter.shape, dtype=torch.bool, device=keep.device))
    own = matrix.part_of(whole)
    along_rows = (matrix.input_dim == 0) == inputs
    own &= keep[:, None] if along_rows else keep[None, :]
    bias = None if inputs else bias_of(matrix)
    if bias is None:
        return
    if matrix.expert is None:
        found[f"{matrix.name}.bias"] = keep
        return
    stacked: Tensor = getattr(matrix.owner, f"{matrix.attribute}_bias")
    rows = found.setdefault(f"{matrix.parameter}_bias", torch.ones(stacked.shape, dtype=torch.bool, device=keep.device))
    rows[matrix.expert] = keep


def _place_of(parameter: Tensor) -> torch.device:
    """Return the device for a parameter's mask; CPU while the parameter is not in memory."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def parts_of(
    block: Block, folds: Sequence[Fold], groups: Sequence[Sequence[Matrix]], handed: Handed, run: OnSample
) -> Iterator[Part]:
    """Yield the parts of a block. groups: its matrices by their input tensor; handed: as in `Structure`."""
    for fold in folds:
        if not fold.layout.is_heads():
            part = Part(block.name, "channels", fold)
        else:
            part = _heads_of(block, fold, groups, run)
        if is_apart(block.module, part, run):
            yield replace(part, shared=_shared(part, block, handed, run)) if part.kind == "heads" else part


def _heads_of(block: Block, fold: Fold, groups: Sequence[Sequence[Matrix]], run: Callable[[], Tensor]) -> Part:
    """Return the part made of attention heads with their queries and keys."""
    layout, value = fold.layout, fold.producers[0][0]
    part = Part(block.name, "heads", fold, vectors=tuple(_per_head(block, value, layout.segments * layout.repeats)))
    used = [matrix for group in groups for matrix in group]
    before = used[: [matrix.name for matrix in used].index(part.name)]
    if layout.before:  # a fused matrix holds the keys and perhaps the queries; otherwise queries have their own input
        others = [m for m in before if m.expert is None and m.name != value.name]
        fitting = [(m, m.shape[0] // layout.segments) for m in others if m.shape[0] % layout.segments == 0]
        return replace(part, beside=tuple(one for one in fitting if _is_theirs(block.module, part, one, run)))
    group = next(group for group in groups if any(matrix.name == value.name for matrix in group))
    keys, queries = layout.segments * layout.size, fold.consumers[0].shape[1]
    rows = {keys: layout.size, queries: layout.repeats * layout.size}
    if fold.gate is not None:
        rows[fold.gate.shape[0]] = fold.gate.shape[0] // layout.segments
    beside = tuple((m, rows[m.shape[0]]) for m in group if m.name != value.name and m.shape[0] in rows)
    if len(beside) < 2:  # in cross-attention, queries and keys have different inputs
        named = {matrix.name for matrix in group}
        nearest = ((m, rows[m.shape[0]]) for m in reversed(before) if m.name not in named and m.shape[0] == queries)
        beside += (*islice((one for one in nearest if _is_theirs(block.module, part, one, run)), 1),)
    return replace(part, beside=beside)


def _is_theirs(module: nn.Module, part: Part, other: tuple[Matrix, int], run: Callable[[], Tensor]) -> bool:
    """Return whether a matrix's rows belong to the heads: silencing them affects these heads, and no others."""
    whole = replace(part, beside=(other,))
    if not is_apart(module, whole, run):
        return False
    name = other[0].parameter
    dense = run()
    with put_back(module, part.block, [name]):
        silence(module, part.block, {name: whole.masks([_every_other(part)])[name]})
        return not close(run(), dense)


def _per_head(block: Block, value: Matrix, heads: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with one value per query head (attention sinks) in the value projection's module.

    Tables with one column per query head (relative positions) are included.
    """
    path = value.name.rpartition(".")[0]
    holder = block.module.get_submodule(path.removeprefix(f"{block.name}").removeprefix("."))
    for name, parameter in holder.named_parameters(recurse=False):
        if tuple(parameter.shape) == (heads,):
            yield f"{path}.{name}", parameter
    for name, module in holder.named_modules():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == heads:
            yield f"{path}.{name}.weight", module.get_parameter("weight")


@torch.no_grad()
def _shared(part: Part, block: Block, handed: Handed, run: OnSample) -> str | None:
    """Return the name of a value passed to or from the block with a slice per head of the part; None if there is none."""
    made = [place for _, place in handed.leaves if place not in handed.takes]
    ways = [*((place, _reads_by_head) for place in handed.takes), *((place, _makes_by_head) for place in made)]
    found = (f"{block.part}:{place}" for place, is_so in ways if is_so(part, block.module, place, run))
    return next(found, None)


def _reads_by_head(part: Part, module: nn.Module, place: Place, run: OnSample) -> bool:
    """Return whether each head reads its own slice of a value passed to the block.

    Changing the value must matter, except in the slices of silent heads.
    """
    given: Any = run.streams()[-1].get(place)
    dense, gone = run(), ~_every_other(part).repeat_interleave(part.repeats)
    for axis in _axes_of_heads(given, part):
        other = given.roll(1, axis)
        if close(run([*run.streams()[:-1], {**run.streams()[-1], place: other}]), dense):
            continue
        shape = [-1 if dim == axis else 1 for dim in range(given.ndim)]
        mixed = torch.where(gone.to(given.device).view(shape), other, given)
        masks = _masks_of_half(part)
        consumers = {c.parameter: masks[c.parameter] for c in part.fold.consumers}
        with put_back(module, part.block, consumers):
            silence(module, part.block, consumers)
            if close(run([*run.streams()[:-1], {**run.streams()[-1], place: mixed}]), run()):
                return True
    return False


def _makes_by_head(part: Part, module: nn.Module, place: Place, run: OnSample) -> bool:
    """Return whether silencing heads changes exactly their own slices of a value the block passes on."""

    def left() -> Tensor:
        streams = run.streams()
        run(streams)
        found: Tensor = streams[-1][place]
        return found

    dense, keep = left(), _every_other(part).repeat_interleave(part.repeats)
    masks = _masks_of_half(part)
    with put_back(module, part.block, masks):
        silence(module, part.block, masks)
        changed = left() != dense
    by_head = [changed.transpose(0, axis).flatten(1).any(dim=1).cpu() for axis in _axes_of_heads(dense, part)]
    return any(bool(own.any()) and not bool(own[keep].any()) for own in by_head)


def _axes_of_heads(value: Any, part: Part) -> list[int]:
    shape = value.shape if isinstance(value, Tensor) else ()
    return [axis for axis, size in enumerate(shape) if size == part.count * part.repeats]


@torch.no_grad()
def is_apart(module: nn.Module, part: Part, run: Callable[[], Tensor]) -> bool:
    """Return whether silencing some units affects no other unit, as a norm over all of them would.

    Units silenced in the consumers' columns must make no difference when their rows are silenced, too.

    Args:
        module: the block; restored at the end.
        part: the units and their matrices.
        run: runs the block on a sample and returns its output.
    """
    masks = _masks_of_half(part)
    consumers = {consumer.parameter for consumer in part.fold.consumers}
    with put_back(module, part.block, masks):
        silence(module, part.block, {name: mask for name, mask in masks.items() if name in consumers})
        alone = run()
        silence(module, part.block, masks)
        return close(run(), alone)


def _every_other(part: Part) -> Tensor:
    return torch.arange(part.count) % 2 == 0


def _masks_of_half(part: Part) -> dict[str, Tensor]:
    """Return a part's masks with every other unit kept."""
    return part.masks([_every_other(part)] * len(part.fold.consumers))


def step_of(units: int, align: int, group: int = 1) -> int:
    """Return the step in which units are kept or removed: `align`, or the largest power of two below it that divides them.

    group: units that can only be removed together, whatever `align` is.
    """
    units, align = units // group, -(-align // group)
    steps = [align, *(1 << power for power in reversed(range((align - 1).bit_length())))]
    return group * next(step for step in steps if units % step == 0 and step < max(units, 2))


def kept_count(units: int, share: float, align: int, group: int = 1) -> int:
    """Return the number of kept units, a multiple of the step of `step_of`.

    group: units that can only be removed together; a rest that it does not divide goes first.
    """
    step, wanted = step_of(units, align, group), units * (1 - share)
    kept = min(max(step, round(wanted / step) * step), units // group * group)
    return kept if abs(kept - wanted) <= units - wanted else units


def share_of(units: int, kept: int) -> str:
    """Return the share, with the fewest digits, at which `kept` of `units` are kept."""
    shares = (f"{1 - kept / units:.{digits}f}" for digits in range(1, 9))
    return next(share for share in shares if kept_count(units, float(share), 1) == kept)


def groups_of(parts: Iterable[Part], kind: Kind) -> dict[int, int]:
    """Return the group size of a kind's units, by number of units."""
    return {part.count: part.group for part in parts if part.kind == kind}


def filled(keep: Tensor, count: int) -> Tensor:
    """Extend kept units to `count` with the first of the others. keep: U bool."""
    whole = keep.clone()
    whole[(~keep).nonzero().flatten()[: count - int(keep.sum())]] = True
    return whole


def together(masks: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine the masks of two removals: a value stays only if both keep it."""
    return {**masks, **{name: mask & masks[name] if name in masks else mask for name, mask in more.items()}}


def parameter_of(module: nn.Module, prefix: str, name: str) -> nn.Parameter:
    return module.get_parameter(name.removeprefix(f"{prefix}."))


@contextmanager
def put_back(module: nn.Module, prefix: str, names: Iterable[str]) -> Iterator[None]:
    """Restore some parameters of a module at the end of the body. prefix: the module's path."""
    before = {name: parameter_of(module, prefix, name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                parameter_of(module, prefix, name).copy_(values)


@torch.no_grad()
def silence(module: nn.Module, prefix: str, masks: Mapping[str, Tensor]) -> None:
    """Zero what is not kept, in place. prefix: the module's path, with which the masks' names begin."""
    for name, mask in masks.items():
        parameter = parameter_of(module, prefix, name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


def find_parts(model: ProvenModel) -> Iterator[tuple[str, list[Part]]]:
    """Yield each block's removable parts, proven on one sample."""
    for block, folds, run in folds_of_blocks(model):
        groups, handed = model.structure.groups[block.index], model.structure.handed[block.index]
        yield block.name, [*parts_of(block, folds, groups, handed, run)]


@torch.no_grad()
def read_together(model: ProvenModel, kind: Kind) -> str | None:
    """Return why heads or channels cannot go, for the first block with a matrix whose outputs are read over all units together.

    None if the cause is something else.
    """
    for block, folds, run in folds_of_blocks(model):
        own = [fold for fold in folds if fold.layout.is_heads() == (kind == "heads")]
        for fold in own if kind == "heads" else ():
            part = _heads_of(block, fold, model.structure.groups[block.index], run)
            for matrix, rows in part.beside:
                if not is_apart(block.module, replace(part, beside=((matrix, rows),)), run):
                    return (
                        f"the outputs of {matrix.name} are {_read_by(block, matrix)} over all heads together, so "
                        "removing a head would change the others"
                    )
        if own:
            return None
    return None


def _read_by(block: Block, matrix: Matrix) -> str:
    """Return how all outputs of a matrix are read together: by a vector beside it of the same length, such as a norm's weight."""
    path = matrix.name.rpartition(".")[0]
    holder = block.module.get_submodule(path.removeprefix(block.name).removeprefix("."))
    vectors = (
        name.rpartition(".")[0]
        for name, parameter in holder.named_parameters()
        if parameter.shape == (matrix.shape[0],) and name.rpartition(".")[2] != "bias"
    )
    found = next((name for name in vectors if name), None)
    return "read" if found is None else f"read by {found}"
