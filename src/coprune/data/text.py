"""What a corpus hands over: one joined text to cut windows from, or documents to draw windows from."""

from __future__ import annotations

from typing import NamedTuple

from coprune.base.errors import BadInput
from coprune.base.validation import is_text

LOCAL_FILE_HINT = (
    "To use text of your own, give the path of a file of text (UTF-8), of rows (.jsonl, .json, .parquet), or of a "
    "folder of such files"
)


class JoinedText(NamedTuple):
    """A corpus as one string, tokenised once; windows start anywhere in it."""

    text: str
    source: str
    """Where the text comes from, in words for the report."""
    most_windows: int | None = None
    """Evaluate at most so many windows (the published evaluation on C4 stops at 256)."""


class Documents(NamedTuple):
    """A corpus as separate documents; each calibration window lies within one of them."""

    texts: list[str]
    source: str


def join(texts: list[str], separator: str, source: str, most_windows: int | None = None) -> JoinedText:
    """Join documents into one text.

    Raises BadInput if there is nothing but white space in them.
    """
    text = whole_characters(separator.join(texts))
    if not text or text.isspace():
        raise BadInput(f"{source} holds no text", fix=LOCAL_FILE_HINT)
    return JoinedText(text, source, most_windows)


def whole_characters(text: str) -> str:
    """Text that tokenizers take: half a character, which UTF-8 cannot write, becomes the sign for what is none (U+FFFD)."""
    return text if is_text(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def choose_text_column(columns: dict[str, bool], wanted: str | None, source: str) -> str:
    """Pick the column that holds the text: the wanted one, else a usual name, else the only one of strings.

    columns: name → whether it holds strings. Raises BadInput if there is no such column or no single candidate.
    """
    strings = [name for name, holds_strings in columns.items() if holds_strings]
    found = f"its columns of text are: {', '.join(map(repr, strings)) or 'none'}"
    if wanted is not None:
        if wanted not in strings:
            raise BadInput(f"{source} has no text column {wanted!r}: {found}")
        return wanted
    for usual in ("text", "sentence", "content", "document"):
        if usual in strings:
            return usual
    if len(strings) == 1:
        return strings[0]
    raise BadInput(
        f"{source} has no column named 'text' and no single column of strings: {found}",
        fix="name it, as in path:column for a file or owner/name::column for a dataset of the Hub",
    )
