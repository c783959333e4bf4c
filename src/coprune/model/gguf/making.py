"""Files that are written to see which is right: of the model's own architecture, or with every block at its own width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Reporter
from coprune.model.gguf.deci import deci_plans, same_in_llama_cpp
from coprune.model.gguf.llama_cpp import has_llama_cpp
from coprune.model.gguf.narrow import Narrow
from coprune.model.gguf.plan import Example, planned
from coprune.model.gguf.smaller import Exported
from coprune.model.gguf.types import PLAIN
from coprune.model.gguf.verify import require_same, require_written
from coprune.model.gguf.write import Plan, write_gguf

Beside = Callable[[], AbstractContextManager[Path]]
"""Gives the path of a file that is gone in the end."""


@dataclass(frozen=True)
class Whole:
    """All of a new file."""

    plan: Plan
    values: Callable[[str], Tensor]
    """Makes a tensor, float32, by its name in the example."""
    source: Exported
    number: int | None = None
    """Which of the ways to say every block's own width it is; None where all blocks are alike."""

    def write(self, file: Path, reporter: Reporter) -> None:
        """Write it, read it again, and compare. Raises VerificationError, UnsupportedModel where it is not the model."""
        with reporter.bar("Writing", self.plan.bytes) as advance:
            write_gguf(file, self.plan, self.values, advance)
        reporter.say("Reloading the file to compare it")
        if self.number is not None:
            require_written(file, self.plan, self.values)
        elif (unread := require_same(file, self.source, self.plan.kind)) is not None:
            reporter.say(unread)


@dataclass(frozen=True)
class Making:
    """A model that becomes a file."""

    example: Example
    narrow: Narrow
    reporter: Reporter

    def alike(self, kind: str) -> Whole:
        """A file of the example's architecture. kind: a type that the gguf package makes."""
        source = self.narrow.alike
        return Whole(planned(self.example, source, kind), lambda name: self.example.values(name, source), source)

    def _apart(self, kind: str) -> Iterator[Whole]:
        source = self.narrow.apart
        assert source is not None
        for number, found in enumerate(deci_plans(self.alike(kind).plan, self.example, source)):

            def values(name: str, arrange: Callable[[str, Tensor], Tensor] = found.arrange) -> Tensor:
                return arrange(name, self.example.values(name, source))

            yield Whole(found.plan, values, source, number)

    def again(self, whole: Whole, kind: str) -> Whole:
        """The same file in another type."""
        if whole.number is None:
            return self.alike(kind)
        return next(other for other in self._apart(kind) if other.number == whole.number)

    def chosen(self, kind: str, beside: Beside) -> Whole:
        """The file with every block at its own width where that computes the same in llama.cpp, the padded one otherwise."""
        whole = self.alike(kind)
        if self.narrow.apart is None:
            return whole
        why = "the package llama-cpp-py-sync is not installed, in which it would be tried"
        if has_llama_cpp():
            try:
                found, why = self._tried(whole, beside), "llama.cpp computes something else then"
            except UnsupportedModel as error:
                found, why = None, str(error)
            if found is not None:
                return found
        self.reporter.say(f"Blocks of different widths stay padded with zeros: {why}.")
        return whole

    def _tried(self, whole: Whole, beside: Beside) -> Whole | None:
        kind = whole.plan.kind
        assert kind in PLAIN
        with beside() as padded:
            whole.write(padded, self.reporter)
            for other in self._apart(kind):
                with beside() as file:
                    other.write(file, self.reporter)
                    if same_in_llama_cpp(padded, file):
                        return other
        return None
