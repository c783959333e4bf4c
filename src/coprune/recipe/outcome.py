"""The parts of a recipe about the result: how the pruned model is measured and where it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from coprune.recipe.answers import AnswersPart
from coprune.recipe.parts import Decides, Part, Shown, Word

_RESULT = Decides.RESULT | Decides.COST
_MEASUREMENT = Decides.MEASUREMENT | Decides.COST


def _or_none(value: Any) -> Any:
    """Parse `none`, transformers' name for no tracker, as None."""
    return None if value == "none" else value


def _joined(value: Any) -> Any:
    """Join a list of names or a path into comma-separated text."""
    if isinstance(value, Path):
        return str(value)
    named = isinstance(value, list | tuple) and value and all(isinstance(part, str | Path) for part in value)
    return ",".join(map(str, value)) if named else value


CommaSeparated = Annotated[
    str | None, BeforeValidator(_joined, json_schema_input_type=str | Sequence[str | Path] | Path | None)
]


class TasksPart(Part):
    """Tasks of lm-eval, run on both models."""

    title = "Measuring"
    head = "names"

    names: Annotated[
        CommaSeparated,
        Word("tasks"),
        _MEASUREMENT,
        Shown.COMMON,
        Field(
            description="Tasks of lm-eval to run, comma-separated; implies --eval-zero-shot, which alone runs boolq, rte, "
            "hellaswag, winogrande, arc_easy, arc_challenge and openbookqa."
        ),
    ] = None
    few_shot: Annotated[
        int,
        Word("num_fewshot"),
        _MEASUREMENT,
        Field(description="Number of solved examples before each question.", ge=0),
    ] = 0
    task_folder: Annotated[
        Path | None,
        Word("include_path"),
        Decides.MEASUREMENT,
        Field(
            description="Folder with your own task definitions (YAML); those that run code (`!function`) need --trust-tasks."
        ),
    ] = None
    trusted: Annotated[
        bool,
        Word("trust_tasks"),
        Decides.WHERE,
        Field(description="Allow task definitions to run the code that they name; read it first."),
    ] = False
    limit: Annotated[int | None, _MEASUREMENT, Field(description="Maximum number of items per task. [all]", ge=1)] = (
        None
    )
    chat_template: Annotated[
        bool,
        Word("apply_chat_template"),
        Decides.MEASUREMENT,
        Field(description="Format the tasks' prompts with the tokenizer's chat template."),
    ] = False
    gen_kwargs: Annotated[
        str | None,
        _MEASUREMENT,
        Field(description="Generation settings of the tasks, as in max_gen_toks=64,do_sample=true,temperature=0.7."),
    ] = None
    log_samples: Annotated[
        Path | None,
        Decides.WHERE,
        Field(description="Folder for the tasks' items with the model's answers, one .jsonl file per model and task."),
    ] = None


class EvaluatePart(Part):
    """Measurements of the dense and the pruned model."""

    title = "Measuring"

    perplexity: Annotated[
        bool,
        Word("evaluate"),
        _MEASUREMENT,
        Shown.COMMON,
        Field(description="Measure perplexity or accuracy before and after."),
    ] = True
    dense: Annotated[
        bool, Word("evaluate_dense"), _MEASUREMENT, Field(description="Measure the dense model's perplexity too.")
    ] = True
    data: Annotated[
        CommaSeparated,
        Word("eval_data"),
        _MEASUREMENT,
        Shown.COMMON,
        Field(
            description="Texts for perplexity; comma-separated. The last tenth of your own file is held out for it. [the "
            "corpus's test split, or your file's last tenth]"
        ),
    ] = None
    images: Annotated[
        int | None,
        Word("eval_images"),
        _MEASUREMENT,
        Field(description="Maximum number of images per set, evenly spaced. [all]", ge=1),
    ] = None
    tokens: Annotated[
        int | None,
        Word("eval_tokens"),
        _MEASUREMENT,
        Shown.COMMON,
        Field(description="Maximum number of tokens per text. [all]", ge=2),
    ] = None
    zero_shot: Annotated[
        bool,
        Word("eval_zero_shot"),
        _MEASUREMENT,
        Field(description="Run the papers' seven zero-shot tasks (needs coprune[eval])."),
    ] = False
    tasks: TasksPart = TasksPart()
    prompt: Annotated[
        str,
        Decides.MEASUREMENT,
        Field(description="Text that both models continue, for the report; empty: none, as for streamed models."),
    ] = "The city of Paris is"
    # Measured while a matrix is pruned, so a result, not a later measurement.
    layer_error: Annotated[
        bool, _RESULT, Field(description="Measure every matrix's relative layer error (costs little).")
    ] = True
    answers: AnswersPart = AnswersPart()

    @property
    def runs_tasks(self) -> bool:
        """Whether zero-shot tasks are run."""
        return self.zero_shot or self.tasks.names is not None


class OutputPart(Part):
    """Settings of the output: files, folders and trackers."""

    title = "Where it goes"

    run: Annotated[
        Path | None,
        Word("save"),
        Decides.WHERE,
        Shown.COMMON,
        Field(description="Run folder for recipe, report and log. [out/MODEL/PATTERN/METHOD]"),
    ] = None
    model: Annotated[
        Path | None,
        Word("save_model"),
        _MEASUREMENT | Decides.WHETHER,
        Shown.COMMON,
        Field(
            description="Folder for the pruned model and tokenizer; NAME.gguf if experts, blocks or tokens are removed from a "
            "GGUF file, for a file in which the rest keeps the source's bytes. [not saved]"
        ),
    ] = None
    encoding: Annotated[
        Literal["source", "dense"],
        Decides.MEASUREMENT,
        Field(
            description="How the saved model's tensors are stored: like the source's (FP8, MXFP4, INT4 …, else dense), "
            "or dense, which any tool can read."
        ),
    ] = "source"
    report_to: Annotated[
        CommaSeparated,
        BeforeValidator(_or_none),
        Decides.WHERE,
        Field(description="Also log to these, comma-separated: tensorboard, wandb, mlflow, trackio."),
    ] = None
    push_to_hub: Annotated[
        str | None,
        Decides.WHERE,
        Field(description="Upload the saved model with its card to this repository of the Hub."),
    ] = None
    private: Annotated[
        bool | None, Decides.WHERE, Field(description="Make that repository, which must be new, private.")
    ] = None
    overwrite: Annotated[
        bool | None,
        Decides.WHERE,
        Shown.COMMON,
        Field(description="Overwrite an earlier run's files in this run's folders."),
    ] = None
    log_json: Annotated[
        Path | None, Decides.WHERE, Field(description="Also log events to this file, one JSON object per line.")
    ] = None

    @property
    def as_gguf(self) -> bool:
        """Whether the model is saved as a GGUF file."""
        return self.model is not None and self.model.suffix.lower() == ".gguf"
