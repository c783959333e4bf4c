"""Text of a corpus: one joined text to cut windows from, or documents to draw windows from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from coprune.base.errors import BadInput
from coprune.base.validation import is_text

if TYPE_CHECKING:
    from torch import Tensor

LOCAL_FILE_HINT = (
    "To use text of your own, give the path of a file of text (UTF-8), of rows (.jsonl, .json, .csv, .parquet), or of a "
    "folder of such files"
)


class JoinedText(NamedTuple):
    """A corpus as one string, tokenised once; windows start anywhere in it."""

    text: str
    source: str
    """Origin of the text, for the report."""
    most_windows: int | None = None
    """Maximum number of evaluation windows (256 in the published evaluation on C4)."""


class Documents(NamedTuple):
    """A corpus as separate documents; each calibration window lies within one of them."""

    texts: list[str]
    source: str


def join(texts: list[str], separator: str, source: str, most_windows: int | None = None) -> JoinedText:
    """Join documents into one text.

    Raises BadInput if they are only white space.
    """
    text = whole_characters(separator.join(texts))
    if not text or text.isspace():
        raise BadInput(f"{source} holds no text", fix=LOCAL_FILE_HINT)
    return JoinedText(text, source, most_windows)


def whole_characters(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with the replacement character (U+FFFD)."""
    return text if is_text(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def choose_text_column(columns: dict[str, bool], wanted: str | None, source: str) -> str:
    """Choose the column that holds the text: the wanted one, else one with a common name, else the only string column.

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


PREFIX = "given:"
"""Prefix of the names of data passed from Python."""
NOTHING = -1
"""Padding after the end of a sample; not a token id."""


def padded(parts: Sequence[Tensor], nothing: int | bool) -> Tensor:
    """Stack samples of several parts. parts: N × S, each with its own S; nothing: the padding value."""
    import torch  # imported here, since text is checked before this slow import

    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=nothing) for part in parts])


def lengths_of(tokens: Tensor) -> Tensor:
    """Return the length of every sample: N int64. tokens: N × S int64."""
    return (tokens != NOTHING).sum(dim=1)


def of_each_length(tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the numbers of the samples of one length (int64), and the length, in order of their first samples."""
    lengths = lengths_of(tokens)
    for length in dict.fromkeys(lengths.tolist()):
        yield (lengths == length).nonzero().flatten(), length


def first_of_a_length(tokens: Tensor) -> Tensor:
    """Return the samples that are as long as the first, without padding: N × S int64."""
    if len(tokens) == 0:
        return tokens
    rows, length = next(of_each_length(tokens))
    return tokens[rows, :length]


def a_longest(tokens: Tensor) -> Tensor:
    """Return the first of the longest samples: 1 × S int64."""
    place = int(lengths_of(tokens).argmax())
    return tokens[place : place + 1]
