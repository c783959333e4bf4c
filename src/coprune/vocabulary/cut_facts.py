"""Facts about a vocabulary cut and its cost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from coprune.base.words import per_cent

_COVERED = 0.5
"""Tokens per byte below which a tokenizer has more than bytes and letters for a text."""
_WORTH = 0.25
"""Acceptable rise in bits per share of bytes saved; going from 8 to 4 bits costs less than half of it."""
LOUD = 0.10
"""Rise in bits or tokens above which a language gets a warning."""


class TextCost(BaseModel):
    """Cost of one text before and after."""

    model_config = ConfigDict(frozen=True)

    text: str
    bytes: int
    tokens: tuple[int, int]
    """Number of tokens before and after."""
    bits: tuple[float, float] | None = None
    """Bits per byte before and after; None if no model was run."""
    renormalised: float | None = None
    """Bits per byte with the old tokens, after renormalising over the kept ones."""
    worst: str = ""
    """The passage with the largest rise."""
    worst_rise: float = 0.0

    @property
    def covered(self) -> bool:
        """Whether the full vocabulary has tokens for the text beyond bytes and letters."""
        return self.tokens[0] < _COVERED * self.bytes

    @property
    def more_tokens(self) -> float:
        """Rise of tokens per byte."""
        return self.tokens[1] / max(self.tokens[0], 1) - 1

    @property
    def more_bits(self) -> float | None:
        """Rise of bits per byte."""
        return None if self.bits is None else self.bits[1] / max(self.bits[0], 1e-12) - 1

    @property
    def rise(self) -> float:
        """Rise of bits per byte, or of tokens if no model was run."""
        return self.more_tokens if self.more_bits is None else self.more_bits

    def line(self) -> str:
        """Return the cost before and after as a line."""
        first, second = (count / self.bytes for count in self.tokens)
        said = f"{self.text}: {first:.3f} → {second:.3f} tokens per byte ({self.more_tokens:+.1%})"
        if self.bits is None or self.more_bits is None:
            return said
        return f"{said}, {self.bits[0]:.4f} → {self.bits[1]:.4f} bits per byte ({self.more_bits:+.2%})"


class VocabularyFacts(BaseModel):
    """Facts about a vocabulary cut."""

    model_config = ConfigDict(frozen=True)

    before: int
    after: int
    kind: str
    """Kind of tokenizer."""
    essential: int
    """Number of tokens kept regardless of counts."""
    parts: int
    """Number of tokens kept as parts of others."""
    counted: list[str]
    """Counted texts with their shares."""
    bytes_before: int
    """Bytes of all weights before."""
    bytes_after: int
    texts: list[TextCost]
    notes: list[str] = []
    """Notes on the folder's other files, one per line."""
    tries: dict[int, float] = {}
    """Rise of bits per byte on held-out text by number of tokens, if a size was searched."""
    proven: float | None = None
    """Rise at the final size, on other held-out text."""
    not_run: str = ""
    """Why no model was run."""

    @property
    def saved(self) -> float:
        """Share of the weights' bytes that is saved."""
        return 1 - self.bytes_after / self.bytes_before

    @property
    def pays(self) -> bool:
        """Whether the rise on the first text is less than that of a quant with the same bytes."""
        return not self.texts or self.texts[0].rise <= _WORTH * self.saved

    @property
    def lost(self) -> list[TextCost]:
        """Texts that lose more than a tenth, largest first, among those that the full vocabulary covered."""
        return sorted((one for one in self.texts if one.covered and one.rise > LOUD), key=lambda one: -one.rise)

    def warning(self) -> str | None:
        """Return the warning; None if no text loses much."""
        if not self.lost:
            return None
        named = ", ".join(f"{one.text} {one.rise:+.0%}" for one in self.lost)
        what = "bits per byte" if self.lost[0].bits is not None else "tokens per byte"
        return f"LOST MORE THAN A TENTH ({what}): {named}"

    def lines(self) -> list[str]:
        """Return all facts, one per line."""
        first = (
            f"{self.before:,} → {self.after:,} tokens ({self.kind}), {per_cent(self.saved)} of the weights' bytes saved"
        )
        counted = "; ".join(self.counted)
        kept = f"{self.essential:,} tokens stay in any case, {self.parts:,} as parts of others; counted: {counted}"
        found = [first, kept, *(one.line() for one in self.texts)]
        for one in self.texts[:1]:
            if one.bits is not None and one.renormalised is not None:
                alone = one.renormalised / one.bits[0] - 1
                found.append(
                    f"the removed tokens' probability, given to the others, hides {alone:+.2%} of that on {one.text}"
                )
            if one.worst:
                found.append(f"worst passage of {one.text} ({one.worst_rise:+.1%}): {one.worst}")
        if self.proven is not None:
            tried = ", ".join(f"{size:,} {rise:+.2%}" for size, rise in sorted(self.tries.items()))
            found.append(f"searched ({tried}), proven on other text: {self.proven:+.2%}")
        found += [f"no model was run: {self.not_run}"] if self.not_run else []
        found += self.notes
        if not self.pays:
            found.append(
                f"DOES NOT PAY: {self.texts[0].rise:+.1%} for {self.saved:.1%} of the bytes; fewer bits a weight cost less"
            )
        warning = self.warning()
        return [*found, *([warning] if warning else [])]
