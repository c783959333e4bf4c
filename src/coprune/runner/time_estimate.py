"""An estimate of a run's time: multiplications counted from shapes, divided by the rate of a short probe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from coprune.base.devices import is_accelerator, synchronize
from coprune.evaluation.answers.questions import plan_of
from coprune.model.loaded_model import Loaded
from coprune.model.matrices import Matrix
from coprune.pruning.pruner import Solver
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import COMPARED_BY_KL, MAP_CANDIDATES, MAP_SPANS, MAP_TOKENS, MIXES, REFIT_TOKENS
from coprune.recipe.train_part import has_teacher

_SIZE, _LEAST_SECONDS = 768, 0.2
_EFFICIENCY = 0.7
"""Share of the probed rate that whole runs reach; like the next two, from the times in benchmarks/results/typed.csv."""
_DECODING = 3.0
"""Time per token of an answer relative to reading it in a batch."""
_OPENING = 10.0
"""Seconds to import, open, verify and report."""


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens that a run reads."""

    calibrated: int
    evaluated: int
    seqlen: int


def seconds_of(
    recipe: Recipe, solver: Solver, tokens: Tokens, loaded: Loaded, blocks: Sequence[Sequence[Matrix]]
) -> float:
    """Estimate the seconds of a run on its idle device, to a factor of two and without zero-shot tasks.

    Args:
        recipe: the settings.
        solver: the resolved method.
        tokens: numbers of tokens that the run reads.
        loaded: the model, with or without weights.
        blocks: the matrices of every block.
    """
    if recipe.train.minutes is not None:
        training, limit = 0.0, 60 * recipe.train.minutes
    else:
        training, limit = _training(recipe, tokens, loaded, blocks), 0.0
    work = training + _walking(recipe, solver, tokens, blocks) + _measuring(recipe, tokens, loaded, blocks)
    work += _choosing(recipe, tokens, loaded, blocks) + _answering(recipe, loaded, blocks)
    return _OPENING + limit + work / (_EFFICIENCY * _rate(loaded.device))


def _walking(recipe: Recipe, solver: Solver, tokens: Tokens, blocks: Sequence[Sequence[Matrix]]) -> float:
    """Return the operations of the walk: the blocks on the calibration tokens, the Gram matrices, and the solves."""
    gram = bool({"channels", "heads"} & {*recipe.remove.kinds}) or (
        solver.statistic is not None and any(len(shape) == 2 for shape in solver.statistic.shapes(8).values())
    )
    reads = bool(recipe.remove.parts) or solver.statistic is not None or recipe.prune.reconstruct.steps > 0
    passes = 2 if recipe.calibrate.propagation == "block" else 1
    work = 2 * passes * tokens.calibrated * _weights(blocks) if reads else 0.0
    if gram:
        for matrix in (one for own in blocks for one in own):
            outputs, inputs = matrix.shape
            if recipe.remove.parts and outputs >= inputs:
                continue  # only matrices that write hidden states lose inputs
            work += _share(matrix) * 2 * tokens.calibrated * inputs**2 / 2 + inputs**3 + 4 * outputs * inputs**2
    steps = recipe.prune.reconstruct.steps
    return work + 3 * 2 * steps * tokens.seqlen * _weights(blocks)


def _choosing(recipe: Recipe, tokens: Tokens, loaded: Loaded, blocks: Sequence[Sequence[Matrix]]) -> float:
    """Return the operations of choosing blocks, solving their maps, and comparing the mixes of a target size."""
    removed = recipe.remove
    if "blocks" not in removed.kinds or removed.score_of("blocks").name == "influence":
        return 0.0
    weights, count, itemsize = _weights(blocks), len(blocks), loaded.model.dtype.itemsize
    gone = removed.most_blocks(count, int(weights / count), loaded.model.num_parameters(), itemsize)
    predicted = 2 * min(COMPARED_BY_KL, tokens.calibrated) * (weights + _head(loaded))
    if not removed.maps_blocks or recipe.output.as_gguf:
        return (count / 2 + 6 * gone) * predicted
    ranked, solved, refit = (min(most, tokens.calibrated) for most in (MAP_TOKENS // 4, MAP_TOKENS, REFIT_TOKENS))
    hidden = min(min(matrix.shape) for own in blocks for matrix in own if own)
    spans = gone * count * (2 * ranked * hidden**2 + 6 * hidden**3)
    passes, tried = 2 * ranked + 2 * solved, MAP_CANDIDATES * MAP_SPANS
    if removed.size is None:
        return spans + 2 * passes * weights + tried * predicted
    refits = sum(_share(m) * m.shape[1] ** 2 * (m.shape[1] + 4 * m.shape[0]) for own in blocks for m in own)
    return spans + 2 * (passes + 3 * refit) * weights + MIXES * (predicted + refits)


def _measuring(recipe: Recipe, tokens: Tokens, loaded: Loaded, blocks: Sequence[Sequence[Matrix]]) -> float:
    if not recipe.evaluate.perplexity:
        return 0.0
    return (1 + recipe.evaluate.dense) * 2 * tokens.evaluated * (_weights(blocks) + _head(loaded))


def _answering(recipe: Recipe, loaded: Loaded, blocks: Sequence[Sequence[Matrix]]) -> float:
    """Return the operations of generating the answers of the dense and the pruned model."""
    plan = plan_of(recipe.evaluate.answers, recipe.output.model is not None)
    if plan is None:
        return 0.0
    answers = len(plan.prompts.texts) * (2 if plan.temperature else 1)
    return 2 * 2 * _DECODING * answers * plan.new_tokens * (_weights(blocks) + _head(loaded))


def _training(recipe: Recipe, tokens: Tokens, loaded: Loaded, blocks: Sequence[Sequence[Matrix]]) -> float:
    asked = recipe.train
    if asked.mode is None:
        return 0.0
    seen = asked.tokens or (asked.max_steps or 0) * (asked.accumulate or 8) * tokens.seqlen
    seen = seen or math.ceil(asked.epochs * tokens.calibrated)
    passes = 6 + 2 * has_teacher(asked.mode)
    return passes * seen * (_weights(blocks) + _head(loaded))


def _head(loaded: Loaded) -> int:
    head = loaded.model.get_output_embeddings()
    return 0 if head is None else math.prod(head.weight.shape)


def _share(matrix: Matrix) -> float:
    """Return the share of tokens that a matrix sees: an eighth for an expert, as in most mixtures."""
    return 1.0 if matrix.expert is None else 1 / 8


def _weights(blocks: Sequence[Sequence[Matrix]]) -> float:
    """Return the number of weights that a token is multiplied with."""
    return sum(_share(matrix) * math.prod(matrix.shape) for own in blocks for matrix in own)


@torch.no_grad()
def _rate(device: torch.device) -> float:
    """Measure an idle device's float32 operations per second, multiplications and additions counted separately."""
    if is_accelerator(device):
        return _rate_by(time.perf_counter, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the time of one thread excludes other processes; that of several includes their waiting
    try:
        return threads * _rate_by(time.thread_time, device)
    finally:
        torch.set_num_threads(threads)


def _rate_by(clock: Callable[[], float], device: torch.device) -> float:
    one = torch.ones(_SIZE, _SIZE, device=device)
    one @ one  # the first product also loads and starts what the others use
    synchronize(device)
    began, done = clock(), 0
    while not done or clock() < began + _LEAST_SECONDS:
        one @ one
        synchronize(device)
        done += 1
    return done * 2 * _SIZE**3 / (clock() - began)
