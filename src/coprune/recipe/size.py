"""Target size of a model after removal: a share to remove, or the bytes or parameters to keep."""

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
    """A maximum size; exactly one field is set."""

    gone: float | None = None
    """Share of the parameters to remove."""
    nbytes: int | None = None
    """Bytes of the saved weights."""
    parameters: int | None = None

    def most(self, parameters: int, itemsize: int) -> int:
        """Return the maximum number of parameters.

        Args:
            parameters: number before removal.
            itemsize: bytes per saved parameter.
        """
        if self.gone is not None:
            return int(parameters * (1 - self.gone))
        return self.nbytes // itemsize if self.nbytes is not None else self.parameters or 0


def size_of(text: str) -> Size:
    """Parse `0.25`, `25%`, `100MB` or `1.0B`.

    Raises:
        BadInput: the text is none of these.
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
        fix="write the share to remove (0.25 or 25%), or the size to keep: bytes (100MB) or parameters (350M, 1.2B)",
    )


def share_of(text: str) -> float | None:
    """Parse a number between 0 and 1, such as `0.25` or `25%`; return None for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return share if 0 < share < 1 else None
