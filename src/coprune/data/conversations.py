"""Conversations and generated texts, as token ids with a mask of the generated ones.

Rows of .jsonl, .json, .csv and .parquet files in the usual formats: `messages` (role, content), `conversations` as in ShareGPT
(from, value), `instruction`, `input`, `output` as of Alpaca, `prompt` and `answer`, each with an optional `system`; or with
`prompt_ids` and `answer_ids`, which `coprune generate` writes. Everything but ids goes through the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.data.local_text import files_of, first_row, rows_of, split_column
from coprune.data.rendering import render
from coprune.data.tokenizing import encode

IDS = ("prompt_ids", "answer_ids")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_ANSWERS = ("answer", "completion", "response", "output")
_PROMPT = 'A row reads like {"prompt": "Why is the sky blue?"}'
_MOST_ID = 2**31 - 1
_FORMATS = "messages, conversations, instruction and output, prompt and answer, or prompt_ids and answer_ids"
Message = dict[str, str]


class Document(NamedTuple):
    """Token ids with a mask of the generated ones."""

    ids: list[int]
    generated: list[bool]


def holds_conversations(name: str) -> bool:
    """Return whether the first row of a file is a conversation or generated token ids, and has no `text` column."""
    row = first_row(name)
    if not isinstance(row, Mapping) or "text" in row:
        return False
    return all(isinstance(row.get(key), Sequence) for key in IDS) or messages_of(row) is not None


def read_conversations(name: str, tokenizer: PreTrainedTokenizerBase, column: str | None = None) -> list[Document]:
    """Read every row of a file or folder.

    Args:
        name: the path.
        tokenizer: the model's, whose chat template formats messages.
        column: the column with the messages; by default that of a known format.

    Raises:
        BadInput: a row has an unknown format, the chat template is missing or fails, or ids belong to another tokenizer.
    """
    path = split_column(name)[0]
    rows = [(f"row {i} of {file}", row) for file in files_of(path) for i, row in enumerate(rows_of(file), start=1)]
    if not rows:
        raise BadInput(f"{path} holds no rows")
    documents = []
    for place, row in rows:
        if isinstance(row, Mapping) and column is None and all(row.get(key) is not None for key in IDS):
            documents.append(_of_ids(row, tokenizer, place))
            continue
        messages = messages_of(row, column) if isinstance(row, Mapping) else None
        if messages is None:
            found = (
                f"its columns are {', '.join(map(repr, row))}" if isinstance(row, Mapping) else "it is not an object"
            )
            wanted = _FORMATS if column is None else f"a list of messages in {column!r}"
            raise BadInput(f"{place} is not a conversation: {found}", fix=f"it should have {wanted}")
        documents.append(document_of(messages, tokenizer, place))
    return documents


def messages_of(row: Mapping[str, Any], column: str | None = None) -> list[Message] | None:
    """Return the messages of a row in any known format, with the roles of chat templates, or None.

    Text in the column `system` comes first.
    """
    said, system = _said_in(row, column), row.get("system")
    if not system or said is None:
        return said
    first = {"role": "system", "content": system}
    return None if not isinstance(system, str) else said if said[0] == first else [first, *said]


def _said_in(row: Mapping[str, Any], column: str | None) -> list[Message] | None:
    for key in (column,) if column is not None else ("messages", "conversations", "conversation"):
        said = row.get(key)
        if isinstance(said, Sequence) and not isinstance(said, str) and said:
            found = [_message(one) for one in said]
            return None if any(one is None for one in found) else [one for one in found if one is not None]
    if column is not None:
        return None
    asked = row.get("instruction", row.get("prompt"))
    answer = next((row[key] for key in _ANSWERS if isinstance(row.get(key), str)), None)
    if not isinstance(asked, str) or answer is None:
        return None
    more = row.get("input") if "instruction" in row else None
    question = f"{asked}\n\n{more}" if isinstance(more, str) and more else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(said: Any) -> Message | None:
    if not isinstance(said, Mapping):
        return None
    role, content = said.get("role", said.get("from")), said.get("content", said.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _ROLES.get(role, role), "content": content}


def document_of(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> Document:
    """Apply the chat template; mark the assistant's messages and their end tokens as generated."""
    whole, edges = template_text(messages, tokenizer, place), list[tuple[int, int]]()
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template_text(messages[:number], tokenizer, place, answers=True) if number else ""
        upto = template_text(messages[: number + 1], tokenizer, place)
        # If a template rewrites earlier turns (e.g. drops reasoning), mark only unchanged ones.
        if whole.startswith(before) and whole.startswith(upto) and len(before) < len(upto):
            edges.append((len(before), len(upto)))
    ids, offsets = _encoded(whole, edges, tokenizer, place)
    return Document(ids, [any(start < t and s < end for start, end in edges) for s, t in offsets])


def _encoded(
    text: str, edges: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise a text and return each token with the span of characters that it covers, at least one."""
    if tokenizer.is_fast:
        found = encode(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, last = list[tuple[int, int]](), 0
        for start, end in found["offset_mapping"]:
            # Byte-level tokenizers trim spaces from offsets; a "▁" before a word covers no text and belongs to the word.
            offsets.append((start, end) if start < end else (last, end) if last < end else (end, end + 1))
            last = max(last, end)
        return list(found["input_ids"]), offsets

    def ids_of(piece: str) -> list[int]:
        return list(encode(tokenizer, piece, add_special_tokens=False)["input_ids"]) if piece else []

    cuts = sorted({0, len(text), *(cut for edge in edges for cut in edge)})
    pieces = [(ids_of(text[start:end]), (start, end)) for start, end in pairwise(cuts)]
    ids, whole = [token for found, _ in pieces for token in found], ids_of(text)
    if ids != whole:
        raise BadInput(
            f"cannot find the assistant's tokens in {place}: {type(tokenizer).__name__} gives no offsets, and "
            "tokenizes the answers differently on their own",
            fix="use a model with a fast tokenizer (tokenizer.json)",
        )
    return ids, [span for found, span in pieces for _ in found]


def template_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str, answers: bool = False
) -> str:
    """Return messages as text. answers: whether an answer will follow. Raises BadInput if the template is missing or fails."""
    if not tokenizer.chat_template:
        raise BadInput(
            f"the tokenizer has no chat template, which {place} needs",
            fix="use a model that was tuned for conversations, or plain text",
        )
    try:
        return render(tokenizer, messages, answers)
    except ValueError as error:
        raise BadInput(f"the tokenizer's chat template fails on {place}: {error}") from error


def _of_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, place: str) -> Document:
    prompt, answer = (row[key] for key in IDS)
    if not all(isinstance(ids, list) and all(map(_is_id, ids)) for ids in (prompt, answer)):
        raise BadInput(f"{place} holds token ids that are not integers of at least 0")
    text = row.get("answer")
    if isinstance(text, str) and tokenizer.decode(answer, skip_special_tokens=True) != text:
        raise BadInput(f"{place} has ids of another tokenizer", fix="generate the file again with this model")
    return Document(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ID


def read_prompts(name: str, column: str | None = None, instead: str = "") -> list[str | list[Message]]:
    """Read prompts: texts in a column (`prompt`), or conversations up to their last answer.

    Args:
        name: a .jsonl, .json or .parquet file; `file:column` names another column.
        column: the same, as an argument.
        instead: alternatives to suggest if the file does not exist.

    Raises:
        BadInput: the file does not exist, or a row has no prompt.
    """
    path, named = split_column(name)
    if not Path(path).is_file():
        raise BadInput(f"there is no file of prompts {str(path)!r}", fix=f"give a .jsonl file{instead}")
    wanted, prompts = column or named or "prompt", list[str | list[Message]]()
    for number, row in enumerate(rows_of(path), start=1):
        said = row.get(wanted) if isinstance(row, Mapping) else row
        messages = messages_of(row) if isinstance(row, Mapping) and column is None and named is None else None
        if isinstance(said, str) and said.strip():
            prompts.append(said)
        elif messages and messages[0]["role"] in ("user", "system"):
            prompts.append(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
        else:
            raise BadInput(
                f"row {number} of {path} {_lacks(row, wanted)}",
                fix=f"name another column, as in {path}:COLUMN. {_PROMPT}",
            )
    if not prompts:
        raise BadInput(f"{path} holds no prompts", fix=_PROMPT)
    return prompts


def _lacks(row: Any, column: str) -> str:
    if isinstance(row, Mapping) and column in row:
        return f"has no text in the column {column!r}"
    has = f", only {', '.join(map(repr, row))}" if isinstance(row, Mapping) and row else ""
    return f"has no column {column!r}{has}"
