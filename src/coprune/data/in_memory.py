"""Text and token ids passed from Python, under names that a recipe can hold.

A recipe names its data. Data without a name (a list of strings, a `datasets.Dataset`, a tensor of token ids) gets one derived
from its contents, `given:<fingerprint>`, so that runs on other data are other runs; during the call the contents are found
under that name.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.data.text import PREFIX, JoinedText, choose_text_column, join

_LABEL = re.compile(r"[\w-]+")
_KINDS = "a list of strings, a datasets.Dataset or a tensor of token ids"


class GivenTokens(NamedTuple):
    """Token ids: samples × seqlen int64, or T int64 for an evaluation; and where they come from."""

    tokens: Tensor
    source: str


class Rows(Protocol):
    """A `datasets.Dataset`, as a protocol, since importing that package is slow."""

    features: Any

    def __len__(self) -> int: ...

    def with_format(self, type: str | None = None) -> Any: ...


GivenText = Sequence[str] | Rows | Tensor
"""Strings, a `datasets.Dataset`, or token ids."""
CalibrationData = str | Path | GivenText | Mapping[str, Any]
TextData = str | Path | Sequence[str] | Rows | Tensor | Mapping[str, str | Path | GivenText]
"""A name, names, a `datasets.Dataset`, token ids, or a mapping of labels to names and data."""
GivenData = JoinedText | GivenTokens
_HERE: ContextVar[Mapping[str, GivenData]] = ContextVar("given data")


def given_data(name: str) -> GivenData | None:
    """Return the data passed from Python under a name, or None if the name means something else.

    Raises:
        BadInput: the data was passed in another call.
    """
    if not name.startswith(PREFIX):
        return None
    found = _HERE.get({}).get(name)
    if found is None:
        raise BadInput(
            f"{name} is data from an earlier Python call, which a recipe cannot hold",
            fix="pass it again, or name a file",
        )
    return found


def given_samples(name: Any) -> dict[str, int]:
    """Return the number and length of samples, as settings, if the caller passed token ids under this name."""
    data = given_data(name) if isinstance(name, str) and not {",", "="} & set(name) else None
    if not isinstance(data, GivenTokens) or data.tokens.ndim != 2:
        return {}
    samples, length = data.tokens.shape
    return {"nsamples": samples, "seqlen": length}


@contextmanager
def handed_over(settings: Mapping[str, Any], calibration: str | None, evaluation: str) -> Iterator[dict[str, Any]]:
    """Yield settings in which the caller's data is replaced by names, valid inside the `with`.

    Args:
        settings: the caller's.
        calibration: the setting with text or token ids to calibrate or train on, if there is one.
        evaluation: the setting with data to measure on. A list there holds names, so texts are a mapping from labels.

    Raises:
        BadInput: a value is neither a name nor text nor token ids.
    """
    named, found = dict(settings), dict[str, GivenData]()
    if calibration is not None and not _is_name(settings.get(calibration)):
        named[calibration], own = _named_sources(settings[calibration], calibration)
        found |= own
    asked = settings.get(evaluation)
    if not _is_name(asked) and not _is_names(asked):
        parts = asked if isinstance(asked, Mapping) else {None: asked}
        entries = [(value, label) for label, value in parts.items()]
        texts = dict(_named(value, label, evaluation) for value, label in entries if not _is_name(value))
        found |= texts
        named[evaluation] = ",".join([*(str(value) for value, _ in entries if _is_name(value)), *texts])
    before = _HERE.set({**_HERE.get({}), **found})
    try:
        yield named
    finally:
        _HERE.reset(before)


def _named_sources(asked: Any, field: str) -> tuple[str, dict[str, GivenData]]:
    """Return the calibration data as written in a recipe, and the objects passed from Python by the names in it."""
    several = isinstance(asked, Mapping) and not type(asked).__name__.endswith("DatasetDict")
    parts = _with_shares(asked, field) if several else {"": (asked, None)}
    said, found = [], dict[str, GivenData]()
    for label, (value, share) in parts.items():
        name = str(value)
        if not _is_name(value):
            own, colon, options = label.partition(":")
            name, data = _named(value, own or None, field)
            found[name] = data
            name += colon + options
        said.append(name if share is None else f"{name}={share}")
    return ",".join(said), found


def _with_shares(asked: Mapping[Any, Any], field: str) -> dict[str, tuple[Any, Any]]:
    """Return data and shares by label: `{"wikitext2": 0.5, "mine:seqlen=64": (texts, 0.5)}`; without data the label is a name."""
    found = {}
    for label, value in asked.items():
        data, share = value if isinstance(value, tuple) and len(value) == 2 else (label, value)
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float)):
            wrong = f"{label} has the share {share!r:.40}, which is not a number"
            raise BadInput(wrong, field=field, fix="give a share, or (data, share)")
        found[str(label)] = data, share
    return found


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str | Path)


def _is_names(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, str | Path) for one in value)


def _named(value: Any, label: str | None, field: str) -> tuple[str, GivenData]:
    """Return a name for an object, and the object as data. label: the caller's name for it, if any."""
    if label is not None and not _LABEL.fullmatch(str(label)):
        raise BadInput(f"the label {label!r} may only contain letters, digits, '_' and '-'", field=field)
    data = _read(value, field)
    content = data.text.encode() if isinstance(data, JoinedText) else data.tokens.numpy().astype("<i8").tobytes()
    shape = "" if isinstance(data, JoinedText) else str(tuple(data.tokens.shape))
    digest = hashlib.sha256(content + shape.encode()).hexdigest()[:12]
    return f"{PREFIX}{digest}" if label is None else f"{PREFIX}{label}:{digest}", data


def _read(value: Any, field: str) -> GivenData:
    if isinstance(value, Tensor):
        return _tokens(value, field)
    datasets: Any = sys.modules.get("datasets")  # a caller that passes a data set has imported the library
    if datasets is not None and isinstance(value, datasets.Dataset):
        return _of_dataset(value, field)
    if not _is_names(value) or any(isinstance(one, Path) for one in value):
        split = "; take one split of it" if type(value).__name__.endswith("DatasetDict") else ""
        raise BadInput(f"data is a name, {_KINDS}, not of type {type(value).__name__}{split}", field=field)
    return join(list(value), "\n\n", f"{len(value)} texts from Python")


def _tokens(tokens: Tensor, field: str) -> GivenTokens:
    whole = not tokens.is_floating_point() and not tokens.is_complex() and tokens.dtype != torch.bool
    if not whole or tokens.ndim not in (1, 2) or tokens.numel() == 0 or int(tokens.min()) < 0:
        found = f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
        raise BadInput(f"token ids are whole numbers from 0, samples × length; this tensor is {found}", field=field)
    return GivenTokens(tokens.detach().to("cpu", torch.int64).contiguous(), "token ids from Python")


def _of_dataset(rows: Any, field: str) -> GivenData:
    """Return the text of a data set's rows, or their token ids if it has `input_ids` of one length and no text."""
    strings = {
        name: getattr(feature, "dtype", None) in ("string", "large_string") for name, feature in rows.features.items()
    }
    if "input_ids" in strings and not any(strings.values()):
        ids = rows.with_format(None)["input_ids"]
        if len(lengths := {len(row) for row in ids}) != 1:
            raise BadInput(
                f"the rows of input_ids have {len(lengths)} lengths", field=field, fix="cut them to one length"
            )
        return _tokens(torch.tensor(list(ids)), field)
    source = f"a dataset of {len(rows)} rows from Python"
    column = choose_text_column(strings, None, source)
    return join([text for text in rows.with_format(None)[column] if text], "\n\n", source)
