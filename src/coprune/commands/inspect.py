"""`coprune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.recipe.recipe import make_recipe


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.")],
    include: Annotated[
        list[str] | None, typer.Option(help="Only matrices that match this pattern; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not matrices that match this; repeatable.")] = None,
    sparsity: Annotated[float | None, typer.Option("--sparsity", "--sparsity_ratio", "-s", help="As in prune.")] = None,
    pattern: Annotated[str, typer.Option("--pattern", "--sparsity_type", "-p", help="As in prune.")] = "unstructured",
    allocation: Annotated[
        str, typer.Option(help="As in prune: show the sparsity of every block (owl and error take a pass over data).")
    ] = "uniform",
    matrices: Annotated[bool, typer.Option("--matrices", help="One line per matrix instead of one per kind.")] = False,
    weights: Annotated[bool, typer.Option(help="Read the weights, to tell how sparse they are already.")] = True,
    plot: Annotated[
        str | None,
        typer.Option(help="Draw this matrix: weight magnitudes, input norms, Wanda scores (a pass over data)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The drawing, .png or .svg.")] = Path("matrix.svg"),
    dataset: Annotated[
        str, typer.Option(help="Calibration text for a drawing or an allocation, as in prune.")
    ] = "wikitext2",
    nsamples: Annotated[int, typer.Option(help="Calibration samples for that.", min=1)] = 16,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per sample of that.", min=2)] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", "--cache_dir", help="Where downloads are kept.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Show a model's blocks and matrices, what would be pruned, and the present sparsity."""
    settings = {"model": model, "sparsity": sparsity, "pattern": pattern, "cache_dir": cache_dir}
    data = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "allocation": allocation}
    recipe = make_recipe(settings | data | {"include": include or (), "exclude": exclude or ()})
    from coprune.base.progress import Reporter
    from coprune.run.inspect import inspect_lines

    if plot is not None:
        from coprune.run.plot_matrix import plot_matrix

        plot_matrix(recipe, plot, output, Reporter(quiet))
        typer.echo(f"plot      {output}")
        return
    typer.echo("\n".join(inspect_lines(recipe, matrices, weights, Reporter(quiet))))
