"""The parameters of a block that reconstruction trains: the chosen matrices, norms and biases, and nothing else.

A layer is trained whole or not at all: a bias beside a matrix that is not pruned (a router's, an excluded layer's, a
depth-wise convolution's) is left alone with it. So are vectors that are not norms, such as a recurrence's decay.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coprune.model.blocks import Block
from coprune.model.leftovers import kind_of
from coprune.model.matrices import Matrix


@dataclass(frozen=True)
class Trained:
    """A trained parameter of a block."""

    name: str
    """Path within the block."""
    parameter: nn.Parameter
    entries: Tensor | None
    """Mask of its trainable entries (bool, of its shape); None: all."""


@torch.no_grad()
def sizes_of(trained: Iterable[tuple[Tensor, Tensor | None]]) -> list[float]:
    """Return root mean squares of parameters, to which learning rates are relative; 1 for all-zero parameters.

    trained: parameters, each with the mask of its trainable entries (bool, of its shape; None: all).
    """
    found = []
    for parameter, entries in trained:
        count = parameter.numel() if entries is None else entries.sum().clamp_min(1)
        changing = parameter if entries is None else parameter * entries
        found.append((changing.square().sum() / count).sqrt())
    return [size or 1.0 for size in torch.stack(found).tolist()]


def trained_in(block: Block, chosen: Sequence[Matrix], fixed: Container[str] = ()) -> list[Trained]:
    """Return the trainable parameters of a pruned block.

    Args:
        block: the block; its parameters must be loaded.
        chosen: its chosen matrices, of which nonzero weights are trained.
        fixed: parameters of the model that are not trained.

    Returns:
        The parameters in the order of the block's modules; none if no matrix was chosen.
    """
    matrices: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        matrices.setdefault(matrix.parameter, []).append(matrix)
    found: list[Trained] = []
    for path, module in block.module.named_modules() if matrices else ():
        own = dict(module.named_parameters(recurse=False))
        names = {attribute: ".".join(part for part in (path, attribute) if part) for attribute in own}
        mine = {attribute: matrices.get(f"{block.name}.{name}", []) for attribute, name in names.items()}
        whole = all(mine[attribute] or _is_vector(attribute, parameter) for attribute, parameter in own.items())
        for attribute, parameter in own.items():
            if f"{block.name}.{names[attribute]}" in fixed:
                continue
            if mine[attribute]:
                found.append(Trained(names[attribute], parameter, _kept(parameter, mine[attribute])))
            elif whole and ("bias" in attribute or _is_norm(module)) and parameter.is_floating_point():
                found.append(Trained(names[attribute], parameter, None))
    return found


def names_of(trained: Sequence[Trained]) -> str:
    """Return the names of trained parameters as text: without `.weight`, and once for layers that differ only in a number."""
    return ", ".join(dict.fromkeys(kind_of(one.name.removesuffix(".weight")) for one in trained))


def _is_vector(attribute: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a bias or scale; experts' biases are a table."""
    return parameter.ndim < 2 or "bias" in attribute


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module has only vectors and no submodules."""
    vectors = all(parameter.ndim < 2 for parameter in module.parameters(recurse=False))
    return vectors and next(module.children(), None) is None


def _kept(parameter: nn.Parameter, matrices: Sequence[Matrix]) -> Tensor:
    """Return the mask of a parameter's nonzero entries in its chosen matrices."""
    kept, not_zero = torch.zeros_like(parameter, dtype=torch.bool), parameter.detach() != 0
    for matrix in matrices:
        matrix.part_of(kept).copy_(matrix.part_of(not_zero))
    return kept
