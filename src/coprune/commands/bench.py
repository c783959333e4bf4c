"""`coprune bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.commands.terminal import show


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folder of a pruned model, packed or not; or several models: folders and names run in transformers, GGUF files "
            "in llama.cpp, and each is compared with the first in the same runtime.",
            metavar="MODEL",
        ),
    ],
    batches: Annotated[
        str | None,
        typer.Option(help="Batch sizes, comma-separated. [1,4, and 1 for several models]", show_default=False),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "--prompt", help="Tokens of the prompt.", min=1)
    ] = 128,
    decode_tokens: Annotated[
        int, typer.Option("--decode-tokens", "--tokens", help="Tokens to decode per measurement.", min=1)
    ] = 24,
    repeats: Annotated[int, typer.Option(help="Measurements of each form, in turns.", min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [torch's choice]", min=1)] = None,
    busy: Annotated[
        bool,
        typer.Option(
            "--busy", help="Count the processor's time of one thread, where others use the machine meanwhile."
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also with a compiled decoding step: half a minute more for each form.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the figures to this file; RUN/bench.json puts them into RUN's page."),
    ] = None,
) -> None:
    """Measure prefill and decoding on this machine, as ratios in one run: dense, packed and semi-structured, or several models.

    Example: coprune bench out/pruned --json out/SmolLM2/2-4/wanda/bench.json

    Example: coprune bench smollm2-135m out/smaller dense-q8_0.gguf smaller-q8_0.gguf --threads 2
    """
    import torch

    from coprune.base.errors import BadInput
    from coprune.base.files import require_file, write_text
    from coprune.packed.bench import bench

    require_file(json_file, "json")
    sizes = None if batches is None else [part.strip() for part in batches.split(",")]
    if sizes is not None and not all(size.isdecimal() and int(size) > 0 for size in sizes):
        numbers = "they should be positive numbers with commas between, such as 1,4,16"
        raise BadInput(f"the batches cannot be {batches!r}", field="batches", value=batches, fix=numbers)
    if threads is not None or busy:
        torch.set_num_threads(threads or 1)
    asked: Any = {"dtype": dtype, "device": device, "busy": busy, "compile": compile}
    alone = len(models) == 1 and not models[0].lower().endswith(".gguf")
    model = Path(models[0]) if alone else models
    asked |= {"prompt": prompt_tokens, "tokens": decode_tokens, "repeats": repeats}
    found = bench(model, None if sizes is None else tuple(map(int, sizes)), **asked)
    if json_file is not None:
        write_text(json_file, json.dumps(found.to_dict(), indent=2) + "\n")
    show(str(found))
    if json_file is not None:
        _put_into_page(json_file)


def _put_into_page(json_file: Path) -> None:
    """Make the page of the run again whose folder now holds the figures."""
    from coprune.report.folder import REPORT_FILE, write_page
    from coprune.report.links import PAGE_FILE

    run = json_file.parent
    if json_file.name == "bench.json" and (run / REPORT_FILE).is_file():
        write_page([run], run / PAGE_FILE)
        show(f"page      {run / PAGE_FILE}")
