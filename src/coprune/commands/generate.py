"""`coprune generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import expand_home
from coprune.base.words import Command, Set
from coprune.commands.options import settings_options, with_options
from coprune.commands.terminal import show, show_next
from coprune.model.checkpoint.glance import look
from coprune.steps.generate_settings import GenerateSettings, require_free


@with_options(settings_options(GenerateSettings))
def generate(
    model: Annotated[str, typer.Argument(help="The model: Hub id, folder, GGUF file, or smollm2-135m.")],
    target: Annotated[Path, typer.Argument(help="The .jsonl file to write.", metavar="OUT.jsonl")],
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts to answer. [none: from BOS]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and lines.")] = False,
    **settings: Any,
) -> None:
    """Generate calibration text, or answers to prompts, with a model (for --dataset, --calibrate-on generated).

    Example: coprune generate smollm2-135m own.jsonl --samples 64 --seqlen 256
    """
    given: Any = {name: value for name, value in settings.items() if value is not None}
    require_free(expand_home(target))
    if prompts is None or prompts.is_file():  # if not, report that instead
        look(model, settings["cache_dir"])
    from coprune.steps.write_text import generate

    written = generate(model, target, prompts, quiet=quiet, **given)
    show(f"written   {written}")
    on = Set("dataset", written), Set("calibrate_on", "generated")
    show_next(("calibrate on it: ", Command("prune", model, *on, Set("save_model", ...))))
