"""`coprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import importing
from coprune.base.words import Command, Set, Words
from coprune.commands.options import MeasuringCommand, help_all_option, measuring_options, with_options
from coprune.commands.terminal import show, show_next

READ_WITH = {"cls": MeasuringCommand}


@with_options([*measuring_options(), help_all_option()])
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, Hub ids, GGUF files, runs or sweeps that saved models; the first is the baseline."
        ),
    ],
    evaluation_cache: Annotated[
        Path | None,
        typer.Option(help="Where evaluations are cached. [~/.cache/coprune/store]"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again, without the cache.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all measurements to this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file, as CSV.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="The same as Markdown.")] = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", help="Also write a page with charts to this file, as HTML.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Compare models: size, sparsity, perplexity or accuracy, closeness to the first, and tasks; results are cached.

    Example: coprune compare smollm2-135m out/wanda out/sparsegpt --data embedded --seqlen 512 --json table.json
    """
    with importing():
        from coprune.base.files import require_file, write_text
        from coprune.commands.terminal import end_unless_held, print_sheet
        from coprune.model.checkpoint.locate import locates_gguf
        from coprune.sweeps.model_comparison import compare

    for field, file in (("json", json_file), ("csv", csv_file), ("markdown", markdown_file), ("page", page_file)):
        require_file(file, field)
    typed: Any = {name: value for name, value in settings.items() if value is not None}
    found = compare(models, evaluation_cache=evaluation_cache, fresh=fresh, quiet=quiet, **typed)
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_text(csv_file, found.to_csv())
    if markdown_file is not None:
        write_text(markdown_file, found.to_markdown())
    if page_file is not None:
        from coprune.report.comparison_page import comparison_page
        from coprune.report.provenance import MadeFacts

        write_text(page_file, comparison_page(found, MadeFacts.here(), page_file.parent))
    print_sheet(found.sheet())  # after the files, since the reader of a pipe may be gone
    required = [(row.name, one) for row in found.rows for one in row.evaluation.required]
    for name, one in required:
        show(f"required  {name}: {one.line()}")
    if page_file is not None:
        show(f"page      {page_file}")
    last = models[-1]
    export: Words = ("for llama.cpp and Ollama: ", Command("export", last, "OUT.gguf", Set("type", "q8_0")))
    show_next(("measure their speed here: ", Command("bench", *models)) if locates_gguf(last) else export)
    end_unless_held(one for _, one in required)
