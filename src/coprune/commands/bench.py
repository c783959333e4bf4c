"""`coprune bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.words import Command, Set
from coprune.commands.terminal import show, show_next
from coprune.model.checkpoint.glance import look


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders and names (run in transformers) and GGUF files (run in llama.cpp).",
            metavar="MODEL",
        ),
    ],
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.", min=1)] = 128,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Tokens to decode after it.", min=1)] = 24,
    repeats: Annotated[int, typer.Option(help="Measurements of the prompt.", min=1)] = 5,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights in transformers: auto, float32, bfloat16 or float16.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [torch's choice]", min=1)] = None,
    busy: Annotated[
        bool,
        typer.Option("--busy", help="Count the processor time of one thread; for a machine that is doing other work."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure prompt and decoding speed of models on this machine's CPU, in turns.

    Example: coprune bench smollm2-135m out/smaller dense-q8_0.gguf smaller-q8_0.gguf --threads 2
    """
    for model in models:
        look(model)
    import torch

    from coprune.base.files import require_file, write_text
    from coprune.sweeps.generation_speed import bench

    require_file(json_file, "json")
    if threads is not None or busy:
        torch.set_num_threads(threads or 1)
    asked: Any = {"prompt": prompt_tokens, "tokens": decode_tokens, "repeats": repeats, "dtype": dtype, "busy": busy}
    found = bench(models, **asked)
    if json_file is not None:
        write_text(json_file, json.dumps(found.to_dict(), indent=2) + "\n")
    show(str(found))
    show_next(
        (
            "find a smaller one that still does your task: ",
            Command("fit", models[0], Set("task", ...), Set("output", ...)),
        )
    )
