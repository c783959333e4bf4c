"""The Triton kernels compile to machine code for GPUs, without needing one."""

from __future__ import annotations

from pathlib import Path

from support.triton_scripts import run_script

SCRIPT = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from coprune.base.kernels.columns_triton import _update

def compiled(kernel, pointers, integers, **constants):
    signature = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    for capability in (80, 90):
        result = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert len(result.asm["cubin"]) > 1000

for group, pruned in ((4, 2), (8, 4), (16, 8), (1, 0)):
    pointers = dict.fromkeys(("columns", "left", "unit", "pivots"), "*fp32") | {"keep": "*u8"}
    shape = dict(M=group, PRUNED=pruned, SIZE=128, ROWS=32)
    compiled(_update, pointers, ("rows", "size", "down", "right"), **shape)
print("checked")
"""


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    run_script(SCRIPT, TRITON_CACHE_DIR=str(tmp_path))
