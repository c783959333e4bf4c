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
    """Text to train on, as in prune: wikitext2, c4, embedded, a datasets id or a local file; pairs or recordings,
    where the model reads these; or images: digits, a folder of classes, .parquet, or a datasets id. [embedded]"""
    seqlen: int | None
    """Tokens per training window. [min(1024, model's limit)]"""
    batch_size: int | None
    """Windows or images per process and forward pass. [1 window, 32 images]"""
    accumulate: int | None
    """Forward passes per step of the fine-tuning. [8 of text, 1 of images]"""
    epochs: float
    """Passes over the data, unless tokens, steps or minutes are given."""
    max_steps: int | None
    """Optimiser steps."""
    tokens: int | None
    """Fine-tune on so many tokens: as many steps as they fill. [one pass over the text]"""
    minutes: float | None
    """Limit on the time of the fine-tuning, with loading, measuring and saving; the learning rate falls with it. [one
    pass over the text]"""
    learning_rate: float | None
    """Peak rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]"""
    rates: Literal["absolute", "relative"]
    """absolute: one learning rate for all that is trained; relative: times the size of each matrix and vector, so that
    one rate serves models with smaller or larger weights."""
    train: str | Sequence[str]
    """Train only what matches this pattern, such as '*.q_proj', or blocks or routers; repeatable. blocks: embeddings,
    head and other matrices around the blocks stay as they are, unless they were pruned; routers: only what chooses
    among experts, after some were removed. [lora: all pruned linear layers; else all weights]"""
    exclude: str | Sequence[str]
    """Leave what matches this pattern as it is, and blocks of which all does; repeatable."""
    rank: int
    """lora: rank of the adapters."""
    alpha: float
    """lora: the update is scaled by alpha / rank."""
    masked: bool
    """lora: mask the update; without, adapters are plain PEFT's and stay unmerged."""
    teacher: str | Path | None
    """The dense model: distill trains toward it, and answers that are asked for are compared with its. [in prune: the
    model]"""
    dtype: Literal["float32", "bfloat16"]
    """What the fine-tuning computes in; trained weights are float32."""
    gradient_checkpointing: bool
    """Recompute activations to save memory."""
    seed: int
    """Seed of everything random."""
    device: str
    """auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""


class FinetuneArguments(TrainingArguments, AnswerArguments, total=False):
    """The settings of a fine-tuning but for model and mode."""

    held_out: float
    """Share of the samples held out (at most 64 windows or 2,048 images); 0: nothing is watched."""
    save_every: int
    """Steps between the states from which a training resumes."""
    evaluate: bool
    """Measure perplexity or accuracy before and after."""
    eval_data: TextData | None
    """Text for perplexity, comma-separated. [test split of the calibration corpus; of a text of your own the last
    tenth, which is held out]"""
    eval_images: int | None
    """Use only so many images of each evaluation set, evenly spaced. [all]"""
    eval_seqlen: int | None
    """Tokens per window of perplexity. [as in training]"""
    eval_tokens: int | None
    """Use only so many tokens of each evaluation text. [all]"""
    bos: Literal["auto", "first", "every", "never"]
    """Where the token that begins a text (BOS) stands, in calibration and perplexity: at the start of the text, of
    every window, or never; auto does as the tokenizer, unless it puts BOS and the dense model is clearly better (by
    5 % in perplexity, on a few windows) where every window has it."""
    gate: bool
    """Let a model that is saved answer a few short prompts, and say whether the answers loop or are empty."""
    require: str | None
    """Exit with 3, once all is saved, unless the answers, or what is measured, are so: conditions with commas between,
    such as 'loops<=dense+1,kl<0.5' or 'perplexity<=dense*1.05' (accuracy, word_error; cosine, overlap, alike with
    the dense model); no more answers may be empty than the dense model's unless that is said: empty<=dense+1."""
    cache_dir: str | Path | None
    """Where downloads are kept. [the Hugging Face cache]"""
    report_to: str | Sequence[str] | None
    """Trackers as transformers names them, such as wandb."""
    save: str | Path | None
    """Run folder. [out/finetune/MODEL/MODE]"""
    save_model: str | Path | None
    """Folder for the model. [model/ in the run folder]"""
    overwrite: bool | None
    """Replace what an earlier run left in the folders of this one."""
