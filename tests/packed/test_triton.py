"""Products from packed weights by the Triton kernel, in Triton's interpreter."""

from __future__ import annotations

from support.triton_scripts import run_interpreted

SCRIPT = """
import torch
from coprune.packed.format import pack_tensor
from coprune.packed.header import read_header
from coprune.packed.operator import row_starts
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

CHOSEN = """
import torch
from coprune.packed import timing
from coprune.packed.linear import PackedLinear
from coprune.packed.operator import on_gpu
from coprune.packed.timing import Timing

torch.manual_seed(0)
linear = torch.nn.Linear(64, 16)
linear.weight.data *= torch.rand(16, 64) < 0.5
packed = PackedLinear.from_linear(linear)
multiplied, own = [], None

def run(x):
    timing.TRIED.clear()
    return on_gpu(x, packed.packed, packed.starts, packed.bias, 64, torch.float32, False)

def timed(kernel, unpacked):
    timing.time_in_turns = lambda calls, repeats: {"candidate": Timing(*[kernel] * 3), "known": Timing(*[unpacked] * 3)}

from coprune.packed import triton_kernel
own = triton_kernel.multiply

def noted(*arguments):
    multiplied.append(arguments)
    return own(*arguments)

triton_kernel.multiply = noted
x = torch.randn(2, 3, 64)
for kernel, unpacked, calls in ((1.0, 2.0, 2), (2.0, 1.0, 1)):  # tried once, and once more where it wins
    timed(kernel, unpacked)
    multiplied.clear()
    torch.testing.assert_close(run(x), linear(x))
    assert len(multiplied) == calls, multiplied
timed(1.0, 2.0)
multiplied.clear()
many = torch.randn(17, 64)
torch.testing.assert_close(run(many), linear(many))
torch.testing.assert_close(run(x.double()), linear.double()(x.double()), atol=1e-5, rtol=1e-5)
assert not multiplied
linear.float()

def wrong(*arguments):
    return own(*arguments) + 1

def fails(*arguments):
    raise OSError("no C compiler")

for broken in (wrong, fails):
    triton_kernel.multiply = broken
    torch.testing.assert_close(run(x), linear(x))
print("checked")
"""


def test_the_kernel_is_used_where_it_wins_and_gives_the_same() -> None:
    run_interpreted(CHOSEN)


def test_products_equal_the_dense_ones_in_the_interpreter() -> None:
    run_interpreted(SCRIPT)
