"""Fine-tuning that is called from Python: `coprune.finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.given import given_samples, handed_over
from coprune.recipe.finetune import Mode
from coprune.training.arguments import FinetuneArguments
from coprune.training.report import FinetuneReport
from coprune.training.run import run_finetuning
from coprune.training.settings import make_settings


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
        return run_finetuning(make_settings({"model": str(model), "mode": mode, **plain}), Reporter(quiet))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are written in a file: names of data and models are text."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if isinstance(plain.get("eval_data"), list | tuple):
        plain["eval_data"] = ",".join(map(str, plain["eval_data"]))
    return plain
