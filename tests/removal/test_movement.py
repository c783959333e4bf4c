"""Allocation of channels and heads to blocks."""

from __future__ import annotations

import pytest
import torch

from coprune.removal.unit_scores import movement


def test_movement_is_relative_per_token() -> None:
    before = torch.tensor([[3.0, 4.0], [1000.0, 0.0]])
    after = torch.tensor([[3.0, 0.0], [1000.0, 0.0]])
    assert movement(before, after) == pytest.approx((16 / 9 + 0) / 2)
    assert movement(None, None) == movement(before, after[:1]) == 1.0
