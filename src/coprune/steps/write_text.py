"""A file of what a model writes, for `dataset=` of any run, also of models that are too large to write there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, about, unknown_name
from coprune.base.files import require_file, write_text
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.data.conversations import read_prompts
from coprune.evaluation.own_text import Wanted, prompt_ids, settings_for, write_own
from coprune.model.checkpoint.weights import InMemory
from coprune.model.compiled import compile_decoding
from coprune.model.generation import positions_of
from coprune.model.loaded_model import (
    Loaded,
    open_model,
    refuse_what_loading_decides,
    require_processor,
    say_of_bfloat16,
)
from coprune.recipe.recipe import make_recipe
from coprune.recipe.sources import OWN, Source

_SAMPLES, _LENGTH = 16, 512
_FITS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "samples": (int, lambda said: said >= 1, "at least 1"),
    "seqlen": (int, lambda said: said >= 1, "at least 1"),
    "temperature": (int | float, lambda said: 0 <= said < float("inf"), "at least 0"),
    "top_p": (int | float, lambda said: 0 < said <= 1, "above 0, up to 1"),
    "seed": (int, lambda said: True, "a whole number"),
}
"""Type of a setting, test of a value, and the valid values as the end of a sentence."""


class GenerateArguments(TypedDict, total=False):
    """Settings of `generate`."""

    samples: int
    """Texts; by default one for every prompt, or 16 without any."""
    seqlen: int
    """Tokens of a text at most, without its prompt [512, or the model's limit]."""
    temperature: float
    """Divisor of the logits; 0 takes the likeliest tokens [1]."""
    top_p: float
    """Tokens are drawn from the likeliest that together have this probability [1]."""
    seed: int
    column: str
    """The column of the prompts."""
    template: Literal["chat", "none"]
    """Whether prompts go through the chat template; by default if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    compile: bool
    """Compile the step that makes a token, which pays off where much is written [no]."""
    cache_dir: str | Path | None


def generate(
    model: str | Path | PreTrainedModel,
    target: str | Path,
    prompts: str | Path | None = None,
    *,
    processor: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    **settings: Unpack[GenerateArguments],
) -> Path:
    """Generate texts, or answers to prompts, with a model into a file to calibrate on.

    Args:
        model: a Hub id, a folder, a GGUF file, `smollm2-135m`, or a model in memory.
        target: the .jsonl file, which must not exist. Every row has `prompt`, `answer`, `ended`, `prompt_ids` and
            `answer_ids`, so that `calibrate_on="generated"` knows the model's own tokens.
        prompts: a .jsonl file of prompts, texts in a column `prompt` or conversations; without one, every text starts from
            the BOS token.
        processor: the tokenizer of a model in memory.
        quiet: no progress bar on standard error.
        settings: `samples`, `seqlen`, `temperature`, `top_p`, `seed`; `column` and `template` of prompts; `compile`; `dtype`,
            `device` and `cache_dir` of a model that is loaded.

    Returns:
        The file.

    Raises:
        BadInput: a setting is unknown or invalid, the file exists, or a prompt cannot be used.
    """
    asked: dict[str, Any] = dict(settings)
    path = expand_home(target)
    _check(path, asked)
    with about("prompts", prompts):  # of which the model can make nothing: said before it is loaded
        read = None if prompts is None else read_prompts(str(prompts), asked.get("column"))
    source = Source(OWN if prompts is None else f"{OWN}:{prompts}", 1.0, _options(asked))
    reporter = Reporter(quiet)
    with reporter.libraries():
        loaded = _open(model, processor, asked)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise BadInput("a model needs its tokenizer to generate text", field="processor")
    with about("prompts", prompts):
        given = prompt_ids(source, tokenizer, loaded.model, ("give it prompts with ", Setting("prompts")), read)
    say_of_bfloat16(reporter, loaded, not isinstance(model, PreTrainedModel))
    limit = positions_of(loaded.model)
    length = int(asked.get("seqlen") or min(_LENGTH, limit or _LENGTH))
    drawn = (float(asked.get("temperature", 1.0)), float(asked.get("top_p", 1.0)), int(asked.get("seed", 0)))
    texts = asked.get("samples") or (_SAMPLES if prompts is None else len(given))
    compiles = bool(asked.get("compile"))
    how = replace(settings_for(loaded, length, *drawn), fixed_cache=compiles)
    undo = compile_decoding(loaded.model) if compiles else lambda: None
    try:
        own = write_own(loaded, given, Wanted(0, how, int(texts)), reporter)
    finally:
        undo()
    rows = [_row(tokenizer, prompt, answer, how.end_ids) for prompt, answer in own.pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: asked[name] for name in ("column", "template") if asked.get(name) is not None}


def _check(target: Path, asked: dict[str, Any]) -> None:
    known = GenerateArguments.__annotations__
    for name in asked:
        if name not in known:
            raise unknown_name("setting", name, known, field=name)
    if target.exists():
        raise BadInput(f"{target} already exists", field="target", value=target, fix="name another file")
    if target.suffix != ".jsonl":
        raise BadInput(f"{target} does not end in .jsonl", field="target", value=target)
    require_file(target, "target")
    for name, (kind, fits, right) in _FITS.items():
        said = asked.get(name)
        if said is not None and not (isinstance(said, kind) and fits(said)):
            raise BadInput((Setting(name), f" is {right}, not {said!r}"), field=name, value=said)
    if asked.get("template") not in (None, "chat", "none"):
        raise BadInput(f"the template is chat or none, not {asked['template']!r}", field="template")


def _open(model: str | Path | PreTrainedModel, processor: Any, asked: dict[str, Any]) -> Loaded:
    if isinstance(model, PreTrainedModel):
        refuse_what_loading_decides(asked)
        require_processor(processor)
        return Loaded(InMemory(model), processor, model.name_or_path or type(model).__name__, False)
    said = {name: asked[name] for name in ("dtype", "device", "cache_dir") if asked.get(name) is not None}
    return open_model(make_recipe({"model": str(model), **said}).model, stream=False)


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
