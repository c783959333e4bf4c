"""RIA, DSnoT, ADMM and ALPS against plain float64 versions of their papers' formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.walk.statistics import Gram, InputMoments
from coprune.pruning.methods import METHODS, method_named
from coprune.pruning.methods.admm import keep_on_schedule
from coprune.pruning.methods.dsnot import STARTS
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import NM, Target, Unstructured
from support.problems import TARGETS, correlated_layer

SIXTY_PERCENT = Target(Unstructured(), 0.6)


@pytest.fixture(scope="module", params=[0, 1])
def layer(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Gram]:
    return correlated_layer(rows=16, width=64, tokens=1024, seed=request.param)


def largest(score: Tensor, target: Target) -> Tensor:
    """Return the mask of the largest scores: over the matrix, or N of every M."""
    if isinstance(target.pattern, NM):
        grouped = score.reshape(-1, target.pattern.m)
        kept = grouped.topk(target.pattern.n, dim=1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, kept, True).view_as(score)
    order = score.flatten().argsort(descending=True)
    count = score.numel() - int(score.numel() * target.sparsity + 1e-6)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view_as(score)


@pytest.mark.parametrize("target", [*TARGETS, SIXTY_PERCENT], ids=str)
def test_ria_matches_its_paper(layer: tuple[Tensor, Tensor, Gram], target: Target) -> None:
    weight, x, statistic = layer
    size = weight.double().abs()
    score = torch.empty_like(size)
    for i in range(size.shape[0]):
        for j in range(size.shape[1]):
            score[i, j] = (size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()) * x[:, j].square().mean() ** 0.25
    assert torch.equal(METHODS["ria"].prune(weight, statistic, target).keep, largest(score, target))


@pytest.mark.parametrize("target", [*TARGETS, SIXTY_PERCENT], ids=str)
def test_admm_matches_its_paper(layer: tuple[Tensor, Tensor, Gram], target: Target) -> None:
    weight, x, statistic = layer
    norm = x.double().square().mean(dim=0).sqrt()
    gram = x.double().T @ x.double() / len(x)
    scaled = gram / torch.outer(norm, norm) + 0.1 * torch.eye(64)
    dense = weight.double() * norm
    inverse = torch.linalg.inv(scaled + torch.eye(64))
    b, u = dense, torch.zeros_like(dense)
    for done in range(20):
        if done < 15:
            sparsity = target.sparsity * (1 - (1 - (done + 1) / 15) ** 3)
            score = (b + u).abs()
            if isinstance(target.pattern, NM):
                score = score.masked_fill(largest(score, target), torch.inf)
            keep = largest(score, Target(Unstructured(), sparsity))
        z = (b + u) * keep
        u = u + b - z
        b = (dense @ scaled + z - u) @ inverse
    pruned = METHODS["admm"].prune(weight, statistic, target)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, ((b + u) * keep / norm).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", [*TARGETS, SIXTY_PERCENT], ids=str)
def test_alps_matches_its_paper(layer: tuple[Tensor, Tensor, Gram], target: Target) -> None:
    weight, x, statistic = layer
    gram = x.double().T @ x.double() / len(x)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(64)
    norm = gram.diagonal().sqrt()
    scaled = gram / torch.outer(norm, norm)
    dense = weight.double() * norm
    rho, v = 0.1, torch.zeros_like(dense)
    support = seen = largest(dense.abs(), target)
    d = dense * support
    for done in range(1, 301):
        b = (dense @ scaled - v + rho * d) @ torch.linalg.inv(scaled + rho * torch.eye(64))
        support = largest((b + v / rho).abs(), target)
        d = (b + v / rho) * support
        v = v + rho * (b - d)
        if done % 3 == 0:
            change = int((support != seen).sum()) / int(support.sum())
            if change == 0:
                break
            rho *= 1.3 if change >= 0.1 else 1.2 if change >= 0.005 else 1.1
            seen = support
    solved = torch.zeros_like(dense)
    for row, kept in enumerate(support):
        solved[row, kept] = torch.linalg.solve(scaled[kept][:, kept], (scaled @ dense[row])[kept])
    pruned = method_named("alps", {"refit_rounds": 60}).prune(weight, statistic, target)
    assert torch.equal(pruned.keep, support)
    torch.testing.assert_close(pruned.weight, (solved / norm).float(), rtol=1e-2, atol=1e-3)


def test_alps_with_dead_inputs_prunes_what_multiplies_them_first(layer: tuple[Tensor, Tensor, Gram]) -> None:
    weight, x, _ = layer
    x = x.clone()
    x[:, 5:15] = 0
    statistic = Gram(64)
    statistic.update(x)
    pruned = METHODS["alps"].prune(weight, statistic, SIXTY_PERCENT)
    assert not bool(pruned.keep[:, 5:15].any())
    nothing = Gram(64)
    nothing.update(torch.zeros(8, 64))
    pruned = METHODS["alps"].prune(weight, nothing, SIXTY_PERCENT)
    assert int((~pruned.keep).sum()) == int(0.6 * weight.numel())
    assert torch.equal(pruned.keep, METHODS["magnitude"].prune(weight, None, SIXTY_PERCENT).keep)
    torch.testing.assert_close(pruned.weight[pruned.keep], weight[pruned.keep])


def test_alps_reports_an_unsettled_mask(layer: tuple[Tensor, Tensor, Gram]) -> None:
    weight, _, statistic = layer
    pruned = method_named("alps", {"rounds": 3}).prune(weight, statistic, SIXTY_PERCENT)
    assert pruned.events == (Event(kind="mask unsettled", figures={"rounds": 3}),)


@pytest.mark.parametrize("name", ["admm", "alps"])
def test_four_of_eight_is_not_two_of_four(layer: tuple[Tensor, Tensor, Gram], name: str) -> None:
    weight, _, statistic = layer
    keep = METHODS[name].prune(weight, statistic, Target(NM(4, 8), 0.5)).keep
    assert bool((keep.reshape(-1, 8).sum(dim=1) == 4).all())
    assert not bool((keep.reshape(-1, 4).sum(dim=1) == 2).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), progress=st.floats(0.01, 1), nm=st.sampled_from([NM(2, 4), NM(4, 8), NM(1, 4)]))
def test_the_mask_schedule_reaches_the_target_cubically(seed: int, progress: float, nm: NM) -> None:
    score = torch.rand(6, 32, generator=torch.Generator().manual_seed(seed))
    share = 1 - (1 - progress) ** 3
    keep = keep_on_schedule(score, Target(nm, nm.sparsity), progress, "matrix")
    assert int((~keep).sum()) == int(6 * 32 * nm.sparsity * share + 1e-6)
    assert bool(keep[largest(score, Target(nm, nm.sparsity))].all())
    keep = keep_on_schedule(score, SIXTY_PERCENT, progress, "row")
    assert ((~keep).sum(dim=1) == int(32 * 0.6 * share + 1e-6)).all()


def test_at_the_end_the_schedule_is_the_target() -> None:
    score = torch.rand(6, 32, generator=torch.Generator().manual_seed(0))
    for target in [*TARGETS, SIXTY_PERCENT]:
        assert torch.equal(keep_on_schedule(score, target, 1.0, "matrix"), target.keep(score))


def test_more_mask_rounds_than_rounds_are_refused() -> None:
    with pytest.raises(BadInput, match="mask_rounds"):
        method_named("admm", {"rounds": 10})


def dsnot_of_one_row(
    weight: Tensor, keep: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, group: int, cycles: int = 50
) -> Tensor:
    """Run the published loop for one row in plain Python."""
    keep = keep.clone()
    for _ in range(cycles):
        error = float(sum(w * m for w, m, k in zip(weight, mean, keep, strict=True) if not k))
        sign = 1.0 if error > 0 else -1.0
        removable = [j for j in range(len(weight)) if keep[j] and sign * weight[j] * mean[j] < 0]
        groups = {j // group for j in removable}
        regrowable = [i for i in range(len(weight)) if not keep[i] and i // group in groups]
        if not regrowable:
            break
        i = max(regrowable, key=lambda i: sign * weight[i] * mean[i] / variance[i])
        j = min((j for j in removable if j // group == i // group), key=lambda j: abs(weight[j]) * norm[j])
        if abs(error - weight[i] * mean[i] + weight[j] * mean[j]) >= abs(error):
            break
        keep[i], keep[j] = True, False
    return keep


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_dsnot_matches_the_published_loop(layer: tuple[Tensor, Tensor, Gram], target: Target, start: str) -> None:
    weight, x, _ = layer
    x = x + 0.3 * x.std(dim=0)
    statistic = InputMoments(64)
    statistic.update(x)
    begun = STARTS[start].prune(weight, statistic, target).keep
    pruned = method_named("dsnot", {"start": start}).prune(weight, statistic, target)
    mean, variance, norm = x.double().mean(dim=0), x.double().var(dim=0, correction=0), x.square().mean(dim=0).sqrt()
    group = target.pattern.m if isinstance(target.pattern, NM) else 64
    for row in range(len(weight)):
        expected = dsnot_of_one_row(weight[row].double(), begun[row], mean, variance, norm, group)
        assert torch.equal(pruned.keep[row], expected)
    assert torch.equal(pruned.keep.sum(dim=1), begun.sum(dim=1))
    before, after = ((weight.masked_fill(k, 0) @ x.T).mean(dim=1).abs() for k in (begun, pruned.keep))
    assert bool((after <= before + 1e-5).all())
    assert float(after.sum()) < float(before.sum())
