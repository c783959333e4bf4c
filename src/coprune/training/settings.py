"""One fine-tuning run as data: everything that decides its result, as one frozen and validated object.

The fields' descriptions are the help texts of the command's options. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import AliasChoices, Field, ValidationError, model_validator

from coprune.base.environment import asks_for_fsdp
from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import explain
from coprune.base.words import LeaveOut, Set, Setting, Words
from coprune.recipe.answers import (
    AnswersPart,
    Count,
    Gate,
    NewTokens,
    Prompts,
    Require,
    Seed,
    Temperature,
    cannot_require,
)
from coprune.recipe.finetune import LEARNING_RATES, EvalSeqlen, Mode, Rates, Scope, has_adapters, has_teacher
from coprune.recipe.outcome import Overwrite
from coprune.recipe.parts import Decides, Globs, Part
from coprune.recipe.retired import passed_over, retired
from coprune.recipe.tree import FLAT

_RESULT, _MEASURED = Decides.RESULT, Decides.MEASUREMENT
_OLDER = "block_size"  # what `seqlen` was called
_SEQLEN = Field(
    description="Tokens per training window. [min(1024, model's limit)]",
    ge=2,
    validation_alias=AliasChoices("seqlen", _OLDER),
)
_ANSWERS = {place.rpartition(".")[2]: word for word, place in FLAT.items() if place.startswith("evaluate.answers.")}


class FinetuneSettings(Part):
    """One fine-tuning run: pruned model, mode, data, how long, output."""

    model: Annotated[str, _RESULT, Field(description="The pruned model: a local folder or Hub id.", min_length=1)]
    mode: Annotated[
        Mode,
        _RESULT,
        Field(
            description="lora: low-rank adapters, masked so that merging keeps every zero; dense: the weights themselves; "
            "distill: the weights, toward the dense model (--teacher); lora-distill: adapters, toward it."
        ),
    ] = "lora"
    dataset: Annotated[
        str,
        _RESULT,
        Field(
            description="Text to train on, as in prune: wikitext2, c4, embedded, a datasets id or a local file; or images: "
            "digits, a folder of classes, .parquet, or a datasets id."
        ),
    ] = "wikitext2"
    seqlen: Annotated[int | None, _RESULT, _SEQLEN] = None
    batch_size: Annotated[
        int | None,
        _RESULT,
        Field(description="Windows or images per process and forward pass. [1 window, 32 images]", ge=1),
    ] = None
    accumulate: Annotated[
        int | None, _RESULT, Field(description="Forward passes per optimiser step. [8 of text, 1 of images]", ge=1)
    ] = None
    epochs: Annotated[
        float, _RESULT, Field(description="Passes over the data, unless steps or minutes are given.", gt=0)
    ] = 1.0
    max_steps: Annotated[int | None, _RESULT, Field(description="Optimiser steps.", ge=1)] = None
    tokens: Annotated[
        int | None, _RESULT, Field(description="Train on so many tokens: as many steps as they fill.", ge=1)
    ] = None
    max_samples: Annotated[int | None, _RESULT, Field(description="Use only so many windows or images.", ge=1)] = None
    minutes: Annotated[
        float | None,
        _RESULT,
        Field(description="Train for so long; the learning rate falls with the time.", gt=0),
    ] = None
    learning_rate: Annotated[
        float | None,
        _RESULT,
        Field(description="Peak learning rate. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]", gt=0),
    ] = None
    rates: Rates = "absolute"
    scope: Scope = "all"
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        _RESULT,
        Field(description="How the learning rate falls after the warm-up."),
    ] = "linear"
    warmup: Annotated[float, _RESULT, Field(description="Share of the training in which it rises.", ge=0, lt=1)] = 0.03
    optimizer: Annotated[
        Literal["adamw", "sgd", "adafactor"], _RESULT, Field(description="sgd has a momentum of 0.9.")
    ] = "adamw"
    weight_decay: Annotated[float, _RESULT, Field(description="Weight decay.", ge=0)] = 0.0
    max_grad_norm: Annotated[float, _RESULT, Field(description="Clip gradients to this norm; 0: not.", ge=0)] = 1.0
    train: Annotated[
        Globs,
        _RESULT,
        Field(
            description="Train only what matches this pattern, e.g. '*.q_proj'; repeatable. [lora: all pruned linear "
            "layers; else all weights]"
        ),
    ] = ()
    exclude: Annotated[
        Globs,
        _RESULT,
        Field(description="Leave what matches this pattern as it is, and blocks of which all does; repeatable."),
    ] = ()
    rank: Annotated[int, _RESULT, Field(description="lora: rank of the adapters.", ge=1)] = 8
    alpha: Annotated[float, _RESULT, Field(description="lora: the update is scaled by alpha / rank.", gt=0)] = 16.0
    dropout: Annotated[float, _RESULT, Field(description="lora: dropout before plain adapters.", ge=0, lt=1)] = 0.0
    masked: Annotated[
        bool,
        _RESULT,
        Field(description="lora: mask the update; without, adapters are plain PEFT's and stay unmerged."),
    ] = True
    teacher: Annotated[str | None, _RESULT, Field(description="distill: the dense model.")] = None
    temperature: Annotated[
        float | None,
        _RESULT,
        Field(description="distill: of the compared distributions. [1 of text, 2 of images]", gt=0),
    ] = None
    kl_weight: Annotated[float, _RESULT, Field(description="distill: weight of the logits' divergence.", ge=0)] = 1.0
    hidden_weight: Annotated[
        float | None,
        _RESULT,
        Field(description="distill: weight of the blocks' relative errors. [1; 0 with --top-k or for images]", ge=0),
    ] = None
    text_weight: Annotated[float, _RESULT, Field(description="distill: weight of the data's own loss.", ge=0)] = 0.0
    top_k: Annotated[
        int | None,
        _RESULT,
        Field(description="distill: run the teacher ahead and keep its so many largest logits per token.", ge=1),
    ] = None
    bf16: Annotated[bool, _RESULT, Field(description="Compute in bfloat16; trained weights stay float32.")] = False
    gradient_checkpointing: Annotated[bool, _RESULT, Field(description="Recompute activations to save memory.")] = False
    seed: Annotated[int, _RESULT, Field(description="Seed of everything random.", ge=0, lt=2**32)] = 0
    device: Annotated[
        str, _RESULT, Field(description="auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")
    ] = "auto"
    evaluations: Annotated[
        int, _RESULT, Field(description="How often the loss on held-out samples is measured.", ge=0)
    ] = 5
    held_out: Annotated[
        float,
        _RESULT,
        Field(description="Share of them held out (at most 64 windows or 2,048 images).", ge=0, lt=1),
    ] = 0.05
    patience: Annotated[
        int | None,
        _RESULT,
        Field(description="Stop after so many evaluations without a better loss, and keep the best.", ge=1),
    ] = None
    save_every: Annotated[
        int, Decides.WHERE, Field(description="Steps between the states from which a run resumes.", ge=1)
    ] = 100
    evaluate: Annotated[bool, _MEASURED, Field(description="Measure perplexity or accuracy before and after.")] = True
    eval_data: Annotated[
        str | None,
        _MEASURED,
        Field(
            description="Text for perplexity or images for accuracy, comma-separated. [test split of the data; of a text of your "
            "own the last tenth, which is held out]"
        ),
    ] = None
    eval_images: Annotated[
        int | None, _MEASURED, Field(description="So many images of each set, evenly spaced. [all]", ge=1)
    ] = None
    eval_seqlen: EvalSeqlen = None
    eval_tokens: Annotated[int | None, _MEASURED, Field(description="So many tokens of each. [all]", ge=2)] = None
    bos: Annotated[
        Literal["auto", "first", "every", "never"],
        _RESULT | _MEASURED,
        Field(description="Where the token that begins a text (BOS) stands in windows, as in prune."),
    ] = "auto"
    generate: Prompts = None
    generate_prompts: Count = None
    generate_tokens: NewTokens = 128
    generate_temperature: Temperature = 0.8
    generate_seed: Seed = 0
    gate: Gate = True
    require: Require = None
    against: Annotated[
        str | None,
        _MEASURED,
        Field(description="The dense model, with whose answers the model's are compared. [with those from before]"),
    ] = None
    cache_dir: Annotated[Path | None, Decides.WHERE, Field(description="Where downloads are kept.")] = None
    report_to: Annotated[
        str, Decides.WHERE, Field(description="Trackers as transformers names them, such as wandb.")
    ] = "none"
    save: Annotated[Path | None, Decides.WHERE, Field(description="Run folder. [out/finetune/MODEL/MODE]")] = None
    save_model: Annotated[
        Path | None, Decides.WHERE, Field(description="Folder for the model. [model/ in the run folder]")
    ] = None
    overwrite: Overwrite = None

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not passed_over(name, value)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
        if (error := contradiction(self, changed)) is not None:
            raise error
        return self

    @property
    def answers(self) -> AnswersPart:
        """What the model writes before and after, as a recipe says it."""
        return AnswersPart(**{field: getattr(self, word) for field, word in _ANSWERS.items()})

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.mode] if self.learning_rate is None else self.learning_rate

    @property
    def weight_of_hidden(self) -> float:
        """Weight of the hidden states' error in distillation."""
        default = 0.0 if self.top_k is not None else 1.0
        return default if self.hidden_weight is None else self.hidden_weight

    @property
    def run_folder(self) -> Path:
        """Where curves, adapters and resumable states go."""
        return self.save or Path("out") / "finetune" / (Path(self.model).name or "model") / self.mode

    @property
    def model_folder(self) -> Path:
        """Where the model goes."""
        return self.save_model or self.run_folder / "model"

    def to_yaml(self, usual: bool = True) -> str:
        """The settings as YAML. usual: whether those are in it that are as they are where nothing is said."""
        said = self.model_dump(mode="json", exclude_none=True, exclude_defaults=not usual)
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=10_000)


def make_settings(values: dict[str, Any]) -> FinetuneSettings:
    """Build settings, turning what pydantic finds wrong into one clear BadInput."""
    if find_spec("peft") is None:
        raise BadInput("fine-tuning needs peft", fix="pip install 'coprune[finetune]'")
    if asks_for_fsdp():
        raise BadInput(
            "fine-tuning over FSDP is not there yet",
            fix="use data parallel processes: torchrun, or accelerate without FSDP",
        )
    for name in values:
        if name not in FinetuneSettings.model_fields and name != _OLDER and retired(name) is None:
            raise unknown_name("setting", name, FinetuneSettings.model_fields, field=name)
    try:
        return FinetuneSettings.model_validate(values)
    except ValidationError as error:
        raise explain(error) from None


class Settings(Protocol):
    """The settings that may contradict each other."""

    @property
    def mode(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def hidden_weight(self) -> float | None: ...
    @property
    def weight_of_hidden(self) -> float: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def text_weight(self) -> float: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def masked(self) -> bool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def rates(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def train(self) -> tuple[str, ...]: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def held_out(self) -> float: ...
    @property
    def answers(self) -> AnswersPart: ...
    @property
    def against(self) -> str | None: ...
    @property
    def save(self) -> Path | None: ...
    @property
    def save_model(self) -> Path | None: ...


_OF_DISTILLATION = ("temperature", "kl_weight", "hidden_weight", "text_weight")
_OF_ADAPTERS = ("rank", "alpha", "dropout", "masked")


def contradiction(asked: Settings, changed: Collection[str]) -> BadInput | None:
    """What is wrong with the settings taken together, with the fix; None if nothing is.

    changed: names of those that are not as they are where nothing is said of them.
    """
    wrong = _of_teacher(asked) or _of_mode(asked, changed) or _of_training(asked)
    return wrong or _of_answers(asked) or _of_folders(asked)


def _of_teacher(asked: Settings) -> BadInput | None:
    if has_teacher(asked.mode) and asked.teacher is None:
        return BadInput(
            f"{asked.mode} needs the dense model", field="teacher", fix=("name it with ", Setting("teacher"))
        )
    if not has_teacher(asked.mode) and (asked.teacher is not None or asked.top_k is not None):
        cause: Words = ("a teacher belongs to ", Set("mode", "distill"), " or ", Set("mode", "lora-distill"))
        return BadInput(cause, field="mode", value=asked.mode)
    if asked.top_k is not None and asked.hidden_weight:
        cause = ("a teacher that runs ahead (", Set("top_k", asked.top_k), ") leaves no hidden states")
        fix: Words = ("add ", Set("hidden_weight", 0))
        return BadInput(cause, field="hidden_weight", value=asked.hidden_weight, fix=fix)
    if has_teacher(asked.mode) and not asked.kl_weight + asked.weight_of_hidden + asked.text_weight:
        return nothing_to_learn()
    return None


def nothing_to_learn() -> BadInput:
    """What to tell where every part of a distillation's loss has the weight zero."""
    fix: Words = ("leave out ", Set("kl_weight", 0))
    return BadInput("nothing is left of the distillation's loss", field="kl_weight", value=0, fix=fix)


def _of_mode(asked: Settings, changed: Collection[str]) -> BadInput | None:
    """A setting of another mode, which this one would not look at."""
    unused = [] if has_teacher(asked.mode) else [*_OF_DISTILLATION]
    unused += [] if has_adapters(asked.mode) else [*_OF_ADAPTERS]
    for name in unused:
        if name in changed:
            cause: Words = (Setting(name), " means nothing to ", Set("mode", asked.mode))
            return BadInput(cause, field=name, value=getattr(asked, name), fix=LeaveOut(name))
    return None


def _of_training(asked: Settings) -> BadInput | None:
    if has_adapters(asked.mode) and asked.masked and asked.dropout:
        product = "the masked update is one product with the weights, which leaves no place for dropout"
        return BadInput(product, field="dropout", value=asked.dropout, fix=LeaveOut("dropout"))
    if has_adapters(asked.mode) and asked.rates == "relative":
        empty = "adapters begin at zero, which has no size that a rate could be relative to"
        return BadInput(empty, field="rates", value=asked.rates, fix=LeaveOut("rates"))
    if asked.scope != "all" and (has_adapters(asked.mode) or asked.train):
        own: Words = (
            (Setting("train"), " says what is trained, too") if asked.train else "adapters are on matrices of their own"
        )
        return BadInput(own, field="scope", value=asked.scope, fix=LeaveOut("scope"))
    if asked.tokens is not None and asked.max_steps is not None:
        cause: Words = (Set("max_steps", asked.max_steps), " says how long to train, too")
        return BadInput(cause, field="tokens", value=asked.tokens, fix=LeaveOut("max_steps"))
    if asked.patience is not None and not (asked.evaluations and asked.held_out):
        cause = (Set("patience", asked.patience), " needs evaluations during the training")
        fix: Words = ("ask for some with ", Setting("held_out" if asked.evaluations else "evaluations"))
        return BadInput(cause, field="patience", value=asked.patience, fix=fix)
    return None


def _of_answers(asked: Settings) -> BadInput | None:
    return cannot_require(asked.answers, ("ask for them with ", Setting("against")) if asked.against is None else None)


def _of_folders(asked: Settings) -> BadInput | None:
    if asked.save is not None and asked.save == asked.save_model:
        same = "the run folder and the model folder are the same"
        return BadInput(same, field="save_model", value=asked.save, fix=("name another with ", Setting("save_model")))
    return None
