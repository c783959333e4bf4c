"""Texts that a model always sees: its chat template's text, default system prompt and tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.limited import Exceeded
from coprune.data.rendering import render

_TOOL: dict[Any, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search for a text and return what was found.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "What to search for."},
                "limit": {"type": "integer", "enum": [1, 2, 3], "default": 1},
                "exact": {"type": "boolean"},
                "among": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["query"],
        },
    },
}
_USER = {"role": "user", "content": "Hello"}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "search", "arguments": {"query": "tide"}}}
_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [_USER],
    [{"role": "system", "content": "You are a helpful assistant."}, _USER],
    [_USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Thank you."}],
    [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "search", "tool_call_id": "call00001", "content": json.dumps({"found": 3})},
    ],
]


_TOOLS: tuple[list[Any] | None, ...] = (None, [_TOOL])


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a few conversations rendered with a tokenizer's chat templates, and all text in the templates.

    Raises:
        BadInput: a template takes more time or memory than any real one.
    """
    templates = tokenizer.chat_template
    if not templates:
        return []
    named = templates if isinstance(templates, dict) else {"default": templates}
    return [text for template in named.values() for text in (*_written(tokenizer, template), *_literals(template))]


def _written(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[str]:
    for messages in _CONVERSATIONS:
        for tools in _TOOLS:
            for begins in (False, True):
                try:
                    yield render(tokenizer, messages, begins, template=template, tools=tools)
                except Exceeded as error:
                    raise BadInput(f"the tokenizer's chat template fails on a short conversation: {error}") from error
                except ValueError:  # some templates refuse some conversations
                    continue


def _literals(template: str) -> Iterator[str]:
    try:
        lexed = list(Environment().lex(template))
    except TemplateError:
        return
    for _, kind, text in lexed:
        if kind == "data":
            yield text
        elif kind == "string":
            yield text[1:-1].replace("\\n", "\n").replace("\\t", "\t")
