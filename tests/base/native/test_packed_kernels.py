"""The native kernels on every instruction set that this processor has, against float64 products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.base.native import build
from coprune.base.native.build import load_kernels
from coprune.base.native.product import NativeMatrix
from coprune.packed.header import read_header
from coprune.packed.operator import native_matrix, pack_matrix, row_starts

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) >= sparsity)).to(dtype)


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NativeMatrix | None:
    blob = pack_matrix(weight)
    if blob is None:
        return None
    header = read_header(blob)
    return native_matrix(blob, row_starts(blob, header), header, bias)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_dense_ones(level: str, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 70), st.integers(1, 300), st.integers(1, 19), st.floats(0, 1), st.booleans(), st.integers(0, 99)
    )
    def check(rows: int, columns: int, batch: int, sparsity: float, with_bias: bool, seed: int) -> None:
        weight = sparse(rows, columns, sparsity, dtype, seed)
        bias = torch.randn(rows).to(dtype) if with_bias else None
        native = prepare(weight, bias)
        if native is None:
            return
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        scale = (x.double().abs() @ weight.double().abs().T).max() + 1
        for y in (native.multiply(x, batch), native.multiply_by_tiles(x, batch)):
            assert y.dtype == dtype
            assert float((y.double() - exact).abs().max() / scale) < tolerance
        dense = torch.full_like(weight, 7)
        native.expand(dense, 0, rows)
        assert torch.equal(dense, weight)

    check()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_behind_the_input_does_not_leak(level: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(8, 70, dtype=dtype)
    weight[:, ::3] = 1.0
    native = prepare(weight)
    assert native is not None
    x = torch.full((1, 200), float("nan"), dtype=dtype)[:, :70]
    x[:] = 1.0
    assert native.multiply(x, 1).tolist() == [[24.0] * 8]
    x[0, 69] = float("inf")  # a kept column
    assert native.multiply(x, 1).tolist() == [[float("inf")] * 8]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_input_that_is_not_finite_shows_where_its_weight_is_pruned(
    level: str, value: float, dtype: torch.dtype
) -> None:
    weight = sparse(9, 200, 0.6, dtype, 0)
    native = prepare(weight)
    assert native is not None
    x = torch.ones(3, 200, dtype=dtype)
    for column in (0, 63, 64, 199):
        broken = x.clone()
        broken[1, column] = value
        expected = torch.nn.functional.linear(broken, weight)
        found = native.multiply(broken, 3)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        assert bool(found[[0, 2]].isfinite().all())


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads: int) -> None:
    weight = sparse(517, 640, 0.6, torch.float32, 0)
    native = prepare(weight)
    assert native is not None
    x = torch.randn(3, 640)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = native.multiply(x, 3)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_threads_come_from_pytorchs_own_runtime() -> None:
    assert build._openmp_parallel() is not None


def test_without_a_compiler_there_are_no_kernels_and_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("COPRUNE_CACHE", str(tmp_path))
    assert load_kernels.__wrapped__() is None
    assert "install g++ or clang++" in caplog.text


def test_a_failing_compiler_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COPRUNE_CACHE", str(tmp_path))
    assert load_kernels.__wrapped__() is None
    assert "no such instruction" in caplog.text


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPRUNE_KERNELS", "0")
    assert load_kernels.__wrapped__() is None
