"""The command `coprune`: it turns what was typed into a recipe or a call, and errors into one message. No logic.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.errors import BadInput, CopruneError, unknown_name
from coprune.finetune.settings import FinetuneSettings, make_settings
from coprune.packed.command import bench, pack, unpack
from coprune.presets import preset_settings
from coprune.recipe import Recipe, make_recipe, read_settings

app = typer.Typer(
    name="coprune",
    help="Prune large language models after training, measure what it did, and save a checkpoint that others can load.",
    epilog="Try: coprune demo. Every command explains itself with --help.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The seed system's names of options, and short forms. Every other option is named like its field of the recipe.
_ALIASES: dict[str, list[str]] = {
    "method": ["--method", "--prune_method", "--prune-method", "-m"],
    "sparsity": ["--sparsity", "--sparsity_ratio", "--sparsity-ratio", "-s"],
    "pattern": ["--pattern", "--sparsity_type", "--sparsity-type", "-p"],
    "cache_dir": ["--cache-dir", "--cache_dir"],
    "save_model": ["--save-model", "--save_model"],
    "eval_zero_shot": ["--eval-zero-shot", "--eval_zero_shot"],
    "num_fewshot": ["--num-fewshot", "--num_fewshot"],
    "include_path": ["--include-path", "--include_path"],
    "evaluate": ["--eval/--no-eval"],
    "evaluate_dense": ["--eval-dense/--no-eval-dense"],
    "layer_error": ["--layer-error/--no-layer-error"],
    "masked": ["--masked/--no-masked"],
}
Command = Callable[..., None]
# What every error of typer's own (a missing argument, no number) derives from; it has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]
# What the user can mend; any other error of the system is a bug that needs its traceback.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_NOT_OPTIONS = ("model", "options")


def _options_of(settings: type[Recipe] | type[FinetuneSettings]) -> list[inspect.Parameter]:
    """One command-line option per field, with the field's description as its help."""
    parameters = []
    for name, field in settings.model_fields.items():
        if name in _NOT_OPTIONS:
            continue
        flags = _ALIASES.get(name, [f"--{name.replace('_', '-')}"])
        kind: Any = list[str] if field.default == () else field.annotation
        # None means "not typed", so that a recipe file's value is only replaced by what was typed.
        default = "" if field.default is None or field.default == () else f" [{field.default}]"
        option = typer.Option(*flags, help=f"{field.description}{default}", show_default=False)
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _with_options_of(settings: type[Recipe] | type[FinetuneSettings]) -> Callable[[Command], Command]:
    """Give a command one option per field in place of its `**settings`."""

    def decorate(function: Command) -> Command:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *_options_of(settings)]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


_METHOD_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(context_settings=_METHOD_OPTIONS)
@_with_options_of(Recipe)
def prune(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.", show_default=False)
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", help="The same, as an option.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Start from this recipe.yaml.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="fast, balanced or best: settings that belong together.")
    ] = None,
    use_variant: Annotated[
        bool, typer.Option("--use-variant", "--use_variant", help="Wanda's variant with an adaptive threshold.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Prune a model, measure its perplexity before and after, and save what you ask for.

    Example: coprune prune smollm2-135m --dataset embedded -p 2:4 --seqlen 512 --nsamples 32 --save-model out/pruned

    A method's own options (coprune methods lists them) are given like any other: --method sparsegpt --block-size 64
    """
    typed = {name: value for name, value in settings.items() if value is not None}
    chosen = preset_settings(preset) if preset is not None else {}
    chosen |= read_settings(recipe) if recipe is not None else {}
    options = {**chosen.get("options", {}), **_method_options(context.args)}
    chosen |= typed | {"options": options}
    if model and model_option and model != model_option:
        raise BadInput(f"two models are named: {model} and {model_option}.")
    if model or model_option:
        chosen["model"] = model or model_option
    if "model" not in chosen:
        raise BadInput("no model is named; for example: coprune prune smollm2-135m --dataset embedded.")
    if use_variant:
        if chosen.get("method", "wanda") != "wanda":
            raise BadInput(f"--use_variant is a variant of wanda, not of {chosen['method']}.")
        chosen["method"] = "wanda_variant"
    checked = make_recipe(chosen)
    from coprune.distributed import joined_processes
    from coprune.progress import Reporter
    from coprune.report.summary import summary_lines
    from coprune.run import run_recipe

    with joined_processes() as processes:
        report = run_recipe(checked, reporter=Reporter(quiet), processes=processes).report
    if processes.first:
        typer.echo("\n".join(summary_lines(report)))
        typer.echo(f"report    {checked.run_folder / 'report.json'}")


def _method_options(arguments: list[str]) -> dict[str, Any]:
    """Read `--block-size 64` or `--block-size=64` as an option of the method.

    Raises BadInput for an option that is no method's, with the nearest of all options.
    """
    if not arguments:
        return {}
    import dataclasses

    from coprune.methods import METHODS

    known = {f.name for method in METHODS.values() for f in dataclasses.fields(method)}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise BadInput(f"unexpected argument {flag!r}; options begin with --.")
        written, has_value, value = flag.partition("=")
        name = written[2:].replace("-", "_")
        if name not in known:
            flags = [option for parameter in _options_of(Recipe) for option in _flags(parameter)]
            flags += ["--model", "--recipe", "--preset", "--use-variant", "--quiet"]
            raise unknown_name("option", written, [*flags, *(f"--{other.replace('_', '-')}" for other in known)])
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"the option {written} needs a value.")
            value = rest.pop(0)
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """A whole number, a number, true or false, or else the text itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _flags(parameter: inspect.Parameter) -> list[str]:
    option = parameter.annotation.__metadata__[0]
    # Within Annotated, typer keeps the first name where a default would be.
    return [flag for name in (option.default, *option.param_decls) for flag in name.split("/") if flag.startswith("--")]


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
) -> None:
    """List the pruning methods and their own options."""
    from coprune.methods.describe import describe_methods

    typer.echo("\n".join(describe_methods(name)))


@app.command()
@_with_options_of(FinetuneSettings)
def finetune(
    model: Annotated[str, typer.Argument(help="The pruned model: a local folder or Hub id.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Recover what pruning cost, with every zero kept: masked LoRA, masked dense training, or distillation.

    Example: coprune finetune out/pruned --mode lora --dataset embedded --block-size 512 --minutes 20
    """
    checked = make_settings({"model": model} | {name: value for name, value in settings.items() if value is not None})
    from coprune.finetune.report import summary_lines
    from coprune.finetune.run import finetune as run_finetune
    from coprune.progress import Reporter

    report = run_finetune(checked, Reporter(quiet))
    if os.environ.get("RANK", "0") == "0":
        typer.echo("\n".join(summary_lines(report)))
        typer.echo(f"curves    {checked.run_folder / 'finetune.json'}")


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="The pruned model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a masked adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Merge a masked adapter into its pruned model; every zero stays one."""
    from coprune.finetune.run import merge_saved
    from coprune.progress import Reporter

    typer.echo("\n".join(merge_saved(model, adapter, output, Reporter(quiet))))


# What `eval` and `compare` are asked to measure, and how.
_Data = Annotated[
    str | None,
    typer.Option("--data", "--eval-data", help="Texts, comma-separated: embedded, a path … [wikitext2, without tasks]"),
]
_Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-eval, comma-separated, such as boolq,arc_easy.")]
_ZeroShot = Annotated[bool, typer.Option("--eval-zero-shot", "--eval_zero_shot", help="The papers' seven tasks.")]
_Shots = Annotated[int, typer.Option(help="Solved examples before every question.", min=0)]
_Definitions = Annotated[Path | None, typer.Option(help="Folder with task definitions of your own (YAML).")]
_Limit = Annotated[int | None, typer.Option(help="Only the first so many items of each task.", min=1)]
_Seqlen = Annotated[int | None, typer.Option(help="Tokens per window. [min(2048, model's limit)]", min=2)]
_BatchSize = Annotated[int | None, typer.Option(help="Windows per forward pass. [about 4096 tokens]", min=1)]
_Tokens = Annotated[int | None, typer.Option(help="Use only so many tokens of each text. [all]", min=2)]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
_CacheDir = Annotated[Path | None, typer.Option("--cache-dir", "--cache_dir", help="Where downloads are kept.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")]
_JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write everything that was measured to this file.")]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.")],
    data: _Data = None,
    tasks: _Tasks = None,
    eval_zero_shot: _ZeroShot = False,
    num_fewshot: _Shots = 0,
    include_path: _Definitions = None,
    limit: _Limit = None,
    against: Annotated[
        str | None, typer.Option(help="Also compare next-token distributions with this (dense) model.")
    ] = None,
    seqlen: _Seqlen = None,
    batch_size: _BatchSize = None,
    tokens: _Tokens = None,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    cache_dir: _CacheDir = None,
    json_file: _JsonFile = None,
    quiet: _Quiet = False,
) -> None:
    """Measure a model's perplexity on one or more texts, as the papers do (non-overlapping windows), or run tasks."""
    from coprune.evaluate.command import evaluate_model, evaluation_lines
    from coprune.files import write_text
    from coprune.progress import Reporter

    what = _what_to_measure(data, tasks, eval_zero_shot)
    how: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "include_path": include_path,
        "limit": limit,
        "cache_dir": cache_dir,
    }
    how |= {"seqlen": seqlen, "batch_size": batch_size, "eval_tokens": tokens, "dtype": dtype, "device": device}
    found = evaluate_model(make_recipe({"model": model, **what, **how}), Reporter(quiet), against)
    typer.echo("\n".join(evaluation_lines(found)))
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Folders, Hub ids, GGUF files or run folders; the first is the baseline.")
    ],
    data: _Data = None,
    tasks: _Tasks = None,
    eval_zero_shot: _ZeroShot = False,
    num_fewshot: _Shots = 0,
    include_path: _Definitions = None,
    limit: _Limit = None,
    seqlen: _Seqlen = None,
    batch_size: _BatchSize = None,
    tokens: _Tokens = None,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    cache_dir: _CacheDir = None,
    evaluations: Annotated[
        Path | None, typer.Option(help="Where evaluations are kept, to be used again. [~/.cache/coprune/evaluations]")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again and keep nothing.")] = False,
    json_file: _JsonFile = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file, as CSV.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="The same as Markdown.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Compare models: size, sparsity, perplexity, closeness to the first, and tasks; what is known is not measured again.

    Example: coprune compare smollm2-135m out/wanda out/sparsegpt --data embedded --seqlen 512 --json table.json
    """
    from rich.console import Console

    from coprune.evaluate.cache import EvaluationCache, default_cache_folder
    from coprune.evaluate.compare import compare_models
    from coprune.evaluate.tables import print_table, to_csv, to_markdown
    from coprune.files import write_text
    from coprune.progress import Reporter

    what = _what_to_measure(data, tasks, eval_zero_shot)
    how: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "include_path": include_path,
        "limit": limit,
        "cache_dir": cache_dir,
    }
    how |= {"seqlen": seqlen, "batch_size": batch_size, "eval_tokens": tokens, "dtype": dtype, "device": device}
    cache = EvaluationCache(None if fresh else evaluations or default_cache_folder())
    found = compare_models(models, make_recipe({"model": models[0], **what, **how}), Reporter(quiet), cache)
    print_table(found, Console())
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_text(csv_file, to_csv(found))
    if markdown_file is not None:
        write_text(markdown_file, to_markdown(found))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or their report.json.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page. [report.html in the run's folder, or here for several]"),
    ] = None,
) -> None:
    """Make the page of a run again, or one page that compares several runs."""
    from coprune.report.folder import PAGE_FILE, write_page

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    path = output or (folder / PAGE_FILE if len(runs) == 1 else Path(PAGE_FILE))
    if not write_page(runs, path):
        raise BadInput("the page needs altair and vl-convert: pip install 'coprune[report]'.")
    typer.echo(f"page      {path}")


def _what_to_measure(data: str | None, tasks: str | None, eval_zero_shot: bool) -> dict[str, Any]:
    """WikiText-2 unless something is named."""
    runs_tasks = eval_zero_shot or tasks is not None
    text = data if data is not None or runs_tasks else "wikitext2"
    return {"eval_data": text, "tasks": tasks, "eval_zero_shot": eval_zero_shot}


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.")],
    include: Annotated[
        list[str] | None, typer.Option(help="Only matrices that match this pattern; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not matrices that match this; repeatable.")] = None,
    sparsity: Annotated[float | None, typer.Option("--sparsity", "--sparsity_ratio", "-s", help="As in prune.")] = None,
    pattern: Annotated[str, typer.Option("--pattern", "--sparsity_type", "-p", help="As in prune.")] = "unstructured",
    matrices: Annotated[bool, typer.Option("--matrices", help="One line per matrix instead of one per kind.")] = False,
    weights: Annotated[bool, typer.Option(help="Read the weights, to tell how sparse they are already.")] = True,
    plot: Annotated[
        str | None,
        typer.Option(help="Draw this matrix: weight magnitudes, input norms, Wanda scores (a pass over data)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The drawing, .png or .svg.")] = Path("matrix.svg"),
    dataset: Annotated[str, typer.Option(help="Calibration text for the drawing, as in prune.")] = "wikitext2",
    nsamples: Annotated[int, typer.Option(help="Calibration samples for the drawing.", min=1)] = 16,
    seqlen: _Seqlen = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", "--cache_dir", help="Where downloads are kept.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Show a model's blocks and matrices, what would be pruned, and the present sparsity."""
    settings = {"model": model, "sparsity": sparsity, "pattern": pattern, "cache_dir": cache_dir}
    recipe = make_recipe(settings | {"include": include or (), "exclude": exclude or ()})
    from coprune.inspection import inspect_lines
    from coprune.progress import Reporter

    if plot is not None:
        from coprune.report.plot import plot_matrix

        data = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen}
        plot_matrix(recipe.model_copy(update=data), plot, output, Reporter(quiet))
        typer.echo(f"plot      {output}")
        return
    typer.echo("\n".join(inspect_lines(recipe, matrices, weights, Reporter(quiet))))


@app.command()
def demo(
    nsamples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens.", min=1)] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Prune SmolLM2-135M to 50 % with Wanda, on text that needs no network, and show what that did."""
    from coprune.demo import run_demo
    from coprune.progress import Reporter

    typer.echo("\n".join(run_demo(nsamples, Reporter(quiet))))


app.command()(pack)
app.command()(unpack)
app.command()(bench)


def main() -> None:
    """Entry point: run the command; a known error is one message on standard error and exit code 2."""
    # Libraries' notes are for their developers; what matters to a user, coprune says itself.
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stopped = False
    try:
        # Not standalone, since typer would spread a usage error over several lines and answer Ctrl-C with silence.
        stopped = app(sys.argv[1:] or ["--help"], standalone_mode=False) == 130
    except CopruneError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(error.format_message())
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}.")
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
