"""Accuracy of classifiers, with Wilson's interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.evaluation.measurement import Accuracy

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def rank_classes(logits: Tensor) -> Tensor:
    """Return the five likeliest classes of each image (fewer if there are not as many): B × 5 int64, on the CPU.

    logits: B × classes. Raises NumericalError for NaN.
    """
    if bool(logits.isnan().any()):
        raise NumericalError("the model's output is NaN for some images")
    return logits.to(torch.float32).topk(min(5, logits.shape[-1]), dim=-1).indices.cpu()


def aggregate_accuracy(ranked: Tensor, labels: Tensor) -> Accuracy:
    """Compute the accuracies from every image's ranked classes (N × 5) and label (N)."""
    hits = ranked == labels[:, None]
    first, five, count = int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), len(labels)
    return Accuracy(
        images=count,
        top1=first / count,
        top1_interval=wilson_interval(first, count),
        top5=five / count,
        top5_interval=wilson_interval(five, count),
        labels=tuple(labels.tolist()),
        predicted=tuple(ranked[:, 0].tolist()),
    )


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share hits / count; count is at least 1."""
    share, z2 = hits / count, _Z * _Z
    centre = share + z2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count)), min(1.0, (centre + spread) / (1 + z2 / count))
