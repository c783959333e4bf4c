"""The zeros of a pruned model: their positions, their patterns, and whether they are still zero.

A checkpoint does not record how it was pruned, so its zeros are the mask. A matrix counts as pruned if more than a small
share of it is zero, since trained weights contain a few zeros by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coprune.base.errors import BadInput, BrokenMask
from coprune.base.words import Command, LeaveOut, Set
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.names import is_below_any
from coprune.model.edit import DropBlock
from coprune.model.edits import Edits, history_of, pruned_names
from coprune.model.leftovers import large_parameters, routers_of
from coprune.model.matrices import LEAST_SPARSITY, Matrix, find_matrices
from coprune.model.matrix_choice import Selection
from coprune.model.removed import AnyRemoval
from coprune.recipe.pattern import Pattern, find_pattern


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned matrix: its view, the parameter that holds it, its zeros and their pattern."""

    matrix: Matrix
    parameter: str
    zeros: int
    sparsity: float
    pattern: Pattern

    @property
    def tied(self) -> bool:
        """Whether another module owns its parameter, such as an embedding tied to the output layer."""
        return self.parameter != _plain_name(self.matrix.parameter)

    def rows_of(self, whole: Tensor) -> Tensor:
        """Return the matrix's part of a tensor shaped like its parameter, as an out × in view."""
        return _rows(self.matrix.part_of(whole), self.matrix)


@dataclass(frozen=True)
class Masks:
    """The masks of a model: its pruned matrices, and per parameter the weights that are pruned."""

    matrices: list[PrunedMatrix]
    pruned: dict[str, Tensor]
    """Parameter name → bool in the stored layout, True where a weight is pruned and has to stay zero. Includes parameters
    outside of `matrices`, such as most routers."""
    whole: list[Matrix] = field(default_factory=list)
    """After a removal: matrices of the blocks without zeros, which are trained as well."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the pruned matrices."""
        sizes = sum(entry.matrix.shape[0] * entry.matrix.shape[1] for entry in self.matrices)
        return sum(entry.zeros for entry in self.matrices) / max(sizes, 1)

    @property
    def patterns(self) -> dict[str, int]:
        """Number of matrices by pattern."""
        counts: dict[str, int] = {}
        for entry in self.matrices:
            counts[str(entry.pattern)] = counts.get(str(entry.pattern), 0) + 1
        return counts

    def fingerprint(self) -> str:
        """Hash the masks: 16 hex digits of SHA-256."""
        digest = hashlib.sha256()
        for name, pruned in sorted(self.pruned.items()):
            digest.update(name.encode())
            digest.update(pruned.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def verify(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise BrokenMask, naming the first matrix, if a pruned weight is not zero or a pattern is violated.

        parameters: by their names in the unwrapped model (see `plain_parameters`).
        """
        for name in self.pruned.keys() - {entry.parameter for entry in self.matrices}:
            lost = int((parameters[name].detach()[self.pruned[name].to(parameters[name].device)] != 0).sum())
            if lost:
                raise BrokenMask(f"{lost} weights of {name} that were zero are not any more", fix="Nothing was saved")
        for entry in self.matrices:
            parameter = parameters[entry.parameter].detach()
            stored = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            pruned = self.pruned[entry.parameter]
            stored, pruned = entry.matrix.part_of(stored), entry.matrix.part_of(pruned)
            kept = stored != 0
            lost = int((kept & pruned.to(kept.device)).sum())
            if lost:
                raise BrokenMask(
                    f"{lost} weights of {entry.matrix.name} that were pruned are not zero any more",
                    fix="Nothing was saved",
                )
            if not entry.pattern.holds(_rows(kept, entry.matrix)):
                raise BrokenMask(f"{entry.matrix.name} is not {entry.pattern} any more", fix="Nothing was saved")


def find_masks(model: nn.Module, named: Container[str] = (), smaller: Sequence[str] = ()) -> Masks:
    """Derive the masks of a pruned model from its zeros.

    Args:
        model: the pruned model.
        named: matrices known to be pruned, however few zeros they have.
        smaller: names of the model's blocks, if parts of it were removed; it may then have no zeros.

    Raises:
        BadInput: the model is dense.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices: list[PrunedMatrix] = []
    whole_matrices: list[Matrix] = []
    pruned: dict[str, Tensor] = {}
    for matrix in find_matrices(model):
        if _is_adapter(matrix.name):
            continue
        stored = matrix.stored()
        zero = stored == 0
        zeros = int(zero.sum())
        if zeros < LEAST_SPARSITY * stored.numel() and not (zeros and matrix.name in named):
            whole_matrices += [matrix] if is_below_any(matrix.name, smaller) else []
            continue
        whole = getattr(matrix.owner, matrix.attribute)
        name = _plain_name(known.get(id(whole), matrix.parameter))
        matrices.append(PrunedMatrix(matrix, name, zeros, zeros / stored.numel(), find_pattern(_rows(~zero, matrix))))
        pruned.setdefault(name, torch.zeros(whole.shape, dtype=torch.bool, device=whole.device))
        matrix.part_of(pruned[name]).copy_(zero)
    for name, parameter in _no_matrices(known, model):
        if name not in pruned and float((zero := parameter.detach() == 0).float().mean()) >= LEAST_SPARSITY:
            pruned[name] = zero
    if not pruned and not whole_matrices:
        raise BadInput(
            "the model is dense: it has no zeros to keep, so there is no mask",
            field="model",
            fix=(
                "prune it first with ",
                Command("prune", "MODEL", Set("save_model", ...)),
                ", and fine-tune the result",
            ),
        )
    return Masks(matrices, pruned, whole_matrices)


def _no_matrices(known: Mapping[int, str], model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield 2-D parameters outside of torch's own layers, such as most routers. known: parameter names by id."""
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for parameter in module.parameters(recurse=False):
                name = known[id(parameter)]
                if parameter.ndim == 2 and parameter.is_floating_point() and not _is_adapter(name):
                    yield _plain_name(name), parameter


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names without the wrappers of adapters, data parallelism and compilation."""
    return {_plain_name(name): p for name, p in model.named_parameters() if not _is_adapter(name)}


def parameters_within(model: nn.Module, blocks: Sequence[str], masks: Masks) -> Iterator[nn.Parameter]:
    """Yield the parameters of the named blocks, and outside of them the pruned parameters and vectors."""
    for name, parameter in model.named_parameters():
        if name in masks.pruned or parameter.ndim < 2 or is_below_any(name, blocks):
            yield parameter


def routers_within(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Parameter]:
    """Yield the parameters of the routers in blocks. Raises BadInput if there are none."""
    names = set[str]()
    for block in blocks:
        names |= routers_of(block, [*find_matrices(block.module, block.name)], large_parameters(block))
    if not names:
        cause = "the model has no mixture of experts, and so no router"
        raise BadInput(cause, field="train", value="routers", fix=LeaveOut("train"))
    for name, parameter in model.named_parameters():
        if is_below_any(name, [*names]):
            yield parameter


def select_parameters(model: nn.Module, globs: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """Yield parameters whose name or module matches a shell-like glob; all parameters if there are no globs.

    Raises BadInput if a glob matches nothing.
    """
    parameters = dict(model.named_parameters())
    for glob in globs:
        if not any(_matches(name, glob) for name in parameters):
            raise BadInput(
                f"the pattern {glob!r} matches no parameter",
                field="train",
                value=glob,
                fix=f"names look like {next(iter(parameters))!r}",
            )
    for name, parameter in parameters.items():
        if not globs or any(_matches(name, glob) for glob in globs):
            yield parameter


def leave_alone(model: nn.Module, blocks: Sequence[Block], globs: tuple[str, ...]) -> set[int]:
    """Find the parameters that are excluded from training.

    Args:
        model: the unwrapped model.
        blocks: its blocks; if all matrices of a block are excluded, so is the rest of it, such as norms.
        globs: patterns as in pruning. A pattern for one of several fused experts excludes all of them.

    Returns:
        Ids of the parameters.

    Raises:
        BadInput: a pattern matches nothing.
    """
    alone: set[int] = set()
    for glob in globs:
        selection = Selection(exclude=(glob,))
        found = {id(m.owner.get_parameter(m.attribute)) for m in find_matrices(model) if selection.against(m.name)}
        found |= {id(parameter) for name, parameter in model.named_parameters() if _matches(name, glob)}
        if not found:
            fix = f"names look like {next(name for name, _ in model.named_parameters())!r}"
            raise BadInput(f"the pattern {glob!r} matches no parameter", field="exclude", value=glob, fix=fix)
        alone |= found
    for block in blocks:
        own = {id(matrix.owner.get_parameter(matrix.attribute)) for matrix in find_matrices(block.module, block.name)}
        if own and own <= alone:
            alone |= set(map(id, block.module.parameters()))
    return alone


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain_name(name: str) -> str:
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.replace(".base_layer", "").replace("._checkpoint_wrapped_module", "")


def _rows(stored: Tensor, matrix: Matrix) -> Tensor:
    """Return a stored weight as out × in; that of a convolution is stored as out × channels × height × width."""
    return stored.flatten(1) if matrix.input_dim == 1 else stored.T


@dataclass(frozen=True)
class History:
    """Edits of a model, as recorded in its folder."""

    steps: Sequence[Edits] = ()
    """Edits, oldest first."""

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read a folder's history, empty if it has none. Raises BadInput if it is damaged."""
        return cls(history_of(folder)[1])

    @property
    def removed(self) -> list[AnyRemoval]:
        """Removed parts; empty for a model that only has zeros."""
        return [removal for edits in self.steps for removal in edits.removals()]

    def counterparts(self, blocks: int, teacher: int, path: str = "") -> list[int] | None:
        """Return the index of the dense model's hidden state to compare with each block's output; 0 is the embeddings.

        The block before removed ones is compared with the output of the last of them.

        Args:
            blocks: number of blocks.
            teacher: number of the dense model's blocks.
            path: of their list, if the model has several.

        Returns:
            The indices, or None if unknown.
        """
        left = list(range(teacher))
        for edits in self.steps if teacher != blocks else ():
            dropped = [edit.block for edit in edits.all() if isinstance(edit, DropBlock)]
            gone = {int(block.rpartition(".")[2]) for block in dropped if block.startswith(path)}
            left = [block for index, block in enumerate(left) if index not in gone]
        return [*left[1:], teacher] if len(left) == blocks else None


def masks_of(model: nn.Module, folder: Path) -> Masks:
    """Return the masks of a folder's model; after a removal, with its unpruned matrices. Raises BadInput."""
    smaller = [block.name for block in find_blocks(model)] if History.read(folder).removed else []
    return find_masks(model, named=pruned_names(folder), smaller=smaller)
