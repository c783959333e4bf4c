"""The commands that measure models and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.errors import BadInput
from coprune.recipe.recipe import make_recipe

# What `eval` and `compare` are asked to measure, and how.
_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--eval-data",
        help="Texts, comma-separated: embedded,c4@seqlen=1024,a path … [wikitext2]; or images: digits, a folder …",
    ),
]
_Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-eval, comma-separated, such as boolq,arc_easy.")]
_ZeroShot = Annotated[bool, typer.Option("--eval-zero-shot", "--eval_zero_shot", help="The papers' seven tasks.")]
_Shots = Annotated[int, typer.Option(help="Solved examples before every question.", min=0)]
_Definitions = Annotated[Path | None, typer.Option(help="Folder with task definitions of your own (YAML).")]
_Limit = Annotated[int | None, typer.Option(help="Only the first so many items of each task.", min=1)]
_Seqlen = Annotated[int | None, typer.Option(help="Tokens per window. [min(2048, model's limit)]", min=2)]
_BatchSize = Annotated[int | None, typer.Option(help="Windows per forward pass. [about 4096 tokens]", min=1)]
_Tokens = Annotated[int | None, typer.Option(help="Use only so many tokens of each text. [all]", min=2)]
_Images = Annotated[
    int | None, typer.Option("--images", "--eval-images", help="Use only so many images of each set. [all]", min=1)
]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
_CacheDir = Annotated[Path | None, typer.Option("--cache-dir", "--cache_dir", help="Where downloads are kept.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")]
_JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write everything that was measured to this file.")]


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
    images: _Images = None,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    cache_dir: _CacheDir = None,
    json_file: _JsonFile = None,
    quiet: _Quiet = False,
) -> None:
    """Measure a model's perplexity on one or more texts, as the papers do (non-overlapping windows), or run tasks.

    Of a classifier of images: its top-1 and top-5 accuracy on one or more sets of them.
    """
    from coprune.base.files import write_text
    from coprune.base.progress import Reporter
    from coprune.evaluation.command import evaluate_model, evaluation_lines

    what = _what_to_measure(data, tasks, eval_zero_shot)
    how: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "include_path": include_path,
        "limit": limit,
        "cache_dir": cache_dir,
    }
    how |= {"seqlen": seqlen, "batch_size": batch_size, "eval_tokens": tokens, "eval_images": images}
    how |= {"dtype": dtype, "device": device}
    found = evaluate_model(make_recipe({"model": model, **what, **how}), Reporter(quiet), against)
    typer.echo("\n".join(evaluation_lines(found)))
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, Hub ids, GGUF files, runs or sweeps that saved models; the first is the baseline."
        ),
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
    images: _Images = None,
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

    models = [model for name in models for model in models_to_compare(name)]
    what = _what_to_measure(data, tasks, eval_zero_shot)
    how: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "include_path": include_path,
        "limit": limit,
        "cache_dir": cache_dir,
    }
    how |= {"seqlen": seqlen, "batch_size": batch_size, "eval_tokens": tokens, "eval_images": images}
    how |= {"dtype": dtype, "device": device}
    cache = EvaluationCache(None if fresh else evaluations or default_cache_folder())
    found = compare_models(models, make_recipe({"model": models[0], **what, **how}), Reporter(quiet), cache, model_of)
    print_table(found, Console())
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_text(csv_file, to_csv(found))
    if markdown_file is not None:
        write_text(markdown_file, to_markdown(found))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, their report.json, or a sweep.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page. [report.html in the run's folder, or here for several]"),
    ] = None,
) -> None:
    """Make the page of a run again, or one page that compares several runs."""
    from coprune.report.folder import PAGE_FILE, write_page
    from coprune.run.sweep.finished import is_sweep
    from coprune.run.sweep.page import write_sweep_page

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    path = output or (folder / PAGE_FILE if len(runs) == 1 else Path(PAGE_FILE))
    made = write_sweep_page(folder, path) if len(runs) == 1 and is_sweep(folder) else write_page(runs, path)
    if not made:
        raise BadInput("the page needs altair and vl-convert: pip install 'coprune[report]'.")
    typer.echo(f"page      {path}")


def _what_to_measure(data: str | None, tasks: str | None, eval_zero_shot: bool) -> dict[str, Any]:
    """WikiText-2 unless something is named."""
    runs_tasks = eval_zero_shot or tasks is not None
    text = data if data is not None or runs_tasks else "wikitext2"
    return {"eval_data": text, "tasks": tasks, "eval_zero_shot": eval_zero_shot}
