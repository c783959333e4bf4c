"""Records of what edits removed from a model, which a report turns into text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from coprune.base.words import per_cent
from coprune.recipe.structure import Removable


class Removal(BaseModel):
    """Parts that one edit removed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def line(self) -> str:
        """Return the removal as a line of text."""


class Fewer(BaseModel):
    """Number of parts of one kind and size, before and after."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Removable
    before: int
    least: int
    """Number kept in the block that keeps the fewest."""
    most: int
    mean: float
    share: float | None = None
    """Requested share of removed experts, if it would leave a different number."""

    @classmethod
    def of(cls, kind: Removable, before: int, kept: Sequence[int], share: float | None = None) -> Fewer:
        """Return the numbers of one kind. kept: in each block that had `before`."""
        return cls(kind=kind, before=before, least=min(kept), most=max(kept), mean=sum(kept) / len(kept), share=share)

    def counts(self, mean: bool = True) -> str:
        """Return both numbers as text. mean: whether to add the average if blocks differ."""
        if self.least == self.most:
            return f"{self.before} → {self.most}"
        average = f" ({self.mean:g} on average)" if mean else ""
        return f"{self.before} → {self.least} to {self.most}{average}"


def fewer_lines(parts: Iterable[Fewer]) -> Iterator[str]:
    """Yield a line of text per kind."""
    for kind, alike in groupby(parts, lambda part: part.kind):
        for own in [[*alike]] if kind in ("channels", "heads") else [[part] for part in alike]:
            first, near = own[0], ""
            if first.share is not None:
                exactly = round(first.before * (1 - first.share))
                near = f" ({first.share:g} of them would leave {exactly}; {first.most} is easier to serve)"
            name = "key-value heads with their query heads" if kind == "heads" else kind
            where = {"experts": " of every mixture", "blocks": ""}.get(kind, " of every block")
            yield f"{name} {' and '.join(part.counts() for part in own)}{where}{near}"


class SmallerModel(Removal):
    """Parts removed from the blocks, and the remaining parameters."""

    parts: tuple[Fewer, ...]
    before: int
    """Number of parameters."""
    saved: int
    padding: int = 0
    """Number of saved parameters that are padding zeros."""

    def line(self) -> str:
        left = self.saved - self.padding
        sizes = f"{self.before:,} → {left:,} parameters ({per_cent(left / self.before - 1, 1, signed=True)})"
        if self.padding:
            held = (
                "the folder is as large as before" if self.saved == self.before else f"the folder holds {self.saved:,}"
            )
            sizes += f"; {held}, padded with zeros to the widest block, and coprune export leaves them out"
        return f"{', '.join(fewer_lines(self.parts))}: {sizes}"


class MappedBlocks(Removal):
    """Blocks whose linear map was merged into the block before them."""

    blocks: tuple[str, ...]

    def line(self) -> str:
        first, last = self.blocks[0], self.blocks[-1].rpartition(".")[2]
        named = first if len(self.blocks) == 1 else f"{first} to {last}"
        return f"a linear map of {named} is merged into the block before"


class SilentUnits(Removal):
    """Removed channels and heads that were all zeros."""

    parts: tuple[Fewer, ...]

    def line(self) -> str:
        names = {"heads": "key-value heads"}
        lines = (f"{names.get(part.kind, part.kind)} {part.counts(mean=False)} of a block" for part in self.parts)
        return f"zeros: {', '.join(lines)}"


class CarriedExperts(Removal):
    """Removed experts of a mixture that the model's class does not load."""

    mixture: str
    before: int
    after: int

    def line(self) -> str:
        left = f"experts {self.before} → {self.after} of {self.mixture}, which the model does not load"
        return f"{left}: chosen by their weights (aimer), since no text runs through them"


class Tokens(Removal):
    """Removed tokens of the vocabulary."""

    tokens: int
    """Number before."""
    left: int

    def line(self) -> str:
        return f"{self.tokens - self.left:,} of {self.tokens:,} tokens of the vocabulary"


class Told(Removal):
    """A removal as text, for an edit without numbers."""

    text: str

    def line(self) -> str:
        return self.text


AnyRemoval = SmallerModel | MappedBlocks | SilentUnits | CarriedExperts | Tokens | Told
