"""Arguments of `coprune.evaluate` and `coprune.compare` by name, as a type; a test keeps it equal to what they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict


class AnswerArguments(TypedDict, total=False):
    """Prompts, and how they are answered."""

    generate: str | Path | None
    generate_prompts: int | None
    generate_tokens: int
    generate_temperature: float


class MeasureArguments(AnswerArguments, total=False):
    """The measurements of a model, and how they are done."""

    require: str | None
    tasks: str | Sequence[str] | None
    zero_shot: bool
    num_fewshot: int
    include_path: str | Path | None
    trust_tasks: bool
    limit: int | None
    apply_chat_template: bool
    gen_kwargs: str | None
    log_samples: str | Path | None
    seqlen: int | None
    bos: Literal["auto", "first", "every", "never"]
    batch_size: int | None
    tokens: int | None
    images: int | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    cache_dir: str | Path | None
