"""Pages, cards and tables from the templates in each package's folder `templates/`."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from coprune.base.markdown import fenced, inline


@functools.cache
def _environment() -> Environment:
    """Return the environment: in HTML every text is escaped; in Markdown templates escape, with `inline` and `fenced`."""
    found = Environment(
        loader=PackageLoader("coprune", ""),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    found.filters |= {"inline": inline, "fenced": fenced}
    found.tests["of_kind"] = lambda value, name: type(value).__name__ == name
    return found


def render(template: str, **facts: Any) -> str:
    """Render a template with facts. template: path within the package, such as `report/templates/page.html.j2`."""
    return _environment().get_template(template).render(facts)


def macro(template: str, name: str, *facts: Any) -> str:
    """Render a macro of a template."""
    return str(getattr(_environment().get_template(template).module, name)(*facts))
