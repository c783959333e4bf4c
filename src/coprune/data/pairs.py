"""Pairs of encoder inputs and decoder targets as one tensor, and their sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.data.local_text import files_of, first_row, rows_of, split_column
from coprune.data.marks import Marks
from coprune.data.text import NOTHING, lengths_of, padded
from coprune.data.tokenizing import encode
from coprune.data.windows import EvaluationText, Samples, Windows

COLUMNS = (("source", "target"), ("input", "output"))
HINT = 'a row should look like {"source": "…", "target": "…"}, or have "input" and "output"'
_SPAN, _HIDDEN = 3, 0.15
"""Tokens per hidden span, and the share of hidden tokens (arXiv 1910.10683)."""


class Pairs(Tensor):
    """Decoder tokens (N × T int64), together with the encoder's input for each row: token ids or audio features.

    Indexing, splitting and moving rows also applies to the encoder's input; other operations only see the tokens.
    """

    source: Tensor
    """N × S int64, or N × features floating."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(source: Tensor, tokens: Tensor) -> Pairs:
        """Join what the encoder reads with the decoder's tokens. Both have one row, or more, for every sample."""
        found = tokens.as_subclass(Pairs)
        found.source = source
        return found

    @property
    def written(self) -> Tensor:
        """The decoder's tokens alone."""
        return self.as_subclass(Tensor)

    def __getitem__(self, rows: Any) -> Any:
        taken = self.written[rows]
        if isinstance(rows, tuple):  # rows, and positions of the tokens
            rows = rows[0]
        return Pairs.of(self.source[rows], taken) if taken.ndim == self.ndim else taken

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move both. As `Tensor.to`, to a device."""
        return Pairs.of(self.source.to(*args, **kwargs), self.written.to(*args, **kwargs))

    def split(self, size: Any, dim: int = 0) -> Any:
        """Split into parts of some rows."""
        parts = zip(self.source.split(size), self.written.split(size), strict=True)
        return tuple(Pairs.of(source, tokens) for source, tokens in parts)

    def __iter__(self) -> Any:
        return iter(self.written)


@dataclass(frozen=True, kw_only=True)
class EvaluationPairs(EvaluationText):
    """Pairs to measure on; `tokens` are those that the decoder writes."""

    pairs: Pairs

    @classmethod
    def of(cls, samples: Samples[Pairs]) -> EvaluationPairs:
        """Return samples as evaluation data."""
        written = samples.tokens.written[:, 1:]
        tokens = written[written != NOTHING]
        return cls(tokens, torch.zeros_like(tokens), samples.fingerprint, samples.source, pairs=samples.tokens)


def alike(pairs: Pairs) -> Iterator[tuple[Tensor, Pairs]]:
    """Yield pairs of equal lengths: their indices (int64), and the pairs without padding."""
    heard = pairs.source.is_floating_point()
    sources = torch.full((len(pairs),), pairs.source.shape[1]) if heard else lengths_of(pairs.source)
    lengths = list(zip(sources.tolist(), lengths_of(pairs.written).tolist(), strict=True))
    for source, tokens in dict.fromkeys(lengths):
        rows = torch.tensor([row for row, own in enumerate(lengths) if own == (source, tokens)])
        yield rows, Pairs.of(pairs.source[rows, :source], pairs.written[rows, :tokens])


def pair_fingerprint(pairs: Pairs) -> str:
    """Hash the content of pairs: 16 hex digits of SHA-256, and the shape of the decoder tokens."""
    digest = hashlib.sha256()
    for part in (pairs.source, pairs.written):
        digest.update(part.contiguous().numpy().tobytes())
    return f"{digest.hexdigest()[:16]}-{'x'.join(map(str, pairs.shape))}"


def holds_pairs(name: str) -> bool:
    """Return whether the first row of a file is a pair of texts."""
    return _pair(first_row(name)) is not None


def read_pairs(name: str) -> list[tuple[str, str]]:
    """Read every row of a file or folder. Raises BadInput for a row that is not a pair of texts."""
    found = []
    for file in files_of(split_column(name)[0]):
        for number, row in enumerate(rows_of(file), start=1):
            if (pair := _pair(row)) is None:
                raise BadInput(f"row {number} of {file} is not a pair of texts", fix=HINT)
            found.append(pair)
    return found


def _pair(row: Any) -> tuple[str, str] | None:
    for one, other in COLUMNS if isinstance(row, Mapping) else ():
        if isinstance(row.get(one), str) and isinstance(row.get(other), str):
            return row[one], row[other]
    return None


def tokenised(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, start: int, length: int) -> Pairs:
    """Tokenise pairs of texts.

    Args:
        pairs: sources and targets.
        tokenizer: the model's.
        start: the decoder's start token.
        length: maximum length of either.
    """
    limits: dict[str, Any] = {"truncation": True, "max_length": length}
    sources = [torch.tensor([encode(tokenizer, source, **limits)["input_ids"]]) for source, _ in pairs]
    targets = [
        torch.tensor([tokenizer(text_target=target, verbose=False, **limits)["input_ids"]]) for _, target in pairs
    ]
    return Pairs.of(padded(sources, NOTHING), padded([begun(one, start) for one in targets], NOTHING))


def begun(targets: Tensor, start: int) -> Tensor:
    """Prepend the decoder's start token to targets that lack it. targets: N × T int64."""
    if targets.shape[1] and bool((targets[:, 0] == start).all()):
        return targets
    return torch.nn.functional.pad(targets, (1, 0), value=start)


def from_text(windows: Windows, tokenizer: PreTrainedTokenizerBase | None, marks: Marks, start: int) -> Samples[Pairs]:
    """Make pairs from plain text, as in the pre-training of such models.

    Args:
        windows: of one length, between the marks.
        tokenizer: if it has sentinels, they replace hidden spans, which are the target (T5); if it has a mask, the
            target is the whole text (BART). With neither, or for the caller's token ids, source and target are equal.
        marks: around a text.
        start: the decoder's start token.
    """
    tokens, generator = windows.tokens, torch.Generator().manual_seed(0)
    inside = marks.inside(tokens.shape[1])
    length = inside.stop - inside.start
    count = max(1, round(_HIDDEN * length / _SPAN))
    sentinels = [] if tokenizer is None or windows.given else _sentinels(tokenizer, count + 1)
    mask = None if tokenizer is None or windows.given or sentinels else tokenizer.mask_token_id
    if length // count <= _SPAN or not (sentinels or isinstance(mask, int)):
        pairs, how = Pairs.of(tokens, begun(tokens, start)), "read and written as it is"
    else:
        signs = torch.tensor(sentinels or [mask] * count)
        rows = [_hidden(row, inside, signs[:count], generator) for row in tokens]
        sources = torch.stack([source for source, _ in rows])
        if sentinels:
            end = torch.cat([signs[count:], torch.tensor(marks.behind, dtype=tokens.dtype)])
            written, how = torch.stack([torch.cat([spans, end]) for _, spans in rows]), "spans hidden and written"
        else:
            written, how = tokens, "spans masked and the whole written"
        pairs = Pairs.of(sources, begun(written, start))
    return Samples(
        pairs, pair_fingerprint(pairs), f"{windows.source} ({how})", windows.given, text_tokens=windows.text_tokens
    )


def _sentinels(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Return the ids of the first `count` tokens for hidden spans, in order; empty if there are fewer."""
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary.get(f"<extra_id_{number}>") for number in range(count)]
    return [one for one in found if one is not None] if None not in found else []


def _hidden(row: Tensor, inside: slice, sentinels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace a span in each of as many equal pieces of a text by a sentinel; return the text, and sentinels with their spans."""
    piece = (inside.stop - inside.start) // len(sentinels)
    source, spans, at = [row[: inside.start]], [], inside.start
    for number, sentinel in enumerate(sentinels):
        begin = inside.start + number * piece + int(torch.randint(piece - _SPAN + 1, (), generator=generator))
        source += [row[at:begin], sentinel[None]]
        spans += [sentinel[None], row[begin : begin + _SPAN]]
        at = begin + _SPAN
    return torch.cat([*source, row[at:]]), torch.cat(spans)
