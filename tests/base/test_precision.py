from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.base.errors import NumericalError
from coprune.base.precision import full_float32, held_in_bfloat16, total


def test_precision_is_put_back() -> None:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_float32():
            assert backend.fp32_precision == "ieee"
            assert not torch.is_grad_enabled()
        assert backend.fp32_precision == "tf32"
        with pytest.raises(NumericalError), full_float32():
            raise NumericalError("no")
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@given(rows=st.integers(0, 40), width=st.integers(0, 40_000), scale=st.floats(1e-3, 1e6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_total_sums_in_float64(rows: int, width: int, scale: float, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(2 * rows, width, generator=drawn)[::2]  # rows that do not lie side by side
    exact, found = values.double(), total(values)
    assert found.dtype == torch.float64
    assert abs(float(found - exact.sum())) <= 1e-13 * float(exact.abs().sum())


def test_parameters_in_bfloat16_come_back_unrounded() -> None:
    norm = torch.nn.BatchNorm1d(3)  # with buffers, of which one counts
    one = torch.nn.init.normal_(norm.weight).data.clone()
    with held_in_bfloat16(norm):
        assert norm.weight.dtype == norm.bias.dtype == torch.bfloat16
        assert norm.running_mean is not None
        assert norm.running_mean.dtype == torch.float32
    assert torch.equal(norm.weight, one)
