"""`report.json`: all measurements of a run, and what is needed to verify them."""

from __future__ import annotations

import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from coprune.base.environment import installed_version
from coprune.base.files import write_text
from coprune.base.validation import read_as
from coprune.base.words import Sheet, Shown, per_cent
from coprune.data.windows import SourcePart
from coprune.evaluation.answers.answer_facts import AnswerFacts, Requirement, answer_rows
from coprune.evaluation.bos_choice import BosChoice
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.extra_measurements import TextSample
from coprune.evaluation.required import Figure, figures_of_closeness
from coprune.evaluation.transcripts import TranscriptChange
from coprune.evaluation.zero_shot import ZeroShotFacts
from coprune.model.checkpoint.load import TaskName
from coprune.model.removed import AnyRemoval
from coprune.pruning.block_training import BlockTraining
from coprune.pruning.distributions import Distributions
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.recipe import Recipe
from coprune.report.figures import AccuracyFacts, FinetunedFacts, PerplexityFacts
from coprune.report.provenance import MadeFacts
from coprune.report.run_events import AnyEvent, LeftAlone, left_lines
from coprune.report.runtimes import loads_in
from coprune.vocabulary.cut_facts import VocabularyFacts

DISTRIBUTIONS_FILE = "distributions.json"
PACKAGES = ("coprune", "torch", "transformers", "safetensors", "datasets", "accelerate", "timm", "torchvision")
OF_IMAGES = ("timm", "torchvision")
"""Packages that only image models need."""

_DISTRIBUTIONS = TypeAdapter(dict[str, Distributions])


class ModelFacts(BaseModel):
    """The pruned model."""

    model_config = ConfigDict(frozen=True)

    source: str
    model_type: str
    dtype: str
    device: str
    blocks: int
    parameters: int
    quantised_source: bool
    """Whether the weights were dequantised from a quantised file; all figures are then of the dequantised model."""
    task: TaskName = "text"
    block_names: list[str] = []
    loaded_by: str = ""
    """Class of transformers that loads it, if not one of its Auto classes."""
    digest: str | None = None
    """Digest of the source's files, to detect changes; None for a model in memory."""


class CalibrationFacts(BaseModel):
    """The calibration data."""

    model_config = ConfigDict(frozen=True)

    source: str
    nsamples: int
    seqlen: int | None
    """Tokens per sample, the maximum if sources differ; None for images."""
    seed: int
    fingerprint: str
    sources: list[SourcePart] = []
    """Contribution of each source, if there are several or one with options."""
    counted: int | None = None
    """Number of tokens in the statistics, if not all."""
    image_size: tuple[int, int] | None = None
    """(height, width) after the model's transforms; None for text."""

    @property
    def length(self) -> str:
        """Tokens of a sample, for display."""
        return f"{'up to ' if len({part.seqlen for part in self.sources}) > 1 else ''}{self.seqlen}"

    def details(self) -> str:
        """Return sentences about the counted tokens and the sources, to append to another; empty without either."""
        said = "" if self.counted is None else f" Statistics are over {self.counted:,} generated tokens."
        parts = "; ".join(part.line() for part in self.sources)
        return f"{said} Sources: {parts}." if parts else said


class SparsityFacts(BaseModel):
    """Fractions of zeros: requested, in the pruned matrices, and in all parameters of the model."""

    model_config = ConfigDict(frozen=True)

    target: float
    matrices: float
    model: float


class PhaseFacts(BaseModel):
    """A phase of a run, with the memory in use at its end."""

    model_config = ConfigDict(frozen=True)

    name: str
    seconds: float
    resident_bytes: int | None
    """Resident set of the process; None if the system does not report it."""
    device_bytes: int | None
    """GPU memory used by tensors; None without a GPU."""


class Report(Shown, BaseModel):
    """The report of a pruning run."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    model: ModelFacts
    calibration: CalibrationFacts | None
    sparsity: SparsityFacts
    perplexity: list[PerplexityFacts]
    prune_seconds: float
    """Time of pruning without loading, evaluating and saving, in the process that finished the run."""
    total_seconds: float
    """Total time of the process that finished the run."""
    earlier_seconds: float = 0.0
    """Time that an earlier, stopped process spent on choosing weights."""
    peak_memory_bytes: int
    """Largest resident set of the process."""
    peak_device_memory_bytes: int | None
    versions: dict[str, str]
    events: list[AnyEvent]
    """Numerical events of matrices, and other notable events of the run."""
    matrices: list[MatrixResult]
    trainings: list[BlockTraining] = []
    """Block reconstruction, by block."""
    saved_model: Path | None = None
    zero_shot: ZeroShotFacts | None = None
    sample: TextSample | None = None
    answers: AnswerFacts | None = None
    """Answers of the models, if they were checked."""
    no_answers: str | None = None
    """Why they were not checked, if they should have been."""
    required: tuple[Requirement, ...] = ()
    phases: list[PhaseFacts] = []
    accuracy: list[AccuracyFacts] = []
    embeddings: list[EmbeddingChange] = []
    """Closeness of the pruned model's embeddings to the dense model's."""
    transcripts: list[TranscriptChange] = []
    """Transcripts of the pruned model, compared with the dense model's."""
    bos: BosChoice | None = None
    """Position of the BOS token; None without text."""
    covered: dict[str, float] = {}
    """Share of the experts' score that each domain keeps, if experts were removed."""
    finetuned: FinetunedFacts | None = None
    """Results of fine-tuning after pruning; `saved_model` is then the fine-tuned model."""
    vocabulary: VocabularyFacts | None = None
    """Tokens removed first; both perplexities are then of the model with fewer tokens."""
    left: int | None = None
    """Parameters left, if parts were removed."""
    padding: int = 0
    """Zeros saved as padding, if blocks keep different numbers of channels or heads."""
    edits: list[AnyRemoval] = []
    """Parts of the model that were removed."""
    made: MadeFacts
    left_out: list[LeftAlone] = []
    """Layers that cannot be pruned as matrices, and tensors that the model does not load."""

    @property
    def has_zeros(self) -> bool:
        """Whether weights were set to zero, in addition to any removal."""
        return self.recipe.sets_zeros

    def figures(self) -> list[Figure]:
        """Return the measurements of the pruned and the dense model, by the names used in conditions."""
        found = [Figure("perplexity", one.data, one.pruned, one.dense) for one in self.perplexity]
        found += [Figure("accuracy", one.data, one.pruned_top1, one.dense_top1) for one in self.accuracy]
        return [*found, *figures_of_closeness([*self.embeddings, *self.transcripts])]

    def headline(self) -> str:
        """Return model, method, pattern and the effect on the first text."""
        recipe, measured = self.recipe, ""
        for text in self.perplexity[:1]:
            dense = "" if text.dense is None else f"{text.dense:.2f} → "
            tuned = {} if self.finetuned is None else self.finetuned.perplexity
            after = f" → {tuned[text.data]:.2f} after {recipe.train.mode}" if text.data in tuned else ""
            measured = f", {text.title} {dense}{text.pruned:.2f}{after} on {text.data}"
        near: list[EmbeddingChange | TranscriptChange] = [*self.embeddings, *self.transcripts]
        for one in near[:1]:
            measured = f", {one.headline()} with dense on {one.data}"
        if self.vocabulary is not None and not self.perplexity:
            measured = "".join(f", {text.line()}" for text in self.vocabulary.texts[:1])
        asked = f"{recipe.way} {recipe.shape}"
        zeros = f"{per_cent(self.sparsity.matrices)} zeros" if self.has_zeros else "removed"
        return f"{Path(self.model.source).name}: {asked}, {zeros}{measured}"

    def sheet(self) -> Sheet:
        """Return the settings, the sparsity, the measurements and the cost."""
        recipe, model, zeros = self.recipe, self.model, self.sparsity
        rows = [
            ("model", f"{model.source}, {model.parameters:,} parameters, {model.dtype}"),
            ("method", f"{recipe.way}, {recipe.shape}, {recipe.calibrate.propagation} propagation"),
        ]
        if self.has_zeros:
            matrices = f"{per_cent(zeros.matrices)} of the {len(self.matrices)} pruned matrices"
            rows.append(("sparsity", f"{matrices}, {per_cent(zeros.model)} of all parameters"))
        after = self.finetuned.after if self.finetuned is not None else lambda data: ""
        rows += [("fine-tuned", self.finetuned.line())] if self.finetuned is not None else []
        rows += [(text.title, text.line(after(text.data))) for text in self.perplexity]
        if self.bos is not None and (begins := self.bos.line()) is not None:
            rows.append(("BOS", begins))
        rows += [] if self.vocabulary is None else [("vocabulary", line) for line in self.vocabulary.lines()]
        rows += [("embeddings", vectors.line("dense") + after(vectors.data)) for vectors in self.embeddings]
        rows += [("transcripts", heard.line("dense") + after(heard.data)) for heard in self.transcripts]
        rows += [("accuracy", images.line(after(images.data))) for images in self.accuracy]
        rows += [("removed", one.line()) for one in self.edits]
        if self.covered:
            kept = ", ".join(f"{name} {per_cent(share)}" for name, share in self.covered.items())
            rows.append(("kept", f"of the experts' score by {recipe.remove.score_of('experts')}: {kept}"))
        rows += [("left", layer) for layer in left_lines(self.left_out)]
        took = f"{self.prune_seconds:.1f} s to prune, {self.total_seconds:.1f} s in all"
        rows.append(("took", f"{took}{self.before()}, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"))
        rows += answer_rows(self.answers, self.no_answers, self.required)
        if self.trainings:
            rows.append(("trained", f"{len(self.trainings)} blocks, the last: {training_line(self.trainings[-1])}"))
        if self.events:
            rows.append(("events", f"numerical: {len(self.events)}, the first: {self.events[0].line()}"))
        if self.saved_model is not None:
            how = "bytes compared with the source's" if recipe.output.as_gguf else "reloaded and compared"
            rows.append(("model in", f"{self.saved_model} ({how})"))
            if self.edits and not recipe.output.as_gguf and (tried := loads_in(model.model_type, self.edits)):
                rows.append(
                    ("loads in", f"transformers; models of its family with the same parts removed: {', '.join(tried)}")
                )
        return Sheet(self.headline(), rows)

    def before(self) -> str:
        """Return the time of an earlier, stopped process in words; empty if there was none."""
        if not self.earlier_seconds:
            return ""
        return f" in this process, after {self.earlier_seconds:.1f} s of choosing weights in a stopped one"

    def write(self, path: Path) -> None:
        """Write the report atomically, and the matrices' distributions to a file next to it."""
        found = {matrix.name: matrix.distributions for matrix in self.matrices if matrix.distributions is not None}
        if found:
            write_text(path.with_name(DISTRIBUTIONS_FILE), _DISTRIBUTIONS.dump_json(found).decode() + "\n")
        write_text(path, self.model_dump_json(indent=2, exclude={"matrices": {"__all__": {"distributions"}}}) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report, with the distributions if they are next to it. Raises BadInput if it is missing or not a report."""
        report = read_as(cls, path)
        try:
            found = _DISTRIBUTIONS.validate_json(path.with_name(DISTRIBUTIONS_FILE).read_bytes())
        except (OSError, ValueError):
            return report  # copied without them
        matrices = [matrix.model_copy(update={"distributions": found.get(matrix.name)}) for matrix in report.matrices]
        return report.model_copy(update={"matrices": matrices})


def training_line(training: BlockTraining) -> str:
    """Return the result of a block's training in words."""
    start = f"relative error {training.start:.5f}"
    gained = f"nothing gained, {start}" if training.is_idle else f"{start} → {training.end:.5f}"
    return f"{gained} on the held-out batches, rate {training.rate:g}; trained: {training.trained}"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {package: version for package in PACKAGES if (version := installed_version(package))}
    return {"python": platform.python_version(), **found}


def reference_log(method: str, sparsity: float, perplexity: float | None) -> str:
    """Return the Wanda repository's log: a tab-separated header and one line (`nan` for an unmeasured perplexity)."""
    value = float("nan") if perplexity is None else perplexity
    return f"method\tactual_sparsity\tppl_test\n{method}\t{sparsity:.4f}\t{value:.4f}\n"
