"""Views of prunable weights as out × in matrices: the one place that knows how modules store them.

`nn.Linear` stores out × in, `Conv1D` in × out, and a mixture of experts a 3-D parameter with one matrix per expert,
out × in or in × out as transformers' `is_transposed` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coprune.errors import BadInput
from coprune.model.blocks import Block


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


def find_matrices(root: nn.Module, prefix: str = "") -> Iterator[Matrix]:
    """Yield every weight below `root` that can be seen as out × in matrices, in module order."""
    for path, module in root.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if isinstance(module, nn.Linear):
            yield Matrix(name, module, "weight", input_dim=1)
        elif isinstance(module, Conv1D):
            yield Matrix(name, module, "weight", input_dim=0)
        else:
            yield from _find_experts(module, name)


def _find_experts(module: nn.Module, name: str) -> Iterator[Matrix]:
    for attribute, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3 or not parameter.is_floating_point():
            continue
        # Set by transformers on every fused mixture; observation confirms it before anything is changed.
        input_dim = 0 if getattr(module, "is_transposed", False) else 1
        base = Matrix(f"{name}.{attribute}", module, attribute, input_dim)
        for expert in range(parameter.shape[0]):
            yield replace(base, name=f"{base.name}[{expert}]", expert=expert)


def block_matrices(blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[list[Matrix]]:
    """Choose the matrices to prune in every block.

    Patterns are shell-like (`*.q_proj`, `model.layers.0.*`) and match the name, or the name without the expert's
    bracket. Routers (linear layers with one output per expert) are left out unless included by name.
    Raises BadInput for a pattern that matches nothing, or if nothing is left to prune.
    """
    found = [list(find_matrices(block.module, block.name)) for block in blocks]
    names = [matrix.name for matrices in found for matrix in matrices]
    for pattern in [*include, *exclude]:
        if not any(_matches(name, pattern) for name in names):
            raise BadInput(
                f"the pattern {pattern!r} matches none of the {len(names)} matrices; names look like {names[0]!r} "
                "(see them all with: coprune inspect MODEL)."
                if names
                else f"the pattern {pattern!r} matches nothing: the blocks hold no matrices."
            )
    chosen = []
    for matrices in found:
        routers = _router_names(matrices)
        chosen.append(
            [
                m
                for m in matrices
                if (any(_matches(m.name, p) for p in include) if include else m.name not in routers)
                and not any(_matches(m.name, p) for p in exclude)
            ]
        )
    if not any(chosen):
        raise BadInput("no matrix is left to prune: loosen --include or --exclude.")
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition("[")[0], pattern)


def _router_names(matrices: Sequence[Matrix]) -> set[str]:
    """Linear layers of a block of experts that give one value per expert, or one gate value per token."""
    experts = {int(getattr(m.owner, m.attribute).shape[0]) for m in matrices if m.expert is not None}
    if not experts:
        return set()
    return {m.name for m in matrices if m.expert is None and m.shape[0] in experts | {1}}
