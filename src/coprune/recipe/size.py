"""The size that a model is to have once parts of it are removed: a share to go, or what is left in bytes or parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coprune.base.errors import BadInput

PART = "size"
"""Its name among the parts to remove."""
_LEFT = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[KMG]i?B|[KMB])")
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_PARAMETERS = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Size:
    """The largest size that is allowed; one of the three is given."""

    gone: float | None = None
    """Share of the parameters that goes."""
    nbytes: int | None = None
    """Bytes of the saved weights."""
    parameters: int | None = None

    def most(self, parameters: int, itemsize: int) -> int:
        """Return how many parameters may be left.

        Args:
            parameters: of the model before.
            itemsize: bytes of a parameter where it is saved.
        """
        if self.gone is not None:
            return int(parameters * (1 - self.gone))
        return self.nbytes // itemsize if self.nbytes is not None else self.parameters or 0


def size_of(text: str) -> Size:
    """Read `0.25`, `25%`, `100MB` or `1.0B`.

    Raises:
        BadInput: it is none of these.
    """
    if (found := _LEFT.fullmatch(text)) is not None:
        number, unit = float(found["number"]), found["unit"]
        if number > 0:
            times = _BYTES.get(unit) or _PARAMETERS[unit]
            return Size(nbytes=int(number * times)) if unit in _BYTES else Size(parameters=int(number * times))
    elif (gone := share_of(text)) is not None:
        return Size(gone=gone)
    raise BadInput(
        f"{text!r} is not a size of a model",
        field="remove",
        value=f"{PART}={text}",
        fix="write the share to remove (0.25 or 25%), or what is to be left: bytes (100MB) or parameters (350M, 1.2B)",
    )


def share_of(text: str) -> float | None:
    """Read a number between 0 and 1, as `0.25` or `25%`; None for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return share if 0 < share < 1 else None
