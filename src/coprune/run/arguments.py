"""Keyword arguments of `coprune.prune` and `coprune.estimate` as types, for editors and type checkers.

A test keeps them equal to the settings of a recipe and the options of the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from transformers import PreTrainedTokenizerBase

from coprune.data.in_memory import CalibrationData, TextData
from coprune.evaluation.measure_arguments import AnswerArguments
from coprune.recipe.choice import Choice
from coprune.recipe.outcome import EvaluatePart, OutputPart
from coprune.recipe.parts import CalibratePart, PrunePart
from coprune.recipe.structure import RemovePart
from coprune.recipe.train import Mode, TrainPart

File = str | Path
Options = Mapping[str, bool | int | float | str | None]
Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""


class MethodArguments(TypedDict, total=False):
    """The methods' own options, each for the methods that have it; see `coprune methods`."""

    block_size: int
    cycles: int
    damping: float
    group: Literal["row", "matrix"]
    inner_loop: Literal["auto", "torch", "triton"]
    mask_rounds: int
    power: float
    refit_rounds: int
    rho: float
    rounds: int
    rounds_per_rho: int
    score: Literal["magnitude", "wanda"] | Named | Sequence[Named]
    selection: Literal["sequential", "iterative"]
    start: Literal["magnitude", "wanda", "ria"]


class CalibrationArguments(TypedDict, total=False):
    """Arguments of pruning and calibration."""

    prune: PrunePart | Mapping[str, Any]
    options: Options
    use_variant: bool
    sparsity: float | None
    sparsity_ratio: float | None
    pattern: str
    sparsity_type: str
    permute: bool
    rotate: bool
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    calibrate: CalibratePart | Mapping[str, Any]
    dataset: CalibrationData
    nsamples: int
    seqlen: int | None
    calibrate_on: Literal["all", "generated"]
    bos: Literal["auto", "first", "every", "never"]
    seed: int
    batch_size: int | None
    activation_memory: float | None
    device_activation_memory: float | None
    propagation: Literal["block", "sequential", "dense"]
    allocation: Named
    refine: Named | Sequence[Named]
    reconstruct: int | str
    reconstruct_tokens: int
    reconstruct_lr: float
    reconstruct_dtype: Literal["float32", "bfloat16"]


class StructureArguments(TypedDict, total=False):
    """Arguments of structured removal."""

    remove: str | Sequence[str] | RemovePart | Mapping[str, Any]
    domains: str | Sequence[str] | Mapping[str, File]
    blend: str
    align: int
    vocabulary_text: str | Sequence[str] | Mapping[str, float]
    vocabulary_force: bool


class OutcomeArguments(AnswerArguments, total=False):
    """Arguments of loading, training, measuring and writing."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    cache_dir: File | None
    stream: bool | None
    check_memory: bool
    train: Literal["whole", "blocks"] | TrainPart | Mapping[str, Any] | None
    finetune: Mode | str | None
    finetune_minutes: float | None
    finetune_tokens: int | None
    finetune_lr: float | None
    finetune_rates: Literal["absolute", "relative"]
    finetune_accumulate: int | None
    finetune_dtype: Literal["float32", "bfloat16"]
    evaluate: bool | EvaluatePart | Mapping[str, Any]
    evaluate_dense: bool
    eval_data: TextData | None
    eval_images: int | None
    eval_tokens: int | None
    eval_zero_shot: bool
    tasks: str | Sequence[str] | None
    num_fewshot: int
    include_path: File | None
    trust_tasks: bool
    limit: int | None
    apply_chat_template: bool
    gen_kwargs: str | None
    log_samples: File | None
    prompt: str
    layer_error: bool
    gate: bool
    require: str | None
    output: OutputPart | Mapping[str, Any]
    save: File | None
    save_model: File | None
    encoding: Literal["source", "dense"]
    report_to: str | Sequence[str] | None
    push_to_hub: str | None
    private: bool | None
    overwrite: bool | None
    log_json: File | None


class ProcessorArguments(TypedDict, total=False):
    """Aliases of `processor`."""

    tokenizer: PreTrainedTokenizerBase | None
    image_processor: Any


class PruneArguments(
    ProcessorArguments, MethodArguments, StructureArguments, CalibrationArguments, OutcomeArguments, total=False
):
    """A recipe's settings, but for the model and the method's name, and the methods' own options."""
