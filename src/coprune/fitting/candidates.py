"""Candidates of a fit: removed parts, a short distillation, and a number of bits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

EXACT: Final = "f16"
"""Sixteen bits as they are."""
GIVEN = "given"
"""The user's own file or folder, byte for byte."""
FOREIGN: Final = "file"
"""A file from elsewhere, byte for byte."""
MIXED: Final = "mixed"
"""A type for each tensor."""
BITS = tuple(eighths / 8 for eighths in (*range(64, 40, -2), *range(40, 16, -1)))
"""Bits of a weight of mixtures that are tried, the largest first, as far as types are that small."""
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_xxs", "q2_k", "iq2_xs")
"""Plain quants that are tried, the largest first."""
EMBEDDINGS = ("q5_1", "q5_0", "q4_1", "iq4_nl")
"""Types of the embeddings and the head, which the quantiser leaves at eight bits where both are one table."""
VOCABULARIES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the tokens that stay."""
STRUCTURES = (("experts=0.25",), ("channels=0.125", "channels=0.25"), ("blocks=0.1",))
"""Structured removals that are tried, each followed by a distillation: the least first, where there are several amounts."""


@dataclass(frozen=True)
class Cut:
    """A model without some parts, before it is quantised."""

    removed: tuple[str, ...] = ()
    """Removed parts in the syntax of `--remove`, one after another."""
    tokens: int = 0
    """Tokens of a distillation afterwards."""

    @property
    def name(self) -> str:
        """Description; empty for the dense model."""
        trained = [f"distilled on {self.tokens:,} tokens"] if self.tokens else []
        return ", ".join([*self.removed, *trained])

    @property
    def rows(self) -> int | None:
        """How many tokens the last part leaves; None where it is of another kind."""
        return int(self._left) if self.removed and _counts_tokens(self.removed[-1]) else None

    @property
    def others(self) -> tuple[str, ...]:
        """Removed parts that are no tokens."""
        return tuple(part for part in self.removed if not _counts_tokens(part))

    @property
    def sized_by(self) -> Cut:
        """The cut whose file tells the bytes of this one's quants: rows of tokens are subtracted."""
        return self if self.rows is None else self.before or self

    @property
    def before(self) -> Cut | None:
        """The cut without its last part; None for the dense model."""
        left = Cut(self.removed[:-1], self.tokens)
        return (left if left.others else Cut(left.removed)) if self.removed else None

    @property
    def fewer(self) -> Cut | None:
        """The cut up to the part that takes tokens; None without one."""
        found = [place for place, part in enumerate(self.removed) if _counts_tokens(part)]
        return Cut(self.removed[: found[0] + 1]) if found else None

    def spares(self, other: Cut) -> bool:
        """Return whether it removes nothing but what another cut removes too."""
        return self.others in ((), other.others) and self._left >= other._left

    @property
    def _left(self) -> float:
        return min((int(part.partition("=")[2]) for part in self.removed if _counts_tokens(part)), default=math.inf)


def _counts_tokens(part: str) -> bool:
    return part.startswith("vocabulary=")


DENSE = Cut()


@dataclass(frozen=True)
class Candidate:
    """A file."""

    cut: Cut
    type: str
    embedding: str | None = None
    bits: float = 0.0
    """Of a weight, where every tensor has its own type."""
    types: tuple[tuple[str, str], ...] = ()
    """Names of tensors, each with its type."""
    file: str = ""
    """Digest of a file from elsewhere."""
    title: str = field(default="", compare=False)
    """Its name."""

    @property
    def name(self) -> str:
        """Description."""
        if self.type == GIVEN:
            return "the model as it was given"
        if self.type == FOREIGN:
            return self.title
        if self.type == MIXED:
            return f"{self.cut.name} {f'{self.bits:g} bits' if self.bits else 'types'} by tensor".strip()
        bits = self.type if self.embedding is None else f"{self.type}, embeddings {self.embedding}"
        return f"{self.cut.name} {bits}".strip()

    @property
    def plain(self) -> bool:
        """Whether it is a quant of the dense model and nothing else."""
        return self.cut == DENSE and self.embedding is None and self.type not in (FOREIGN, MIXED)

    @property
    def key(self) -> str:
        """Names it in a cache."""
        facts = asdict(self)
        del facts["title"]
        for name in ("file", "bits", "types"):
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, sort_keys=True)

    def of(self, cut: Cut) -> Candidate:
        """Return the candidate of another cut."""
        return replace(self, cut=cut)

    def spares(self, other: Candidate, types: Sequence[str]) -> bool:
        """Return whether it is in no respect cut more than another candidate. types: the largest first."""
        if MIXED in (self.type, other.type):
            return self.type == other.type and self.bits >= other.bits and self.cut.spares(other.cut)
        (type, bits), (lower, fewer) = (
            (types.index(one.type), (None, *EMBEDDINGS).index(one.embedding)) for one in (self, other)
        )
        return type <= lower and bits <= fewer and self.cut.spares(other.cut)


AS_GIVEN = Candidate(DENSE, GIVEN)
