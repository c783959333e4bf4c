"""The part of a recipe that says how the pruned model is trained, and what does not go with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from coprune.recipe.parts import Decides, Part, Shown, Word

_RESULT = Decides.RESULT | Decides.COST
Mode = Literal["lora", "dense", "distill", "lora-distill"]
LEARNING_RATES: dict[Mode, float] = {"lora": 1e-4, "dense": 5e-5, "distill": 5e-5, "lora-distill": 2e-3}
Rates = Annotated[
    Literal["absolute", "relative"],
    _RESULT,
    Field(
        description="absolute: one learning rate for all that is trained; relative: times the size of each "
        "matrix and vector, so that one rate serves models with smaller or larger weights."
    ),
]
Scope = Annotated[
    Literal["all", "blocks"],
    _RESULT,
    Field(
        description="all: every weight is trained; blocks: embeddings, head and other matrices around the blocks stay as they "
        "are, unless they were pruned."
    ),
]

EvalSeqlen = Annotated[
    int | None, Decides.MEASUREMENT, Field(description="Tokens per window of perplexity. [as in training]", ge=2)
]


def has_adapters(mode: str | None) -> bool:
    """Whether adapters are trained, and the weights are left alone."""
    return mode in ("lora", "lora-distill")


def has_teacher(mode: str | None) -> bool:
    """Whether the model is trained toward the dense one."""
    return mode in ("distill", "lora-distill")


class TrainPart(Part):
    """Training of the pruned model."""

    title = "Fine-tuning"
    prefix = "finetune_"

    mode: Annotated[
        Mode | None,
        Word("finetune"),
        _RESULT,
        Shown.COMMON,
        Field(description="Fine-tune the pruned model with its zeros kept (coprune finetune has more settings)."),
    ] = None
    minutes: Annotated[
        float | None, _RESULT, Shown.COMMON, Field(description="Fine-tune for so long. [one pass over the text]", gt=0)
    ] = None
    tokens: Annotated[
        int | None, _RESULT, Field(description="Fine-tune on so many tokens. [one pass over the text]", ge=1)
    ] = None
    learning_rate: Annotated[
        float | None,
        Word("finetune_lr"),
        _RESULT,
        Field(description="Peak rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]", gt=0),
    ] = None
    rates: Rates = "absolute"
    scope: Scope = "all"
    accumulate: Annotated[
        int | None, _RESULT, Field(description="Windows per step of the fine-tuning. [8 of text, 1 of images]", ge=1)
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        _RESULT,
        Field(description="What the fine-tuning computes in; trained weights are float32."),
    ] = "float32"
