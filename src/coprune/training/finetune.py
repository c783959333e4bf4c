"""Fine-tuning that is called from Python: `coprune.finetune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.in_memory import CalibrationData, TextData, given_samples, handed_over
from coprune.evaluation.measure_arguments import AnswerArguments
from coprune.recipe.train import Mode
from coprune.recipe.views import training_recipe
from coprune.training.report import FinetuneReport
from coprune.training.run import run_finetuning


def finetune(
    model: str | Path, mode: Mode = "lora", *, quiet: bool = False, **settings: Unpack[FinetuneArguments]
) -> FinetuneReport:
    """Recover what pruning cost, with every zero kept, and save the model with its curves.

    Goes on where an interrupted run with the same settings, model and data stopped. Under torchrun or accelerate every
    process calls this.

    Args:
        model: the pruned model: a folder or a Hub id.
        mode: `lora` (low-rank adapters, masked so that merging keeps every zero), `dense` (the weights themselves) or
            `distill` (the weights, toward the dense model, which `teacher` names), or `lora-distill` (adapters, toward it).
        quiet: no progress bars and lines on standard error.
        settings: as `coprune finetune --help` lists them: the data (`dataset`, `seqlen`), how long (`minutes`, `epochs`
            or `max_steps`), and where the results go (`save`, `save_model`), among others. Data may be handed over, as in
            `coprune.prune`.

    Returns:
        Curves, figures before and after, and where the model is.

    Raises:
        BadInput: for what cannot be done as asked.
        BrokenMask: a weight that was pruned is not zero any more.
        NumericalError: the loss is not finite.
        VerificationError: what was saved is not what was computed.
    """
    if not isinstance(model, str | Path):
        held = f"a model is fine-tuned from its files, and a {type(model).__name__} is in memory"
        raise BadInput(
            held, field="model", fix="save it and name the folder, or train it with coprune.keep_zeros(model)"
        )
    with handed_over(settings, "dataset", "eval_data") as named:
        plain = _plain(named)
        if not {"seqlen", "block_size"} & plain.keys() and (own := given_samples(plain.get("dataset"))):
            plain["seqlen"] = own["seqlen"]  # samples stay as they were cut
        return run_finetuning(training_recipe({"model": str(model), "mode": mode, **plain}), Reporter(quiet))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a file holds them, with names of data and models as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


class TrainingArguments(TypedDict, total=False):
    """Arguments of a training: data, mode and duration."""

    dataset: CalibrationData
    seqlen: int | None
    batch_size: int | None
    accumulate: int | None
    epochs: float
    max_steps: int | None
    tokens: int | None
    minutes: float | None
    learning_rate: float | None
    rates: Literal["absolute", "relative"]
    train: str | Sequence[str]
    exclude: str | Sequence[str]
    rank: int
    alpha: float
    masked: bool
    teacher: str | Path | None
    bf16: bool
    dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool
    seed: int
    device: str


class FinetuneArguments(TrainingArguments, AnswerArguments, total=False):
    """The settings of a fine-tuning but for model and mode."""

    held_out: float
    save_every: int
    evaluate: bool
    eval_data: TextData | None
    eval_images: int | None
    eval_seqlen: int | None
    eval_tokens: int | None
    bos: Literal["auto", "first", "every", "never"]
    gate: bool
    require: str | None
    cache_dir: str | Path | None
    report_to: str | Sequence[str] | None
    save: str | Path | None
    save_model: str | Path | None
    overwrite: bool | None
