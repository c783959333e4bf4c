"""The number of kept experts: near the requested one, and supported by servers of mixtures."""

from __future__ import annotations

import pytest

from coprune.removal.expert_choice import SERVED, count_left


@pytest.mark.parametrize("count", [17, 24, 32, 60, 64, 128, 160, 256, 384, 512])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
def test_a_share_keeps_a_near_number_that_is_served_or_divides_well(count: int, share: float) -> None:
    kept, step = count_left(count, share), min(8, 1 << (count // 8).bit_length() - 1)
    assert 0 < kept < count
    assert kept in SERVED or kept % step == 0
    wanted = count * (1 - share)
    assert abs(kept - wanted) <= max(step, 0.1 * share * count)


@pytest.mark.parametrize(
    ("count", "share", "groups", "kept"),
    [
        (128, 0.1, 1, 112),
        (512, 0.4, 1, 320),  # served, although a multiple of 8 would be slightly nearer
        (256, 0.5, 8, 128),
        (60, 0.25, 1, 44),
        (16, 0.2, 1, 13),  # with few experts, any number
        (16, 0.2, 4, 12),
        (24, 0.3, 3, 18),  # equal in every group, and even
        (8, 0.01, 1, 8),
    ],
)
def test_expert_counts_suit_servers_of_mixtures(count: int, share: float, groups: int, kept: int) -> None:
    assert count_left(count, share, groups) == kept
