"""What a fine-tuning run leaves for people: `finetune.json` with its curves, and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from coprune.finetune.settings import FinetuneSettings

REPORT_FILE = "finetune.json"


class LossPoint(BaseModel):
    """The training loss at one optimiser step (of distillation: its objective), mean over the step's windows."""

    model_config = ConfigDict(frozen=True)

    step: int
    seconds: float
    loss: float
    learning_rate: float
    gradient_norm: float | None = None


class HeldOutPoint(BaseModel):
    """The text's own loss on the held-out windows, in nats per token."""

    model_config = ConfigDict(frozen=True)

    step: int
    seconds: float
    loss: float


class BeforeAfter(BaseModel):
    """Perplexity on one text that training never saw."""

    model_config = ConfigDict(frozen=True)

    data: str
    source: str
    seqlen: int
    before: float
    after: float


class FinetuneReport(BaseModel):
    """One fine-tuning run."""

    model_config = ConfigDict(frozen=True)

    settings: FinetuneSettings
    source: str
    """The text."""
    windows: int
    block_size: int
    fingerprint: str
    """Of the training windows."""
    processes: int
    trained_parameters: int
    pruned_matrices: int
    patterns: dict[str, int]
    """How many pruned matrices follow each pattern."""
    sparsity_before: float
    sparsity_after: float
    """Of the pruned matrices; of unmerged adapters: of the weights beside them."""
    masks: str
    """Fingerprint of the masks, all of which were verified at every save."""
    steps: int
    seconds: float
    curve: list[LossPoint]
    held_out: list[HeldOutPoint]
    perplexity: list[BeforeAfter]
    adapter: Path | None
    saved_model: Path | None
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the report whole or not at all."""
        from coprune.files import write_text

        write_text(folder / REPORT_FILE, self.model_dump_json(indent=2) + "\n")


def curves(history: list[dict[str, Any]]) -> tuple[list[LossPoint], list[HeldOutPoint]]:
    """Sort a Trainer's log into the two curves."""
    training = [
        LossPoint(
            step=entry["step"],
            seconds=entry["seconds"],
            loss=entry["loss"],
            learning_rate=entry["learning_rate"],
            gradient_norm=entry.get("grad_norm"),
        )
        for entry in history
        if "loss" in entry
    ]
    held_out = [
        HeldOutPoint(step=entry["step"], seconds=entry["seconds"], loss=entry["eval_loss"])
        for entry in history
        if "eval_loss" in entry
    ]
    return training, held_out


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
        "`coprune.finetune.adapters.load_adapter` or merge them with `coprune merge MODEL ADAPTER OUTPUT`; PEFT alone reads "
        "the files too, but would add the update without its mask.\n\n",
    )


def _card(report: FinetuneReport, library: str, note: str) -> str:
    settings = report.settings
    header = ["---", f"library_name: {library}", "tags:", "- coprune", "- pruning"]
    header += (
        [f"base_model: {settings.model}"] if settings.model.count("/") == 1 and settings.model[0] not in "./" else []
    )
    rows = "\n".join(f"| {p.data} | {p.seqlen} | {p.before:.2f} | {p.after:.2f} |" for p in report.perplexity)
    results = (
        f"| text | sequence length | before | after |\n| --- | --- | --- | --- |\n{rows}" if rows else "Not measured."
    )
    patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(header) + (
        f"\n---\n\n# {Path(settings.model).name}, fine-tuned with its zeros kept ({settings.mode})\n\n"
        f"{report.sparsity_after:.2%} of the weights in {report.pruned_matrices} pruned matrices are zero ({patterns}), "
        f"as before; this was verified before saving.\n\n{note}## Perplexity\n\n{results}\n\n## How it was made\n\n"
        f"{report.steps} steps in {report.seconds / 60:.1f} minutes on {report.windows} windows of {report.block_size} "
        f"tokens of {report.source} (fingerprint `{report.fingerprint}`). Made with {versions}.\n\n"
        f"```yaml\n{settings.to_yaml()}```\n"
    )


def summary_lines(report: FinetuneReport) -> list[str]:
    """What was trained, what that did, and where it is."""
    patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
    lines = [
        f"trained   {report.trained_parameters:,} parameters ({report.settings.mode}), {report.steps} steps in "
        f"{report.seconds / 60:.1f} minutes",
        f"sparsity  {report.sparsity_before:.4%} before, {report.sparsity_after:.4%} after, in {report.pruned_matrices} "
        f"matrices ({patterns}); every zero kept",
    ]
    lines += [
        f"perplexity {p.before:.2f} → {p.after:.2f} on {p.data} (sequence length {p.seqlen})" for p in report.perplexity
    ]
    lines += [f"adapter in {report.adapter}"] if report.adapter else []
    lines += [f"model in  {report.saved_model} (reloaded and compared)"] if report.saved_model else []
    return lines
