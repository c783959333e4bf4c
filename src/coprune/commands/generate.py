"""`coprune generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.words import Command, Set
from coprune.commands.terminal import show, show_next
from coprune.model.checkpoint.glance import look


def generate(
    model: Annotated[str, typer.Argument(help="The model: Hub id, folder, GGUF file, or smollm2-135m.")],
    target: Annotated[Path, typer.Argument(help="The .jsonl file to write.", metavar="OUT.jsonl")],
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts to answer. [none: from BOS]")] = None,
    samples: Annotated[int | None, typer.Option(help="Texts. [one per prompt, or 16]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a text at most, without its prompt. [512]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens. [1]")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens up to this. [1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what is drawn. [0]")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the prompts. [prompt]")] = None,
    template: Annotated[str | None, typer.Option(help="chat or none. [chat where there is a template]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16. [auto: the checkpoint's own]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda … [auto]")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where downloads are kept. [the Hugging Face cache]")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the step that makes a token: for long texts and many of them.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and lines.")] = False,
) -> None:
    """Let a model write texts, or answers to prompts, into a file to be calibrated on (--dataset, --calibrate-on generated).

    Example: coprune generate smollm2-135m own.jsonl --samples 64 --seqlen 256
    """
    said: dict[str, Any] = dict(samples=samples, seqlen=seqlen, temperature=temperature, top_p=top_p, seed=seed)
    said |= dict(column=column, template=template, dtype=dtype, device=device, cache_dir=cache_dir)
    said |= dict(compile=compile or None)
    if prompts is None or prompts.is_file():  # else that is what is wrong
        look(model, cache_dir)
    from coprune.steps.write_text import generate

    given: Any = {name: value for name, value in said.items() if value is not None}
    written = generate(model, target, prompts, quiet=quiet, **given)
    show(f"written   {written}")
    on = Set("dataset", written), Set("calibrate_on", "generated")
    show_next(("calibrate on it: ", Command("prune", model, *on, Set("save_model", ...))))
