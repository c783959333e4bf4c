"""Generation of a text file for any run's `dataset=`, even for models that are too large to generate during the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, about
from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.base.validation import settings_of
from coprune.base.words import Setting
from coprune.data.conversations import read_prompts
from coprune.data.keyword_arguments import GenerateArguments
from coprune.evaluation.own_text import Wanted, prompt_ids, settings_for, write_own
from coprune.model.generation import positions_of
from coprune.model.loaded_model import (
    Loaded,
    handed_over_model,
    open_model,
    refuse_what_loading_decides,
    say_of_bfloat16,
)
from coprune.recipe.recipe import make_recipe
from coprune.recipe.sources import OWN, Source
from coprune.steps.generate_settings import GenerateSettings, require_free

_SAMPLES, _LENGTH = 16, 512


def generate(
    model: str | Path | PreTrainedModel,
    target: str | Path,
    prompts: str | Path | None = None,
    *,
    processor: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    **settings: Unpack[GenerateArguments],
) -> Path:
    """Generate texts or answers to prompts with a model, as a file of calibration data.

    Args:
        model: a Hub id, a folder, a GGUF file, `smollm2-135m`, or a model in memory.
        target: the .jsonl file, which must not exist. Every row has `prompt`, `answer`, `ended`, `prompt_ids` and
            `answer_ids`, so that `calibrate_on="generated"` knows the model's own tokens.
        prompts: a .jsonl file of prompts, texts in a column `prompt` or conversations; without one, every text starts from
            the BOS token.
        processor: the tokenizer of a model in memory.
        quiet: no progress bar on standard error.
        settings: how the model writes; see `coprune generate --help`.

    Returns:
        The file.

    Raises:
        BadInput: a setting is unknown or invalid, the file exists, or a prompt cannot be used.
    """
    asked, path = settings_of(GenerateSettings, settings), expand_home(target)
    require_free(path)
    with about("prompts", prompts):  # bad prompts are reported before the model is loaded
        read = None if prompts is None else read_prompts(str(prompts), asked.column)
    how = asked.model_dump(include={"column", "template"}, exclude_none=True)
    source = Source(OWN if prompts is None else f"{OWN}:{prompts}", 1.0, how)
    reporter = Reporter(quiet)
    with reporter.libraries():
        loaded = _open(model, processor, asked.model_dump(include={"dtype", "device", "cache_dir"}, exclude_unset=True))
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise BadInput("a model needs its tokenizer to generate text", field="processor")
    with about("prompts", prompts):
        given = prompt_ids(source, tokenizer, loaded.model, ("give it prompts with ", Setting("prompts")), read)
    say_of_bfloat16(reporter, loaded, not isinstance(model, PreTrainedModel))
    limit = positions_of(loaded.model)
    length = asked.seqlen or min(_LENGTH, limit or _LENGTH)
    drawn = settings_for(loaded, length, asked.temperature, asked.top_p, asked.seed)
    how_many = asked.samples or (_SAMPLES if prompts is None else len(given))
    own = write_own(loaded, given, Wanted(0, drawn, how_many), reporter)
    rows = [_row(tokenizer, prompt, answer, drawn.end_ids) for prompt, answer in own.pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _open(model: str | Path | PreTrainedModel, processor: Any, asked: dict[str, Any]) -> Loaded:
    if isinstance(model, PreTrainedModel):
        refuse_what_loading_decides(asked)
        return handed_over_model(model, processor)
    return open_model(make_recipe({"model": str(model), **asked}).model, stream=False)


def _row(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], ends: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "ended": bool(answer) and answer[-1] in ends,
        "prompt_ids": prompt,
        "answer_ids": answer,
    }
