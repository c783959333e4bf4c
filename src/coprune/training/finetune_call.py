"""Fine-tuning that is called from Python: `coprune.finetune`."""

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
        if "seqlen" not in named and (own := given_samples(named.get("dataset"))):
            named["seqlen"] = own["seqlen"]  # samples stay as they were cut
        return run_finetuning(training_recipe({"model": str(model), "mode": mode, **named}), Reporter(quiet))
