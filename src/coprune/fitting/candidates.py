"""Candidates of a fit: removed parts, a short distillation, and a number of bits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

EXACT: Final = "f16"
"""Unquantised, in 16 bits."""
GIVEN = "given"
"""The user's own file or folder, byte for byte."""
FOREIGN: Final = "file"
"""A GGUF file named by the user, byte for byte."""
MIXED: Final = "mixed"
"""An own type for each tensor."""
BITS = tuple(eighths / 8 for eighths in (*range(64, 40, -2), *range(40, 16, -1)))
"""Bits per weight of the mixtures to try, descending, down to the smallest type."""
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_xxs", "q2_k", "iq2_xs")
"""Plain quants to try, descending."""
EMBEDDINGS = ("q5_1", "q5_0", "q4_1", "iq4_nl")
"""Types for embeddings and head, which the quantiser stores in 8 bits if they are tied."""
VOCABULARIES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the vocabulary to keep, descending."""
STRUCTURES = (("experts=0.25",), ("channels=0.125", "channels=0.25"), ("blocks=0.1",))
"""Structured removals to try, each followed by a distillation; amounts of one kind are ascending."""


@dataclass(frozen=True)
class Cut:
    """The model with some parts removed, before quantisation."""

    removed: tuple[str, ...] = ()
    """Removed parts in the syntax of `--remove`, or steps in that of `--step`, in order."""
    tokens: int = 0
    """Tokens of the distillation that follows; 0: none."""

    @property
    def name(self) -> str:
        """Description; empty for the dense model."""
        trained = [f"distilled on {self.tokens:,} tokens"] if self.tokens else []
        return ", ".join([*self.removed, *trained])

    @property
    def rows(self) -> int | None:
        """Number of vocabulary rows left, if the last removal is of the vocabulary; else None."""
        return int(self._left) if self.removed and _counts_tokens(self.removed[-1]) else None

    @property
    def others(self) -> tuple[str, ...]:
        """Removed parts other than vocabulary, and steps."""
        return tuple(part for part in self.removed if not _counts_tokens(part))

    @property
    def sized_by(self) -> Cut:
        """The cut from whose file the sizes of this one's quants are computed, by subtracting vocabulary rows."""
        return self if self.rows is None else self.before or self

    @property
    def before(self) -> Cut | None:
        """The cut without its last part; None for the dense model."""
        left = self.removed[:-1]
        trained = any(not _counts_tokens(part) and not is_step(part) for part in left)
        return Cut(left, self.tokens if trained else 0) if self.removed else None

    @property
    def fewer(self) -> Cut | None:
        """The cut up to its removal of vocabulary; None without one."""
        found = [place for place, part in enumerate(self.removed) if _counts_tokens(part)]
        return Cut(self.removed[: found[0] + 1]) if found else None

    def spares(self, other: Cut) -> bool:
        """Return whether another cut is made by the same steps and removes everything that this one removes."""
        return self._steps == other._steps and self.others in (self._steps, other.others) and self._left >= other._left

    @property
    def _steps(self) -> tuple[str, ...]:
        return tuple(part for part in self.removed if is_step(part))

    @property
    def _left(self) -> float:
        return min((int(part.partition("=")[2]) for part in self.removed if _counts_tokens(part)), default=math.inf)


def _counts_tokens(part: str) -> bool:
    return part.startswith("vocabulary=")


def is_step(part: str) -> bool:
    """Return whether a part of a cut is a registered step, such as `merge:share=0.5`, instead of `channels=0.25`."""
    return "=" not in part.partition(":")[0]


DENSE = Cut()


@dataclass(frozen=True)
class Candidate:
    """A file that the search may make and measure: a cut in a type."""

    cut: Cut
    type: str
    embedding: str | None = None
    bits: float = 0.0
    """Bits per weight, if each tensor has its own type."""
    types: tuple[tuple[str, str], ...] = ()
    """Pairs of a tensor's name and its type."""
    file: str = ""
    """Digest of a file named by the user."""
    title: str = field(default="", compare=False)
    """Name of that file, for messages."""

    @property
    def name(self) -> str:
        """Description for messages."""
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
        """Whether it is an ordinary quant of the dense model."""
        return self.cut == DENSE and self.embedding is None and self.type not in (FOREIGN, MIXED)

    @property
    def key(self) -> str:
        """Identifier for keys of the store."""
        facts = asdict(self)
        del facts["title"]
        for name in ("file", "bits", "types"):
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, sort_keys=True)

    def of(self, cut: Cut) -> Candidate:
        """Return the candidate with another cut in the same type."""
        return replace(self, cut=cut)

    def spares(self, other: Candidate, types: Sequence[str]) -> bool:
        """Return whether another candidate is reduced at least as much in every respect. types: descending."""
        if MIXED in (self.type, other.type):
            return self.type == other.type and self.bits >= other.bits and self.cut.spares(other.cut)
        (type, bits), (lower, fewer) = (
            (types.index(one.type), (None, *EMBEDDINGS).index(one.embedding)) for one in (self, other)
        )
        return type <= lower and bits <= fewer and self.cut.spares(other.cut)


AS_GIVEN = Candidate(DENSE, GIVEN)
