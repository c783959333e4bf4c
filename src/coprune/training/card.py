"""The model card of a fine-tuned model, and of adapters."""

from __future__ import annotations

from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.shown import per_cent
from coprune.model.edits import source_of
from coprune.report.answers import answers_markdown
from coprune.report.markdown import fenced, field, hub_id, inline, without_places
from coprune.report.schema import OF_IMAGES
from coprune.training.report import FinetuneReport


def finetune_card(report: FinetuneReport) -> str:
    """Markdown with the Hub's metadata header for the fine-tuned model."""
    return _card(report, "transformers", "")


def adapter_card(report: FinetuneReport, warning: str) -> str:
    """As `finetune_card`, for adapters; warning: what merging plain ones would do."""
    if not report.settings.masked:
        return _card(report, "peft", f"Plain adapters of PEFT. {warning}\n\n")
    return _card(
        report,
        "peft",
        "Masked adapters: the update is (B A) ⊙ keep, with keep where the pruned model is not zero. Load them with "
        "`coprune.training.adapters.load_adapter` or merge them with `coprune merge MODEL ADAPTER OUTPUT`; PEFT alone reads "
        "the files too, but would add the update without its mask.\n\n",
    )


def _card(report: FinetuneReport, library: str, note: str) -> str:
    settings = report.settings
    header = ["---", f"library_name: {library}", "tags:", "- coprune", "- pruning"]
    base = hub_id(settings.model) or hub_id(_source(settings.model))
    header += [field("base_model", base)] if base else []
    title, results = _results(report)
    if report.answers is not None:
        results += f"\n\n## What it writes\n\n{answers_markdown(report.answers, report.required)}"
    windows = "images" if report.block_size is None else f"windows of {report.block_size} tokens"
    patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
    images = report.block_size is None
    used = {name: version for name, version in report.versions.items() if images or name not in OF_IMAGES}
    versions = ", ".join(f"{name} {version}" for name, version in used.items())
    zeros = (
        f"{per_cent(report.sparsity_after)} of the weights in {report.pruned_matrices} pruned matrices are zero ({patterns}), "
        f"as many as before (every zero kept); this was verified before saving.\n\n"
    )
    what = [f"Removed before: {inline(line)}.\n\n" for line in report.removed]
    what += [zeros] if report.pruned_matrices else []
    how = "with its zeros kept" if report.pruned_matrices else "with less in it"
    card = "\n".join(header) + (
        f"\n---\n\n# {inline(Path(settings.model).name)}, fine-tuned {how} ({settings.mode})\n\n"
        f"{''.join(what)}{note}## {title}\n\n{results}\n\n## How it was made\n\n"
        f"{report.steps} steps in {report.seconds / 60:.1f} minutes on {report.windows} {windows} "
        f"of {inline(report.source)} (fingerprint `{report.fingerprint}`). Made with {versions}.\n\n"
        f"{fenced(settings.to_yaml(usual=False), 'yaml')}\n"
    )
    return without_places(card, settings.model_dump(mode="json"))


def _source(model: str) -> str:
    """What the model that was fine-tuned was made from, as its folder tells."""
    try:
        return source_of(expand_home(model)) or ""
    except BadInput:
        return ""


def _results(report: FinetuneReport) -> tuple[str, str]:
    """What was measured: its name, and a table."""
    if report.block_size is None:
        title, head = "Accuracy", "| images | number | top-1 before | top-1 after | top-5 before | top-5 after |"
        rows = [
            f"| {inline(a.data)} | {a.images} | {per_cent(a.before_top1)} | {per_cent(a.after_top1)} | {per_cent(a.before_top5)} "
            f"| {per_cent(a.after_top5)} |"
            for a in report.accuracy
        ]
    else:
        title, head = "Perplexity", "| text | sequence length | before | after |"
        rows = [f"| {inline(p.data)} | {p.seqlen} | {p.before:.2f} | {p.after:.2f} |" for p in report.perplexity]
    rule = "| --- " * (head.count("|") - 1) + "|"
    return title, "\n".join([head, rule, *rows]) if rows else "Not measured."
