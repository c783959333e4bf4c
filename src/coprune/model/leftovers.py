"""The tensors of a block that are not pruned (convolutions, tables, routers), with the reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coprune.base.errors import UnsupportedModel
from coprune.base.words import per_cent
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix, why_no_matrix

LEAST_SHARE = 0.5
"""Minimum share of a block's weights in prunable matrices; below it, pruning would hardly change the block."""


@dataclass(frozen=True)
class LargeParameter:
    """A parameter of a block with more than one dimension."""

    path: str
    why: str
    """Why it is not a matrix, if it is not."""
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name in the style of matrices: without `.weight`."""
        return self.path.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Number of entries."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def large_parameters(block: Block) -> list[LargeParameter]:
    """Return all parameters of a block with two or more dimensions except biases, in module order."""
    found = []
    for path, module in block.module.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "bias" not in attribute:
                name = ".".join(part for part in (block.name, path, attribute) if part)
                found.append(LargeParameter(name, _why_no_matrix(module, parameter), tuple(parameter.shape)))
    return found


def _why_no_matrix(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, _ConvNd):
        return why_no_matrix(module) or "a convolution"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if parameter.ndim == 2:
        return "the weight of no linear layer"
    return "a vector" if sum(length > 1 for length in parameter.shape) < 2 else f"{parameter.ndim} dimensions"


def routers_of(
    block: Block, matrices: Sequence[Matrix], parameters: Sequence[LargeParameter], ranked: Collection[int] = ()
) -> set[str]:
    """Return the names of a block's routers: modules with one output per expert, or per token, beside the experts.

    A router is a layer beside the experts, or the last layer of a module beside them. So neither attention nor a shared
    expert counts as one, whatever its width.

    Args:
        block: the block.
        matrices: its matrices. Experts are slices of one parameter, or layers of the modules of a list.
        parameters: all its large parameters.
        ranked: the numbers of values among which its forward took the largest. A router may have more outputs than there are
            experts: some stand for experts that do nothing.
    """
    outputs = {p.name: p.shape[0] for p in parameters if len(p.shape) == 2}
    outputs |= {matrix.name: matrix.shape[0] for matrix in matrices if matrix.expert is None}
    routers = set()
    lists = tuple(f"{place}." for place in lists_of(block))
    widths = {
        m.shape[0] for m in matrices if m.expert is not None or m.name.startswith(lists)
    }  # a shared expert's, too
    for place, experts in _mixtures(block, matrices).items():
        last: dict[str, str] = {}
        for name in outputs:
            if name.startswith(f"{place}.") and not name.startswith(lists):
                last[name.removeprefix(f"{place}.").partition(".")[0]] = name
        routers |= {name for name in last.values() if outputs[name] in {*experts, 1, *set(ranked) - widths}}
    return routers


def _mixtures(block: Block, matrices: Sequence[Matrix]) -> dict[str, set[int]]:
    """Return the modules that hold a mixture, by path, with the number of experts.

    There may be two numbers: if some experts do nothing, not every parameter has an entry for them.
    """
    found: dict[str, set[int]] = {}
    for matrix in matrices:
        if matrix.expert is not None:
            place = _beside_experts(block, matrix)
            found.setdefault(place, set()).add(matrix.stacked)
    for path, experts in lists_of(block).items():
        found.setdefault(path.rpartition(".")[0], {experts})
    return found


def _beside_experts(block: Block, matrix: Matrix) -> str:
    """Return the path of the module that holds the experts and other modules."""
    place, own = matrix.parameter.rpartition(".")[0], matrix.owner
    experts = {id(parameter) for parameter in own.parameters()}
    while place != block.name and (own is matrix.owner or {id(p) for p in own.parameters()} == experts):
        place = place.rpartition(".")[0]
        own = block.module.get_submodule(place.removeprefix(block.name).removeprefix("."))
    return place


def lists_of(block: Block) -> dict[str, int]:
    """Return the lengths of lists whose modules are of one class and all hold linear layers, by path."""
    return {
        f"{block.name}.{path}": len(module)
        for path, module in block.module.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(element) for element in module}) == 1
        and all(any(isinstance(part, nn.Linear) for part in element.modules()) for element in module)
    }


def refuse_mostly_other(found: Sequence[tuple[Block, Collection[str], Collection[str]]]) -> None:
    """Raise UnsupportedModel for a block with less than half of its weights in matrices, not counting biases and norms.

    A block without any matrix (between the stages of a model) is accepted, but half of all blocks' weights together have to be
    in matrices too.

    Args:
        found: for every block, the paths of the parameters that are or hold matrices, and the paths of those that a forward
            does not use, which do not count.
    """
    everything, rest = list[LargeParameter](), list[LargeParameter]()
    for block, matrices, unused in found:
        parameters = [parameter for parameter in large_parameters(block) if parameter.path not in unused]
        others = [parameter for parameter in parameters if parameter.path not in matrices]
        if matrices:
            _require_share(block.name, parameters, others)
        everything += parameters
        rest += others
    _require_share("its blocks", everything, rest)


def _require_share(name: str, parameters: Sequence[LargeParameter], others: Sequence[LargeParameter]) -> None:
    """Raise UnsupportedModel if too little can be pruned. others: parameters without prunable matrices."""
    size, rest = sum(p.size for p in parameters), sum(p.size for p in others)
    if size - rest >= LEAST_SHARE * size:
        return
    largest = max(others, key=lambda parameter: parameter.size)
    shape = " × ".join(map(str, largest.shape))
    share = per_cent(1 - rest / size, 0)
    raise UnsupportedModel(
        f"only {share} of the weights of {name} are in matrices that can be pruned; most of the others are "
        f"in {largest.name} ({shape}; {largest.why})"
    )


@dataclass(frozen=True)
class LeftOut:
    """Layers that are left alone for the same reason and whose names differ only in numbers."""

    kind: str
    why: str
    layers: int

    def __str__(self) -> str:
        return f"{self.kind} ({self.why}; {self.layers} layer{'s' if self.layers > 1 else ''})"


@dataclass(frozen=True)
class NotLoaded:
    """Tensors of a checkpoint that the model does not load and that are saved unchanged."""

    kind: str
    tensors: int

    def __str__(self) -> str:
        count = f" ({self.tensors:,})" if self.tensors > 1 else ""
        return f"{self.kind}{count}, which the model does not load"


def left_out(alone: Sequence[tuple[str, str]]) -> list[LeftOut]:
    """Group names with their reasons by kind, in order of first occurrence."""
    layers = dict.fromkeys((re.sub(r"\[\d+\]", "[*]", name), why) for name, why in alone)
    counts = Counter((kind_of(name), why) for name, why in layers)
    return [LeftOut(kind, why, count) for (kind, why), count in counts.items()]


def kind_of(name: str) -> str:
    """Return a name without its numbers: `model.layers.*.mlp.experts.down_proj[*]`."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"\.\d+(?=[.\[]|$)", ".*", name))
