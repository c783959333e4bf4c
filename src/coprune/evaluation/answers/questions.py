"""Prompts as token ids, in the tokenizer's chat template if it has one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import BadInput, about
from coprune.base.words import Setting
from coprune.data import conversations
from coprune.data.conversations import template_text
from coprune.data.local_text import split_column
from coprune.data.tokenizing import encode
from coprune.evaluation.answers.answer_facts import Asked
from coprune.evaluation.answers.answer_records import LEAST_TOKENS
from coprune.model.generation import ends_of, padding_token, positions_of
from coprune.recipe.answers import ALONG, AnswersPart

BUILTIN = "builtin"
_OWN_FILE = "prompts.jsonl"


@dataclass(frozen=True)
class Prompts:
    """Prompts in order, with their source."""

    source: str
    texts: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the prompts: 16 hex digits."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]


def read_prompts(asked: str, count: int | None = None) -> Prompts:
    """Read prompts.

    Args:
        asked: `builtin`, or a file of them (`coprune.data.conversations.read_prompts`), each a single question.
        count: maximum number, evenly spaced, so that every field and language is included.

    Raises:
        BadInput: the file is missing or has no prompts, or a row lacks the column or has no text in it.
    """
    if asked == BUILTIN:
        return Prompts(BUILTIN, _spaced([row["prompt"] for row in _own_rows()], count))
    with about("generate", asked):
        found = conversations.read_prompts(asked, instead=f", or {BUILTIN} for prompts of several fields and languages")
        texts = [_question(prompt, number, asked) for number, prompt in enumerate(found, start=1)]
    return Prompts(str(split_column(asked)[0]), _spaced(texts, count))


def _question(prompt: str | list[conversations.Message], number: int, asked: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1:
        several = f"row {number} of {asked} is a conversation of several turns"
        raise BadInput(several, fix="keep only its last question")
    return prompt[0]["content"]


def short_prompts() -> Prompts:
    """Return the few built-in prompts checked whenever a model is saved."""
    return Prompts(BUILTIN, tuple(row["prompt"] for row in _own_rows() if row.get("gate")))


def _own_rows() -> list[dict[str, Any]]:
    content = (files("coprune.evaluation.answers") / _OWN_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def _spaced(prompts: Sequence[str], count: int | None) -> tuple[str, ...]:
    if count is None or count >= len(prompts):
        return tuple(prompts)
    return tuple(prompts[place * len(prompts) // count] for place in range(count))


SEED = 0
"""Seed of the sampled answers."""
SHORT_ANSWER = 64
"""Maximum tokens per answer when a run only checks that the saved model can still generate text."""


@dataclass(frozen=True)
class Plan:
    """Prompts and generation settings."""

    prompts: Prompts
    new_tokens: int
    temperature: float
    """Temperature of sampled answers; 0 for greedy ones only."""
    is_asked: bool
    """Whether the user asked for answers; otherwise they are skipped if impossible."""
    measures_kl: bool
    is_short: bool
    """Whether these are only the few short answers checked whenever a model is saved."""


def plan_of(asked: AnswersPart, saves: bool) -> Plan | None:
    """Return the prompts to answer: those requested, or a few short ones if a run saves a model, or None.

    Args:
        asked: the settings.
        saves: whether the run saves a model.

    Raises:
        BadInput: like `read_prompts`.
    """
    kl = any(condition.name in ALONG for condition in asked.conditions)
    if asked.prompts is not None:
        prompts = read_prompts(asked.prompts, asked.count)
        whole = dict(is_asked=True, measures_kl=True, is_short=False)
        return Plan(prompts, asked.new_tokens, asked.temperature, **whole)
    if not asked.conditions and not (asked.gate and saves):
        return None
    few = dict(is_asked=asked.is_asked, measures_kl=kl, is_short=True)
    return Plan(short_prompts(), SHORT_ANSWER, 0.0, **few)


@dataclass(frozen=True)
class Questions:
    """The prompts of a plan for one model."""

    plan: Plan
    ids: tuple[tuple[int, ...], ...]
    new_tokens: int
    """Maximum tokens per answer: the plan's, or as many as fit the model."""
    chat: bool
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    pad: int

    @property
    def asked(self) -> Asked:
        """The facts about the questions."""
        return asked_of(self.plan, self.chat, self.new_tokens)


def asked_of(plan: Plan, chat: bool, new_tokens: int) -> Asked:
    """Return the facts about a plan. chat: whether prompts were put in a chat template; new_tokens: maximum per answer."""
    return Asked(
        prompts=plan.prompts.source,
        fingerprint=plan.prompts.fingerprint,
        chat=chat,
        new_tokens=new_tokens,
        temperature=plan.temperature,
        seed=SEED,
        short=plan.is_short,
    )


def questions_for(plan: Plan, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Questions:
    """Tokenise a plan's prompts.

    Args:
        plan: the prompts and generation settings.
        tokenizer: the model's.
        model: the source of the maximum length and the end tokens.

    Returns:
        One sequence of token ids per prompt.

    Raises:
        BadInput: the chat template fails, or a prompt is empty or, with its answer, too long for the model.
    """
    chat = bool(getattr(tokenizer, "chat_template", None))
    ids = tuple(
        tuple(_encode(tokenizer, prompt, chat, place)) for place, prompt in enumerate(plan.prompts.texts, start=1)
    )
    new_tokens = _room(plan, [len(one) for one in ids], positions_of(model))
    ends = ends_of(tokenizer, model)
    return Questions(plan, ids, new_tokens, chat, ends, padding_token(tokenizer.pad_token_id, ends))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, place: int) -> list[int]:
    if chat:
        try:
            text = template_text([{"role": "user", "content": prompt}], tokenizer, f"prompt {place}", answers=True)
        except BadInput as error:
            fix = "correct the tokenizer's chat_template, or remove it to continue prompts without one"
            raise BadInput(error.cause, field="generate", fix=fix) from error
        ids = list(encode(tokenizer, text, add_special_tokens=False)["input_ids"])
    else:
        ids = list(encode(tokenizer, prompt)["input_ids"])
    if not ids:
        cause = f"prompt {place} has no tokens in the model's tokenizer"
        raise BadInput(cause, field="generate", value=prompt, fix="leave it out")
    return ids


def _room(plan: Plan, lengths: list[int], limit: int | None) -> int:
    """Return the maximum length of an answer."""
    longest = max(lengths)
    if limit is None or longest + plan.new_tokens <= limit:
        return plan.new_tokens
    # The automatic check may shorten answers, as long as loops can be detected.
    if not plan.is_asked and limit - longest >= LEAST_TOKENS:
        return limit - longest
    place = lengths.index(longest) + 1
    raise BadInput(
        f"prompt {place} has {longest} tokens, which with an answer of {plan.new_tokens} exceeds the model's "
        f"limit of {limit} positions",
        field="generate",
        fix=("leave it out, or ask for shorter answers with ", Setting("generate_tokens")),
    )
