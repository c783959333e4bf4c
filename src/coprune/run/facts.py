"""Gather a run's report from what the run knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coprune.base.memory import peak_memory
from coprune.data import EvaluationText
from coprune.data.images import LabelledImages
from coprune.evaluation.accuracy import Accuracy
from coprune.evaluation.extras import Beside
from coprune.evaluation.perplexity import Perplexity
from coprune.pruning.pruner import MatrixResult
from coprune.report.examples import accuracy_facts
from coprune.report.schema import (
    AccuracyFacts,
    CalibrationFacts,
    ModelFacts,
    PerplexityFacts,
    Report,
    SparsityFacts,
    installed_versions,
)
from coprune.run.phases import PhaseFacts

if TYPE_CHECKING:
    from coprune.evaluation.tasks import Data, Measured
    from coprune.run.session import Session


def build_report(
    session: Session,
    results: list[MatrixResult],
    dense: dict[str, Measured],
    pruned: dict[str, Measured],
    beside: Beside,
    phases: list[PhaseFacts],
    prune_seconds: float,
    total_seconds: float,
) -> Report:
    """Put together everything that a run measured; dense and pruned by the name of the data."""
    model = session.loaded.model
    return Report(
        recipe=session.recipe,
        model=ModelFacts(
            source=session.loaded.source,
            model_type=model.config.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(session.loaded.device),
            blocks=len(session.blocks),
            block_names=[block.name for block in session.blocks],
            parameters=model.num_parameters(),
            quantised_source=session.loaded.quantised_source,
            task=session.loaded.task,
        ),
        calibration=_calibration(session),
        sparsity=_sparsity(session, results),
        perplexity=[
            _perplexity(session.data[name], name, dense.get(name), found)
            for name, found in pruned.items()
            if isinstance(found, Perplexity)
        ],
        accuracy=[
            _accuracy(session, name, dense.get(name), found)
            for name, found in pruned.items()
            if isinstance(found, Accuracy)
        ],
        left_out=[*session.chosen.left_out, *session.loaded.left_out],
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


def _calibration(session: Session) -> CalibrationFacts | None:
    samples = session.samples
    if samples is None:
        return None
    nsamples, *shape = samples.tokens.shape
    return CalibrationFacts(
        source=samples.source,
        nsamples=nsamples,
        seqlen=shape[0] if len(shape) == 1 else None,
        image_size=(shape[1], shape[2]) if len(shape) == 3 else None,
        seed=session.recipe.seed,
        fingerprint=samples.fingerprint,
    )


def _sparsity(session: Session, results: list[MatrixResult]) -> SparsityFacts:
    """Zeros of the pruned matrices, over their own entries and over all parameters of the model."""
    sizes = [result.shape[0] * result.shape[1] for result in results]
    zeros = sum(round(result.sparsity * size) for result, size in zip(results, sizes, strict=True))
    return SparsityFacts(
        target=session.target.sparsity, matrices=zeros / sum(sizes), model=zeros / session.loaded.model.num_parameters()
    )


def _perplexity(text: Data, name: str, dense: Measured | None, pruned: Perplexity) -> PerplexityFacts:
    assert isinstance(text, EvaluationText)
    return PerplexityFacts(
        data=name,
        source=text.source,
        seqlen=pruned.seqlen,
        windows=pruned.windows,
        fingerprint=text.fingerprint,
        dense=dense.value if isinstance(dense, Perplexity) else None,
        pruned=pruned.value,
        pruned_interval=pruned.interval,
        pruned_bits_per_byte=pruned.bits_per_byte,
    )


def _accuracy(session: Session, name: str, dense: Measured | None, pruned: Accuracy) -> AccuracyFacts:
    images, before = session.data[name], dense if isinstance(dense, Accuracy) else None
    assert isinstance(images, LabelledImages)
    return accuracy_facts(name, images, session.loaded.model.config.id2label, before, pruned)
