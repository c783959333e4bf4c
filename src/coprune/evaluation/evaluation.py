"""All measurements of one model, as data: the results that `coprune eval` and `coprune compare` show and store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer
from torch import nn
from transformers import PreTrainedModel

from coprune.base.words import Sheet, Shown, per_cent
from coprune.evaluation.answers.answer_facts import AnswerFacts, Requirement, answer_rows
from coprune.evaluation.bos_choice import BosChoice
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.measurement import Accuracy, Closeness, Embedded, Perplexity, Transcribed
from coprune.evaluation.required import Figure, figures_of_closeness
from coprune.evaluation.transcripts import TranscriptChange
from coprune.evaluation.zero_shot import MAIN_METRIC, ZeroShot, shown
from coprune.model.matrices import embeddings_and_head


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class WeightFacts(_Facts):
    """Number of parameters and nonzeros, and file size."""

    parameters: int
    nonzeros: int
    matrix_sparsity: float
    """Fraction of zeros in weights of two or more dimensions, except embeddings and head."""
    bytes_on_disk: int
    """Bytes of the weight files."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all parameters."""
        return 1 - self.nonzeros / self.parameters


class Evaluation(Shown, _Facts):
    """One model and its measurements."""

    model: str
    weights: WeightFacts
    perplexity: tuple[Perplexity, ...] = ()
    bos: BosChoice | None = None
    """Where BOS stands in windows of text; None without text."""
    accuracy: tuple[Accuracy, ...] = ()
    """Accuracy of a classifier."""
    embeddings: tuple[Embedded, ...] = ()
    """Embeddings of an embedding model."""
    zero_shot: ZeroShot | None = None
    against: str | None = None
    """The model that this one was compared with."""
    closeness: tuple[Closeness, ...] = ()
    transcripts: tuple[Transcribed, ...] = ()
    near: tuple[EmbeddingChange | TranscriptChange, ...] = ()
    """Closeness of embeddings or transcripts to the other model's."""
    answers: AnswerFacts | None = None
    """Answers, compared with the other model's."""
    required: tuple[Requirement, ...] = ()
    """The requirements, and whether they hold."""

    @field_serializer("embeddings")
    def _without_vectors(self, embeddings: tuple[Embedded, ...]) -> list[dict[str, Any]]:
        return [found.model_dump(mode="json", exclude={"vectors"}) for found in embeddings]

    def figures(self, dense: Evaluation | None = None) -> list[Figure]:
        """Return the measurements by the names used in conditions. dense: the dense model's measurements."""
        perplexity = {} if dense is None else {one.data: one.value for one in dense.perplexity}
        accuracy = {} if dense is None else {one.data: one.top1 for one in dense.accuracy}
        found = [Figure("perplexity", one.data, one.value, perplexity.get(one.data)) for one in self.perplexity]
        found += [Figure("accuracy", one.data, one.top1, accuracy.get(one.data)) for one in self.accuracy]
        if not self.near:
            heard = ((one.data, one.word_error) for one in self.transcripts)
            found += [Figure("word_error", data, value) for data, value in heard if value is not None]
        return [*found, *figures_of_closeness(self.near)]

    def headline(self) -> str:
        """Return the model and the first measurement."""
        first = [f"{found.title} {found.value:.2f} on {found.data}" for found in self.perplexity]
        first += [f"{found.headline()} with {self.against} on {found.data}" for found in self.near]
        first += [f"top-1 accuracy {per_cent(found.top1)} on {found.data}" for found in self.accuracy]
        if self.zero_shot is not None and self.zero_shot.mean is not None:
            first.append(f"mean acc {per_cent(self.zero_shot.mean.value)} over {len(self.zero_shot.tasks)} tasks")
        first += [] if self.answers is None else [self.answers.verdict()]
        return ": ".join([Path(self.model).name, *first[:1]])

    def sheet(self) -> Sheet:
        """Return all measurements."""
        rows = [(found.title, found.line()) for found in self.perplexity]
        if self.bos is not None and (begins := self.bos.line()) is not None:
            rows.append(("BOS", begins))
        rows += [("accuracy", found.line()) for found in self.accuracy]
        rows += [("embeddings", found.line()) for found in self.embeddings]
        rows += [("transcripts", found.line()) for found in self.transcripts]
        rows += [("closeness", found.line(self.against)) for found in self.closeness]
        rows += [("closeness", found.line(self.against)) for found in self.near]
        zero_shot = self.zero_shot
        for task in () if zero_shot is None else zero_shot.tasks:
            metrics = ", ".join(f"{name} {shown(name, estimate)}" for name, estimate in task.metrics.items())
            rows.append((task.task, f"{metrics} ({task.items} items, {task.num_fewshot}-shot, version {task.version})"))
        if zero_shot is not None and zero_shot.mean is not None:
            rows.append((f"mean of acc over {len(zero_shot.tasks)} tasks", shown(MAIN_METRIC, zero_shot.mean)))
        rows += answer_rows(self.answers, None, self.required)
        return Sheet(self.headline(), rows)


def weight_facts(model: PreTrainedModel, bytes_on_disk: int) -> WeightFacts:
    """Count a model's parameters and zeros; shared weights count once."""
    outside = {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}
    parameters = nonzeros = size = kept = 0
    for parameter in model.parameters():
        count, there = parameter.numel(), int(parameter.count_nonzero())
        parameters += count
        nonzeros += there
        if parameter.ndim >= 2 and id(parameter) not in outside:
            size += count
            kept += there
    return WeightFacts(
        parameters=parameters,
        nonzeros=nonzeros,
        matrix_sparsity=1 - kept / size if size else 0.0,
        bytes_on_disk=bytes_on_disk,
    )


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    return embeddings_and_head(model) + [m for m in model.modules() if isinstance(m, nn.Embedding)]
