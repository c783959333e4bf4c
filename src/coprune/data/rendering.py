"""Chat templates, rendered with limits on memory and time.

A template is a program that comes with a model. transformers renders it in jinja2's sandbox, which still allows nested loops,
`'x' * 10**10` and huge indents. So it runs in a limited child process, which ends when idle.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from coprune.base.limited import Child, render_limited

Message = Mapping[str, Any]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answers: bool,
    open_end: bool = False,
    template: str | None = None,
    tools: Sequence[Any] | None = None,
) -> str:
    """Apply a tokenizer's chat template to messages, in a limited process.

    Args:
        tokenizer: one with a chat template.
        messages: role and content of each.
        answers: whether an answer of the assistant will follow.
        open_end: whether the last message is left open, to be continued.
        template: the template [the tokenizer's own].
        tools: that the assistant may call, as JSON schemas [none].

    Returns:
        The text.

    Raises:
        ValueError: the template fails or exceeds the limits.
    """
    options: dict[str, Any] = {"add_generation_prompt": answers, "continue_final_message": open_end}
    options |= {"chat_template": template, "tools": tools, "tokenize": False}
    state = repr((tokenizer.chat_template, tokenizer.special_tokens_map))
    apply = partial(_applied, tokenizer)
    return render_limited(_CHILDREN, tokenizer, apply, ([dict(one) for one in messages], options), state)


_CHILDREN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Child] = weakref.WeakKeyDictionary()


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(messages, **options))
