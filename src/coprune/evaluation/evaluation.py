"""Everything that is measured of one model, as data: what `coprune eval` and `coprune compare` show and keep."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from coprune.base.shown import Sheet, Shown
from coprune.evaluation.accuracy import Accuracy
from coprune.evaluation.closeness import Closeness
from coprune.evaluation.perplexity import Perplexity
from coprune.evaluation.zero_shot import Estimate, ZeroShot

Interval = tuple[float, float]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class WeightFacts(_Facts):
    """How many parameters a model has, how many are not zero, and how much room its files take."""

    parameters: int
    nonzeros: int
    matrix_sparsity: float
    """Fraction of zeros in the weights of two or more dimensions, without the embeddings and the head."""
    bytes_on_disk: int
    """Of the files with weights."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all parameters."""
        return 1 - self.nonzeros / self.parameters


class PerplexityResult(_Facts):
    """Perplexity on one text, with 95 % bootstrap intervals over the windows."""

    data: str
    source: str
    fingerprint: str
    """Names the tokens: only on the same ones do perplexities per token compare."""
    seqlen: int
    windows: int
    tokens: int
    value: float
    interval: Interval | None
    bits_per_byte: float | None
    per_byte: float | None
    window_nll: tuple[float, ...]
    """Mean negative log likelihood of every window in nats, from which models are compared by pairs."""

    def line(self) -> str:
        """The figures, for people."""
        low, high = self.interval or (self.value, self.value)
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        windows = f"({self.windows} windows, sequence length {self.seqlen})"
        return f"{self.value:.4f} [{low:.2f}, {high:.2f}]{per_byte} on {self.data} {windows}"


class AccuracyResult(_Facts):
    """Top-1 and top-5 accuracy on one set of images, with Wilson's 95 % intervals."""

    data: str
    source: str
    images: int
    top1: float
    top1_interval: Interval
    top5: float
    top5_interval: Interval
    labels: tuple[int, ...]
    """Of every image, as the model numbers its classes."""
    predicted: tuple[int, ...]
    """Every image's likeliest class, from which models are compared by pairs."""

    def line(self) -> str:
        """The figures, for people."""
        (low, high), (low5, high5) = self.top1_interval, self.top5_interval
        top1 = f"top-1 {self.top1:.2%} [{low:.2%}, {high:.2%}]"
        return f"{top1}, top-5 {self.top5:.2%} [{low5:.2%}, {high5:.2%}] on {self.data} ({self.images} images)"


class ClosenessResult(_Facts):
    """Closeness to another model on one text, with 95 % bootstrap intervals over the windows."""

    data: str
    fingerprint: str
    seqlen: int
    positions: int
    kl: float
    """Mean KL(other ‖ this) of the next-token distributions, in nats."""
    kl_interval: Interval | None
    top1_agreement: float
    top1_interval: Interval | None

    def line(self, against: str | None) -> str:
        """The figures, for people. against: the other model."""
        low, high = self.kl_interval or (self.kl, self.kl)
        kl = f"KL {self.kl:.4f} [{low:.4f}, {high:.4f}] nats"
        return f"{kl}, top-1 agreement {self.top1_agreement:.2%} with {against} on {self.data}"


class Evaluation(Shown, _Facts):
    """One model and what was measured of it."""

    model: str
    weights: WeightFacts
    perplexity: tuple[PerplexityResult, ...] = ()
    accuracy: tuple[AccuracyResult, ...] = ()
    """Of a classifier of images."""
    zero_shot: ZeroShot | None = None
    against: str | None = None
    """The model that closeness was measured to."""
    closeness: tuple[ClosenessResult, ...] = ()

    def headline(self) -> str:
        """The model, and the first of what was measured."""
        first = [f"perplexity {found.value:.2f} on {found.data}" for found in self.perplexity]
        first += [f"top-1 accuracy {found.top1:.2%} on {found.data}" for found in self.accuracy]
        if self.zero_shot is not None and self.zero_shot.mean is not None:
            first.append(f"mean acc {self.zero_shot.mean.value:.2%} over {len(self.zero_shot.tasks)} tasks")
        return ": ".join([Path(self.model).name, *first[:1]])

    def sheet(self) -> Sheet:
        """Everything that was measured."""
        rows = [("perplexity", found.line()) for found in self.perplexity]
        rows += [("accuracy", found.line()) for found in self.accuracy]
        rows += [("closeness", found.line(self.against)) for found in self.closeness]
        zero_shot = self.zero_shot
        for task in () if zero_shot is None else zero_shot.tasks:
            metrics = ", ".join(f"{name} {percent(estimate)}" for name, estimate in task.metrics.items())
            rows.append((task.task, f"{metrics} ({task.items} items, {task.num_fewshot}-shot, version {task.version})"))
        if zero_shot is not None and zero_shot.mean is not None:
            rows.append((f"mean of acc over {len(zero_shot.tasks)} tasks", percent(zero_shot.mean)))
        return Sheet(self.headline(), rows)


def percent(estimate: Estimate) -> str:
    """An estimate in per cent with its standard error."""
    error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.2f}"
    return f"{100 * estimate.value:.2f}{error} %"


def weight_facts(model: PreTrainedModel, bytes_on_disk: int) -> WeightFacts:
    """Count a model's parameters and zeros; weights that are shared count once."""
    outside = {id(module.weight) for module in _embeddings(model)}
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


def perplexity_result(name: str, source: str, fingerprint: str, found: Perplexity) -> PerplexityResult:
    """Turn a measured perplexity into data. name: as it was asked for; source and fingerprint: of the text."""
    return PerplexityResult(
        data=name,
        source=source,
        fingerprint=fingerprint,
        seqlen=found.seqlen,
        windows=found.windows,
        tokens=found.tokens,
        value=found.value,
        interval=found.interval,
        bits_per_byte=found.bits_per_byte,
        per_byte=found.per_byte,
        window_nll=tuple(found.nll_per_window.tolist()),
    )


def accuracy_result(name: str, source: str, found: Accuracy) -> AccuracyResult:
    """Turn a measured accuracy into data. name: as it was asked for; source: of the images."""
    return AccuracyResult(
        data=name,
        source=source,
        images=found.images,
        top1=found.top1,
        top1_interval=found.top1_interval,
        top5=found.top5,
        top5_interval=found.top5_interval,
        labels=tuple(found.labels.tolist()),
        predicted=tuple(found.predicted.tolist()),
    )


def closeness_result(name: str, fingerprint: str, found: Closeness) -> ClosenessResult:
    """Turn a measured closeness into data."""
    return ClosenessResult(
        data=name,
        fingerprint=fingerprint,
        seqlen=found.seqlen,
        positions=found.positions,
        kl=found.kl,
        kl_interval=found.kl_interval,
        top1_agreement=found.top1_agreement,
        top1_interval=found.top1_interval,
    )


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in found if module is not None] + [
        m for m in model.modules() if isinstance(m, nn.Embedding)
    ]
