"""The part of a recipe about training a pruned model: all of `coprune finetune`, and the training in `coprune prune`."""

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
"""Names usable instead of patterns: the blocks and what was pruned around them, or only the routers of experts."""
Mode = Literal["lora", "dense", "distill", "lora-distill"]
LEARNING_RATES: dict[Mode, float] = {"lora": 1e-4, "dense": 5e-5, "distill": 5e-5, "lora-distill": 2e-3}


def has_adapters(mode: str | None) -> bool:
    """Return whether a mode trains adapters and freezes the weights."""
    return mode in ("lora", "lora-distill")


def has_teacher(mode: str | None) -> bool:
    """Return whether a mode distils from the dense model."""
    return mode in ("distill", "lora-distill")


class AdapterPart(Part):
    """Settings of adapters, trained instead of the weights."""

    title = "Adapters (--mode lora or lora-distill)"
    prefix = "finetune_"

    rank: Annotated[int, _RESULT, Field(description="lora: rank of the adapters.", ge=1)] = 8
    alpha: Annotated[float, _RESULT, Field(description="lora: the update is scaled by alpha / rank.", gt=0)] = 16.0
    masked: Annotated[
        bool,
        _RESULT,
        Field(description="lora: mask the update; otherwise adapters are plain PEFT ones and stay unmerged."),
    ] = True


class TrainPart(Part):
    """Settings of training the pruned model."""

    title = "Fine-tuning"
    prefix = "finetune_"
    head = "mode"

    mode: Annotated[
        Mode | None,
        Word("finetune"),
        _RESULT,
        Shown.COMMON,
        Field(description="Fine-tune the pruned model, keeping its zeros."),
    ] = None
    minutes: Annotated[
        float | None,
        _RESULT,
        Shown.COMMON,
        Field(
            description="Time limit, from loading to saving; the learning rate falls with it. [one pass over the text]",
            gt=0,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        _RESULT,
        Field(
            description="Number of tokens to fine-tune on, which sets the number of steps. [one pass over the text]",
            ge=1,
        ),
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
        Field(description="Gradient accumulation: forward passes per step. [8 of text, 1 of images]", ge=1),
    ] = None
    learning_rate: Annotated[
        float | None,
        Word("finetune_lr"),
        _RESULT,
        Field(
            description="Peak learning rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]", gt=0
        ),
    ] = None
    rates: Annotated[
        Literal["absolute", "relative"],
        _RESULT,
        Field(
            description="absolute: one learning rate for all trained weights; relative: times the size of each "
            "matrix and vector, so that one rate serves models with smaller or larger weights."
        ),
    ] = "absolute"
    only: Annotated[
        Globs,
        _RESULT,
        Field(
            description="Train only weights that match this pattern, such as '*.q_proj', or blocks or routers; repeatable. "
            "blocks: freeze embeddings, head and other matrices around the blocks, unless they were pruned; routers: only the "
            "routers, after experts were removed. [lora: all pruned linear layers; else all weights]"
        ),
    ] = ()
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        _RESULT,
        Field(description="Compute type of the fine-tuning; trained weights are float32."),
    ] = "float32"
    gradient_checkpointing: Annotated[bool, _RESULT, Field(description="Recompute activations to save memory.")] = False
    held_out: Annotated[
        float,
        _RESULT,
        Field(
            description="Share of the samples held out (at most 64 windows or 2,048 images); 0: no held-out loss.",
            ge=0,
            lt=1,
        ),
    ] = 0.05
    save_every: Annotated[
        int,
        Decides.WHERE,
        Field(description="Steps between checkpoints from which training resumes.", ge=1),
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
        Field(description="The dense model: target of distill, and the reference for answers. [in prune: the model]"),
    ] = None
    adapters: AdapterPart = AdapterPart()

    @property
    def scope(self) -> Scope:
        """Which weights are trained: all, those of the blocks only, or routers."""
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
    if not has_adapters(asked.mode) and (said := asked.adapters.first_changed()) is not None:
        word = f"{asked.adapters.prefix}{said[-1]}"
        cause: Words = (Setting(word), " has no effect with ", Set("finetune", asked.mode))
        return BadInput(cause, field=word, value=getattr(asked.adapters, said[-1]), fix=LeaveOut(word))
    return None


def _of_how(asked: TrainPart) -> BadInput | None:
    adapters = has_adapters(asked.mode)
    if adapters and asked.rates == "relative":
        empty = "adapters begin at zero, so a rate cannot be relative to their size"
        return BadInput(empty, field="finetune_rates", value=asked.rates, fix=LeaveOut("finetune_rates"))
    named = [one for one in asked.only if one in SCOPES]
    if named and (adapters or len(asked.only) > 1):
        own = "adapters choose their own matrices" if adapters else f"{named[0]} already says what to train"
        fix: Words = LeaveOut("finetune_only") if adapters else "leave out the others"
        return BadInput(own, field="finetune_only", value=asked.only, fix=fix)
    if asked.tokens is not None and asked.max_steps is not None:
        cause: Words = (Set("finetune_max_steps", asked.max_steps), " also sets the length of the training")
        return BadInput(cause, field="finetune_tokens", value=asked.tokens, fix=LeaveOut("finetune_max_steps"))
    return None
