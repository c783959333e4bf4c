"""The first code of a documentation page, for further tests of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DOCS = Path(__file__).parents[2] / "docs"


def first_code(page: str) -> str:
    """Return the first Python block of a page."""
    return (_DOCS / page).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def named_in(page: str, name: str) -> Any:
    """Return an object defined in the first block of a page."""
    names: dict[str, Any] = {"__name__": f"docs.{page}"}
    exec(compile(first_code(page), page, "exec", dont_inherit=True), names)
    return names[name]
