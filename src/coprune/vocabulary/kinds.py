"""Kinds of tokenizers whose vocabulary can be cut: which tokens must be kept, and which a token is merged from.

The smaller vocabulary must tokenise text of kept tokens identically. For BPE this holds if every token keeps the intermediate
tokens of its own merges: within its span the merges run as on the token alone, and no removed merge was in the derivation of
a kept token. For Unigram the best path stays the best of fewer; for WordPiece the longest match stays the longest. Text with
a removed token falls back to its characters or bytes, so these are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

from coprune.vocabulary.tokenizer_file import check_content, named_in, unsupported

_NAMED_FREE = re.compile(r"unused|reserved|\[PAD\d+\]", re.IGNORECASE)
"""Names of unused added tokens."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(Protocol):
    """A vocabulary as its algorithm reads it."""

    @property
    def ids(self) -> Mapping[str, int]:
        """Ids of the model's tokens, without added ones."""
        ...

    def parts(self, token: str) -> tuple[int, ...] | None:
        """Return the ids of all tokens that a token is merged from; None if the algorithm never produces it."""
        ...

    def needed(self) -> Iterator[int]:
        """Return the ids of tokens that are needed to represent any text."""
        ...


@dataclass(frozen=True)
class Bpe:
    """Byte-pair encoding: byte-level, of characters with byte fallback, or of characters only."""

    ids: Mapping[str, int]
    merges: Mapping[tuple[str, str], int]
    """Rank of every pair."""
    letters: frozenset[str]
    """Characters of the 256 bytes; empty without byte-level encoding."""
    byte_fallback: bool
    ignore_merges: bool
    """Whether a piece of text that is a token is used as is (`ignore_merges`)."""
    unknown: str | None

    def parts(self, token: str) -> tuple[int, ...] | None:
        """Return the parts as in `Kind`."""
        symbols, seen = [], set[str]()
        for letter in token:
            own = [letter] if letter in self.ids else [f"<0x{byte:02X}>" for byte in letter.encode()]
            if any(one not in self.ids for one in own):
                return None
            symbols += own
        seen.update(symbols)
        while len(symbols) > 1:
            ranks = [self.merges.get(pair) for pair in pairwise(symbols)]
            known = [rank for rank in ranks if rank is not None]
            if not known:
                break
            place = ranks.index(min(known))
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            seen.add(symbols[place])
        if symbols == [token]:
            return tuple(sorted(self.ids[one] for one in seen if one != token))
        # Used as is if it is a whole piece, so it needs no parts.
        return () if self.ignore_merges else None

    def needed(self) -> Iterator[int]:
        """Yield the needed ids as in `Kind`."""
        if self.unknown is not None and self.unknown in self.ids:
            yield self.ids[self.unknown]
        if self.letters or self.byte_fallback:
            yield from (self.ids[letter] for letter in self.letters if letter in self.ids)
            yield from (number for token, number in self.ids.items() if _BYTE.fullmatch(token))
            return
        yield from _without_fallback(self.ids, lambda token: list(token))


@dataclass(frozen=True)
class Unigram:
    """Unigram: the most likely path through a text by token scores."""

    ids: Mapping[str, int]
    scores: tuple[float, ...]
    byte_fallback: bool
    unknown: int | None

    def parts(self, token: str) -> tuple[int, ...] | None:
        """Return no parts: a path needs only its own tokens."""
        return ()

    def needed(self) -> Iterator[int]:
        """Yield the needed ids as in `Kind`. The penalty of unknown characters depends on the lowest score."""
        yield min(range(len(self.scores)), key=self.scores.__getitem__)
        if self.unknown is not None:
            yield self.unknown
        yield from (number for token, number in self.ids.items() if _BYTE.fullmatch(token))
        if not self.byte_fallback:
            yield from _without_fallback(self.ids, lambda token: list(token))


@dataclass(frozen=True)
class WordPiece:
    """WordPiece: repeatedly the longest matching token."""

    ids: Mapping[str, int]
    prefix: str
    """Prefix of tokens that continue a word."""
    unknown: str

    def parts(self, token: str) -> tuple[int, ...] | None:
        """Return no parts."""
        return ()

    def needed(self) -> Iterator[int]:
        """Yield the needed ids as in `Kind`."""
        if self.unknown in self.ids:
            yield self.ids[self.unknown]
        yield from _without_fallback(self.ids, self._letters)

    def _letters(self, token: str) -> list[str]:
        within = token.startswith(self.prefix) and token != self.prefix
        bare = token.removeprefix(self.prefix) if within else token
        first = f"{self.prefix}{bare[0]}" if within else bare[:1]
        return [first, *(f"{self.prefix}{letter}" for letter in bare[1:])]


def _without_fallback(ids: Mapping[str, int], letters_of: Any) -> Iterator[int]:
    """Yield single characters, and tokens that they cannot spell."""
    for token, number in ids.items():
        letters = letters_of(token)
        if len(letters) == 1 or any(letter not in ids for letter in letters):
            yield number


def kind_of(content: Mapping[str, Any]) -> Kind:
    """Return the kind of a tokenizer from the content of its `tokenizer.json`.

    Raises:
        BadInput, UnsupportedModel: like `check_content`, and for BPE options whose cut is not known to be exact.
    """
    check_content(content)
    model = content["model"]
    kind = model["type"]
    if kind == "BPE":
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(option):
                raise unsupported(f"BPE with {option}")
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merges = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
        letters = frozenset(BYTE_LETTERS) if _has(content, "ByteLevel") else frozenset[str]()
        fallback, whole = bool(model.get("byte_fallback")), bool(model.get("ignore_merges"))
        return Bpe(model["vocab"], merges, letters, fallback, whole, model.get("unk_token"))
    if kind == "Unigram":
        ids = {token: number for number, (token, _) in enumerate(model["vocab"])}
        scores = tuple(float(score) for _, score in model["vocab"])
        return Unigram(ids, scores, bool(model.get("byte_fallback")), model.get("unk_id"))
    return WordPiece(model["vocab"], model.get("continuing_subword_prefix", "##"), model.get("unk_token", "[UNK]"))


def _has(content: Mapping[str, Any], kind: str) -> bool:
    """Return whether a tokenizer's normalizer or pre-tokenizer is of a type, or contains one."""

    def within(part: Any) -> bool:
        if isinstance(part, Mapping):
            return part.get("type") == kind or any(within(inner) for inner in part.values())
        return isinstance(part, list) and any(within(inner) for inner in part)

    return within(content.get("pre_tokenizer")) or within(content.get("normalizer"))


def _byte_letters() -> str:
    """Return the letters of GPT-2's byte-level encoding for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_LETTERS = _byte_letters()


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer, added ones included."""

    content: Mapping[str, Any]
    """Content of `tokenizer.json`."""
    kind: Kind

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Vocabulary:
        """Read the content of a `tokenizer.json`. Raises as `kind_of`."""
        return cls(content, kind_of(content))

    @cached_property
    def added(self) -> dict[str, int]:
        """Ids of added tokens."""
        return {one["content"]: one["id"] for one in self.content.get("added_tokens") or ()}

    @cached_property
    def by_token(self) -> dict[str, int]:
        """Ids of all tokens."""
        return {**self.kind.ids, **self.added}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Tokens by id."""
        return {number: token for token, number in self.by_token.items()}

    @cached_property
    def meaningful(self) -> set[int]:
        """Ids of added tokens that are not reserved."""
        return {number for token, number in self.added.items() if not _NAMED_FREE.search(token)}

    @cached_property
    def texts(self) -> dict[int, str]:
        """Text of every token; an incomplete character decodes to the replacement character."""
        letters = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        if not isinstance(self.kind, Bpe) or not self.kind.letters:
            return self.tokens
        return {
            number: bytes(letters[one] for one in token).decode("utf-8", "replace")
            if token not in self.added and all(one in letters for one in token)
            else token
            for number, token in self.tokens.items()
        }

    def essential(self) -> set[int]:
        """Return the ids that are always kept: bytes or characters, unknown, and added tokens that are not reserved."""
        return {*self.kind.needed()} | self.meaningful | named_in(self.content)

    def parts(self, number: int) -> tuple[int, ...] | None:
        """Return the ids of the tokens that a token is merged from; None if no text ever produces it."""
        token = self.tokens.get(number)
        if token is None:
            return None
        return () if token in self.added else self.kind.parts(token)
