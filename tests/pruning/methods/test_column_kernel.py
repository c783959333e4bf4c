"""SparseGPT's loop over columns as a Triton kernel, against the plain one, in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from coprune.base.errors import BadInput
from coprune.pruning.methods.sparsegpt import SparseGPT
from support.triton_scripts import run_interpreted

SCRIPT = """
import torch
from coprune.base.errors import BadInput
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.recipe.pattern import NM, Target, Unstructured
from coprune.model.walk.statistics import Gram

def gathered(inputs):
    statistic = Gram(inputs.shape[1])
    statistic.update(inputs)
    return statistic

torch.manual_seed(0)
CASES = [
    (Target(Unstructured(), 0.5), 37, 40, 16),  # a last block that is not full
    (Target(NM(2, 4), 0.5), 37, 40, 16),
    (Target(NM(4, 8), 0.5), 70, 32, 16),  # three programs
    (Target(NM(1, 4), 0.75), 5, 24, 24),  # a block that is no power of two
]
for target, rows, width, block_size in CASES:
    inputs = torch.randn(200, width) @ torch.randn(width, width) / width**0.5
    inputs[:, 3] = 0.0  # an input that never fires
    weight = torch.randn(rows, width)
    statistic = gathered(inputs)
    plain = SparseGPT(block_size=block_size).prune(weight, statistic, target)
    kernel = SparseGPT(block_size=block_size, inner_loop="triton").prune(weight, statistic, target)
    assert torch.equal(plain.keep, kernel.keep), target
    assert not kernel.weight[~kernel.keep].any(), target
    torch.testing.assert_close(kernel.weight, plain.weight, rtol=1e-4, atol=1e-5)

# Equal scores: the lower index falls first, as everywhere.
statistic = gathered(torch.eye(8))
tied = SparseGPT(inner_loop="triton", block_size=8).prune(torch.ones(3, 8), statistic, Target(NM(2, 4), 0.5))
assert tied.keep.tolist() == [[False, False, True, True] * 2] * 3, tied.keep

try:
    SparseGPT(inner_loop="triton", block_size=12).prune(torch.randn(4, 12), gathered(torch.randn(50, 12)), Target(NM(3, 6), 0.5))
except BadInput as error:
    assert "power of two" in str(error)
else:
    raise SystemExit("groups of six were taken")
print("checked")
"""


def test_the_kernel_gives_what_the_plain_loop_gives():
    run_interpreted(SCRIPT)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_option_says_what_is_missing():
    with pytest.raises(BadInput, match="pip install triton"):
        SparseGPT(inner_loop="triton")
