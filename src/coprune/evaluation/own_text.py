"""Text that the dense model writes itself: from the token that begins a text, or as answers to prompts."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.devices import PerMemory
from coprune.base.errors import BadInput, about
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, Setting, Words
from coprune.data.conversations import Document, Message, read_prompts, template_text
from coprune.data.tokenizing import encode
from coprune.model.blocks import find_blocks
from coprune.model.generation import Generation, ends_of, filling, generate, positions_of
from coprune.model.loaded_model import Loaded
from coprune.recipe.sources import Source
from coprune.store.store import Store, key_of

_TOGETHER = PerMemory(host=16, gpu=64)
"""Texts that are written at the same time."""


class OwnText(BaseModel):
    """Text that a model wrote: token ids of its prompts and of its continuations, as pairs."""

    model_config = ConfigDict(frozen=True)

    pairs: list[tuple[list[int], list[int]]]

    @property
    def documents(self) -> list[Document]:
        """The texts as documents to cut samples from."""
        return [Document(a + b, [False] * len(a) + [True] * len(b)) for a, b in self.pairs]


@dataclass(frozen=True)
class Wanted:
    """Amount and settings of generated text."""

    tokens: int
    """Minimum number of tokens in all, prompts included."""
    settings: Generation
    texts: int | None = None
    """Exactly so many texts instead."""


def own_documents(
    source: Source, loaded: Loaded, nsamples: int, seqlen: int, seed: int, reporter: Reporter
) -> list[Document]:
    """Generate enough text for some samples with a model, or use stored text.

    Args:
        source: `self` with its options.
        loaded: the dense model, in memory.
        nsamples: number of samples.
        seqlen: tokens of each.
        seed: of the sampling.
        reporter: shows the speed.

    Raises:
        BadInput: the model streams, or the prompts cannot be used.
    """
    if loaded.weights.streams:
        raise BadInput(
            "a streamed model cannot generate calibration text",
            field="dataset",
            value=source.name,
            fix=(
                *(
                    "load it whole with ",
                    Set("stream", False),
                    ", or let any runtime write a file to calibrate on, such as ",
                ),
                Command("generate", "MODEL", "OUT.jsonl"),
            ),
        )
    tokenizer, options = loaded.tokenizer, source.options
    if tokenizer is None:
        raise BadInput(
            "a model needs its tokenizer to generate text",
            field="processor",
            fix=("give it with ", Setting("processor")),
        )
    with about("dataset", source.name):
        given = prompt_ids(source, tokenizer, loaded.model)
    length = min(int(options.get("length", seqlen - 1)), seqlen - 1)
    settings = settings_for(loaded, length, options.get("temperature", 1.0), options.get("top_p", 1.0), seed)
    if settings.temperature == 0 and source.prompts is None and nsamples > 1:
        raise BadInput(
            "at temperature 0 all texts without a prompt are equal",
            field="dataset",
            fix="give it prompts, or a temperature",
        )
    return write_own(loaded, given, Wanted(nsamples * seqlen, settings), reporter).documents


def settings_for(loaded: Loaded, length: int, temperature: float, top_p: float, seed: int) -> Generation:
    """Return the settings of generation, which also stops at the tokens that end an answer."""
    tokenizer, model = loaded.tokenizer, loaded.model
    assert tokenizer is not None
    end_ids = ends_of(tokenizer, model)
    together = _TOGETHER.on(loaded.device)
    return Generation(length, temperature, top_p, seed, together, end_ids, filling(tokenizer.pad_token_id, end_ids))


def prompt_ids(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    instead: Words = "give it prompts: self:FILE.jsonl",
    prompts: Sequence[str | list[Message]] | None = None,
) -> list[list[int]]:
    """Return the beginnings of a model's texts: each prompt, in the chat template if any, or the token that begins a text.

    Args:
        source: `self` with its options.
        tokenizer: of the model.
        model: the one that writes.
        instead: what to do where no token begins a text.
        prompts: those of the source, if they were read before.

    Raises:
        BadInput: there is no such token, a prompt is too long for the model, a template is asked for and there is none, or it
            fails.
    """
    if source.prompts is None:
        begin = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else tokenizer.eos_token_id
        if not isinstance(begin, int):
            raise BadInput("the tokenizer has no token that begins a text", fix=instead)
        return [[begin]]
    asked, limit, found = source.options.get("template"), positions_of(model), list[list[int]]()
    if prompts is None:
        prompts = read_prompts(source.prompts, source.options.get("column"))
    for number, prompt in enumerate(prompts, start=1):
        place = f"prompt {number} of {source.prompts}"
        talks = asked == "chat" or (asked is None and (bool(tokenizer.chat_template) or not isinstance(prompt, str)))
        if talks:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = template_text(messages, tokenizer, place, answers=True)
        else:
            text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        ids = list(encode(tokenizer, text, add_special_tokens=not talks)["input_ids"])
        if not ids or (limit is not None and len(ids) >= limit):
            wrong = (
                "is no token"
                if not ids
                else f"has {len(ids)} tokens, and the model {limit} positions for it and its answer"
            )
            raise BadInput(f"{place} {wrong}", field="dataset", value=source.name, fix="leave it out or change it")
        found.append(ids)
    return found


def write_own(loaded: Loaded, given: Sequence[list[int]], wanted: Wanted, reporter: Reporter) -> OwnText:
    """Generate a model's text, or use what it generated earlier with the same settings, from the user's store."""
    contents = {
        "model": loaded.fingerprint(find_blocks(loaded.model)),
        "dtype": str(loaded.model.dtype),
        "device": loaded.device.type,
        "given": hashlib.sha256(json.dumps(list(given)).encode()).hexdigest(),
        "tokens": wanted.tokens,
        "texts": wanted.texts,
        "settings": repr(wanted.settings),
    }
    key = key_of("own-text", 3, **contents)
    return Store.of_user().get(key, OwnText, lambda: _write(loaded, given, wanted, reporter))


def _write(loaded: Loaded, given: Sequence[list[int]], wanted: Wanted, reporter: Reporter) -> OwnText:
    pairs: list[tuple[list[int], list[int]]] = []
    began, written, settings = time.perf_counter(), 0, wanted.settings
    total = wanted.tokens if wanted.texts is None else wanted.texts * settings.max_new_tokens
    order = list(range(len(given)))
    if wanted.texts is None:
        random.Random(settings.seed).shuffle(order)
    with reporter.bar("Writing", total) as advance:
        while (missing := _missing(pairs, given, wanted)) > 0:
            batch = [given[order[(len(pairs) + i) % len(order)]] for i in range(min(settings.batch_size, missing))]
            # Every round draws other numbers.
            answers = generate(loaded.model, batch, replace(settings, seed=settings.seed * 1009 + len(pairs)), advance)
            pairs += [(prompt, answer.tokens) for prompt, answer in zip(batch, answers, strict=True)]
            written += sum(len(answer.tokens) for answer in answers)
    seconds = time.perf_counter() - began
    reporter.say(f"Written: {written} tokens in {seconds:.1f} s, {written / max(seconds, 1e-9):.0f} a second.")
    return OwnText(pairs=pairs)


def _missing(pairs: Sequence[tuple[list[int], list[int]]], given: Sequence[list[int]], wanted: Wanted) -> int:
    """Return how many more texts are needed, if all become as long as possible."""
    if wanted.texts is not None:
        return wanted.texts - len(pairs)
    if wanted.settings.temperature == 0 and len(pairs) >= len(given):
        return 0  # without any draw the same answers would come again
    tokens = wanted.tokens - sum(len(a) + len(b) for a, b in pairs)
    longest = max(len(prompt) for prompt in given) + wanted.settings.max_new_tokens
    return -(-tokens // longest)
