"""`coprune fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coprune.base.environment import expand_home
from coprune.commands.terminal import show
from coprune.gguf_files.llama_cpp import require_llama_cpp
from coprune.model.checkpoint.glance import is_run, look

if TYPE_CHECKING:
    from coprune.fitting.fit import FitArguments

NOT_KEPT = 1


def fit(
    model: Annotated[
        str, typer.Argument(help="A model to fit, or the recipe.yaml that an earlier fit left, which is made again.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model, its recipe, page and card.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SHARE]",
            help="Items of one kind, repeatable: .jsonl of {prompt, choices, answer}, {prompt, answer}, {prompt, regex}, "
            "{prompt} or {text}, plain text, or a task of lm-eval (its name, or its definition in .yaml). Half of them are never "
            "seen by the search. A share is of the text to calibrate on.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(
            help="What has to be kept, with commas between: accuracy>=dense-0.01, bits<=dense*1.02, acceptance>=0.9, kl<=0.1. "
            "[by the kind of task: accuracy>=dense-0.02, bits<=dense*1.02, acceptance>=0.9]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="size|speed|memory",
            help="What to minimise: bytes of the file, bytes in memory, or time of a token.",
        ),
    ] = "size",
    runtime: Annotated[
        str, typer.Option(metavar="llama.cpp|transformers", help="Where it will run: a GGUF file, or a folder.")
    ] = "llama.cpp",
    budget: Annotated[str, typer.Option(help="Time of the search and the proof: 60m, 2h; the best by then.")] = "60m",
    items: Annotated[
        int | None, typer.Option(min=1, help="Items of each task at most. [all]", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="More text to calibrate and distill on. [what the model writes]", show_default=False),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Any GGUF file of the model, in any type: needed where MODEL is a folder, unless there is a --converter.",
            show_default=False,
        ),
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's convert_hf_to_gguf.py, or its folder, for a MODEL folder without --like. [in $LLAMA_CPP, or on the "
            "PATH]",
            show_default=False,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Do not try this: vocabulary, experts, blocks, channels, embedding; repeatable.",
            show_default=False,
        ),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(help="Types of llama.cpp to try, with commas between. [q8_0 to iq2_xs]", show_default=False),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Candidates that are measured at a time, by processes of this machine.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Or by a Ray cluster (host:port, auto, local).", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves, and of what is drawn.")] = 0,
    trust_tasks: Annotated[
        bool, typer.Option("--trust-tasks", help="Let task definitions run the code that they name; read it first.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Find the smallest file of a model that still does your tasks, and prove it on items that the search has not seen.

    Plain quants with an importance matrix, smaller embeddings, fewer tokens, channels, blocks or experts with a distillation.

    Exit code 0: kept, proven on the unseen half; 1: not. The same command resumes.

    Example: coprune fit smollm2-135m --task examples/fit/choice.jsonl --require 'accuracy>=dense-0.25' -o small
    """
    from coprune.base.errors import BadInput
    from coprune.fitting.require import wanted
    from coprune.fitting.tasks import is_file

    if runtime == "llama.cpp":
        require_llama_cpp("models are fitted to llama.cpp", "runtime", runtime)
    is_recipe = Path(model).suffix in (".yaml", ".yml")
    if not is_recipe:
        if task and all(is_file(one) for one in task):
            wanted(task, require, seed, items)
        if not is_run(expand_home(model)):
            look(model)
    from coprune.fitting.fit import fit, remake

    if is_recipe:
        show(f"{remake(model, output, quiet)}: the same bytes as the recipe says")
        return
    if not task:
        raise BadInput("no task is named", field="task", fix="name a file of items, as in examples/fit/choice.jsonl")
    given: dict[str, Any] = {
        "items": items,
        "text": text,
        "like": like,
        "converter": converter,
        "without": without,
        "types": types,
    }
    how: FitArguments = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    how["trust_tasks"] = trust_tasks
    how |= {"target": target, "runtime": runtime, "budget": budget, "seed": seed, "workers": workers, "ray": ray}  # type: ignore[typeddict-item]
    found = fit(model, task, require, output=output, quiet=quiet, **how)
    show(str(found))
    if not found.kept:
        raise typer.Exit(NOT_KEPT)
