"""Fine-tuning from Python: `coprune.finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.in_memory import given_samples, handed_over
from coprune.data.keyword_arguments import FinetuneArguments
from coprune.recipe.train_part import Mode
from coprune.recipe.views import training_recipe
from coprune.training.finetune_report import FinetuneReport
from coprune.training.finetuning import run_finetuning


def finetune(
    model: str | Path, mode: Mode = "lora", *, quiet: bool = False, **settings: Unpack[FinetuneArguments]
) -> FinetuneReport:
    """Fine-tune a pruned model, keep every zero, and save the model with its training curves.

    Call it again with the same settings, model and data to resume an interrupted run. Under torchrun or accelerate every
    process calls this.

    Args:
        model: the pruned model: a folder or a Hub id.
        mode: `lora` (low-rank adapters, masked so that merging keeps every zero), `dense` (the weights themselves),
            `distill` (the weights, toward the dense model given by `teacher`) or `lora-distill` (adapters, toward it).
        quiet: show no progress bars and messages on standard error.
        settings: as listed by `coprune finetune --help`, such as the data (`dataset`, `seqlen`), the duration (`minutes`,
            `epochs` or `max_steps`) and the output folders (`save`, `save_model`). Data may be passed in memory, as in
            `coprune.prune`.

    Returns:
        The curves, the measurements before and after, and the model's folder.

    Raises:
        BadInput: the request cannot be fulfilled.
        BrokenMask: a pruned weight is no longer zero.
        NumericalError: the loss is not finite.
        VerificationError: the saved model differs from the one in memory.
    """
    if not isinstance(model, str | Path):
        held = f"fine-tuning reads a model from its files, and this is a {type(model).__name__} in memory"
        raise BadInput(
            held, field="model", fix="save it and pass the folder, or train it with coprune.keep_zeros(model)"
        )
    with handed_over(settings, "dataset", "eval_data") as named:
        if "seqlen" not in named and (own := given_samples(named.get("dataset"))):
            named["seqlen"] = own["seqlen"]  # the samples' own length
        return run_finetuning(training_recipe({"model": str(model), "mode": mode, **named}), Reporter(quiet))
