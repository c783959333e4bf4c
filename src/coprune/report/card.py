"""The model card of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from coprune.base.files import write_text
from coprune.base.words import per_cent
from coprune.evaluation.zero_shot import ZeroShotFacts
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.model.checkpoint.origin import origin_of
from coprune.report.answers import answers_markdown
from coprune.report.html import base_of, name_of
from coprune.report.markdown import fenced, field, hub_id, inline, without_places
from coprune.report.schema import OF_IMAGES, Report
from coprune.report.vocabulary import vocabulary_markdown

_LOAD = """```python
from transformers import {model}, {processor}

model = {model}.from_pretrained("PATH OR ID OF THIS FOLDER")
{name} = {processor}.from_pretrained("PATH OR ID OF THIS FOLDER")
```"""
_STORED = {
    "source": "The weights are stored as the original's are, so any tool that loads the original loads this.",
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


def _how_to_load(report: Report) -> str:
    names = _AUTO[report.model.task]
    own = {"model": report.model.loaded_by} if report.model.loaded_by else {}
    return _LOAD.format(**names | own)


def _where_it_loads(report: Report, size: int | None) -> str:
    said = "" if size is None else f"The weights take {size:,} bytes. "
    gguf = " llama.cpp and Ollama take what `coprune export` writes." if report.model.task == "text" else ""
    return f"{said}The model loads in transformers.{gguf}"


def write_card(report: Report, folder: Path) -> None:
    """Write the card of a saved model, with the bytes of its weights, into its folder."""
    write_text(folder / CARD_FILE, model_card(report, bytes_of_weights(folder)))


def model_card(report: Report, size: int | None = None) -> str:
    """Return Markdown with the Hub's metadata header: the model, the method, the measurements, how to load it.

    size: bytes of the saved weights, where they are known by now.
    """
    base, origin = base_of(report.model.source), origin_of(report.recipe.model.name, report.recipe.model.cache_dir)
    images = report.model.task == "images"
    header = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINES[report.model.task]}",
        "tags:",
        "- coprune",
        "- pruning",
    ]
    if known := (base if hub_id(base) else origin.base_model):
        header.append(field("base_model", known))
    header += [field(name, value) for name, value in origin.licence().items()]
    note = (
        "The weights were dequantised from a quantised file before they were pruned; all figures are of those.\n\n"
        if report.model.quantised_source
        else ""
    )
    measured, results = _results(report)
    if report.vocabulary is not None:
        results += f"\n\n## Vocabulary\n\n{vocabulary_markdown(report.vocabulary)}"
    if report.zero_shot is not None:
        results += f"\n\n## Zero-shot tasks\n\n{_task_table(report.zero_shot)}"
    if report.answers is not None:
        results += f"\n\n## What it writes\n\n{answers_markdown(report.answers, report.required)}"
    used = {name: version for name, version in report.versions.items() if images or name not in OF_IMAGES}
    versions = ", ".join(f"{name} {version}" for name, version in used.items())
    tuned = "" if report.finetuned is None else f", then fine-tuned ({report.finetuned.line()})"
    recipe, title = report.recipe.untold(), base if hub_id(base) else Path(base).name
    repeats = "" if report.recipe.given else ", which `coprune prune --recipe` repeats where its files are"
    card = "\n".join(header) + (
        f"\n{_model_index(report)}---\n\n# {inline(title)}, pruned with {report.recipe.way}{tuned}\n\n"
        f"{_what_was_done(report)} "
        f"{_STORED[_stored(report)]}\n\n{note}## {measured}\n\n{results}\n\n"
        f"## How it was made\n\n{_calibrated_on(report)}\n\n"
        f"Made with {versions}. The recipe, without what is usual{repeats}:\n\n{fenced(recipe.to_yaml(usual=False), 'yaml')}\n\n"
        f"## Load\n\n{_where_it_loads(report, size)}\n\n{_how_to_load(report)}\n"
    )
    return without_places(card, [recipe.model_dump(mode="json"), base])


def _results(report: Report) -> tuple[str, str]:
    """Return the measurements as a title and a table."""
    if report.model.task in ("images", "labels"):
        return "Accuracy", _accuracy_table(report)
    if report.model.task == "embeddings":
        rows = [
            f"| {inline(e.data)} | {e.passages} | {e.cosine:.4f} | {per_cent(e.overlap)} |" for e in report.embeddings
        ]
        nearest = report.embeddings[0].nearest if report.embeddings else 0
        header = f"| text | passages | cosine with the dense model | of the {nearest} nearest, alike |"
        return "Embeddings", _table(header, rows)
    if report.model.task == "speech":
        rows = [f"| {inline(one.data)} | {inline(one.line(None))} |" for one in report.transcripts]
        return "Transcripts", _table("| recordings | dense → pruned |", rows)
    titles = {"masked": "Pseudo-perplexity", "pairs": "Perplexity of targets"}
    return titles.get(report.model.task, "Perplexity"), _perplexity_table(report)


def _stored(report: Report) -> str:
    """Return how the weights are stored; a GGUF file's are decoded when it is read."""
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
        said.append(f"Removed: {'; '.join(one.line() for one in report.edits)}. What is left is {kind}.")
    if report.has_zeros:
        zeros = report.sparsity
        said.append(
            f"{per_cent(zeros.matrices)} of the weights in {len(report.matrices)} matrices are zero ({report.recipe.shape}), "
            f"{per_cent(zeros.model)} of all parameters."
        )
    return " ".join(said)


def _perplexity_table(report: Report) -> str:
    rows = [
        f"| {inline(p.data)} | {p.seqlen} | {'not measured' if p.dense is None else f'{p.dense:.2f}'} | {p.pruned:.2f} |"
        f"{_tuned(report, p.data)}"
        for p in report.perplexity
    ]
    tuned = "" if report.finetuned is None else " fine-tuned |"
    return _table(f"| text | sequence length | dense | pruned |{tuned}", rows)


def _task_table(facts: ZeroShotFacts) -> str:
    rows = [
        f"| {inline(task.task)} (version {task.version}, {task.num_fewshot}-shot) | {metric} | {task.items} "
        f"| {' | '.join(task.side_by_side(metric))} |"
        for task in facts.tasks
        for metric in task.pruned
    ]
    if facts.mean_pruned is not None:
        rows.append(f"| mean | acc | | {' | '.join(facts.means_side_by_side())} |")
    table = _table("| task | metric | items | dense | pruned | difference |", rows)
    return f"{table}\n\nWith lm-eval {facts.harness}; ± is one standard error, of a difference over the same items."


def _model_index(report: Report) -> str:
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
    # Tasks were run on what fine-tuning started from.
    for task in () if report.zero_shot is None or tuned is not None else report.zero_shot.tasks:
        for metric, value in task.pruned.items():
            result = round(value.value, 6)
            found.append(EvalResult("text-generation", task.task, task.task, metric, result, metric_name=metric))
    if not found:
        return ""
    index = eval_results_to_model_index(f"{name_of(report.model.source)}-{report.recipe.way}", found)
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True, width=10_000)


def _accuracy_table(report: Report) -> str:
    rows = [
        f"| {inline(a.data)} | {a.images} | {'not measured' if a.dense_top1 is None else per_cent(a.dense_top1)} "
        f"| {per_cent(a.pruned_top1)} | {per_cent(a.pruned_top5)} |{_tuned(report, a.data)}"
        for a in report.accuracy
    ]
    tuned = "" if report.finetuned is None else " fine-tuned top-1 |"
    return _table(f"| images | number | dense top-1 | pruned top-1 | pruned top-5 |{tuned}", rows)


def _tuned(report: Report, data: str) -> str:
    """Return the table cell of the fine-tuned model."""
    if (facts := report.finetuned) is None:
        return ""
    if data in facts.perplexity:
        return f" {facts.perplexity[data]:.2f} |"
    return f" {per_cent(facts.top1[data])} |" if data in facts.top1 else " not measured |"


def _table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "| --- " * (head.count("|") - 1) + "|", *rows]) if rows else "Not measured."
