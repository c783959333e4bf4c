"""`report.json`: everything that was measured in a run, and what is needed to believe it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.shown import Sheet, Shown
from coprune.evaluation.extras import TextSample
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.zero_shot import ZeroShotFacts
from coprune.model.checkpoint.load import TaskName
from coprune.pruning.distributions import Distributions
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.recipe import Recipe

DISTRIBUTIONS_FILE = "distributions.json"
PACKAGES = ("coprune", "torch", "transformers", "safetensors", "datasets", "accelerate", "timm", "torchvision")

_DISTRIBUTIONS = TypeAdapter(dict[str, Distributions])


class ModelFacts(BaseModel):
    """Which model was pruned."""

    model_config = ConfigDict(frozen=True)

    source: str
    model_type: str
    dtype: str
    device: str
    blocks: int
    parameters: int
    quantised_source: bool
    """True if the weights were dequantised from a quantised file, so that all figures are of those."""
    task: TaskName = "text"
    block_names: list[str] = []


class CalibrationFacts(BaseModel):
    """Which tokens or images calibrated it."""

    model_config = ConfigDict(frozen=True)

    source: str
    nsamples: int
    seqlen: int | None
    """Tokens per sample; None for images."""
    seed: int
    fingerprint: str
    image_size: tuple[int, int] | None = None
    """(height, width) that the model's transforms gave; None for text."""


class SparsityFacts(BaseModel):
    """Fractions of zeros: asked for, in the pruned matrices, and in all parameters of the model."""

    model_config = ConfigDict(frozen=True)

    target: float
    matrices: float
    model: float


class PerplexityFacts(BaseModel):
    """Perplexity of the dense and the pruned model on one text, with non-overlapping windows of seqlen tokens."""

    # A model pruned to pieces has perplexity inf, and JSON's null could not be read back as a number.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    data: str
    source: str
    seqlen: int
    windows: int
    fingerprint: str
    dense: float | None
    pruned: float
    pruned_interval: tuple[float, float] | None
    """95 % bootstrap interval over the windows."""
    pruned_bits_per_byte: float | None

    @classmethod
    def of(cls, dense: Perplexity | None, pruned: Perplexity) -> PerplexityFacts:
        """Put both measurements on the same text side by side. dense: None if that model was not measured."""
        return cls(
            data=pruned.data,
            source=pruned.source,
            seqlen=pruned.seqlen,
            windows=pruned.windows,
            fingerprint=pruned.fingerprint,
            dense=None if dense is None else dense.value,
            pruned=pruned.value,
            pruned_interval=pruned.interval,
            pruned_bits_per_byte=pruned.bits_per_byte,
        )

    def line(self) -> str:
        """Both figures, for people."""
        dense = "" if self.dense is None else f"dense {self.dense:.2f} → "
        return f"{dense}pruned {self.pruned:.2f} on {self.data} (sequence length {self.seqlen})"


class ChangedPrediction(BaseModel):
    """An image on whose class the dense and the pruned model differ, by its position in the evaluation set."""

    model_config = ConfigDict(frozen=True)

    image: int
    label: int
    dense: int
    pruned: int
    names: tuple[str, str, str] | None = None
    """Of these three classes, in this order."""
    thumbnail: str | None = None
    """A small copy as a data URI, of the first of them."""


class AccuracyFacts(BaseModel):
    """Top-1 and top-5 accuracy on one set of images, with Wilson's 95 % intervals."""

    model_config = ConfigDict(frozen=True)

    data: str
    source: str
    images: int
    dense_top1: float | None
    dense_top1_interval: tuple[float, float] | None
    dense_top5: float | None
    pruned_top1: float
    pruned_top1_interval: tuple[float, float]
    pruned_top5: float
    pruned_top5_interval: tuple[float, float]
    changed: int | None
    """Images whose predicted class is another than the dense model's; None if that was not measured."""
    examples: list[ChangedPrediction]
    """The first of them."""

    def line(self) -> str:
        """Both figures, for people."""
        before = "" if self.dense_top1 is None else f"dense {self.dense_top1:.2%} → "
        low, high = self.pruned_top1_interval
        top = f"pruned {self.pruned_top1:.2%} [{low:.2%}, {high:.2%}] top-1, {self.pruned_top5:.2%} top-5"
        return f"{before}{top} on {self.data} ({self.images} images)"


class PhaseFacts(BaseModel):
    """One phase of a run, with the memory in use when it ended."""

    model_config = ConfigDict(frozen=True)

    name: str
    seconds: float
    resident_bytes: int | None
    """Resident set of the process; None where the system does not tell."""
    device_bytes: int | None
    """Memory that tensors occupy on the GPU; None without one."""


class Report(Shown, BaseModel):
    """One pruning run."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    model: ModelFacts
    calibration: CalibrationFacts | None
    sparsity: SparsityFacts
    perplexity: list[PerplexityFacts]
    prune_seconds: float
    """The walk alone, without loading, evaluating and saving."""
    total_seconds: float
    peak_memory_bytes: int
    """Largest resident set of the process."""
    peak_device_memory_bytes: int | None
    versions: dict[str, str]
    events: list[str]
    """Numerical events, each with the name of its matrix."""
    matrices: list[MatrixResult]
    saved_model: Path | None = None
    zero_shot: ZeroShotFacts | None = None
    sample: TextSample | None = None
    phases: list[PhaseFacts] = []
    accuracy: list[AccuracyFacts] = []
    edits: list[str] = []
    """What was done to the model besides zeros, a line each."""
    left_out: list[str] = []
    """Layers that cannot be pruned as matrices, and tensors that are not written again, each with the reason."""

    def headline(self) -> str:
        """Model, method and pattern, and what that did to the first text."""
        recipe, measured = self.recipe, ""
        for text in self.perplexity[:1]:
            dense = "" if text.dense is None else f"{text.dense:.2f} → "
            measured = f", perplexity {dense}{text.pruned:.2f} on {text.data}"
        asked = f"{recipe.method.name} {recipe.pattern.name}"
        return f"{Path(self.model.source).name}: {asked}, {self.sparsity.matrices:.2%} zeros{measured}"

    def sheet(self) -> Sheet:
        """What was pruned, how sparse it is, what that did, and what it took."""
        recipe, model, zeros = self.recipe, self.model, self.sparsity
        rows = [
            ("model", f"{model.source}, {model.parameters:,} parameters, {model.dtype}"),
            ("method", f"{recipe.method.name}, {recipe.pattern.name}, {recipe.calibration.propagation} propagation"),
            ("sparsity", f"{zeros.matrices:.4%} of the {len(self.matrices)} pruned matrices, "
             f"{zeros.model:.2%} of all parameters"),
        ]  # fmt: skip
        rows += [("perplexity", text.line()) for text in self.perplexity]
        rows += [("accuracy", images.line()) for images in self.accuracy]
        rows += [("removed", line) for line in self.edits]
        rows += [("left", layer) for layer in self.left_out]
        took = f"{self.prune_seconds:.1f} s to prune, {self.total_seconds:.1f} s in all"
        rows.append(("took", f"{took}, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"))
        if self.events:
            rows.append(("events", f"{len(self.events)} numerical events, the first: {self.events[0]}"))
        if self.saved_model is not None:
            rows.append(("model in", f"{self.saved_model} (reloaded and compared)"))
        return Sheet(self.headline(), rows)

    def write(self, path: Path) -> None:
        """Write the report whole or not at all, and the matrices' distributions to a file beside it."""
        found = {matrix.name: matrix.distributions for matrix in self.matrices if matrix.distributions is not None}
        if found:
            write_text(path.with_name(DISTRIBUTIONS_FILE), _DISTRIBUTIONS.dump_json(found).decode() + "\n")
        write_text(path, self.model_dump_json(indent=2, exclude={"matrices": {"__all__": {"distributions"}}}) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report, with the distributions if they are beside it. Raises BadInput if it is missing or no report."""
        try:
            report = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"the report {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise BadInput(f"{path} is not a report that this version of coprune can read") from None
        try:
            found = _DISTRIBUTIONS.validate_json(path.with_name(DISTRIBUTIONS_FILE).read_bytes())
        except (OSError, ValueError):
            return report  # of an earlier version, or copied alone
        matrices = [matrix.model_copy(update={"distributions": found.get(matrix.name)}) for matrix in report.matrices]
        return report.model_copy(update={"matrices": matrices})


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reference_log(method: str, sparsity: float, perplexity: float | None) -> str:
    """The Wanda repository's log: a tab-separated header and one line (an unmeasured perplexity is `nan`)."""
    value = float("nan") if perplexity is None else perplexity
    return f"method\tactual_sparsity\tppl_test\n{method}\t{sparsity:.4f}\t{value:.4f}\n"
