"""Gather a run's report from what the run knows."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch

from coprune.evaluate.beside import Beside
from coprune.evaluate.perplexity import Perplexity
from coprune.pruning import MatrixResult
from coprune.report.phases import PhaseFacts
from coprune.report.schema import (
    CalibrationFacts,
    ModelFacts,
    PerplexityFacts,
    Report,
    SparsityFacts,
    installed_versions,
)

if TYPE_CHECKING:
    from coprune.run import Session


def build_report(
    session: Session,
    results: list[MatrixResult],
    dense: dict[str, Perplexity],
    pruned: dict[str, Perplexity],
    beside: Beside,
    phases: list[PhaseFacts],
    prune_seconds: float,
    total_seconds: float,
) -> Report:
    """Put together everything that a run measured; dense and pruned by the name of the text."""
    model = session.loaded.model
    return Report(
        recipe=session.recipe,
        model=ModelFacts(
            source=session.loaded.source,
            model_type=model.config.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(session.loaded.device),
            blocks=len(session.blocks),
            parameters=model.num_parameters(),
            quantised_source=session.loaded.quantised_source,
        ),
        calibration=_calibration(session),
        sparsity=_sparsity(session, results),
        perplexity=[_perplexity(session, name, dense.get(name), pruned[name]) for name in session.texts],
        prune_seconds=prune_seconds,
        total_seconds=total_seconds,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        versions=installed_versions(),
        events=[f"{result.name}: {event}" for result in results for event in result.events],
        matrices=results,
        saved_model=session.recipe.save_model,
        zero_shot=beside.zero_shot_facts(),
        sample=beside.sample(),
        phases=phases,
    )


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _calibration(session: Session) -> CalibrationFacts | None:
    windows = session.windows
    if windows is None:
        return None
    nsamples, seqlen = windows.tokens.shape
    return CalibrationFacts(
        source=windows.source,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=session.recipe.seed,
        fingerprint=windows.fingerprint,
    )


def _sparsity(session: Session, results: list[MatrixResult]) -> SparsityFacts:
    """Zeros of the pruned matrices, over their own entries and over all parameters of the model."""
    sizes = [result.shape[0] * result.shape[1] for result in results]
    zeros = sum(round(result.sparsity * size) for result, size in zip(results, sizes, strict=True))
    return SparsityFacts(
        target=session.target.sparsity, matrices=zeros / sum(sizes), model=zeros / session.loaded.model.num_parameters()
    )


def _perplexity(session: Session, name: str, dense: Perplexity | None, pruned: Perplexity) -> PerplexityFacts:
    return PerplexityFacts(
        data=name,
        source=session.texts[name].source,
        seqlen=pruned.seqlen,
        windows=pruned.windows,
        fingerprint=session.texts[name].fingerprint,
        dense=None if dense is None else dense.value,
        pruned=pruned.value,
        pruned_interval=pruned.interval,
        pruned_bits_per_byte=pruned.bits_per_byte,
    )
