"""What `coprune.finetune` takes by name, as a type; a test keeps it equal to the settings of a fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from coprune.data.given import CalibrationData, TextData
from coprune.evaluation.arguments import AnswerArguments


class TrainingArguments(TypedDict, total=False):
    """What is trained, on what, and how long."""

    dataset: CalibrationData
    seqlen: int | None
    batch_size: int | None
    accumulate: int | None
    epochs: float
    max_steps: int | None
    tokens: int | None
    max_samples: int | None
    minutes: float | None
    learning_rate: float | None
    rates: Literal["absolute", "relative"]
    scope: Literal["all", "blocks"]
    schedule: Literal["cosine", "linear", "constant"]
    warmup: float
    optimizer: Literal["adamw", "sgd", "adafactor"]
    weight_decay: float
    max_grad_norm: float
    train: str | Sequence[str]
    exclude: str | Sequence[str]
    rank: int
    alpha: float
    dropout: float
    masked: bool
    teacher: str | Path | None
    temperature: float | None
    kl_weight: float
    hidden_weight: float | None
    text_weight: float
    top_k: int | None
    bf16: bool
    gradient_checkpointing: bool
    seed: int
    device: str


class FinetuneArguments(TrainingArguments, AnswerArguments, total=False):
    """The settings of a fine-tuning but for model and mode."""

    evaluations: int
    held_out: float
    patience: int | None
    save_every: int
    evaluate: bool
    eval_data: TextData | None
    eval_images: int | None
    eval_seqlen: int | None
    eval_tokens: int | None
    bos: Literal["auto", "first", "every", "never"]
    gate: bool
    require: str | None
    against: str | Path | None
    cache_dir: str | Path | None
    report_to: str
    save: str | Path | None
    save_model: str | Path | None
    overwrite: bool | None
