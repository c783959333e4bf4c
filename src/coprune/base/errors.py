"""The errors that coprune raises on purpose: values with a cause and a fix.

    CopruneError              anything that stops a run with a message instead of a traceback
    ├── BadInput              invalid input; also a ValueError
    ├── NumericalError        the values allow no meaningful result
    ├── UnsupportedModel      the walk cannot reproduce the model
    ├── VerificationError     a saved model differs from what was computed
    ├── BrokenMask            a pruned weight is not zero any more
    ├── OutOfMemory           a device, or the host, is out of memory
    └── LostProcess           another process of the run is gone

Messages name settings as the interface does (see `coprune.base.words`): arguments in Python, flags on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from coprune.base.words import Face, Words, ended, parts_of, renamed, say

_FEW = 30
"""Maximum number of names listed in a message."""
_LONGEST = 1_000
"""Maximum characters of a cause or a fix, which may quote a file's content."""


class CopruneError(Exception):
    """Base class of errors that stop a run with a message instead of a traceback; the command exits with 2.

    Args:
        cause: what is wrong, as words without a final full stop.
        field: the name of the setting at fault; None for none or several.
        value: the setting's value; None if not given.
        fix: what to do about it, as words; with a capital first letter, a separate sentence.
    """

    def __init__(
        self, cause: Words, *, field: str | None = None, value: object = None, fix: Words | None = None
    ) -> None:
        # One positional argument and the rest as attributes, so that the error survives pickling.
        super().__init__(cause)
        self.cause = cause
        self.field = field
        self.value = value
        self.fix = fix

    def __str__(self) -> str:
        return self.text()

    def text(self, face: Face | None = None) -> str:
        """Return the whole message for an interface, by default the process's own."""
        cause = _bounded(say(self.cause, face))
        if self.fix is None:
            return ended(cause)
        fix = _bounded(say(self.fix, face))
        return ended(f"{cause.removesuffix('.')}{'.' if fix[:1].isupper() else ';'} {fix}")

    def advised(self, fix: Words) -> Self:
        """Return the error with another fix."""
        more = fix if self.fix is None else (*parts_of(self.fix), ". ", *parts_of(fix))
        return type(self)(self.cause, field=self.field, value=self.value, fix=more)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the error with settings renamed. names: new ones by old ones."""
        fix = None if self.fix is None else renamed(self.fix, names)
        field = names.get(self.field or "", self.field)
        return type(self)(renamed(self.cause, names), field=field, value=self.value, fix=fix)

    def within(self, place: str) -> Self:
        """Return the error prefixed by its place: a run, a file, a matrix."""
        cause = (f"{place}: ", *parts_of(self.cause))
        return type(self)(cause, field=self.field, value=self.value, fix=self.fix)


class BadInput(CopruneError, ValueError):
    """Invalid input: an unknown name, a ratio out of range, a missing file."""


class NumericalError(CopruneError):
    """The values allow no meaningful result: NaN activations, a Hessian that no damping repairs."""


class UnsupportedModel(CopruneError):
    """The model does something between or inside its blocks that the walk cannot reproduce."""


class VerificationError(CopruneError):
    """A saved model differs from the computed one: another mask, or other logits."""


class BrokenMask(CopruneError):
    """A pruned weight is no longer zero, or an N:M group has more than N nonzeros."""


class OutOfMemory(CopruneError):
    """A device or the host ran out of memory."""


class LostProcess(CopruneError):
    """Another process of the run ended or does not respond."""


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library, which pyo3 does not derive from Exception."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_caught() -> Iterator[None]:
    """Convert a panic into a ValueError with the same message."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(str(error)) from None


@contextmanager
def about(field: str, value: object) -> Iterator[None]:
    """Add the setting to a BadInput that names none."""
    try:
        yield
    except BadInput as error:
        if error.field is None:
            error.field, error.value = field, value
        raise


def unknown_name(kind: str, name: str, known: Iterable[str], field: str | None = None) -> BadInput:
    """Build the error for a name that is not in a table, with the nearest match if there is one.

    A long table is only listed if it has no near match.

    Args:
        kind: the kind of thing named, for the message.
        name: the unknown name.
        known: the names in the table.
        field: the setting that was given the name.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1)
    listed = f"Known: {', '.join(names)}" if not near or len(names) <= _FEW else ""
    hint = f"did you mean {near[0]!r}?" if near else ""
    return BadInput(f"unknown {kind} {name!r}", field=field, value=name, fix=f"{hint} {listed}".strip())


def _bounded(text: str) -> str:
    """Shorten a very long text in the middle."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 200]} […] {text[-190:]}"
