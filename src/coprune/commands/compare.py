"""`coprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.commands.options import measuring_options, with_options
from coprune.recipe.measuring import measuring_recipe


@with_options(measuring_options())
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, Hub ids, GGUF files, runs or sweeps that saved models; the first is the baseline."
        ),
    ],
    evaluations: Annotated[
        Path | None, typer.Option(help="Where evaluations are kept, to be used again. [~/.cache/coprune/evaluations]")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again and keep nothing.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write everything that was measured to this file.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file, as CSV.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="The same as Markdown.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Compare models: size, sparsity, perplexity or accuracy, closeness to the first, and tasks; nothing is measured twice.

    Example: coprune compare smollm2-135m out/wanda out/sparsegpt --data embedded --seqlen 512 --json table.json
    """
    from rich.console import Console

    from coprune.base.files import write_text
    from coprune.base.progress import Reporter
    from coprune.evaluation.cache import EvaluationCache, default_cache_folder
    from coprune.evaluation.compare import compare_models
    from coprune.evaluation.tables import print_table, to_csv, to_markdown
    from coprune.report.folder import model_of
    from coprune.run.sweep.finished import models_to_compare

    named = [model for name in models for model in models_to_compare(name)]
    recipe = measuring_recipe(named[0], settings)
    cache = EvaluationCache(None if fresh else evaluations or default_cache_folder())
    found = compare_models(named, recipe, Reporter(quiet), cache, model_of)
    print_table(found, Console())
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_text(csv_file, to_csv(found))
    if markdown_file is not None:
        write_text(markdown_file, to_markdown(found))
