"""Views of prunable weights as out × in matrices: the one place that knows how modules store them.

`nn.Linear` stores out × in, `Conv1D` in × out, a convolution out × channels × height × width of its kernel, and a
mixture of experts a 3-D parameter with one matrix per expert, out × in or in × out as transformers says of each
mixture. A convolution is a matrix where no two of its positions overlap: 1 × 1, or cutting the image into patches (the
stride is the kernel). Its inputs are then a patch's values, channel by channel.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from coprune.base.errors import BadInput
from coprune.base.words import Command, Setting
from coprune.model.blocks import Block
from coprune.model.transformers_private import Conv1D, input_first


@dataclass(frozen=True)
class Matrix:
    """One prunable weight: where it lives and how it is stored. Parameters are looked up when used, since a
    streamed block gets new ones each time that it is loaded."""

    name: str
    """Path of the parameter without `.weight`; an expert's number in brackets: `…mlp.experts.down_proj[3]`."""
    owner: nn.Module
    attribute: str
    input_dim: int
    """Which dimension of the stored 2-D weight runs over the inputs: 1 for out × in, 0 for in × out."""
    expert: int | None = None

    def stored(self) -> Tensor:
        """The 2-D weight as it is stored, a view of the parameter."""
        parameter: Tensor = getattr(self.owner, self.attribute).detach()
        if parameter.ndim == 4:
            return parameter.view(parameter.shape[0], -1)
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        stored = self.stored()
        return stored.shape[1 - self.input_dim], stored.shape[self.input_dim]

    def read(self) -> Tensor:
        """The weight as out × in float32, a copy."""
        stored = self.stored()
        view = stored if self.input_dim == 1 else stored.T
        return view.to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Put an out × in weight in place, rounded to the model's dtype; zeros stay zeros."""
        stored = self.stored()
        with torch.no_grad():
            stored.copy_(weight if self.input_dim == 1 else weight.T)

    def zeros(self) -> int:
        """Number of entries that are exactly zero."""
        stored = self.stored()
        return stored.numel() - int(torch.count_nonzero(stored))

    def mask_checksum(self) -> str:
        """CRC-32 of where the zeros are, 8 hex digits."""
        return f"{zlib.crc32(np.packbits((self.stored() != 0).cpu().numpy()).tobytes()):08x}"


def find_matrices(root: nn.Module, prefix: str = "") -> Iterator[Matrix]:
    """Yield every weight below `root` that can be seen as out × in matrices, in module order."""
    for path, module in root.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if isinstance(module, nn.Linear):
            yield Matrix(name, module, "weight", input_dim=1)
        elif isinstance(module, Conv1D):
            yield Matrix(name, module, "weight", input_dim=0)
        elif isinstance(module, nn.Conv2d):
            if why_no_matrix(module) is None:
                yield Matrix(name, module, "weight", input_dim=1)
        else:
            yield from _find_experts(module, name)


def find_unprunable(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every convolution below `root` that is no matrix: its name, and the reason."""
    for path, module in root.named_modules():
        reason = why_no_matrix(module) if isinstance(module, nn.Conv2d) else None
        if reason is not None:
            yield ".".join(part for part in (prefix, path) if part), reason


def _kinds(unprunable: Iterable[tuple[str, str]]) -> list[str]:
    kinds = Counter((re.sub(r"\.\d+(?=\.|$)", ".*", name), why) for name, why in unprunable)
    return [f"{kind} ({why}; {count} layers)" for (kind, why), count in kinds.items()]


def why_no_matrix(convolution: nn.Conv2d) -> str | None:
    """Why a convolution cannot be seen as one matrix; None if it can."""
    kernel, stride = tuple(convolution.kernel_size), tuple(convolution.stride)
    if convolution.groups > 1:
        return "depth-wise" if convolution.groups == convolution.in_channels else "a grouped convolution"
    if convolution.padding not in ("valid", (0, 0)) and kernel != (1, 1):
        return "a convolution with padding"
    if kernel not in ((1, 1), stride) or tuple(convolution.dilation) != (1, 1):
        return "a convolution whose positions overlap"
    return None


def _find_experts(module: nn.Module, name: str) -> Iterator[Matrix]:
    for attribute, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3 or not parameter.is_floating_point():
            continue
        # Set by transformers on every fused mixture; observation confirms it before anything is changed.
        input_dim = 0 if input_first(module) else 1
        base = Matrix(f"{name}.{attribute}", module, attribute, input_dim)
        for expert in range(parameter.shape[0]):
            yield replace(base, name=f"{base.name}[{expert}]", expert=expert)


@dataclass(frozen=True)
class Chosen:
    """The matrices to prune: those of every block, and those outside the blocks (lm_head) that were named."""

    blocks: list[list[Matrix]]
    outside: list[Matrix]
    left_out: list[str] = field(default_factory=list)
    """Layers in the blocks that are no matrices, one line for those that differ in the numbers in their names only."""

    def all(self) -> Iterator[Matrix]:
        """Every chosen matrix, in the order of the model."""
        for matrices in self.blocks:
            yield from matrices
        yield from self.outside


def choose_matrices(
    model: nn.Module, blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Chosen:
    """Choose the matrices to prune.

    Patterns are shell-like (`*.q_proj`, `model.layers.0.*`) and match the name, or the name without an expert's
    bracket. Without patterns: everything in the blocks but routers (linear layers with one output per expert).
    Routers and what lies outside the blocks are pruned only if an include pattern spells out the end of their name.
    Raises BadInput for a pattern that matches nothing, if nothing is left, or for a head tied to the embeddings.
    """
    found = [list(find_matrices(block.module, block.name)) for block in blocks]
    inside = {matrix.name for matrices in found for matrix in matrices}
    rest = [matrix for matrix in find_matrices(model) if matrix.name not in inside]
    names = [*sorted(inside), *(matrix.name for matrix in rest)]
    _check_patterns("include", include, names)
    _check_patterns("exclude", exclude, names)

    def wanted(matrix: Matrix, special: bool) -> bool:
        hits = [pattern for pattern in include if _matches(matrix.name, pattern)]
        named = any(matrix.name.endswith(pattern.rpartition("*")[2] or "\n") for pattern in hits)
        return (named if special else bool(hits) or not include) and not any(_matches(matrix.name, p) for p in exclude)

    routers = [_router_names(matrices) for matrices in found]
    chosen = Chosen(
        [[m for m in matrices if wanted(m, m.name in own)] for matrices, own in zip(found, routers, strict=True)],
        [m for m in rest if wanted(m, special=True)],
        _kinds(unprunable for block in blocks for unprunable in find_unprunable(block.module, block.name)),
    )
    for matrix in chosen.outside:
        if any(
            m.weight is getattr(matrix.owner, matrix.attribute) for m in model.modules() if isinstance(m, nn.Embedding)
        ):
            raise BadInput(
                f"{matrix.name} shares its weights with the embeddings, which pruning it would change too",
                field="include",
                value=tuple(include),
            )
    if not any(True for _ in chosen.all()):
        loosen = ("loosen ", Setting("include"), " or ", Setting("exclude"))
        raise BadInput("no matrix is left to prune", field="exclude", value=tuple(exclude), fix=loosen)
    return chosen


def _check_patterns(field: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise BadInput(
                f"the pattern {pattern!r} matches none of the {len(names)} matrices",
                field=field,
                value=pattern,
                fix=(f"names look like {names[0]!r}, and ", Command("inspect", "MODEL"), " lists them all"),
            )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition("[")[0], pattern)


def _router_names(matrices: Sequence[Matrix]) -> set[str]:
    """Linear layers of a block of experts that give one value per expert, or one gate value per token."""
    experts = {int(getattr(m.owner, m.attribute).shape[0]) for m in matrices if m.expert is not None}
    if not experts:
        return set()
    return {m.name for m in matrices if m.expert is None and m.shape[0] in experts | {1}}
