"""`coprune export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import expand_home
from coprune.base.words import Command
from coprune.commands.options import settings_options, with_options
from coprune.commands.terminal import show, show_next
from coprune.gguf_files.export_settings import ExportSettings
from coprune.gguf_files.llama_cpp import require_type
from coprune.model.checkpoint.glance import is_run, look


@with_options(settings_options(ExportSettings))
def export(
    model: Annotated[str, typer.Argument(help="Folder of a model (or of a run that saved one), or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf")],
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with coprune[gguf] also q6_k, q5_k_m, q4_k_m, "
            "iq4_nl, q3_k_m, iq3_xxs, q2_k, iq2_xs …",
        ),
    ] = "f16",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Write a model as a GGUF file for llama.cpp, Ollama and others; removed parts are missing there too.

    A smaller model made from a GGUF file needs nothing else: coprune export out/smaller smaller.gguf --type q8_0.
    One made from another format needs a GGUF file of the same source model, of any type (--like source-q4_0.gguf), or
    llama.cpp's converter.
    """
    if not is_run(expand_home(model)):
        look(model)
    kind = require_type(type_)
    from coprune.steps.export import export

    how: Any = {name: value for name, value in settings.items() if value is not None}
    show(str(export(model, output, type=kind, quiet=quiet, **how)))
    serve = f"serve it: llama-server -m {shlex.quote(str(output))}; "
    show_next((serve, "measure its speed here: ", Command("bench", output)))
