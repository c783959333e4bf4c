"""The differences between two outputs that count as rounding."""

from __future__ import annotations

import torch

from coprune.model.folding import close


def test_the_tolerance_grows_with_blocks_but_never_accepts_another_token() -> None:
    dense = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    other = dense.clone()
    other[0, 3] *= 1 + 1.1e-4
    assert not close(other, dense)
    assert close(other, dense, blocks=18)
    other[0, 3] = -dense[0, 3]
    assert not close(other, dense, blocks=1000)


def test_the_tolerance_of_half_precision_does_not_grow_with_blocks() -> None:
    dense = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    assert close(dense * 1.0234375, dense)
    assert not close(dense * 1.0625, dense, blocks=80)
