"""The part of a recipe that says how a pruned model is trained: all of `coprune finetune`, and what prune trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from coprune.base.errors import BadInput
from coprune.base.validation import path_as_text
from coprune.base.words import LeaveOut, Set, Setting, Words
from coprune.recipe.parts import Decides, Globs, Part, Shown, Word

_RESULT = Decides.RESULT | Decides.COST
_MEASURED = Decides.MEASUREMENT
Scope = Literal["all", "blocks", "routers"]
SCOPES: dict[str, Scope] = {"blocks": "blocks", "routers": "routers"}
"""In the place of patterns: the blocks, and what was pruned around them; or only what chooses among experts."""
Mode = Literal["lora", "dense", "distill", "lora-distill"]
LEARNING_RATES: dict[Mode, float] = {"lora": 1e-4, "dense": 5e-5, "distill": 5e-5, "lora-distill": 2e-3}


def has_adapters(mode: str | None) -> bool:
    """Return whether a mode trains adapters and leaves the weights alone."""
    return mode in ("lora", "lora-distill")


def has_teacher(mode: str | None) -> bool:
    """Return whether a mode distils from the dense model."""
    return mode in ("distill", "lora-distill")


class AdapterPart(Part):
    """Adapters that are trained in the weights' place."""

    title = "Adapters (--mode lora or lora-distill)"
    prefix = "finetune_"

    rank: Annotated[int, _RESULT, Field(description="lora: rank of the adapters.", ge=1)] = 8
    alpha: Annotated[float, _RESULT, Field(description="lora: the update is scaled by alpha / rank.", gt=0)] = 16.0
    masked: Annotated[
        bool,
        _RESULT,
        Field(description="lora: mask the update; without, adapters are plain PEFT's and stay unmerged."),
    ] = True


class TrainPart(Part):
    """Training of the pruned model."""

    title = "Fine-tuning"
    prefix = "finetune_"
    head = "mode"

    mode: Annotated[
        Mode | None,
        Word("finetune"),
        _RESULT,
        Shown.COMMON,
        Field(description="Fine-tune the pruned model with its zeros kept."),
    ] = None
    minutes: Annotated[
        float | None,
        _RESULT,
        Shown.COMMON,
        Field(
            description="Limit on the time of the fine-tuning, with loading, measuring and saving; the learning rate "
            "falls with it. [one pass over the text]",
            gt=0,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        _RESULT,
        Field(description="Fine-tune on so many tokens: as many steps as they fill. [one pass over the text]", ge=1),
    ] = None
    epochs: Annotated[
        float,
        _RESULT,
        Field(description="Passes over the data, unless tokens, steps or minutes are given.", gt=0),
    ] = 1.0
    max_steps: Annotated[int | None, _RESULT, Field(description="Optimiser steps.", ge=1)] = None
    batch_size: Annotated[
        int | None,
        _RESULT,
        Field(description="Windows or images per process and forward pass. [1 window, 32 images]", ge=1),
    ] = None
    accumulate: Annotated[
        int | None,
        _RESULT,
        Field(description="Forward passes per step of the fine-tuning. [8 of text, 1 of images]", ge=1),
    ] = None
    learning_rate: Annotated[
        float | None,
        Word("finetune_lr"),
        _RESULT,
        Field(description="Peak rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]", gt=0),
    ] = None
    rates: Annotated[
        Literal["absolute", "relative"],
        _RESULT,
        Field(
            description="absolute: one learning rate for all that is trained; relative: times the size of each "
            "matrix and vector, so that one rate serves models with smaller or larger weights."
        ),
    ] = "absolute"
    only: Annotated[
        Globs,
        _RESULT,
        Field(
            description="Train only what matches this pattern, such as '*.q_proj', or blocks or routers; repeatable. "
            "blocks: embeddings, head and other "
            "matrices around the blocks stay as they are, unless they were pruned; routers: only what chooses among experts, "
            "after some were removed. [lora: all pruned linear layers; else all weights]"
        ),
    ] = ()
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        _RESULT,
        Field(description="What the fine-tuning computes in; trained weights are float32."),
    ] = "float32"
    gradient_checkpointing: Annotated[bool, _RESULT, Field(description="Recompute activations to save memory.")] = False
    held_out: Annotated[
        float,
        _RESULT,
        Field(
            description="Share of the samples held out (at most 64 windows or 2,048 images); 0: nothing is watched.",
            ge=0,
            lt=1,
        ),
    ] = 0.05
    save_every: Annotated[
        int,
        Decides.WHERE,
        Field(description="Steps between the states from which a training resumes.", ge=1),
    ] = 100
    eval_seqlen: Annotated[
        int | None,
        _MEASURED,
        Field(description="Tokens per window of perplexity. [as in training]", ge=2),
    ] = None
    teacher: Annotated[
        str | None,
        BeforeValidator(path_as_text, json_schema_input_type=str | Path | None),
        _RESULT,
        Field(
            description="The dense model: distill trains toward it, and answers that are asked for are compared with its. [in "
            "prune: the model]"
        ),
    ] = None
    adapters: AdapterPart = AdapterPart()

    @property
    def scope(self) -> Scope:
        """Which weights are trained: all, those of the blocks alone, or routers."""
        return SCOPES.get(self.only[0], "all") if self.only else "all"

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None or self.mode is None:
            return self.learning_rate or 0.0
        return LEARNING_RATES[self.mode]


def cannot_train(asked: TrainPart) -> BadInput | None:
    """Return the error in the settings of a training, or None."""
    return _of_mode(asked) or _of_how(asked)


def _of_mode(asked: TrainPart) -> BadInput | None:
    """Return the error for a setting that this mode ignores."""
    if not has_adapters(asked.mode) and (said := asked.adapters.first_said()) is not None:
        word = f"{asked.adapters.prefix}{said[-1]}"
        cause: Words = (Setting(word), " means nothing to ", Set("finetune", asked.mode))
        return BadInput(cause, field=word, value=getattr(asked.adapters, said[-1]), fix=LeaveOut(word))
    return None


def _of_how(asked: TrainPart) -> BadInput | None:
    adapters = has_adapters(asked.mode)
    if adapters and asked.rates == "relative":
        empty = "adapters begin at zero, which has no size that a rate could be relative to"
        return BadInput(empty, field="finetune_rates", value=asked.rates, fix=LeaveOut("finetune_rates"))
    named = [one for one in asked.only if one in SCOPES]
    if named and (adapters or len(asked.only) > 1):
        own = "adapters are on matrices of their own" if adapters else f"{named[0]} already says what is trained"
        fix: Words = LeaveOut("finetune_only") if adapters else "leave out the others"
        return BadInput(own, field="finetune_only", value=asked.only, fix=fix)
    if asked.tokens is not None and asked.max_steps is not None:
        cause: Words = (Set("finetune_max_steps", asked.max_steps), " also sets the length of the training")
        return BadInput(cause, field="finetune_tokens", value=asked.tokens, fix=LeaveOut("finetune_max_steps"))
    return None
