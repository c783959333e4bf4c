"""Products from packed weights by the Triton kernel, in Triton's interpreter."""

from __future__ import annotations

from support.triton_scripts import run_interpreted

SCRIPT = """
import torch
from coprune.packed.format import pack_tensor
from coprune.packed.header import read_header
from coprune.packed.matrix import row_starts
from coprune.packed.triton_kernel import multiply
own, launched_at = torch.cuda.device_of, []
torch.cuda.device_of = lambda tensor: (launched_at.append(tensor), own(tensor))[1]
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for rows, columns, batch, sparsity in ((16, 64, 1, 0.5), (37, 96, 2, 0.8), (5, 160, 3, 0.99), (20, 32, 1, 0.3)):
        weight = torch.randn(rows, columns).masked_fill_(torch.rand(rows, columns) < sparsity, 0.0).to(dtype)
        blob = pack_tensor(weight)
        assert blob is not None, (rows, columns)
        header = read_header(blob)
        x = torch.randn(batch, columns).to(dtype)
        y = multiply(blob, header, row_starts(blob, header), x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), rtol=tolerance, atol=tolerance)
        assert launched_at[-1] is x, "the kernel would run on the current GPU"
print("checked")
"""


def test_products_equal_the_dense_ones_in_the_interpreter() -> None:
    run_interpreted(SCRIPT)
