"""The syntax of calibration data: one source, or several with shares: `self=0.5,wikitext2=0.3,chat.jsonl=0.2`.

A source's options follow a colon, its share comes last: `chat.jsonl:template=chat,seqlen=512=0.2`. A comma before an
option's name continues the same source: `self:temperature=0.8,top_p=0.9`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import Setting

OWN = "self"
OPTIONS: dict[str, str] = {
    "template": "chat or none",
    "column": "a name",
    "temperature": "a number of at least 0",
    "top_p": "a number above 0, up to 1",
    "length": "a whole number of at least 1",
    "seqlen": "a whole number of at least 2",
}
"""Options of a source, with their values."""
_NAMES = "|".join(OPTIONS)
_OPTION = re.compile(rf"(?P<key>{_NAMES})=(?P<value>[^=]*)(?:=(?P<share>[^=]*))?")
_WITH_OPTION = re.compile(rf"(?P<name>.*?):(?P<option>(?:{_NAMES})=.*)")
_WITH_SHARE = re.compile(r"(?P<name>.*?)(?:=(?P<share>[^=]*))?")
_OF_OWN = ("temperature", "top_p", "length")


@dataclass
class _Written:
    name: str
    share: float | None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A source of calibration samples."""

    name: str
    """A corpus, a file, a data set, what was handed over; `self` or `self:PROMPTS` for what the model writes."""
    share: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether the dense model generates it."""
        return self.name == OWN or self.name.startswith(f"{OWN}:")

    @property
    def prompts(self) -> str | None:
        """The file of prompts that the dense model answers; None if it begins by itself."""
        return self.name.removeprefix(f"{OWN}:") if self.name.startswith(f"{OWN}:") else None

    @property
    def is_plain(self) -> bool:
        """Whether it is only a name."""
        return not self.is_own and not self.options

    @property
    def is_text(self) -> bool:
        """Whether it is a name with at most a sample length, read without a template."""
        return not self.is_own and self.options.keys() <= {"seqlen"}


def split_sources(data: str) -> list[Source]:
    """Read what a model is calibrated on.

    Raises:
        BadInput: an option or a share makes no sense, shares do not add up to 1, or only some sources have one.
    """
    if data != OWN and exists(data):
        return [Source(data, 1.0)]
    written: list[_Written] = []
    for item in (part.strip() for part in data.split(",")):
        option = _OPTION.fullmatch(item)
        if option is not None and written and written[-1].options and written[-1].share is None:
            _take(written[-1], option, data)
        elif (begun := _WITH_OPTION.fullmatch(item)) is not None:
            written.append(_Written(begun["name"], None))
            option = _OPTION.fullmatch(begun["option"])
            if option is None:
                raise _wrong(f"{begun['option']!r} of {begun['name']} cannot be read", data)
            _take(written[-1], option, data)
        else:
            plain = _WITH_SHARE.fullmatch(item)
            if plain is None or not plain["name"]:
                raise _wrong(f"{item!r} names no source", data)
            written.append(_Written(plain["name"], _share(plain["share"], plain["name"], data)))
    return _shared(written, data)


def text_of(value: Any) -> Any:
    """Accept a path, or a mapping of names to shares (or to nothing), as one line of text; a validator."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, Mapping):
        return value
    return ",".join(str(name) if share is None else f"{name}={share}" for name, share in value.items())


def counts_of(shares: Sequence[float], samples: int) -> list[int]:
    """Return the number of samples of each share, rounded by largest remainder; of equal ones the first."""
    exact = [share * samples for share in shares]
    counts = [int(one + 1e-9) for one in exact]
    order = sorted(range(len(shares)), key=lambda i: (-round(exact[i] - counts[i], 9), i))
    for i in order[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def exists(name: str) -> bool:
    """Return whether a path exists under this whole name, commas included."""
    try:
        return expand_home(name).exists()
    except (OSError, ValueError):
        return False


def _take(source: _Written, option: re.Match[str], data: str) -> None:
    key, value = option["key"], option["value"]
    if key in source.options:
        raise _wrong(f"{key} of {source.name} is given twice", data)
    source.options[key] = _value(source.name, key, value, data)
    source.share = _share(option["share"], source.name, data)


def _value(name: str, key: str, text: str, data: str) -> Any:
    own = name == OWN or name.startswith(f"{OWN}:")
    if key in _OF_OWN and not own:
        raise _wrong(f"{key} is an option of {OWN}, and {name} is not written by the model", data)
    wrong = _wrong(f"{key} of {name} is {OPTIONS[key]}, not {text!r}", data)
    if key == "template" and text not in ("chat", "none"):
        raise wrong
    if key in ("template", "column"):
        return text
    try:
        number = int(text) if key in ("length", "seqlen") else float(text)
    except ValueError:
        raise wrong from None
    fits = {
        "temperature": 0 <= number < 1e6,
        "top_p": 0 < number <= 1,
        "length": number >= 1,
        "seqlen": number >= 2,
    }
    if not fits[key]:
        raise wrong
    return number


def _share(text: str | None, name: str, data: str) -> float | None:
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise _wrong(f"the share of {name} is a number above 0, up to 1, not {text!r}", data)
    return share


def _shared(written: list[_Written], data: str) -> list[Source]:
    named = [f"{source.name} {sorted(source.options.items())}" for source in written]
    if twice := next((source.name for i, source in enumerate(written) if named[i] in named[:i]), None):
        raise _wrong(f"the source {twice} is named twice", data)
    without = [source.name for source in written if source.share is None]
    if without and len(without) < len(written):
        raise _wrong(f"{without[0]} has no share, and others have", data, "give each one, or none for equal shares")
    total = sum(source.share or 0 for source in written)
    if not without and abs(total - 1) > 1e-6:
        raise _wrong(f"the shares add up to {total:g}, not to 1", data, "give shares that do, or none for equal ones")
    return [Source(s.name, 1 / len(written) if s.share is None else s.share, s.options) for s in written]


def _wrong(cause: str, data: str, fix: str | None = None) -> BadInput:
    example = (Setting("dataset"), " reads like self=0.5,wikitext2=0.3,chat.jsonl:template=chat=0.2")
    return BadInput(cause, field="dataset", value=data, fix=example if fix is None else fix)
