"""The command `coprune`: it turns what was typed into a recipe or a call, and errors into one message. No logic.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import quieten_tokenizers
from coprune.base.errors import CopruneError
from coprune.base.words import speaking
from coprune.commands.evaluate import compare, evaluate, report
from coprune.commands.face import CommandLine
from coprune.commands.finetune import finetune, merge
from coprune.commands.packed import bench, pack, unpack
from coprune.commands.prune import METHOD_OPTIONS, estimate, prune
from coprune.commands.sweep import SweepCommand, sweep
from coprune.recipe.recipe import make_recipe

app = typer.Typer(
    name="coprune",
    help="Prune large language models after training, measure what it did, and save a checkpoint that others can load.",
    epilog="Try: coprune demo. Every command explains itself with --help.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What every error of typer's own (a missing argument, no number) derives from; it has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]
# What the user can mend; any other error of the system is a bug that needs its traceback.
_FILE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EMFILE),
)


app.command(context_settings=METHOD_OPTIONS)(prune)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
) -> None:
    """List the pruning methods and their own options."""
    from coprune.pruning.methods.describe import describe_methods

    typer.echo("\n".join(describe_methods(name)))


@app.command("inspect")
def inspect_command(
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


@app.command()
def demo(
    nsamples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens.", min=1)] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Prune SmolLM2-135M to 50 % with Wanda, on text that needs no network, and show what that did."""
    from coprune.base.progress import Reporter
    from coprune.commands.demo import run_demo

    typer.echo("\n".join(run_demo(nsamples, Reporter(quiet))))


app.command("eval")(evaluate)
app.command(context_settings=METHOD_OPTIONS)(estimate)
app.command(cls=SweepCommand)(sweep)
app.command()(compare)
app.command()(report)
app.command()(finetune)
app.command()(merge)
app.command()(pack)
app.command()(unpack)
app.command()(bench)


def main() -> None:
    """Entry point: run the command; a known error is one message on standard error and exit code 2."""
    # Libraries' notes are for their developers; what matters to a user, coprune says itself.
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    quieten_tokenizers()
    stopped = False
    try:
        # Not standalone, since typer would spread a usage error over several lines and answer Ctrl-C with silence.
        with speaking(CommandLine()):
            stopped = app(sys.argv[1:] or ["--help"], standalone_mode=False) == 130
    except CopruneError as error:
        _fail(error.text(CommandLine()))
    except _UsageError as error:
        _fail(error.format_message())
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        _fail(f"{error.filename or 'a file'} cannot be opened or written: {error.strerror}.")
    except (KeyboardInterrupt, typer.Abort):
        stopped = True
    if stopped:
        typer.echo("coprune: stopped; nothing half-written was left under its final name.", err=True)
        sys.exit(130)


def _fail(message: str) -> None:
    """Print one line on standard error and exit with 2."""
    typer.echo(f"coprune: {' '.join(message.replace('Value error, ', '').split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
