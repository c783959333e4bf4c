"""A new pattern works with all methods once it is in the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coprune
from coprune.base.errors import BadInput
from coprune.model.matrices import find_matrices
from coprune.pruning.allocation.allocation import Unit, wish, within_budget
from coprune.pruning.methods import METHODS, method_named
from coprune.pruning.refine import refinement_named
from coprune.recipe.pattern import PATTERNS, Target
from support.patterns import Blocks
from support.pico_folder import save_pico, write_words
from support.problems import correlated_layer

SWAPS_SINGLE_WEIGHTS = {"dsnot"}
METHODS_FOR_BLOCKS = [name for name in METHODS if name not in SWAPS_SINGLE_WEIGHTS]


@pytest.mark.parametrize("name", METHODS_FOR_BLOCKS)
@settings(max_examples=10, deadline=None)
@given(sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.8]), seed=st.integers(0, 999), rows=st.integers(1, 12))
def test_methods_keep_or_prune_whole_blocks(name: str, sparsity: float, seed: int, rows: int) -> None:
    weight, _, statistic = correlated_layer(rows, 32, tokens=64, seed=seed)
    before = weight.clone()
    pruned = method_named(name).prune(weight, statistic, Target(Blocks(4), sparsity))
    assert torch.equal(weight, before)
    assert torch.equal(pruned.weight == 0, ~pruned.keep)
    assert Blocks(4).holds(pruned.keep)
    blocks = pruned.keep.numel() // 4
    zeros = int((~pruned.keep).sum()) // 4
    assert zeros in (int(sparsity * blocks + 1e-6), rows * int(sparsity * 8 + 1e-6))


def test_refitting_keeps_the_blocks_and_swapping_refuses_them() -> None:
    weight, _, statistic = correlated_layer(8, 32)
    target = Target(Blocks(4), 0.5)
    pruned = METHODS["wanda"].prune(weight, statistic, target)
    refined = refinement_named("refit").refine(weight, pruned, statistic, target)
    assert torch.equal(refined.keep, pruned.keep)
    refused: tuple[Callable[[], object], ...] = (
        lambda: refinement_named("swaps").refine(weight, pruned, statistic, target),
        lambda: METHODS["dsnot"].prune(weight, statistic, target),
    )
    for prune in refused:
        with pytest.raises(BadInput, match=r"exchange single zeros, which the pattern 1x4"):
            prune()


def test_sparsity_is_allocated_in_whole_blocks() -> None:
    units = [Unit(f"u{i}", f"b{i}", 8, 32, (f"u{i}",)) for i in range(3)]
    wishes = [wish(sparsity, unit) for sparsity, unit in zip((0.3, 0.5, 0.7), units, strict=True)]
    targets = within_budget(units, wishes, Target(Blocks(4), 0.5))
    assert sum(target.sparsity for target in targets) == pytest.approx(1.5)
    assert all(target.sparsity * 8 == int(target.sparsity * 8) for target in targets)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_run_prunes_by_a_new_pattern(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "1xW", Blocks)  # the line in the table
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    result = coprune.prune(
        str(tmp_path / "model"),
        method=method,
        pattern="1x4",
        sparsity=0.5,
        dataset=str(tmp_path / "words.txt"),
        nsamples=4,
        seqlen=32,
        evaluate=False,
        save=tmp_path / "run",
        save_model=tmp_path / "pruned",
        allocation="owl",
    )
    assert result.report.sparsity.matrices == pytest.approx(0.5, abs=1e-3)
    matrices = [m for m in find_matrices(result.model) if m.zeros() > m.shape[0] * m.shape[1] / 10]
    assert len(matrices) == 14
    assert all(Blocks(4).holds(matrix.read() != 0) for matrix in matrices)
    with pytest.raises(BadInput, match="permute"):
        coprune.prune(str(tmp_path / "model"), pattern="1x4", permute=True)
