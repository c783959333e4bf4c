"""The part of a recipe about structured removal."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import one_is_enough
from coprune.base.words import Set, Setting, Words
from coprune.recipe.choice import Choice, read_pairs
from coprune.recipe.parts import Decides, Part, Shown, Word
from coprune.recipe.size import PART as SIZE
from coprune.recipe.size import Size, share_of, size_of
from coprune.recipe.vocabulary_cut import PART as VOCABULARY
from coprune.recipe.vocabulary_cut import Target, shares_of, target_of

Removable = Literal["channels", "heads", "blocks", "experts"]
_FOR_SIZE: tuple[Removable, ...] = ("channels", "heads", "blocks")
"""Kinds of parts removed to reach a target size, in this order."""
Scored = Literal["units", "blocks", "experts", "rows"]
"""What a score ranks: `units` are channels and heads, `rows` are tokens of the vocabulary."""
SCORES: dict[Scored, tuple[str, ...]] = {
    "units": ("obs", "wanda_sp", "flap", "magnitude"),
    "blocks": ("map", "kl", "influence"),
    "experts": ("reap", "frequency", "random", "aimer"),
    "rows": ("counts",),
}
"""Names of the scores by what they rank, the default first."""
MAP_TOKENS, MAP_SPANS, MAP_CANDIDATES = 16384, 3, 2
"""Defaults of the map score: tokens to solve maps, spans, and sets of spans tried for each number of them."""
MIXES, REFIT_TOKENS, COMPARED_BY_KL, KL_ROWS = 4, 4096, 2048, 256
"""Mixes of a target size, tokens that their refits see, tokens on which distributions are compared, and those at a time."""

WHOLE_MODEL = {"fisher": "gradients are of the whole model"}
"""Allocations that need the whole model in memory, and why."""
UNIT_ALLOCATION_NAMES = ("uniform", "error")
"""Allocations of removed channels and heads to the blocks."""


@dataclass(frozen=True)
class Left:
    """A number of experts to keep in every mixture."""

    count: int

    def __format__(self, spec: str) -> str:
        return f"keep-{self.count}"


def _as_words(value: Any) -> Any:
    """Convert a mapping of names to texts, from Python, to `name=text` words."""
    return (
        tuple(f"{name}={text}" for name, text in value.items()) if isinstance(value, Mapping) else one_is_enough(value)
    )


class RemovePart(Part):
    """Settings of structured removal: MLP channels, attention heads, whole blocks, experts, tokens."""

    title = "What is removed as a whole (--remove)"

    parts: Annotated[
        tuple[str, ...],
        Word("remove"),
        BeforeValidator(one_is_enough),
        Decides.RESULT | Decides.COST,
        Shown.COMMON,
        Field(
            description="Remove parts to make the model smaller: size=0.25, or a share of channels=0.33, heads=0.25, "
            "blocks=0.2, experts=0.25, vocabulary=96k (tokens to keep); repeatable or comma-separated. size is the share "
            "of the parameters to remove, or the size to keep: size=100MB, size=1.2B. Also experts=keep:96 (experts to keep), "
            "vocabulary=0.6 (a share to remove) and vocabulary=loss:1% (as few tokens as cost at most 1 % more bits per byte)."
        ),
    ] = ()
    score: Annotated[
        tuple[Choice, ...],
        BeforeValidator(one_is_enough),
        Decides.RESULT,
        Field(
            description="Score for channels and heads: obs (what the others cannot make up for; the default), wanda_sp, flap or "
            "magnitude; for blocks: map (a run of blocks that a linear map replaces best; the default), kl (change of the "
            "output without it) or influence (change of its inputs); for experts: reap (gate times output; the "
            "default), frequency, random, or aimer (weights alone, without text); options as in "
            "wanda_sp:refit=true; repeatable."
        ),
    ] = ()
    domains: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_words, json_schema_input_type=str | Sequence[str] | Mapping[str, str | Path]),
        Decides.RESULT | Decides.COST,
        Field(
            description="Texts by domain, for scoring experts on the same number of samples of each instead of on the "
            "calibration text: code=code.jsonl,chat=chat.jsonl; or the experts.json of an earlier run, to blend its scores "
            "anew without a pass; repeatable."
        ),
    ] = ()
    blend: Annotated[
        str,
        Decides.RESULT,
        Field(
            description="How domains are blended: max-min (maximise the score kept by the domain that keeps the least), "
            "or by weights: code=2,chat=1."
        ),
    ] = "max-min"
    align: Annotated[
        int, Decides.RESULT, Field(description="Keep channels in multiples of this, if the model has them.", ge=1)
    ] = 64
    vocabulary_text: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_words, json_schema_input_type=str | Sequence[str] | Mapping[str, float]),
        Decides.RESULT | Decides.COST,
        Field(
            description="Texts that decide which tokens to keep: files, folders or corpora, word lists of languages (needs "
            "coprune[languages]), and code, each with an optional share: mine.jsonl=2,en,code=0.5; repeatable. [the calibration "
            "text, en and code]"
        ),
    ] = ()
    vocabulary_force: Annotated[
        bool,
        Decides.RESULT,
        Field(description="Cut the vocabulary even if that saves less than 5 % of the weights' bytes."),
    ] = False

    @field_validator("parts")
    @classmethod
    def _check(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        _refuse_beside_size(asked)
        shares(asked)
        _vocabulary(asked)
        return asked

    @field_validator("vocabulary_text")
    @classmethod
    def _with_shares(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        shares_of(asked)
        return asked

    @field_validator("score")
    @classmethod
    def _one_of_each(cls, asked: tuple[Choice, ...]) -> tuple[Choice, ...]:
        kinds = [_scored(one.name) for one in asked]
        if len(set(kinds)) < len(kinds):
            names = " and ".join(str(one) for one in asked)
            raise BadInput(f"{names} are scores of the same parts", field="score", value=names, fix="leave one out")
        return asked

    def score_of(self, scored: Scored) -> Choice:
        """Return the score that ranks units of a kind."""
        default = Choice(name=SCORES[scored][0])
        return next((one for one in self.score if _scored(one.name) == scored), default)

    @field_validator("domains")
    @classmethod
    def _named_once(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        domains_in(asked)
        return asked

    @field_validator("blend")
    @classmethod
    def _max_min_or_weights(cls, asked: str) -> str:
        weights_in(asked)
        return asked

    @property
    def texts(self) -> dict[str, str]:
        """Texts of the domains by name."""
        return {} if self.kept_scores is not None else domains_in(self.domains)

    @property
    def kept_scores(self) -> Path | None:
        """The file of an earlier run's scores, if the domains are given as one."""
        return expand_home(self.domains[0]) if _is_kept(self.domains) else None

    @property
    def weights(self) -> dict[str, float] | None:
        """Weights of the domains; None for max-min."""
        return weights_in(self.blend)

    @property
    def weighs_experts(self) -> bool:
        """Whether experts are scored by their weights alone."""
        return self.score_of("experts").name == "aimer"

    @property
    def scores(self) -> dict[Scored, Choice]:
        """The scores in use, by what they rank."""
        removed = self.kinds
        kinds: list[Scored] = ["units"] if self.removes_units else []
        kinds += ["blocks"] if "blocks" in removed else []
        kinds += ["experts"] if "experts" in removed else []
        kinds += ["rows"] if self.vocabulary is not None else []
        return {kind: self.score_of(kind) for kind in kinds}

    @property
    def maps_blocks(self) -> bool:
        """Whether a linear map replaces the blocks, if the model has a place for one."""
        return "blocks" in self.kinds and self.score_of("blocks").name == "map"

    @property
    def removes_units(self) -> bool:
        """Whether channels or heads are removed, whose number may differ between blocks."""
        return not {"channels", "heads"}.isdisjoint(self.kinds)

    @property
    def size(self) -> Size | None:
        """Target size of the model; None if shares of its parts are given."""
        return None if (own := _pairs(self.parts).get(SIZE)) is None else size_of(own)

    @property
    def kinds(self) -> Collection[Removable]:
        """Kinds of parts that are removed; for a target size, those that may be."""
        return _FOR_SIZE if self.size is not None else self.shares.keys()

    def with_shares(self, found: Mapping[Removable, str]) -> Self:
        """Return a copy with shares instead of a target size."""
        return self.model_copy(update={"parts": tuple(f"{kind}={share}" for kind, share in found.items())})

    @property
    def shares(self) -> dict[Removable, float | Left]:
        """The share of each kind to remove, or the number to keep; empty for a target size."""
        return shares(self.parts)

    def share(self, kind: Removable) -> float:
        """Return the share of a kind to remove."""
        found = self.shares[kind]
        assert not isinstance(found, Left)
        return found

    def most_blocks(self, blocks: int, each: int, before: int, itemsize: int) -> int:
        """Return the maximum number of blocks that go.

        Args:
            blocks: their number.
            each: parameters of a block.
            before: parameters of the model.
            itemsize: bytes per saved parameter.
        """
        if self.size is None:
            return math.ceil(self.share("blocks") * blocks)
        return min(max(1, -(-(before - self.size.most(before, itemsize)) // each)), blocks // 2)

    @property
    def label(self) -> str:
        """The removed parts, as part of a folder's name."""
        shares = [f"{kind}-{share:g}" for kind, share in self.shares.items()]
        others = (f"{name}={value}" for name, value in _pairs(self.parts).items() if name in (SIZE, VOCABULARY))
        return "-".join([*shares, *(re.sub("[=: ]+", "-", one.removesuffix("%")) for one in others)])

    @property
    def vocabulary(self) -> Target | None:
        """Target size of the vocabulary; None if it is not cut."""
        return _vocabulary(self.parts)

    def without_vocabulary(self) -> Self:
        """Return a copy without the vocabulary cut."""
        left = tuple(f"{name}={value}" for name, value in _pairs(self.parts).items() if name != VOCABULARY)
        score = tuple(one for one in self.score if _scored(one.name) != "rows")
        gone = {"vocabulary_text": (), "vocabulary_force": False}
        return self.model_copy(update={"parts": left, "score": score, **gone})

    def vocabulary_alone(self) -> Self:
        """Return a copy with only the vocabulary cut."""
        own = tuple(f"{name}={value}" for name, value in _pairs(self.parts).items() if name == VOCABULARY)
        score = tuple(one for one in self.score if _scored(one.name) == "rows")
        return type(self)(
            parts=own,
            score=score,
            vocabulary_text=self.vocabulary_text,
            vocabulary_force=self.vocabulary_force,
        )


def cannot_score(asked: RemovePart) -> BadInput | None:
    """Return the error in settings for parts that are not removed, or None."""
    if asked.vocabulary is None:
        for field in ("vocabulary_text", "vocabulary_force"):
            if getattr(asked, field):
                fix: Words = ("add ", Set("remove", "vocabulary=96k"), ", or leave it out")
                return BadInput(
                    (Setting(field), " is about a vocabulary cut, and none is requested"), field=field, fix=fix
                )
    for score in asked.score:
        if (kind := _scored(score.name)) not in asked.scores:
            parts = {"units": "channels and heads", "rows": "the vocabulary"}.get(kind, kind)
            wrong: Words = (Set("score", str(score)), f" is of {parts}, and none are removed")
            return BadInput(wrong, field="score", value=str(score), fix="leave it out")
    return None


def _scored(name: str) -> Scored:
    kind = next((kind for kind, names in SCORES.items() if name in names), None)
    if kind is None:
        raise unknown_name("score", name, [one for names in SCORES.values() for one in names], field="score")
    return kind


def shares(asked: tuple[str, ...]) -> dict[Removable, float | Left]:
    """Parse the parts to remove.

    Args:
        asked: as in `("channels=0.33", "heads=0.25,blocks=0.2")`.

    Raises:
        BadInput: a share is invalid, or a part is given twice.
    """
    found: dict[Removable, float | Left] = {}
    for name, value in _pairs(asked).items():
        if name in (VOCABULARY, SIZE):
            continue
        kind: Removable | None = next((known for known in get_args(Removable) if known == name), None)
        if kind is None:
            raise unknown_name("part to remove", name, [*get_args(Removable), VOCABULARY, SIZE], field="remove")
        found[kind] = _share_or_left(kind, value)
    return found


def _share_or_left(kind: Removable, value: str) -> float | Left:
    count = value.removeprefix("keep:")
    if kind == "experts" and count != value and count.isdecimal() and int(count) > 0:
        return Left(int(count))
    share = share_of(value)
    if share is None:
        number = f"; to keep {value}, write experts=keep:{value}" if kind == "experts" and value.isdecimal() else ""
        cause = f"the share of {kind} to remove is a number between 0 and 1, not {value!r}{number}"
        raise BadInput(cause, field="remove", value=f"{kind}={value}")
    return share


def _refuse_beside_size(asked: tuple[str, ...]) -> None:
    """Raise BadInput for an invalid target size, or for parts named besides one, which chooses them itself."""
    said = _pairs(asked)
    if SIZE not in said:
        return
    size, others = size_of(said[SIZE]), [name for name in said if name not in (SIZE, VOCABULARY)]
    if others:
        cause = f"a target size chooses the shares of {', '.join(_FOR_SIZE[:-1])} and {_FOR_SIZE[-1]} itself"
        raise BadInput(cause, field="remove", value=f"{others[0]}={said[others[0]]}", fix="leave one out")
    if size.gone is not None and VOCABULARY in said:
        cause = "a share of the model is ambiguous here, because the vocabulary is cut first"
        fix = ("give the size to keep: ", Set("remove", f"{VOCABULARY}={said[VOCABULARY]},{SIZE}=100MB"))
        raise BadInput(cause, field="remove", value=f"{SIZE}={said[SIZE]}", fix=fix)


def _pairs(asked: tuple[str, ...]) -> dict[str, str]:
    return read_pairs(asked, "the share of", "remove")


def _vocabulary(asked: tuple[str, ...]) -> Target | None:
    """Return the target size of the vocabulary. Raises BadInput if it is given twice or invalid."""
    own = _pairs(asked).get(VOCABULARY)
    return None if own is None else target_of(own)


def _is_kept(asked: tuple[str, ...]) -> bool:
    return len(asked) == 1 and asked[0].endswith(".json") and "=" not in asked[0]


def domains_in(asked: tuple[str, ...]) -> dict[str, str]:
    """Parse the names and texts of domains. Raises BadInput if a name is missing or given twice."""
    found = {} if _is_kept(asked) else read_pairs(asked, "the domain", "domains")
    for name, place in found.items():
        if not place:
            raise BadInput(f"{name!r} lacks the name of a domain", field="domains", value=name, fix="write NAME=TEXT")
    return found


def weights_in(asked: str) -> dict[str, float] | None:
    """Parse the weights of domains; return None for max-min. Raises BadInput for anything else."""
    if asked == "max-min":
        return None
    found: dict[str, float] = {}
    for name, value in read_pairs((asked,), "the weight of", "blend").items():
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < float("inf"):
            text, fix = (
                f"{name}={value}" if value else name,
                "write max-min, or NAME=WEIGHT for every domain, with commas between",
            )
            raise BadInput(f"{text!r} is not a domain's weight", field="blend", value=asked, fix=fix)
    if not any(found.values()):
        raise BadInput(
            "all weights of the domains are zero", field="blend", value=asked, fix="give one a larger weight"
        )
    return found
