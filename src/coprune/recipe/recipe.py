"""The run as data: everything that decides a run's result, as one frozen and validated object.

The command line makes one, the run folder keeps it as `recipe.yaml`, and a run can be repeated from that file alone.
The fields' descriptions are the help texts of the command's options. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coprune.base.errors import BadInput
from coprune.recipe.checks import contradiction
from coprune.recipe.pattern import parse_pattern

OptionValue = bool | int | float | str


class Recipe(BaseModel):
    """One pruning run: model, method, target, data, evaluation, output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(description="Hub id, local folder, GGUF file, or smollm2-135m.", min_length=1)]
    method: Annotated[str, Field(description="How to choose (and mend) weights; see: coprune methods.")] = "wanda"
    options: Annotated[
        dict[str, OptionValue], Field(description="The method's own options, such as block_size of sparsegpt.")
    ] = {}
    sparsity: Annotated[
        float | None, Field(description="Fraction of zeros, 0 ≤ s < 1; an N:M pattern sets it. Without either: 0.5.")
    ] = None
    pattern: Annotated[str, Field(description="unstructured, or N:M = N kept of every M inputs (2:4, 4:8, 1:4 …).")] = (
        "unstructured"
    )
    include: Annotated[
        tuple[str, ...], Field(description="Prune only matrices that match this pattern, e.g. '*.q_proj'; repeatable.")
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Field(description="Leave matrices that match this pattern alone; repeatable.")
    ] = ()
    propagation: Annotated[
        Literal["block", "sequential", "dense"],
        Field(
            description="block: statistics of a block from its dense weights, as in the papers; sequential: each matrix "
            "from the inputs that its pruned predecessors give it, in one pass (faster); dense: each matrix from its inputs in "
            "the dense model, in one pass, so that all methods and patterns have the same statistics."
        ),
    ] = "block"
    refine: Annotated[
        tuple[str, ...],
        Field(
            description="Improve every mask's weights: refit, swaps (which ends with a refit), options as in "
            "refit:rounds=10; repeatable."
        ),
    ] = ()
    target: Annotated[
        Literal["pruned", "dense"],
        Field(
            description="What a matrix aims at: its dense weights on the inputs that it now gets, as in the papers, or "
            "the dense model's own outputs."
        ),
    ] = "pruned"
    allocation: Annotated[
        str,
        Field(
            description="How the sparsity is spread over the matrices: uniform, owl, alpha or error (options as in "
            "owl:spread=0.1), or a FILE.yaml of patterns of names and sparsities."
        ),
    ] = "uniform"
    permute: Annotated[
        bool,
        Field(
            description="For N:M: reorder channels first so that less is pruned, which leaves the model's outputs as "
            "they are. Loads the whole model into memory."
        ),
    ] = False
    reconstruct: Annotated[
        int, Field(description="Train every pruned block for so many steps toward the dense model's outputs.", ge=0)
    ] = 0
    reconstruct_lr: Annotated[float, Field(description="Learning rate of that.", gt=0)] = 1e-3
    reconstruct_dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="What blocks compute in while they are trained.")
    ] = "float32"
    reconstruct_parts: Annotated[
        Literal["together", "separate"], Field(description="Train attention and MLP together or one after the other.")
    ] = "together"
    finetune: Annotated[
        Literal["lora", "dense", "distill"] | None,
        Field(description="Fine-tune the pruned model with its zeros kept (coprune finetune has more settings)."),
    ] = None
    finetune_minutes: Annotated[
        float | None, Field(description="Fine-tune for so long. [one pass over the text]", gt=0)
    ] = None
    dataset: Annotated[
        str,
        Field(
            description="Calibration text: wikitext2, c4, ptb, embedded, a datasets id, or a local .txt, .jsonl or "
            ".parquet file or folder. Images: digits, a folder of classes, .parquet, or a datasets id."
        ),
    ] = "wikitext2"
    nsamples: Annotated[int, Field(description="Number of calibration samples.", ge=1)] = 128
    seqlen: Annotated[
        int | None, Field(description="Tokens per sample and per perplexity window. [min(2048, model's limit)]", ge=2)
    ] = None
    seed: Annotated[int, Field(description="Seed for the choice of calibration samples.")] = 0
    activation_memory: Annotated[
        float | None,
        Field(
            description="GiB of calibration activations to keep in memory; the rest goes to a temporary file and comes "
            "back batch by batch. [all in memory]",
            ge=0,
        ),
    ] = None
    batch_size: Annotated[
        int | None, Field(description="Samples per forward pass. [about 512 tokens on a CPU, 4096 elsewhere]", ge=1)
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."),
    ] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto"
    cache_dir: Annotated[Path | None, Field(description="Where downloads are kept. [the Hugging Face cache]")] = None
    evaluate: Annotated[bool, Field(description="Measure perplexity.")] = True
    evaluate_dense: Annotated[bool, Field(description="Measure the dense model's perplexity too.")] = True
    eval_data: Annotated[
        str | None, Field(description="Text for perplexity, comma-separated. [test split of the calibration corpus]")
    ] = None
    eval_images: Annotated[
        int | None, Field(description="Use only so many images of each evaluation set, evenly spaced. [all]", ge=1)
    ] = None
    eval_tokens: Annotated[
        int | None, Field(description="Use only so many tokens of each evaluation text. [all]", ge=2)
    ] = None
    eval_zero_shot: Annotated[
        bool, Field(description="Run zero-shot tasks on the dense and the pruned model (needs coprune[eval]).")
    ] = False
    tasks: Annotated[
        str | None,
        Field(
            description="Tasks of lm-eval to run, comma-separated; implies --eval-zero-shot. [boolq,rte,hellaswag,"
            "winogrande,arc_easy,arc_challenge,openbookqa]"
        ),
    ] = None
    num_fewshot: Annotated[int, Field(description="Solved examples before every question.", ge=0)] = 0
    include_path: Annotated[Path | None, Field(description="Folder with task definitions of your own (YAML).")] = None
    limit: Annotated[int | None, Field(description="Only the first so many items of each task. [all]", ge=1)] = None
    prompt: Annotated[
        str,
        Field(description="Text that both models continue, for the report; empty for none, as for streamed models."),
    ] = "The city of Paris is"
    report_to: Annotated[
        str | None, Field(description="Also log to these, comma-separated: tensorboard, wandb, mlflow, trackio.")
    ] = None
    push_to_hub: Annotated[
        str | None, Field(description="Upload the saved model with its card to this repository of the Hub.")
    ] = None
    log_json: Annotated[
        Path | None, Field(description="Also write what happens to this file, one JSON object a line.")
    ] = None
    check_memory: Annotated[bool, Field(description="Refuse a run that would not fit the memory.")] = True
    layer_error: Annotated[bool, Field(description="Measure every matrix's relative layer error (costs little).")] = (
        True
    )
    stream: Annotated[
        bool | None,
        Field(
            description="Read and write the model block by block, so that memory holds one block at a time. [yes for "
            "checkpoint folders; a GGUF file is read whole]"
        ),
    ] = None
    save: Annotated[
        Path | None, Field(description="Run folder for recipe, report and log. [out/MODEL/PATTERN/METHOD]")
    ] = None
    save_model: Annotated[Path | None, Field(description="Folder for the pruned model and tokenizer. [not saved]")] = (
        None
    )

    @field_validator("include", "exclude", "refine", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        """A single name may be written without a list."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (reason := contradiction(self)) is not None:
            raise ValueError(reason)
        return self

    @property
    def ratio(self) -> float:
        """The fraction of zeros that is asked for."""
        return parse_pattern(self.pattern).ratio(self.sparsity)

    @property
    def runs_tasks(self) -> bool:
        """Whether zero-shot tasks are run."""
        return self.eval_zero_shot or self.tasks is not None

    @property
    def run_folder(self) -> Path:
        """Where the run's report goes."""
        if self.save is not None:
            return self.save
        name = Path(self.model).name.removesuffix(".gguf") or "model"
        target = parse_pattern(self.pattern).label(f"{self.ratio:g}").replace(":", "-").replace(" ", "-")
        return Path("out") / name / target / self.method

    def to_yaml(self) -> str:
        """The recipe as YAML that `Recipe.from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read a recipe file. Raises BadInput if it is missing, no YAML, or no valid recipe."""
        return make_recipe(read_settings(path))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a recipe file. Raises BadInput if it cannot be read as a mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"the recipe {path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise BadInput(f"the recipe {path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(data, dict):
        raise BadInput(f"the recipe {path} holds no settings; it should read like 'model: smollm2-135m'.")
    return data


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Build a recipe, turning what pydantic finds wrong into one clear BadInput."""
    unknown = sorted(set(settings) - set(Recipe.model_fields))
    if unknown:
        from coprune.base.errors import unknown_name

        raise unknown_name("recipe field", unknown[0], Recipe.model_fields)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise BadInput("; ".join(_explain(detail) for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    field = ".".join(str(part) for part in detail["loc"])
    if not field:
        return message
    return (
        f"{field} cannot be {detail['input']!r}: {message}." if detail["type"] != "missing" else f"{field} is missing."
    )
