"""Differences between two models measured in the same way.

Differences are paired if both models answered the same items of a task, windows of a text, or images. Perplexities compare
as ratios, whose logarithm is a mean of differences over windows.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.evaluation.batches import bootstrap_interval
from coprune.evaluation.evaluation import Evaluation
from coprune.evaluation.measurement import Accuracy, Interval, Perplexity
from coprune.evaluation.zero_shot import ZeroShotFacts, compare_zero_shot


class PerplexityChange(BaseModel):
    """A perplexity against the baseline's on the same text."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    data: str
    difference: float | None
    """Difference from the baseline; None if their tokens differ."""
    ratio: float | None
    """Ratio to the baseline; None if their tokens differ."""
    ratio_interval: Interval | None
    """95 % bootstrap interval over pairs of windows."""
    bits_per_byte_difference: float | None


class AccuracyChange(BaseModel):
    """A classifier's accuracy against the baseline's on the same images."""

    model_config = ConfigDict(frozen=True)

    data: str
    top1_difference: float
    """Difference from the baseline."""
    top1_interval: Interval | None
    """95 % bootstrap interval of the difference over the images."""
    top5_difference: float
    agreement: float | None
    """Share of images with the same predicted class; None if the models number classes differently."""


class Row(BaseModel):
    """One model of a comparison, and its differences from the baseline (None for the baseline)."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Name as requested."""
    evaluation: Evaluation
    bytes_ratio: float | None
    perplexity_changes: tuple[PerplexityChange, ...] | None
    accuracy_changes: tuple[AccuracyChange, ...] | None
    zero_shot: ZeroShotFacts | None


def row(name: str, evaluation: Evaluation, baseline: Evaluation | None) -> Row:
    """Compare an evaluation with the baseline's. Raises BadInput if tasks or items differ."""
    if baseline is None:
        facts = None if evaluation.zero_shot is None else compare_zero_shot(None, evaluation.zero_shot)
        return Row(
            name=name,
            evaluation=evaluation,
            bytes_ratio=None,
            perplexity_changes=None,
            accuracy_changes=None,
            zero_shot=facts,
        )
    changes = zip(baseline.perplexity, evaluation.perplexity, strict=True)
    accuracies = zip(baseline.accuracy, evaluation.accuracy, strict=True)
    return Row(
        name=name,
        evaluation=evaluation,
        bytes_ratio=evaluation.weights.bytes_on_disk / baseline.weights.bytes_on_disk,
        perplexity_changes=tuple(perplexity_change(before, after) for before, after in changes),
        accuracy_changes=tuple(accuracy_change(before, after) for before, after in accuracies),
        zero_shot=None if evaluation.zero_shot is None else compare_zero_shot(baseline.zero_shot, evaluation.zero_shot),
    )


def perplexity_change(before: Perplexity, after: Perplexity) -> PerplexityChange:
    """Compare two perplexities on one text: by window if both models saw the same tokens, otherwise only per byte."""
    bits = None
    if before.bits_per_byte is not None and after.bits_per_byte is not None:
        bits = after.bits_per_byte - before.bits_per_byte
    same = before.fingerprint == after.fingerprint and before.seqlen == after.seqlen
    if not same:
        return PerplexityChange(
            data=after.data, difference=None, ratio=None, ratio_interval=None, bits_per_byte_difference=bits
        )
    logs = after.losses() - before.losses()
    interval = bootstrap_interval(logs)
    return PerplexityChange(
        data=after.data,
        difference=after.value - before.value,
        ratio=_exp(float(logs.mean())),
        ratio_interval=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        bits_per_byte_difference=bits,
    )


def accuracy_change(before: Accuracy, after: Accuracy) -> AccuracyChange:
    """Compare two accuracies image by image. Raises BadInput if the numbers of images differ."""
    if before.images != after.images:
        raise BadInput(f"{after.data} had {before.images} images and then {after.images}", fix="measure both again")
    first, second = (torch.tensor([found.labels, found.predicted]) for found in (before, after))
    gained = (second[0] == second[1]).to(torch.float64) - (first[0] == first[1]).to(torch.float64)
    same = float((first[1] == second[1]).to(torch.float64).mean()) if torch.equal(first[0], second[0]) else None
    return AccuracyChange(
        data=after.data,
        top1_difference=float(gained.mean()),
        top1_interval=bootstrap_interval(gained),
        top5_difference=after.top5 - before.top5,
        agreement=same,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
