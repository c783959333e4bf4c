"""The table of kernels: every operation has one for every device, and the best available is used."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from coprune.base.devices import Kind, capability, describe, in_host_memory, kind_of, synchronize
from coprune.base.errors import BadInput
from coprune.base.kernels import kernel_table
from coprune.base.kernels.gram import (
    WIDE_PANEL,
    add_natively,
    add_on_tensor_cores,
    add_with_torch,
    panel_for_devices,
    panels,
)
from coprune.base.kernels.kernel_table import KERNELS, Operation, kernel
from coprune.base.kernels.ranks import by_kth_value, by_partition

CPU = torch.device("cpu")


def test_every_operation_has_a_kernel_without_requirements_on_every_kind_of_device() -> None:
    assert set(KERNELS) == {(operation, kind) for operation in get_args(Operation) for kind in get_args(Kind)}
    for found in KERNELS.values():
        assert any(one.there is kernel_table.always for one in found)
        assert len({one.name for one in found}) == len(found)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda:1", "cuda"), ("mps", "other"), ("meta", "other")])
def test_kind_of_classifies_devices(device: str, kind: str) -> None:
    assert kind_of(torch.device(device)) == kind
    assert in_host_memory(torch.device(device)) == (kind == "cpu")


def test_cpu_needs_no_synchronisation_and_has_no_capability() -> None:
    synchronize(CPU)
    assert capability(CPU) == (0, 0)
    assert describe(CPU) == "cpu"


def test_torch_is_used_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.base.native.compilation.load_kernels", lambda: None)
    for operation in ("walk_columns", "add_to_gram"):
        assert kernel(operation, CPU) is kernel(operation, CPU, "torch")
    with pytest.raises(BadInput, match="kernel 'native' does not support walk_columns"):
        kernel("walk_columns", CPU, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_both_kernels_find_the_smallest_scores(dtype: torch.dtype) -> None:
    score = torch.randint(0, 20, (7, 30), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = score.sort(dim=1).values
    for position in (1, 15, 30):
        for find in (by_partition, by_kth_value):
            assert torch.equal(find(score, position), expected[:, position - 1 : position])


@pytest.mark.parametrize(("rows", "pieces"), [(1, [1]), (2, [1, 1]), (7, [3, 3, 1]), (1000, [334, 334, 332])])
def test_rows_are_shared_among_threads(rows: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, partition = [], np.partition

    def noted(some: np.ndarray, *how: Any, **more: Any) -> np.ndarray:
        seen.append(len(some))
        return partition(some, *how, **more)

    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("numpy.partition", noted)
    score = torch.rand(rows, 2**19 // rows, generator=torch.Generator().manual_seed(2))
    position = score.shape[1] // 2
    assert torch.equal(by_partition(score, position), score.sort(dim=1).values[:, position - 1 : position])
    assert sorted(seen, reverse=True) == pieces


@pytest.mark.parametrize("size", [64, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_and_torch_sums_fill_the_same_triangle(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double().T @ x.double()
    assert [i for panel in panels(300, size) for i in range(300)[panel]] == list(range(300))
    for add in (add_with_torch, add_natively):
        sums = torch.full((300, 300), 7.0)
        add(sums, x, size)
        for panel in panels(300, size):
            right = sums[panel, panel.start :].double() - 7
            torch.testing.assert_close(right, exact[panel, panel.start :], rtol=1e-4, atol=1e-3)
            assert bool((sums[panel.stop :, panel] == 7).all())


@pytest.mark.parametrize("width", [1, 64, WIDE_PANEL, WIDE_PANEL + 1, 14336])
def test_device_panels_are_whole_or_multiples_of_64(width: int) -> None:
    size = panel_for_devices(width)
    assert size >= width or size % 64 == 0
    assert size <= WIDE_PANEL


@pytest.mark.parametrize("size", [128, 300])
def test_tensor_cores_sum_the_same_triangle_as_torch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only CUDA has 16-bit products with float32 results; here they are computed by definition."""

    def product(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return a.to(out_dtype) @ b.to(out_dtype)

    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, wanted = torch.full((300, 300), 7.0), torch.full((300, 300), 7.0)
    monkeypatch.setattr("torch.mm", product)
    add_on_tensor_cores(found, x, size)
    add_with_torch(wanted, x, size)
    torch.testing.assert_close(found, wanted)


def test_torch_has_half_precision_products_with_float32_results() -> None:
    x, sums = (torch.empty(shape, dtype=t, device="meta") for shape, t in (((8, 64), torch.float16), ((64, 64), None)))
    add_on_tensor_cores(sums, x, 64)


def test_float32_inputs_use_float32_products() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    found, wanted = torch.zeros(64, 64), torch.zeros(64, 64)
    add_on_tensor_cores(found, x, 64)
    add_with_torch(wanted, x, 64)
    assert torch.equal(found, wanted)
