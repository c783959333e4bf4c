"""What passes for rounding between two outputs."""

from __future__ import annotations

import torch

from coprune.model.folding import close


def test_every_block_may_round_but_no_token_may_be_another() -> None:
    dense = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    other = dense.clone()
    other[0, 3] *= 1 + 1.1e-4
    assert not close(other, dense)
    assert close(other, dense, blocks=18)
    other[0, 3] = -dense[0, 3]
    assert not close(other, dense, blocks=1000)


def test_half_precision_is_given_no_more_for_many_blocks() -> None:
    dense = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    assert close(dense * 1.0234375, dense)
    assert not close(dense * 1.0625, dense, blocks=80)
