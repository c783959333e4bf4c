"""The authors' published procedures, written plainly, one column at a time, as the reference for parity.

There is one deviation: the published thresholds are `metric <= sorted[k]`, which prunes one entry more
than requested (per matrix for magnitude, per block of 128 columns for SparseGPT and its ablations). The oracles below use
`< sorted[k]`; `test_the_published_threshold_prunes_one_more` shows that nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smallest_of_each_group(metric: Tensor, prune_n: int, prune_m: int) -> Tensor:
    drop = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, metric.shape[1], prune_m):
        group = metric[:, start : start + prune_m]
        drop.scatter_(1, start + group.topk(prune_n, dim=1, largest=False).indices, True)
    return drop


def below_global_threshold(metric: Tensor, ratio: float) -> Tensor:
    return metric < metric.flatten().sort().values[int(metric.numel() * ratio)]


def published_magnitude(weight: Tensor, ratio: float, prune_n: int, prune_m: int) -> Tensor:
    if prune_n:
        return smallest_of_each_group(weight.abs(), prune_n, prune_m)
    return below_global_threshold(weight.abs(), ratio)


def published_wanda(
    weight: Tensor, mean_square: Tensor, ratio: float, prune_n: int, prune_m: int, use_variant: bool = False
) -> Tensor:
    metric = weight.abs() * mean_square.sqrt().reshape(1, -1)
    if prune_n:
        return smallest_of_each_group(metric, prune_n, prune_m)
    values, indices = metric.sort(dim=-1, stable=True)
    if not use_variant:
        chosen = indices[:, : int(metric.shape[1] * ratio)]
        return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, chosen, True)

    cumulative = values.cumsum(dim=1)
    total = metric.sum(dim=1)

    def with_alpha(alpha: float) -> tuple[Tensor, Tensor]:
        below = cumulative <= (total * alpha).reshape(-1, 1)
        threshold = values.gather(1, below.sum(dim=1, keepdim=True) - 1)
        mask = metric <= threshold
        return mask, mask.sum() / mask.numel()

    alpha, bounds = 0.4, [0.0, 0.8]
    mask, sparsity = with_alpha(alpha)
    while (sparsity - ratio).abs() > 0.001 and bounds[1] - bounds[0] >= 0.001:
        if sparsity > ratio:
            new, bounds[1] = (alpha + bounds[0]) / 2, alpha
        else:
            new, bounds[0] = (alpha + bounds[1]) / 2, alpha
        alpha = new
        mask, sparsity = with_alpha(alpha)
    return mask


def published_column_update(
    weight: Tensor,
    hessian: Tensor,
    metric_of: Callable[[Tensor, Tensor, slice], Tensor],
    ratio: float,
    prune_n: int,
    prune_m: int,
    fixed: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Run the common loop of SparseGPT.fasterprune and AblateGPT.fasterprune, in float64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dropped = torch.zeros_like(weight, dtype=torch.bool)
    width = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(width)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for i1 in range(0, width, block):
        i2 = min(i1 + block, width)
        w1 = weight[:, i1:i2].clone()
        u1 = upper[i1:i2, i1:i2]
        error = torch.zeros_like(w1)
        drop = torch.zeros_like(w1, dtype=torch.bool)
        if fixed is not None:
            drop = fixed[:, i1:i2]
        elif not prune_n:
            drop = below_global_threshold(metric_of(w1, u1.diagonal(), slice(i1, i2)), ratio)
        for i in range(i2 - i1):
            if prune_n and fixed is None and i % prune_m == 0:
                group = slice(i, i + prune_m)
                metric = metric_of(w1[:, group], u1.diagonal()[group], slice(i1 + i, i1 + i + prune_m))
                drop.scatter_(1, i + metric.topk(prune_n, dim=1, largest=False).indices, True)
            column = w1[:, i]
            left = column.clone()
            left[drop[:, i]] = 0
            error[:, i] = (column - left) / u1[i, i]
            w1[:, i:] -= error[:, i : i + 1] @ u1[i : i + 1, i:]
            w1[:, i] = left
        weight[:, i1:i2] = w1
        weight[:, i2:] -= error @ upper[i1:i2, i2:]
        dropped[:, i1:i2] = drop
    return weight, dropped
