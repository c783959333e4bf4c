"""All kernels for SparseGPT's walk through columns keep one contract: the same cases, the same results."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from coprune.base.errors import BadInput
from coprune.base.kernels.table import KERNELS, kernel
from coprune.base.native.build import load_kernels
from coprune.pruning.methods.sparsegpt import SparseGPT
from support.column_walks import check
from support.triton_scripts import run_interpreted

NAMES = sorted(
    {found.name for (operation, _), some in KERNELS.items() if operation == "walk_columns" for found in some}
)


def test_these_are_all_kernels() -> None:
    assert NAMES == ["native", "torch", "triton"]


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_walks_as_published(name: str) -> None:
    if name == "native" and load_kernels() is None:
        pytest.skip("no C++ compiler")
    if name == "triton":
        run_interpreted("from support.column_walks import check; check('triton'); print('checked')")
    else:
        check(name)


def test_the_native_kernel_of_every_instruction_set_does(level: str) -> None:
    check("native")


REFUSED = """
import torch
from coprune.base.errors import BadInput
from coprune.base.kernels.columns import ColumnBlock
from coprune.base.kernels.table import kernel

block = ColumnBlock(
    torch.ones(6, 2), torch.ones(6, 2, dtype=torch.bool), torch.ones(6, 2), torch.eye(6), torch.ones(6), (3, 6)
)
try:
    kernel("walk_columns", torch.device("cpu"), "triton")(block)
except BadInput as error:
    assert "power of two" in str(error)
    print("checked")
"""


def test_triton_refuses_groups_that_are_no_power_of_two() -> None:
    run_interpreted(REFUSED)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_option_says_what_is_missing() -> None:
    with pytest.raises(BadInput, match="pip install triton"):
        SparseGPT(inner_loop="triton")
    with pytest.raises(BadInput, match="no kernel 'triton' for walk_columns"):
        kernel("walk_columns", torch.device("cpu"), "triton")
