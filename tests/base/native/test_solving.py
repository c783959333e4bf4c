"""Native code of statistics and SparseGPT against torch, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, inf

from coprune.base.errors import NumericalError
from coprune.base.native import compilation, solving
from coprune.base.native.compilation import load_kernels
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods.base import Pruned
from coprune.pruning.methods.sparsegpt import SparseGPT, inverse_factor_of
from coprune.recipe.pattern import NM, Target, Unstructured
from support.published import published_column_update

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


def gathered(tokens: int, width: int, seed: int = 0) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    statistic = Gram(width)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    statistic.update(torch.randn(tokens, width, generator=generator) @ mixing)
    return statistic


def require_published(pruned: Pruned, weight: Tensor, gram: Tensor, target: Target, block_size: int) -> None:
    """Compare masks and weights with the published procedure in float64, made to drop the same weights.

    If scores are closer than rounding, either may be dropped; so each dropped score has to be the smallest
    up to rounding, given those dropped before it, and then every weight has to agree.
    """
    pattern = target.pattern

    def forced(current: Tensor, pivots: Tensor, columns: slice) -> Tensor:
        keep, scores = pruned.keep[:, columns], (current / pivots).square()
        dim = 1 if isinstance(pattern, NM) else (0, 1)
        largest_fallen, smallest_kept = scores.masked_fill(keep, 0).amax(dim), scores.masked_fill(~keep, inf).amin(dim)
        assert bool((largest_fallen <= smallest_kept * (1 + 1e-5)).all())
        return keep.double()

    counts = (pattern.m - pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)
    expected, dropped = published_column_update(weight, gram, forced, target.sparsity, *counts, block=block_size)
    assert torch.equal(~pruned.keep, dropped)
    assert not bool(pruned.weight[dropped].any())
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-4, atol=2e-5)


@needs_kernels
def test_the_walk_over_columns_is_the_published_one(level: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 75),
        st.integers(1, 20),
        st.sampled_from([NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 6), NM(17, 24), Unstructured()]),
        st.integers(1, 4),
        st.integers(0, 99),
    )
    def check(rows: int, groups: int, pattern: NM | Unstructured, groups_in_block: int, seed: int) -> None:
        m = pattern.m if isinstance(pattern, NM) else 8
        statistic = gathered(4 * m * groups, m * groups, seed)
        weight = torch.randn(rows, m * groups, generator=torch.Generator().manual_seed(seed))
        target = Target(pattern, 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 0.6)
        block_size = m * groups_in_block
        for loop in ("auto", "torch"):
            pruned = SparseGPT(block_size=block_size, inner_loop=loop).prune(weight, statistic, target)
            require_published(pruned, weight, statistic.gram, target, block_size)

    check()


@needs_kernels
@pytest.mark.parametrize("target", [Target(NM(2, 4), 0.5), Target(Unstructured(), 0.5)])
def test_weights_that_overflow_are_an_error(target: Target) -> None:
    with pytest.raises(NumericalError):
        SparseGPT().prune(torch.full((3, 8), 3e38), gathered(64, 8), target)


@needs_kernels
def test_gram_matrices_of_bfloat16_are_exact_up_to_float32(level: str) -> None:
    library = load_kernels()
    assert library is not None
    if library.coprune_gram_scratch(2, 2) == 0:
        pytest.skip("this level has no products of bfloat16")

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 1100), st.integers(1, 300), st.booleans(), st.integers(0, 99))
    def check(tokens: int, width: int, strided: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, width + 3, generator=generator).to(torch.bfloat16)
        x = x[:, 1 : width + 1] if strided else x[:, :width].contiguous()
        statistic = Gram(width)
        for part in (x[: tokens // 2], x[tokens // 2 :]):
            statistic.update(part)
        exact = x.double().T @ x.double() / tokens
        scale = exact.diagonal().max() + 1e-9
        assert float((statistic.gram.double() - exact).abs().max() / scale) < 4e-6
        assert torch.equal(statistic.gram, statistic.gram.T)
        torch.testing.assert_close(statistic.mean.double(), x.double().mean(dim=0), rtol=1e-4, atol=1e-5)

    check()


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    """Only the native code is compared; torch's products and factorisations around it are computed once."""
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(1))
    statistic = gathered(900, 200)
    inverse_factor_of(statistic, SparseGPT().damping)

    def pruned() -> tuple[Tensor, ...]:
        gram = torch.zeros(200, 200)
        solving.add_to_gram(gram, x, 128)
        found = SparseGPT(block_size=200).prune(weight, statistic, Target(NM(2, 4), 0.5))
        return gram, found.keep, found.weight

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = pruned()
    torch.set_num_threads(threads)
    try:
        together = pruned()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_torch_is_used_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "load_kernels", lambda: None)
    x = torch.randn(64, 16).to(torch.bfloat16)
    statistic = Gram(16)
    statistic.update(x)
    torch.testing.assert_close(statistic.gram.double(), x.double().T @ x.double() / 64, rtol=1e-4, atol=1e-5)
    target = Target(NM(2, 4), 0.5)
    weight = torch.randn(5, 16)
    ours, plain = (SparseGPT(inner_loop=loop).prune(weight, statistic, target) for loop in ("auto", "torch"))
    assert torch.equal(ours.weight, plain.weight)
