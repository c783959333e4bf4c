from __future__ import annotations

import pytest
import torch

from coprune.base.errors import NumericalError
from coprune.base.precision import full_float32


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
