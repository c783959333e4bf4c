"""The report of a fine-tuning: `finetune.json` with its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from coprune.base.files import write_text
from coprune.base.words import Sheet, Shown, per_cent
from coprune.evaluation.answers.answer_facts import AnswerFacts, Requirement, answer_rows, judge
from coprune.evaluation.embeddings import EmbeddingChange, embedding_change
from coprune.evaluation.measurement import Accuracy, Embedded, Measured, Perplexity, Transcribed
from coprune.evaluation.required import Figure, figures_of_closeness, judge_measured
from coprune.evaluation.transcripts import TranscriptChange, transcript_change
from coprune.model.removed import AnyRemoval
from coprune.recipe.recipe import Recipe
from coprune.report.provenance import MadeFacts

REPORT_FILE = "finetune.json"


class LossPoint(BaseModel):
    """The training loss, or distillation objective, at one optimiser step: mean over the step's samples."""

    model_config = ConfigDict(frozen=True)

    step: int
    seconds: float
    loss: float
    learning_rate: float
    gradient_norm: float | None = None


class HeldOutPoint(BaseModel):
    """The loss on the held-out samples, in nats per token or image."""

    model_config = ConfigDict(frozen=True)

    step: int
    seconds: float
    loss: float


class PerplexityChange(BaseModel):
    """Perplexity on one text that was not used for training, before and after."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    data: str
    source: str
    seqlen: int
    before: float
    after: float

    def line(self) -> str:
        """Return both figures as a line."""
        return f"{self.before:.2f} → {self.after:.2f} on {self.data} (sequence length {self.seqlen})"


class AccuracyChange(BaseModel):
    """Accuracy on one set of images that were not used for training, with Wilson's 95 % intervals of top-1."""

    model_config = ConfigDict(frozen=True)

    data: str
    source: str
    images: int
    before_top1: float
    before_top1_interval: tuple[float, float]
    before_top5: float
    after_top1: float
    after_top1_interval: tuple[float, float]
    after_top5: float

    def line(self) -> str:
        """Return both figures as a line."""
        low, high = self.after_top1_interval
        top1 = f"top-1 {per_cent(self.before_top1)} → {per_cent(self.after_top1)} [{per_cent(low)}, {per_cent(high)}]"
        return f"{top1}, top-5 {per_cent(self.before_top5)} → {per_cent(self.after_top5)} on {self.data} ({self.images} images)"


class EmbeddingsChange(BaseModel):
    """Closeness to the dense model's embeddings of texts that were not used for training."""

    model_config = ConfigDict(frozen=True)

    data: str
    before: EmbeddingChange
    after: EmbeddingChange

    def line(self) -> str:
        """Return both figures as a line."""
        return f"{self.before.headline()} → {self.after.line('dense')}"


Change = PerplexityChange | AccuracyChange | EmbeddingsChange | TranscriptChange


def change(before: Measured, after: Measured, dense: Measured | None = None) -> Change:
    """Compare two measurements on the same data. dense: the dense model's, needed for embeddings."""
    if isinstance(before, Embedded) and isinstance(after, Embedded):
        assert isinstance(dense, Embedded)
        sides = embedding_change(dense, before), embedding_change(dense, after)
        return EmbeddingsChange(data=after.data, before=sides[0], after=sides[1])
    if isinstance(before, Transcribed) and isinstance(after, Transcribed):
        return transcript_change(before, after)
    if isinstance(before, Perplexity) and isinstance(after, Perplexity):
        return PerplexityChange(
            data=after.data, source=after.source, seqlen=after.seqlen, before=before.value, after=after.value
        )
    assert isinstance(before, Accuracy)
    assert isinstance(after, Accuracy)
    return AccuracyChange(
        data=after.data,
        source=after.source,
        images=after.images,
        before_top1=before.top1,
        before_top1_interval=before.top1_interval,
        before_top5=before.top5,
        after_top1=after.top1,
        after_top1_interval=after.top1_interval,
        after_top5=after.top5,
    )


class FinetuneReport(Shown, BaseModel):
    """The report of a fine-tuning run."""

    model_config = ConfigDict(frozen=True)

    settings: Recipe
    source: str
    """Name of the text or images."""
    windows: int
    """Number of samples: windows of text, pairs, or images."""
    block_size: int | None
    """Tokens per window, or the maximum per target of a pair; None for images."""
    fingerprint: str
    """Fingerprint of the training data."""
    processes: int
    trained_parameters: int
    pruned_matrices: int
    patterns: dict[str, int]
    """Number of pruned matrices by pattern."""
    sparsity_before: float
    sparsity_after: float
    """Sparsity of the pruned matrices; unmerged adapters are not counted."""
    masks: str
    """Fingerprint of the masks, which were verified at every save."""
    steps: int
    seconds: float
    curve: list[LossPoint]
    held_out: list[HeldOutPoint]
    perplexity: list[PerplexityChange]
    adapter: Path | None
    saved_model: Path | None
    versions: dict[str, str]
    accuracy: list[AccuracyChange] = []
    embeddings: list[EmbeddingsChange] = []
    transcripts: list[TranscriptChange] = []
    """Transcripts compared with those of the model before its training."""
    unit: str = "windows"
    """Name of the samples."""
    removed: list[AnyRemoval] = []
    """Parts removed before the training."""
    answers: AnswerFacts | None = None
    """Answers of the model, if they were checked."""
    no_answers: str | None = None
    """Why they were not checked, if they should have been."""
    required: tuple[Requirement, ...] = ()
    made: MadeFacts

    @property
    def samples(self) -> str:
        """Description of the samples, without their number."""
        if self.block_size is None:
            return "images"
        return f"{self.unit} of {'' if self.unit == 'windows' else 'at most '}{self.block_size} tokens"

    def answered(self, answers: AnswerFacts | None, left_out: str | None) -> FinetuneReport:
        """Return the report with answers and judged requirements. left_out: why there are no answers."""
        asked = self.settings.evaluate.answers
        required = judge(asked.conditions, answers) + judge_measured(asked.measured, self.figures())
        return self.model_copy(update={"answers": answers, "no_answers": left_out, "required": required})

    def figures(self) -> list[Figure]:
        """Return the measurements after the training under the names that conditions use."""
        found = [Figure("perplexity", one.data, one.after) for one in self.perplexity]
        found += [Figure("accuracy", one.data, one.after_top1) for one in self.accuracy]
        found += [Figure("word_error", one.data, one.pruned) for one in self.transcripts if one.pruned is not None]
        return [*found, *figures_of_closeness(one.after for one in self.embeddings)]

    def write(self, path: Path) -> None:
        """Write the report whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    def headline(self) -> str:
        """Return a line with model, mode and the effect on the first text."""
        measured = f", perplexity {self.perplexity[0].line()}" if self.perplexity else ""
        measured += "".join(f", {found.line()}" for found in self.embeddings[:1])
        return f"{Path(self.settings.model.name).name}: {self.settings.train.mode}, {self.steps} steps{measured}"

    def sheet(self) -> Sheet:
        """Return the training, its measurements, and its folders."""
        patterns = ", ".join(f"{count} × {name}" for name, count in self.patterns.items())
        trained = f"{self.trained_parameters:,} parameters ({self.settings.train.mode}), {self.steps} steps"
        sparsity = f"{per_cent(self.sparsity_before)} before, {per_cent(self.sparsity_after)} after"
        rows = [
            ("trained", f"{trained} in {self.seconds / 60:.1f} minutes"),
        ]
        rows += [("removed", one.line()) for one in self.removed]
        if self.pruned_matrices:
            rows.append(("sparsity", f"{sparsity}, in {self.pruned_matrices} matrices ({patterns}); every zero kept"))
        rows += [("perplexity", found.line()) for found in self.perplexity]
        rows += [("accuracy", found.line()) for found in self.accuracy]
        rows += [("embeddings", found.line()) for found in self.embeddings]
        rows += [("transcripts", found.line("before")) for found in self.transcripts]
        rows += answer_rows(self.answers, self.no_answers, self.required)
        rows += [("adapter in", str(self.adapter))] if self.adapter else []
        rows += [("model in", f"{self.saved_model} (reloaded and compared)")] if self.saved_model else []
        return Sheet(self.headline(), rows)


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
