"""Foreign task definitions: which of them run code, and sandboxed rendering of their templates.

lm-eval imports Python that a definition names (`!function`) and renders templates without a sandbox. Definitions of lm-eval
and coprune are part of installed packages; for all others the user must agree before any of their code runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import open_given
from coprune.base.limited import Child, Exceeded, render_limited
from coprune.base.words import Set, Words

_PACKAGE = Path(__file__).parents[1]
# In an installed package, and in a checkout.
DEFINITIONS = next(
    (p for p in (_PACKAGE / "task_definitions", _PACKAGE.parents[1] / "docs" / "tasks") if p.is_dir()), None
)
"""Folder of coprune's own definitions of common tasks."""
_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Definition:
    """A file that defines tasks."""

    path: Path
    runs: str | None
    """The code that it runs, to end a sentence; None if it runs none."""
    texts: frozenset[str] = frozenset()
    """All texts in it, including its templates."""
    includes: tuple[Path, ...] = ()


class _Reader(_Loader):  # type: ignore[misc]
    """A YAML reader like lm-eval's that records custom tags instead of resolving them."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.tags: list[str] = []

    def remember(self, suffix: str, node: Any) -> str:
        value = f" {node.value}" if isinstance(node.value, str) else ""
        self.tags.append(f"!{suffix}{value}")
        return self.tags[-1]


_Reader.add_multi_constructor("!", _Reader.remember)


@dataclass(frozen=True)
class Foreign:
    """Definitions that are not part of an installed package."""

    files: Mapping[Path, Definition] = field(default_factory=dict)

    def require_no_code(self, wanted: set[Path] | None) -> None:
        """Raise BadInput if a definition runs code. wanted: the files in use, checked with their includes; None for all."""
        left, seen = sorted(self.files if wanted is None else wanted), set[Path]()
        while left:
            found = self.files.get(path := left.pop())
            if found is None or path in seen:
                continue
            seen.add(path)
            left += found.includes
            if found.runs is not None:
                raise _untrusted(f"{path} {found.runs}")

    @contextmanager
    def sandboxed(self) -> Iterator[None]:
        """Make lm-eval render templates in a sandbox and a limited process within the body, if there are such definitions."""
        from lm_eval import utils

        if not self.files:
            yield
            return
        plain = utils.apply_template
        utils.apply_template = self._apply
        try:
            yield
        finally:
            utils.apply_template = plain

    def _apply(self, template: str, document: dict[str, Any]) -> str:
        try:
            return render_limited(_CHILDREN, "tasks", _rendered, (template, dict(document)))
        except ValueError as error:
            where = next((file.path for file in self.files.values() if template in file.texts), "a definition")
            said = f"a template of {where} cannot be rendered: {error}"
            unsafe = isinstance(error, Exceeded) or "unsafe" in str(error)
            raise _untrusted(said) if unsafe else BadInput(said, field="tasks") from error


_CHILDREN: dict[str, Child] = {}


def _untrusted(cause: str) -> BadInput:
    fix: Words = ("read it, and if you trust it, add ", Set("trust_tasks", True))
    return BadInput(cause, field="trust_tasks", value=False, fix=fix)


def _rendered(template: str, document: dict[str, Any]) -> str:
    """Render a template like lm-eval, but in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = _replaced
    return environment.from_string(template).render(**document)


def _replaced(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def foreign_definitions(folder: Path | None, names: tuple[str, ...]) -> Foreign:
    """Read all definitions in reach that are not part of lm-eval or coprune, without running any code.

    Args:
        folder: folder with definitions at any depth.
        names: names of tasks, or paths of definitions.
    """
    left = [] if folder is None else [*folder.glob("**/*.yaml")]
    left += [path for name in names if (path := expand_home(name)).is_file()]
    found: dict[Path, Definition] = {}
    while left:
        path = left.pop().resolve()
        if path not in found and not _is_installed(path):
            found[path] = _read(path)
            left += found[path].includes
    return Foreign(found)


def _is_installed(path: Path) -> bool:
    import lm_eval

    homes = [Path(lm_eval.__file__).parent, *([] if DEFINITIONS is None else [DEFINITIONS])]
    return any(path.is_relative_to(home.resolve()) for home in homes)


def _read(path: Path) -> Definition:
    try:
        with open_given(path) as stream:
            reader = _Reader(stream)
            content = reader.get_single_data()
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return Definition(path, "cannot be read, and may run code")
    runs = f"runs code: {reader.tags[0]}" if reader.tags else None
    texts = set[str]()
    for key, value in _values(content):
        if isinstance(value, str):
            texts.add(value)
        runs = runs or _code_named(key, value)
    included = content.get("include", ()) if isinstance(content, dict) else ()
    names = [name for name in (included if isinstance(included, list) else [included]) if isinstance(name, str)]
    return Definition(path, runs, frozenset(texts), tuple((path.parent / name).resolve() for name in names))


def _values(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all values at any depth, with the key of each."""
    left, seen = [(None, content)], set[int]()
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))  # YAML aliases can repeat an object
            left += value.items() if isinstance(value, dict) else [(key, one) for one in value]


def _code_named(key: Any, value: Any) -> str | None:
    """Return the code that a setting makes lm-eval load, to end a sentence, or None."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    if key == "metric" and not (isinstance(value, str) and value in metric_registry):
        return f"runs code: the metric {value}, which lm-eval loads from the Hub or a folder"
    if key == "hf_evaluate" and value:
        return "runs code: a metric that lm-eval loads from the Hub or a folder"
    if key == "use_prompt" and value:
        return f"runs code: the prompt {value}, whose template is not sandboxed"
    return None
