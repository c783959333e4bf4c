"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from coprune.base.files import write_text
from coprune.base.markdown import front_matter, hub_id, inline, without_places
from coprune.base.templating import render
from coprune.base.words import Sheet, per_cent
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.zero_shot import ZeroShotFacts
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.model.checkpoint.origin import origin_of
from coprune.report.answers_section import answers_markdown
from coprune.report.figures import AccuracyFacts, PerplexityFacts
from coprune.report.runtimes import loads_in
from coprune.report.schema import OF_IMAGES, Report
from coprune.report.vocabulary_section import vocabulary_markdown
from coprune.report.wording import base_of, name_of, versions_line

_STORED = {
    "source": "The weights are stored like the original's, so any tool that loads the original loads this.",
    "dense": "The weights are stored dense, so any tool that loads the original loads this.",
}
_TOKENIZER = {"processor": "AutoTokenizer", "name": "tokenizer"}
_AUTO = {
    "text": {"model": "AutoModelForCausalLM", **_TOKENIZER},
    "masked": {"model": "AutoModelForMaskedLM", **_TOKENIZER},
    "labels": {"model": "AutoModelForSequenceClassification", **_TOKENIZER},
    "embeddings": {"model": "AutoModel", **_TOKENIZER},
    "pairs": {"model": "AutoModelForSeq2SeqLM", **_TOKENIZER},
    "speech": {"model": "AutoModelForSpeechSeq2Seq", "processor": "AutoProcessor", "name": "processor"},
    "images": {
        "model": "AutoModelForImageClassification",
        "processor": "AutoImageProcessor",
        "name": "image_processor",
    },
}


_PIPELINES = {
    "text": "text-generation",
    "masked": "fill-mask",
    "labels": "text-classification",
    "embeddings": "feature-extraction",
    "images": "image-classification",
    "pairs": "text2text-generation",
    "speech": "automatic-speech-recognition",
}


def write_card(report: Report) -> None:
    """Write the card of a saved model, with the bytes of its weights, into its folder; a GGUF file has no place for one."""
    folder = report.saved_model
    if folder is not None and folder.is_dir():
        write_text(folder / CARD_FILE, model_card(report, bytes_of_weights(folder)))


def model_card(report: Report, size: int | None = None) -> str:
    """Return the card as Markdown with the Hub's metadata header.

    size: bytes of the saved weights, if known.
    """
    base, origin = base_of(report.model.source), origin_of(report.recipe.model.name, report.recipe.model.cache_dir)
    known, recipe = base if hub_id(base) else origin.base_model, report.recipe.as_stored()
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES[report.model.task],
        "tags": ["coprune", "pruning"],
        **({"base_model": known} if known else {}),
        **origin.licence(),
        **_model_index(report),
    }
    own = {"model": report.model.loaded_by} if report.model.loaded_by else {}
    measured, results = _results(report)
    answers, vocabulary = report.answers, report.vocabulary
    card = render(
        "report/templates/card.md.j2",
        report=report,
        metadata=front_matter(metadata),
        title=base if hub_id(base) else Path(base).name,
        done=_what_was_done(report),
        stored=_STORED[_stored(report)],
        measured=measured,
        results=results,
        vocabulary=None if vocabulary is None else vocabulary_markdown(vocabulary),
        tasks=None if report.zero_shot is None else _task_table(report.zero_shot),
        answers=None if answers is None else answers_markdown(answers, report.required),
        calibration=_calibrated_on(report),
        versions=versions_line(versions_used(report.versions, of_images=report.model.task == "images")),
        recipe=recipe.to_yaml(usual=False),
        size=size,
        loads_in=", ".join(loads_in(report.model.model_type, report.edits)),
        load=_AUTO[report.model.task] | own,
    )
    return without_places(card, [recipe.model_dump(mode="json"), base])


def versions_used(versions: Mapping[str, str], of_images: bool) -> dict[str, str]:
    """Return the versions of the packages that a model needs."""
    return {name: version for name, version in versions.items() if of_images or name not in OF_IMAGES}


def _results(report: Report) -> tuple[str, Sheet]:
    """Return the measurements as a title and a table."""
    if report.model.task in ("images", "labels"):
        return "Accuracy", _accuracy_table(report)
    if report.model.task == "embeddings":
        nearest = report.embeddings[0].nearest if report.embeddings else 0
        of_vectors: dict[str, Callable[[EmbeddingChange], str]] = {
            "text": lambda one: one.data,
            "passages": lambda one: str(one.passages),
            "cosine with the dense model": lambda one: f"{one.cosine:.4f}",
            f"of the {nearest} nearest, alike": lambda one: per_cent(one.overlap),
        }
        return "Embeddings", Sheet.of(report.embeddings, of_vectors)
    if report.model.task == "speech":
        rows = [[one.data, one.line(None)] for one in report.transcripts]
        return "Transcripts", Sheet("", rows, ["recordings", "dense → pruned"])
    titles = {"masked": "Pseudo-perplexity", "pairs": "Perplexity of targets"}
    return titles.get(report.model.task, "Perplexity"), _perplexity_table(report)


def _stored(report: Report) -> str:
    """Return how the weights are stored; those of a GGUF file are dequantised on reading."""
    asked = report.recipe.output.encoding
    return "dense" if asked == "source" and report.model.quantised_source else asked


def _calibrated_on(report: Report) -> str:
    calibration = report.calibration
    if calibration is None:
        return "No calibration data was used."
    size = "images" if report.model.task == "images" else f"samples of {calibration.length} tokens"
    details = f" {inline(calibration.details())}" if calibration.details() else ""
    return (
        f"Calibrated on {calibration.nsamples} {size} of {inline(calibration.source)} "
        f"(seed {calibration.seed}, fingerprint `{calibration.fingerprint}`).{details}"
    )


def _what_was_done(report: Report) -> str:
    said = []
    if report.recipe.remove.parts:
        kind = "an ordinary model, in part zeros" if report.padding else "an ordinary, smaller model"
        said.append(f"Removed: {'; '.join(one.line() for one in report.edits)}. The result is {kind}.")
    if report.has_zeros:
        zeros = report.sparsity
        said.append(
            f"{per_cent(zeros.matrices)} of the weights in {len(report.matrices)} matrices are zero ({report.recipe.shape}), "
            f"{per_cent(zeros.model)} of all parameters."
        )
    return " ".join(said)


def _perplexity_table(report: Report) -> Sheet:
    columns: dict[str, Callable[[PerplexityFacts], str]] = {
        "text": lambda one: one.data,
        "sequence length": lambda one: str(one.seqlen),
        "dense": lambda one: "not measured" if one.dense is None else f"{one.dense:.2f}",
        "pruned": lambda one: f"{one.pruned:.2f}",
    }
    if (tuned := report.finetuned) is not None:
        found = {data: f"{value:.2f}" for data, value in tuned.perplexity.items()}
        columns["fine-tuned"] = lambda one: found.get(one.data, "not measured")
    return Sheet.of(report.perplexity, columns)


def _task_table(facts: ZeroShotFacts) -> Sheet:
    rows = [
        [
            f"{task.task} (version {task.version}, {task.num_fewshot}-shot)",
            metric,
            str(task.items),
            *task.side_by_side(metric),
        ]
        for task in facts.tasks
        for metric in task.pruned
    ]
    if facts.mean_pruned is not None:
        rows.append(["mean", "acc", "", *facts.means_side_by_side()])
    return Sheet("", rows, ["task", "metric", "items", "dense", "pruned", "difference"])


def _model_index(report: Report) -> dict[str, Any]:
    """Return the results as the Hub's metadata, shown beside the model."""
    tuned = report.finetuned
    texts = {p.data: p.pruned for p in report.perplexity} | ({} if tuned is None else tuned.perplexity)
    images = {a.data: a.pruned_top1 for a in report.accuracy} | ({} if tuned is None else tuned.top1)
    found = [
        EvalResult("text-generation", "text", name, "perplexity", round(value, 4), metric_name="perplexity")
        for name, value in texts.items()
    ]
    found += [
        EvalResult("image-classification", "images", name, "accuracy", round(value, 6), metric_name="accuracy")
        for name, value in images.items()
    ]
    # Tasks were run before fine-tuning.
    for task in () if report.zero_shot is None or tuned is not None else report.zero_shot.tasks:
        for metric, value in task.pruned.items():
            result = round(value.value, 6)
            found.append(EvalResult("text-generation", task.task, task.task, metric, result, metric_name=metric))
    name = f"{name_of(report.model.source)}-{report.recipe.way}"
    return {"model-index": eval_results_to_model_index(name, found)} if found else {}


def _accuracy_table(report: Report) -> Sheet:
    columns: dict[str, Callable[[AccuracyFacts], str]] = {
        "images": lambda one: one.data,
        "number": lambda one: str(one.images),
        "dense top-1": lambda one: "not measured" if one.dense_top1 is None else per_cent(one.dense_top1),
        "pruned top-1": lambda one: per_cent(one.pruned_top1),
        "pruned top-5": lambda one: per_cent(one.pruned_top5),
    }
    if (tuned := report.finetuned) is not None:
        found = {data: per_cent(value) for data, value in tuned.top1.items()}
        columns["fine-tuned top-1"] = lambda one: found.get(one.data, "not measured")
    return Sheet.of(report.accuracy, columns)
