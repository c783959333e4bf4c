"""The estimate of benchmarks/gpu_estimate.py against a computation by hand."""

from __future__ import annotations

import gpu_estimate
import pytest
from gpu_estimate import Machine, Shape, Way, drawn_out, gram_of, passed_by, products_of

SHAPE = Shape(width=4, inner=8, keys=2, blocks=3, samples=4, seqlen=10, batch=2)
# A thousand FLOPs and a hundred bytes per second, ten bytes to the host, one second per launch, two per wait.
SLOW = Machine(1e-9, 1e-9, 1e-9, 1e-7, 1e-8, 1e-8, 1e6, 2e6)
STAGES = {
    f"{method} 2:4: {stage}": {"launch": launch, "sync": sync, "to_device": there, "to_host": back}
    for method, stage, launch, sync, there, back in (
        ("wanda", "a matrix and its report", 10, 1, 0, 1),
        ("wanda", "a matrix and its report, twice as wide", 14, 1, 0, 1),
        ("sparsegpt", "a matrix and its report", 522, 2, 0, 1),
        ("sparsegpt", "a matrix and its report, twice as wide", 1034, 2, 0, 1),
    )
} | {
    "llama wanda 2:4: a block": {"launch": 90, "sync": 5, "to_device": 9, "to_host": 16},
    "llama wanda 2:4, twice as many batches: a block": {"launch": 98, "sync": 5, "to_device": 9, "to_host": 16},
    "llama sparsegpt 2:4: a block": {"launch": 1102, "sync": 9, "to_device": 9, "to_host": 16},
    "llama sparsegpt 2:4, twice as many batches: a block": {"launch": 1110, "sync": 13, "to_device": 9, "to_host": 16},
}


def test_the_work_of_a_block_follows_from_its_shapes() -> None:
    # q and o 4 × 4, k and v 2 × 4, gate and up 8 × 4, down 4 × 8; 40 tokens.
    assert SHAPE.weights == 16 + 16 + 8 + 8 + 32 + 32 + 32
    assert products_of(SHAPE) == 40 * (2 * 144 + 2 * 10 * 4)
    assert passed_by(SHAPE) == 40 * (89 * 4 + 20 * 6 + 10 * 8)
    assert gram_of(40, 8, 8) == 2 * 40 * 64
    assert gram_of(40, 8, 4) == 2 * 40 * (4 * 8 + 4 * 4)
    assert gram_of(40, 10, 4) == 2 * 40 * (4 * 10 + 4 * 6 + 2 * 2)


def test_launch_counts_are_extrapolated_to_other_shapes() -> None:
    # Wanda: 2 launches per batch, 10 per matrix, so 90 − 8 − 70 for the rest; 2 batches.
    asked = drawn_out(Way("", "wanda", STAGES), SHAPE)
    assert asked == (4, 12 + 70, 5, (9 + 16 - 7) / 9)
    # SparseGPT: 2 per column and 10 others, 1 wait per batch; 480 columns were counted, here there are 32.
    asked = drawn_out(Way("", "sparsegpt", STAGES), SHAPE)
    assert asked == (4, 1102 - 8 - 70 - 960 + 70 + 64, 7, 2)
    # With more rows than are ranked at once, each group of four takes 4 more launches.
    tall = Shape(width=4, inner=4097, keys=2, blocks=3, samples=4, seqlen=10, batch=2)
    assert drawn_out(Way("", "sparsegpt", STAGES), tall).solve_launches == 64 + 70 + 2 * (24 + 4097) + 1 * 8
    # Triton's kernel processes 128 columns in 8 launches.
    assert drawn_out(Way("", "sparsegpt", STAGES, triton=True), SHAPE).solve_launches == 64 + 70 + 32 / 16


def test_seconds_match_a_computation_by_hand_for_one_block() -> None:
    found = gpu_estimate.seconds_of_block(Way("", "wanda", STAGES), SHAPE, SLOW)
    assert found == {
        "products": pytest.approx(2 * 14720 / 1000),
        "around them": pytest.approx(2 * 22240 / 100),
        "statistics": pytest.approx(40 * 20 * 18 / 100),
        "solving": pytest.approx(144 * 60 / 100),
        "launching": pytest.approx(86),
        "waits": pytest.approx(10),
        "copies": pytest.approx(57.6),
        # The device is busy for longer than the launches; copies in overlap with it, and copies out are queued.
        "all": pytest.approx(29.44 + 444.8 + 144 + 86.4 + 10 + 28.8),
    }
    found = gpu_estimate.seconds_of_block(Way("", "sparsegpt", STAGES), SHAPE, SLOW)
    updates = 16 * 4 * 2 + 8 * 4 * 2 + 32 * 4 * 2 + 32 * 8
    assert found["statistics"] == pytest.approx(2 * 40 * (3 * 16 + 64) / 1000)
    assert found["solving"] == pytest.approx(86.4 + (3 * 64 + 512) / 1000 + 5 * updates / 1000)
    assert found["all"] == pytest.approx(29.44 + 444.8 + found["statistics"] + 198 + 14 + 28.8)


def test_estimated_times_meet_the_targets() -> None:
    """Under a minute for Wanda 2:4 and under two for SparseGPT 2:4, under the assumptions about the GPU."""
    seconds = {
        way.name: 32 * gpu_estimate.seconds_of_block(way, Shape(), Machine())["all"]
        for way in gpu_estimate.ways(gpu_estimate.counted())
    }
    assert seconds["Wanda 2:4"] < 60
    assert seconds["SparseGPT 2:4"] < 120
