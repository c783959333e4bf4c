"""The model card of a fine-tuned model, and of adapters."""

from __future__ import annotations

from pathlib import Path

from coprune.report.answers import answers_markdown
from coprune.report.markdown import fenced, field, inline
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
    header += (
        [field("base_model", settings.model)]
        if settings.model.count("/") == 1 and settings.model[0] not in "./"
        else []
    )
    title, results = _results(report)
    if report.answers is not None:
        results += f"\n\n## What it writes\n\n{answers_markdown(report.answers, report.required)}"
    windows = "images" if report.block_size is None else f"windows of {report.block_size} tokens"
    patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    zeros = (
        f"{report.sparsity_after:.2%} of the weights in {report.pruned_matrices} pruned matrices are zero ({patterns}), "
        "as before; this was verified before saving.\n\n"
    )
    what = [f"Removed before: {inline(line)}.\n\n" for line in report.removed]
    what += [zeros] if report.pruned_matrices else []
    how = "with its zeros kept" if report.pruned_matrices else "with less in it"
    return "\n".join(header) + (
        f"\n---\n\n# {inline(Path(settings.model).name)}, fine-tuned {how} ({settings.mode})\n\n"
        f"{''.join(what)}{note}## {title}\n\n{results}\n\n## How it was made\n\n"
        f"{report.steps} steps in {report.seconds / 60:.1f} minutes on {report.windows} {windows} "
        f"of {inline(report.source)} (fingerprint `{report.fingerprint}`). Made with {versions}.\n\n"
        f"{fenced(settings.to_yaml(), 'yaml')}\n"
    )


def _results(report: FinetuneReport) -> tuple[str, str]:
    """What was measured: its name, and a table."""
    if report.block_size is None:
        title, head = "Accuracy", "| images | number | top-1 before | top-1 after | top-5 before | top-5 after |"
        rows = [
            f"| {inline(a.data)} | {a.images} | {a.before_top1:.2%} | {a.after_top1:.2%} | {a.before_top5:.2%} "
            f"| {a.after_top5:.2%} |"
            for a in report.accuracy
        ]
    else:
        title, head = "Perplexity", "| text | sequence length | before | after |"
        rows = [f"| {inline(p.data)} | {p.seqlen} | {p.before:.2f} | {p.after:.2f} |" for p in report.perplexity]
    rule = "| --- " * (head.count("|") - 1) + "|"
    return title, "\n".join([head, rule, *rows]) if rows else "Not measured."
