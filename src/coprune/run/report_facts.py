"""The report of a run, built from what the run has found."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from typing import Any

from coprune.base.devices import device_memory
from coprune.base.memory import peak_memory
from coprune.data.images import LabelledImages
from coprune.data.labelled_text import LabelledTexts
from coprune.evaluation.answers.answer_facts import judge
from coprune.evaluation.embeddings import embedding_change
from coprune.evaluation.measurement import Accuracy, Embedded, Measured, Perplexity, Transcribed
from coprune.evaluation.required import judge_measured
from coprune.evaluation.transcripts import transcript_change
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.load import loaded_by_auto
from coprune.model.checkpoint.locate import locate
from coprune.model.edit import Configure
from coprune.pruning.pruner import MatrixResult
from coprune.report.figures import AccuracyFacts, ChangedPrediction, PerplexityFacts
from coprune.report.provenance import MadeFacts
from coprune.report.run_events import OfMatrix
from coprune.report.schema import (
    CalibrationFacts,
    ModelFacts,
    Report,
    SparsityFacts,
    installed_versions,
)
from coprune.run.context import Outcome, Run


def build_report(run: Run) -> Report:
    """Build the report of a run."""
    model, extras, outcome = run.model, run.extras, run.outcome
    edits, measured, results = outcome.edits, run.pruned.items(), _placed(outcome)
    cut = next((edit for edit in edits.all() if isinstance(edit, Configure)), None)
    asked = run.recipe.evaluate.answers
    report = Report(
        recipe=run.recipe,
        model=_model(run),
        calibration=_calibration(run),
        sparsity=_sparsity(run, results),
        perplexity=[
            PerplexityFacts.of(before if isinstance(before := run.dense.get(name), Perplexity) else None, one)
            for name, one in measured
            if isinstance(one, Perplexity)
        ],
        accuracy=[_accuracy(run, run.dense.get(name), one) for name, one in measured if isinstance(one, Accuracy)],
        embeddings=[
            embedding_change(before, one)
            for name, one in measured
            if isinstance(one, Embedded) and isinstance(before := run.dense.get(name), Embedded)
        ],
        transcripts=[
            transcript_change(before, one)
            for name, one in measured
            if isinstance(one, Transcribed) and isinstance(before := run.dense.get(name), Transcribed)
        ],
        bos=run.bos,
        left_out=[*model.chosen.left_out, *run.loaded.left_out],
        prune_seconds=outcome.seconds,
        total_seconds=time.perf_counter() - run.began,
        earlier_seconds=outcome.earlier,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=None if (there := device_memory(run.loaded.device)) is None else there.peak,
        versions=installed_versions(),
        events=[
            *outcome.events,
            *(OfMatrix(matrix=result.name, event=event) for result in results for event in result.events),
        ],
        trainings=list(outcome.trainings),
        matrices=results,
        edits=edits.removals(),
        left=None if cut is None else cut.parameters,
        padding=0 if cut is None else cut.padding,
        covered=dict(outcome.covered),
        saved_model=run.recipe.output.model,
        zero_shot=extras.zero_shot_facts(),
        sample=extras.sample(),
        answers=(answers := extras.look.facts()),
        no_answers=extras.look.left_out,
        required=judge(asked.conditions, answers),
        phases=run.phases,
        made=MadeFacts.here(),
    )
    measurements = judge_measured(asked.measured, report.figures())
    return report.model_copy(update={"required": (*report.required, *measurements)})


def report_without_walk(run: Run, model: ModelFacts, **more: Any) -> Report:
    """Return the report of a step without a walk over blocks. more: further fields."""
    seconds = time.perf_counter() - run.began
    found: dict[str, Any] = {
        "calibration": None,
        "sparsity": SparsityFacts(target=0.0, matrices=0.0, model=0.0),
        "perplexity": [],
        "prune_seconds": seconds,
        "total_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": None,
        "versions": installed_versions(),
        "events": [],
        "matrices": [],
        "saved_model": run.recipe.output.model,
        "made": MadeFacts.here(),
    }
    return Report(recipe=run.recipe, model=model, **found | more)


def _placed(outcome: Outcome) -> list[MatrixResult]:
    """Return the remaining matrices under their names in the saved model."""
    named = [(outcome.edits.place(result.name), result) for result in outcome.results]
    return [
        result if name == result.name else result.model_copy(update={"name": name})
        for name, result in named
        if name is not None
    ]


def _model(run: Run) -> ModelFacts:
    loaded, module, asked = run.loaded, run.model.module, run.recipe.model
    return ModelFacts(
        source=loaded.source,
        model_type=module.config.model_type,
        dtype=str(module.dtype).removeprefix("torch."),
        device=str(loaded.device),
        blocks=len(run.model.blocks),
        block_names=run.model.names,
        parameters=module.num_parameters(),
        quantised_source=loaded.quantised_source,
        task=loaded.task,
        loaded_by="" if loaded_by_auto(module) else type(module).__name__,
        digest=None if run.given.loaded is not None else source_digest(locate(asked.name, asked.cache_dir)),
    )


def _calibration(run: Run) -> CalibrationFacts | None:
    samples = run.samples
    if samples is None:
        return None
    nsamples, *shape = samples.tokens.shape
    return CalibrationFacts(
        source=samples.source,
        nsamples=nsamples,
        seqlen=shape[0] if len(shape) == 1 else None,
        image_size=(shape[1], shape[2]) if len(shape) == 3 else None,
        seed=run.recipe.calibrate.seed,
        fingerprint=samples.fingerprint,
        sources=list(samples.parts),
        counted=_counted(run),
    )


def _counted(run: Run) -> int | None:
    marks = None if run.samples is None else run.samples.generated
    return None if marks is None or run.recipe.calibrate.calibrate_on == "all" else int(marks.sum())


def _sparsity(run: Run, results: list[MatrixResult]) -> SparsityFacts:
    """Return the sparsity of the pruned matrices and of the whole model."""
    sizes = [result.shape[0] * result.shape[1] for result in results]
    zeros = sum(round(result.sparsity * size) for result, size in zip(results, sizes, strict=True))
    return SparsityFacts(
        target=run.target.sparsity,
        matrices=zeros / max(sum(sizes), 1),
        model=zeros / run.model.module.num_parameters(),
    )


def _accuracy(run: Run, dense: Measured | None, pruned: Accuracy) -> AccuracyFacts:
    images, before = run.data[pruned.data], dense if isinstance(dense, Accuracy) else None
    assert isinstance(images, LabelledImages | LabelledTexts)
    return accuracy_facts(images, run.loaded.model.config.id2label, before, pruned)


_EXAMPLES = 20  # images with a changed prediction that are named
_SHOWN = 12  # of them that are shown
_SIDE = 112  # pixels of a thumbnail's longer side


def accuracy_facts(
    images: LabelledImages | LabelledTexts,
    id2label: Mapping[Any, str] | None,
    dense: Accuracy | None,
    pruned: Accuracy,
) -> AccuracyFacts:
    """Compare both models' accuracies, and list the images (or texts) whose predicted class changed.

    id2label: the model's class names.
    """
    changed = (
        []
        if dense is None
        else [i for i, (a, b) in enumerate(zip(dense.predicted, pruned.predicted, strict=True)) if a != b]
    )
    return AccuracyFacts(
        data=pruned.data,
        source=pruned.source,
        images=pruned.images,
        unit=pruned.unit,
        dense_top1=None if dense is None else dense.top1,
        dense_top1_interval=None if dense is None else dense.top1_interval,
        dense_top5=None if dense is None else dense.top5,
        pruned_top1=pruned.top1,
        pruned_top1_interval=pruned.top1_interval,
        pruned_top5=pruned.top5,
        pruned_top5_interval=pruned.top5_interval,
        changed=None if dense is None else len(changed),
        examples=[
            _example(i, images, id2label, dense, pruned, shown=place < _SHOWN)
            for place, i in enumerate(changed[:_EXAMPLES])
            if dense is not None
        ],
    )


def class_name(number: int, images: LabelledImages | LabelledTexts, id2label: Mapping[Any, str] | None) -> str:
    """Return a class's name in the model, or in the images if the model only numbers its classes."""
    written = (id2label or {}).get(number, "")
    if written and not written.startswith("LABEL_"):
        return written
    classes = images.classes if isinstance(images, LabelledImages) else ()
    return classes[number] if number < len(classes) else f"class {number}"


def thumbnail(image: Any) -> str:
    """Return a small copy of a PIL image as a data URI: JPEG, or PNG if it is already tiny."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    kind, options = ("png", {}) if max(small.size) < _SIDE // 2 else ("jpeg", {"quality": 80})
    stream = io.BytesIO()
    small.save(stream, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _example(
    i: int,
    images: LabelledImages | LabelledTexts,
    id2label: Mapping[Any, str] | None,
    dense: Accuracy,
    pruned: Accuracy,
    shown: bool,
) -> ChangedPrediction:
    label, before, after = pruned.labels[i], dense.predicted[i], pruned.predicted[i]

    def name(number: int) -> str:
        return class_name(number, images, id2label)

    return ChangedPrediction(
        image=i,
        label=label,
        dense=before,
        pruned=after,
        names=(name(label), name(before), name(after)),
        thumbnail=thumbnail(images.image(i)) if shown and isinstance(images, LabelledImages) else None,
    )
