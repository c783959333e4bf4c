"""Every kernel for this kind of device, compared with its definition and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.sparse import to_sparse_semi_structured

from coprune.base.devices import kind_of
from coprune.base.kernels.columns import ColumnBlock
from coprune.base.kernels.gram import panels
from coprune.base.kernels.kernel_table import KERNELS, Operation, kernel
from gpu_sections.machine import seconds_of
from gpu_sections.section import Asked, Result, head, row

CHUNK = 128


def compare(asked: Asked) -> Result:
    """Print a row for each kernel; one that is wrong fails the section."""
    device = torch.device(asked.device)
    head(" operation", " kernel", " held against its definition", "ms of a call")
    wrong = total = 0
    for operation, name, check, timed in found(device, asked.tiny):
        total += 1
        try:
            said, took = check(), seconds_of(device, timed) * 1e3
        except Exception as error:
            wrong, said, took = wrong + 1, f"**{type(error).__name__}**: {first_line(error)}", float("nan")
        row(operation, name, said, f"{took:.3f}")
    return not wrong, f"{total - wrong} of {total} kernels are right"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "nothing said").replace("|", "/")[:300]


Kernel = tuple[str, str, Callable[[], str], Callable[[], object]]
"""Operation, name, what compares (it raises, or tells), and what is timed."""


def found(device: torch.device, tiny: bool) -> Iterator[Kernel]:
    """All available kernels."""
    names = {operation: there(operation, device) for operation in ("walk_columns", "add_to_gram", "find_smallest")}
    for name in names["walk_columns"]:
        yield "walk_columns", name, walks(name, device), timed_walk(name, device, 64 if tiny else 4096)
    for name in names["add_to_gram"]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            timed = timed_gram(name, device, dtype, (64, 128) if tiny else (4096, 14336))
            yield f"add_to_gram, {dtype}", name, grams(name, device, dtype), timed
    for name in names["find_smallest"]:
        score = torch.rand(64 if tiny else 4096, 128, device=device)
        yield "find_smallest", name, smallest(name, device), partial(kernel("find_smallest", device, name), score, 64)
    if device.type == "cuda":
        for inputs in (8, 512, 4096):
            for sparse in (False, True):
                timed = timed_linear(device, 128 if tiny else 4096, inputs, sparse)
                yield (
                    f"2:4 product, {inputs} inputs",
                    "semi-structured" if sparse else "dense",
                    two_of_four(device),
                    timed,
                )


def there(operation: Operation, device: torch.device) -> list[str]:
    return [found.name for found in KERNELS[operation, kind_of(device)] if found.there()]


def walks(name: str, device: torch.device) -> Callable[[], str]:
    def check() -> str:
        from support import column_walks

        if name == "triton":
            from coprune.base.kernels.columns_triton import is_proven

            assert is_proven(torch.empty(0, device=device).device), (
                "it fails or differs here, so torch goes on in its place"
            )
        column_walks.check(name, device)
        return f"{len(column_walks.CASES)} cases, as published in float64"

    return check


def timed_walk(name: str, device: torch.device, rows: int) -> Callable[[], object]:
    columns = torch.randn(CHUNK, rows, device=device)
    keep = torch.zeros(CHUNK, rows, dtype=torch.bool, device=device)
    unit = torch.eye(CHUNK, device=device) + torch.randn(CHUNK, CHUNK, device=device).triu(1) * 0.01
    pivots = torch.ones(CHUNK, device=device)
    block = ColumnBlock(columns, keep, torch.empty_like(columns), unit, pivots, (2, 4))
    walk = kernel("walk_columns", device, name)
    return lambda: walk(block)


def grams(name: str, device: torch.device, dtype: torch.dtype) -> Callable[[], str]:
    def check() -> str:
        x = torch.randn(1000, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
        sums, exact = torch.zeros(320, 320, device=device), x.double().T @ x.double()
        kernel("add_to_gram", device, name)(sums, x.to(device), 128)
        kernel("add_to_gram", device, name)(sums, x.to(device), 128)
        worst = 0.0
        for panel in panels(320, 128):
            wanted = 2 * exact[panel, panel.start :]
            worst = max(worst, float((sums.cpu()[panel, panel.start :].double() - wanted).abs().max()))
        # 2000 products of about one, rounded to 24 bits; summed in 16 bits, or multiplied in TF32, they would be off by more.
        assert worst < (0.01 if dtype == torch.float32 else 0.1), f"off by {worst:.3g} of {float(exact.max()) * 2:.0f}"
        return f"off by {worst:.1e} of {float(exact.max()) * 2:.0f}"

    return check


def timed_gram(name: str, device: torch.device, dtype: torch.dtype, size: tuple[int, int]) -> Callable[[], object]:
    tokens, width = size
    add, panel = kernel("add_to_gram", device, name), kernel("panel_size", device)(width)

    def timed() -> None:
        add(sums[0], sums[1], panel)

    sums = (torch.zeros(width, width, device=device), torch.ones(tokens, width, dtype=dtype, device=device))
    return timed


def smallest(name: str, device: torch.device) -> Callable[[], str]:
    def check() -> str:
        score = torch.randint(0, 20, (7, 30), generator=torch.Generator().manual_seed(0)).float()
        for position in (1, 15, 30):
            got = kernel("find_smallest", device, name)(score.to(device), position).cpu()
            assert torch.equal(got, score.sort(dim=1).values[:, position - 1 : position]), position
        return "the same"

    return check


def two_of_four(device: torch.device) -> Callable[[], str]:
    def check() -> str:
        worst = 0.0
        for rows, columns, inputs in ((32, 64, 8), (96, 128, 24), (512, 1024, 104)):
            weight = of_four(rows, columns, device)
            x = torch.randn(inputs, columns, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
            try:
                y = torch.nn.functional.linear(x, to_sparse_semi_structured(weight))
            except RuntimeError as error:
                return f"torch refuses it here: {first_line(error).partition('. ')[0]}"
            wanted = torch.nn.functional.linear(x.double(), weight.double())
            worst = max(worst, float((y.double() - wanted).abs().max() / wanted.abs().max()))
        assert worst < 0.01, f"off by {worst:.3g} of the largest"
        return f"off by {worst:.1e} of the largest"

    return check


def timed_linear(device: torch.device, size: int, inputs: int, sparse: bool) -> Callable[[], object]:
    weight = of_four(size, size, device)
    x = torch.ones(inputs, size, device=device).to(weight)
    return partial(torch.nn.functional.linear, x, to_sparse_semi_structured(weight) if sparse else weight)


def of_four(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A random 2:4 weight in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, columns // 4, 4, generator=generator).argsort(dim=2) < 2
    return (torch.randn(rows, columns, generator=generator) * keep.view(rows, columns)).bfloat16().to(device)
