"""Validation of the parts of a `tokenizer.json` that a cut relies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.validation import explain

Id = Annotated[int, Field(strict=True, ge=0)]
_Merge = Annotated[str, StringConstraints(pattern=r"^[^ ]+ [^ ]+$")] | tuple[str, str]


class _Added(BaseModel):
    id: Id
    content: str


class _Named(BaseModel):
    """A token that a template adds."""

    ids: list[Id]


class _Processor(BaseModel):
    """A post-processor, which adds tokens to a text."""

    special_tokens: dict[str, _Named] = {}
    sep: tuple[str, Id] | None = None
    cls: tuple[str, Id] | None = None
    processors: list[_Processor] = []

    def named(self) -> Iterator[int]:
        """Yield the ids that it adds."""
        for token in self.special_tokens.values():
            yield from token.ids
        yield from (pair[1] for pair in (self.sep, self.cls) if pair is not None)
        for inner in self.processors:
            yield from inner.named()


class _Padding(BaseModel):
    pad_id: Id


class _Bpe(BaseModel):
    vocab: dict[str, Id]
    merges: list[_Merge]
    unk_token: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class _WordPiece(BaseModel):
    vocab: dict[str, Id]
    unk_token: str = "[UNK]"
    continuing_subword_prefix: str = "##"


class _Unigram(BaseModel):
    vocab: Annotated[list[tuple[str, float]], Field(min_length=1)]
    unk_id: Id | None = None
    byte_fallback: bool | None = None


_KINDS: dict[str, type[_Bpe | _WordPiece | _Unigram]] = {"BPE": _Bpe, "WordPiece": _WordPiece, "Unigram": _Unigram}
_OTHERS = {"WordLevel": "a list of whole words has no parts to fall back to"}


class _Kind(BaseModel):
    type: str | None = None


class _File(BaseModel):
    added_tokens: list[_Added] | None = None
    post_processor: _Processor | None = None
    padding: _Padding | None = None
    model: _Kind

    def named(self) -> set[int]:
        """Return the ids that the post-processor and the padding name."""
        found = set(() if self.post_processor is None else self.post_processor.named())
        return found | ({self.padding.pad_id} if self.padding is not None else set())


def named_in(content: Mapping[str, Any]) -> set[int]:
    """Return the ids that a checked tokenizer's post-processor and padding name."""
    return _File.model_validate(content).named()


def check_content(content: Mapping[str, Any]) -> None:
    """Refuse a `tokenizer.json` that is malformed, or names tokens that it does not contain.

    Raises:
        BadInput: it is malformed.
        UnsupportedModel: a cut of its kind is not known to be exact.
    """
    try:
        file = _File.model_validate(content)
        kind = file.model.type
        if kind not in _KINDS:
            raise unsupported(f"{kind} ({_OTHERS[kind]})" if kind in _OTHERS else str(kind))
        model = _KINDS[kind].model_validate(content["model"])
    except ValidationError as error:
        raise _damaged(str(explain(error).cause)) from None
    vocab = model.vocab
    own = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
    if len(own) < len(vocab):
        raise _damaged("two tokens have the same id")
    there = own | {token.id for token in file.added_tokens or ()}
    named = file.named() | ({model.unk_id} if isinstance(model, _Unigram) and model.unk_id is not None else set())
    if missing := sorted(named - there):
        raise _damaged(f"its settings name the token {missing[0]}, which is not among its {len(there):,} tokens")


def _damaged(why: str) -> BadInput:
    return BadInput(f"tokenizer.json is damaged: {why}", field="model", fix="fetch or save the model again")


def unsupported(kind: str) -> UnsupportedModel:
    """Return the error for a kind of tokenizer."""
    known = "only BPE, Unigram and WordPiece can be cut exactly"
    return UnsupportedModel(f"the tokenizer is of type {kind}, whose vocabulary cannot be cut ({known})")
