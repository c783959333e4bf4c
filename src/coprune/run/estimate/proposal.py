"""Settings with which a run would fit the memory that it does not fit as asked."""

from __future__ import annotations

from dataclasses import dataclass

from coprune.base.words import Set, Together, Words


@dataclass(frozen=True)
class Proposal:
    """What would make a run fit that does not."""

    settings: dict[str, bool | int | str]
    """By their names."""
    enough: bool
    """Whether it would fit with them, or not even then."""
    halves: bool
    """Whether weights of half the size are another way."""

    def words(self) -> Words:
        """One sentence for people."""
        together = Together(tuple(Set(name, value) for name, value in self.settings.items()))
        if self.enough:
            return ("It would with ", together)
        half = (Set("dtype", "bfloat16"), " and ") if self.halves else ()
        return ("Even ", together, " would not be enough; ", *half, "a machine with more memory would help")
