"""Cases for every kernel of `walk_columns`, and the published algorithm's results for them in float64.

Separate from the tests, since Triton's kernel is checked in its interpreter in another process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.kernels.columns import ColumnBlock
from coprune.base.kernels.kernel_table import kernel
from coprune.pruning.linear_algebra import InverseFactor, factor_inverse
from coprune.pruning.methods.sparsegpt import update_columns
from coprune.recipe.pattern import NM, Target, Unstructured

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A matrix to prune by columns. fixed: whether the mask is given instead of chosen on the way."""

    target: Target
    rows: int
    width: int
    block_size: int
    fixed: bool = False
    dead: tuple[int, ...] = (3,)
    """Inputs that are always zero."""


HALF, TWO_OF_FOUR = Target(Unstructured(), 0.5), Target(NM(2, 4), 0.5)
CASES = {
    "unstructured": Case(HALF, 37, 40, 20),
    "unstructured, a last block that is not full": Case(HALF, 37, 40, 16),
    "unstructured, one block": Case(Target(Unstructured(), 0.7), 5, 24, 128),
    "unstructured, blocks of one column": Case(HALF, 7, 10, 1),
    "fixed mask": Case(HALF, 40, 48, 24, fixed=True),
    "fixed mask of groups": Case(TWO_OF_FOUR, 40, 48, 24, fixed=True),
    "2:4": Case(TWO_OF_FOUR, 37, 40, 20),
    "2:4, a last block that is not full": Case(TWO_OF_FOUR, 37, 40, 16),
    "2:4, blocks of one group": Case(TWO_OF_FOUR, 3, 12, 4),
    "4:8, more rows than a program takes": Case(Target(NM(4, 8), 0.5), 70, 32, 16),
    "1:4, a block that is no power of two": Case(Target(NM(1, 4), 0.75), 5, 24, 24),
    "one row": Case(TWO_OF_FOUR, 1, 16, 8),
    "dead inputs at the blocks' edges": Case(TWO_OF_FOUR, 9, 24, 8, dead=(0, 7, 8, 23)),
    "nothing but dead inputs in a block": Case(HALF, 9, 24, 8, dead=tuple(range(8, 16))),
    "nothing to prune": Case(Target(Unstructured(), 0.0), 4, 16, 8),
}


def check(name: str, device: torch.device = CPU) -> None:
    """Compare a kernel with the reference in all cases. Raises AssertionError naming the case."""
    for seed, (title, case) in enumerate(CASES.items()):
        try:
            _check_case(name, case, seed, device)
        except AssertionError as error:
            raise AssertionError(f"{name}, {title}: {error}") from error
    _check_ties(name, device)


def _check_case(name: str, case: Case, seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(case.width, case.width, generator=generator) / case.width**0.5
    inputs = torch.randn(200, case.width, generator=generator) @ mixing
    inputs[:, list(case.dead)] = 0
    weight = torch.randn(case.rows, case.width, generator=generator)
    factor = factor_inverse(inputs.T @ inputs / len(inputs), 0.01)
    upper = (factor.unit * factor.pivots[:, None]).double()
    given = case.target.keep(weight.abs()) if case.fixed else None
    expected, mask = reference(weight.double(), upper, factor.dead, case, given)

    unit, pivots, dead = (tensor.to(device) for tensor in factor[:3])
    fixed = None if given is None else given.to(device)

    def choose(current: Tensor, columns: slice) -> Tensor:
        return fixed[:, columns] if fixed is not None else case.target.keep((current / pivots[columns]) ** 2)

    own = given is None and case.target.pattern.n_of_m is not None
    start, there = weight.to(device, copy=True), InverseFactor(unit, pivots, dead, ())
    pruned = update_columns(start, there, case.target, case.block_size, None if own else choose, name)
    assert torch.equal(start.cpu(), weight), "the weight was modified"
    keep, found = pruned.keep.cpu(), pruned.weight.cpu()
    assert torch.equal(keep, mask), "another mask"
    assert not bool(found[~keep].any()), "a pruned weight is not zero"
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-5)


def reference(weight: Tensor, upper: Tensor, dead: Tensor, case: Case, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run SparseGPT as published, column by column: each error is propagated to all later columns at once.

    weight: O × I float64; upper: I × I float64, the U of the inverse Hessian; given: the mask, or None to choose it.
    """
    if case.target.sparsity > 0:  # at sparsity 0 weights of dead inputs stay, too
        weight = weight.masked_fill(dead, 0.0)
    keep = torch.ones_like(weight, dtype=torch.bool) if given is None else given
    width = weight.shape[1]
    for j in range(width):
        block = j - j % case.block_size
        size = min(case.block_size, width - block)
        together = case.target.pattern.columns_together(size)
        if given is None and (j - block) % together == 0:
            columns = slice(j, j + together)
            keep[:, columns] = case.target.keep((weight[:, columns] / upper.diagonal()[columns]) ** 2)
        becomes = weight[:, j] * keep[:, j]
        error = (weight[:, j] - becomes) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        # Finished columns do not change, up to rounding.
        weight[:, j] = becomes
    return weight.masked_fill(~keep, 0.0), keep


def _check_ties(name: str, device: torch.device) -> None:
    """Check that of equal scores the lower index is pruned first."""
    rows, size = 35, 8
    block = ColumnBlock(
        columns=torch.ones(size, rows, device=device),
        keep=torch.zeros(size, rows, dtype=torch.bool, device=device),
        errors=torch.empty(size, rows, device=device),
        unit=torch.eye(size, device=device),
        pivots=torch.ones(size, device=device),
        n_of_m=(2, 4),
    )
    kernel("walk_columns", device, name)(block)
    expected = torch.tensor([False, False, True, True] * 2)[:, None].expand(size, rows)
    assert torch.equal(block.keep.cpu(), expected), f"{name}: ties"
    assert torch.equal(block.columns.cpu(), expected.float()), f"{name}: weights of ties"
    assert torch.equal(block.errors.cpu(), (~expected).float()), f"{name}: errors of ties"
