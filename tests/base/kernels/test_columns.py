"""All kernels for SparseGPT's walk over columns give the same results on the same cases."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from coprune.base.errors import BadInput
from coprune.base.kernels.kernel_table import KERNELS, kernel
from coprune.base.native.compilation import load_kernels
from coprune.pruning.methods.sparsegpt import SparseGPT
from support.column_walks import check
from support.triton_scripts import run_interpreted

NAMES = sorted(
    {found.name for (operation, _), some in KERNELS.items() if operation == "walk_columns" for found in some}
)


def test_the_list_of_kernels_is_complete() -> None:
    assert NAMES == ["native", "torch", "triton"]


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_walks_as_published(name: str) -> None:
    if name == "native" and load_kernels() is None:
        pytest.skip("no C++ compiler")
    if name == "triton":
        run_interpreted("from support.column_walks import check; check('triton'); print('checked')")
    else:
        check(name)


def test_native_kernels_of_every_instruction_set_walk_as_published(level: str) -> None:
    check("native")


NOT_SERVED = """
import torch
from coprune.base.kernels import columns_triton
from coprune.base.kernels.columns import ColumnBlock, walk_with_torch
from coprune.base.kernels.kernel_table import kernel
from support.column_walks import check

def block(size, n_of_m):
    torch.manual_seed(size)
    unit = torch.eye(size) + 0.1 * torch.randn(size, size).triu(1)
    errors, keep = torch.empty(size, 5), torch.empty(size, 5, dtype=torch.bool)
    return ColumnBlock(torch.randn(size, 5), keep, errors, unit, torch.ones(size), n_of_m)

walk, launched, own = kernel("walk_columns", torch.device("cpu"), "triton"), [], columns_triton.launch

def noted(block):
    launched.append(block.n_of_m)
    own(block)

columns_triton.launch = noted
for n_of_m, size in (((3, 6), 12), ((16, 32), 64), ((2, 4), 12)):
    wanted, found = block(size, n_of_m), block(size, n_of_m)
    walk_with_torch(wanted)
    walk(found)
    for a, b in zip(wanted[:3], found[:3]):
        torch.testing.assert_close(a, b)
assert launched == [(2, 4)] * 2, launched

# A kernel that gives something else, or that does not compile, is not used.
def fails(block):
    raise OSError("no C compiler")

for broken in (lambda block: None, fails):
    columns_triton.launch = broken
    columns_triton.is_proven.cache_clear()
    assert not columns_triton.is_proven(torch.device("cpu"))
    check("triton")
print("checked")
"""


def test_torch_walks_if_triton_is_unusable() -> None:
    run_interpreted(NOT_SERVED)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_option_says_what_is_missing() -> None:
    with pytest.raises(BadInput, match="pip install triton"):
        SparseGPT(inner_loop="triton")
    with pytest.raises(BadInput, match="kernel 'triton' does not support walk_columns"):
        kernel("walk_columns", torch.device("cpu"), "triton")
