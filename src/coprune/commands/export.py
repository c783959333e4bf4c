"""`coprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coprune.base.environment import expand_home
from coprune.base.words import Command
from coprune.commands.terminal import show, show_next
from coprune.gguf_files.llama_cpp import require_type
from coprune.model.checkpoint.glance import is_run, look

if TYPE_CHECKING:
    from coprune.steps.export import ExportArguments


def export(
    model: Annotated[str, typer.Argument(help="Folder of a model (or of a run that saved one), or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf")],
    like: Annotated[
        str | None,
        typer.Option(
            help="GGUF file of the source model, in any type: its metadata, tokenizer and order are taken over. [the one that "
            "the model was made from, or what --converter makes]",
            show_default=False,
        ),
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's convert_hf_to_gguf.py, or its folder, for a model folder without --like. [in $LLAMA_CPP, or on the "
            "PATH]",
            show_default=False,
        ),
    ] = None,
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with coprune[gguf] also q6_k, q5_k_m, q4_k_m, "
            "iq4_nl, q3_k_m, iq3_xxs, q2_k, iq2_xs …",
        ),
    ] = "f16",
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Keep channels and heads that are all zeros, which pad blocks to one width."),
    ] = False,
    imatrix: Annotated[
        str,
        typer.Option(
            metavar="auto|FILE|none",
            help="How much every input of a matrix matters, for types of llama.cpp's quantiser: measured on --dataset (auto), or "
            "a file of llama-imatrix. Types below iq3_s need it.",
        ),
    ] = "none",
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate",
            help="Round the matrices of the blocks one column after another, so that later columns make up for each one's error "
            "on --dataset (GPTQ): same type and size, nearer to the model.",
        ),
    ] = False,
    dataset: Annotated[str, typer.Option(help="Text that --imatrix auto and --compensate calibrate on.")] = "embedded",
    save_imatrix: Annotated[
        Path | None, typer.Option(help="Write that to this file too, in llama.cpp's format.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp, Ollama and others: what was removed is gone there too.

    A smaller model that came from a GGUF file needs nothing else: coprune export out/smaller smaller.gguf --type q8_0.
    One that came from elsewhere needs a GGUF file of the same source model, of any type (--like source-q4_0.gguf), or
    llama.cpp's converter.
    """
    if not is_run(expand_home(model)):
        look(model)
    kind = require_type(type_)
    from coprune.steps.export import export

    how: ExportArguments = {"imatrix": imatrix, "dataset": dataset, "save_imatrix": save_imatrix}
    how["converter"], how["compensate"] = converter, compensate
    show(str(export(model, output, like=like, type=kind, padded=padded, quiet=quiet, **how)))
    show_next(("how fast it is here: ", Command("bench", output)))
