"""The file of a sweep: a recipe in which fields may have lists of values, and rules for combining the lists.

A field with a list is an axis, and the axes multiply, the first in the file outermost. A field whose value is itself a list
(include, exclude, refine) is an axis if one of its elements is a list. `sweep.yaml` is a `recipe.yaml` with more fields under
`sweep:`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import explain
from coprune.base.words import Set
from coprune.recipe.choice import Choice, split_choice
from coprune.recipe.flat import PRESET, flatten, layered, word_for
from coprune.recipe.recipe import DEFAULTS, read_settings
from coprune.recipe.tree import LEAVES

_LIST_FIELDS = tuple(name for name, default in DEFAULTS.items() if default == ())
# Refused, since all runs of a sweep would write to the same place.
_ONE_RUN_ONLY = ("log_json", "push_to_hub", "private", "overwrite")
SHARED_FOLDER = ".shared"
"""Subfolder with the data that the runs of a sweep share."""
FOLDERS = ("save", "save_model", "log_samples")
"""Settings that name a folder of the whole sweep, with a subfolder for each run."""


class Sweep(BaseModel):
    """A recipe whose fields may have lists of values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Annotated[dict[str, Any], Field(description="Recipe fields, each a value or a list of values.")]
    zip: Annotated[
        tuple[tuple[str, ...], ...],
        Field(description="Groups of fields whose lists advance together instead of multiplying."),
    ] = ()
    include: Annotated[
        tuple[dict[str, Any], ...],
        Field(description="More runs; fields that an entry does not name keep their values and lists."),
    ] = ()
    exclude: Annotated[
        tuple[dict[str, Any], ...],
        Field(description="Runs to leave out: those with all of an entry's values, or one of each list."),
    ] = ()
    folders: Annotated[
        str | None, Field(description="Where a run goes within the sweep's folder, such as '{pattern}/{method}'.")
    ] = None

    steps: Annotated[
        tuple[dict[str, dict[str, Any]], ...],
        Field(
            description="Registered steps that first make each run's model, with their settings, which may be lists."
        ),
    ] = ()

    @field_validator("steps", mode="before")
    @classmethod
    def _one_at_a_time(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, Mapping) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(one, Mapping) for one in listed):
            return value
        return tuple({name: asked or {}} for one in listed for name, asked in one.items())

    @field_validator("zip", mode="before")
    @classmethod
    def _one_group_is_enough(cls, value: Any) -> Any:
        one = isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value)
        return (value,) if one else value

    @classmethod
    def make(cls, data: Mapping[str, Any]) -> Self:
        """Build a sweep from the content of its file. Raises BadInput for unknown fields or invalid lists."""
        rules = _plain(data.get("sweep") or {})
        settings = _words({name: value for name, value in data.items() if name != "sweep"})
        if not isinstance(rules, dict):
            raise BadInput(
                "sweep must be a mapping with zip, include, exclude, folders or steps", field="sweep", value=rules
            )
        for name in rules:
            if name not in cls.model_fields or name == "settings":
                raise unknown_name("key of sweep", name, set(cls.model_fields) - {"settings"}, field=f"sweep.{name}")
        settings, paired = methods_with_options(settings)
        try:
            made = cls(settings=settings, **rules)._by_words(paired)
        except ValidationError as error:
            raise explain(error, lambda place: (f"sweep.{place[0]}", f"sweep.{'.'.join(place)}")) from None
        made._check()
        return made

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a sweep's file; if it names no folder, results go to `out/` and the file's name. Raises BadInput."""
        data = read_settings(path)
        rules = {"sweep": data.pop("sweep")} if "sweep" in data else {}
        return cls.make(layered({"save": str(Path("out") / path.stem)}, data) | rules)

    def _by_words(self, paired: bool) -> Self:
        """Return the sweep with settings by their own names. paired: whether methods and their options advance together."""
        groups = [tuple(map(word_for, group)) for group in self.zip]
        if paired:
            groups = [(*group, "options") if "method" in group else group for group in groups]
            groups += [] if any("method" in group for group in groups) else [("method", "options")]
        with_options = any({"method", "options"} <= set(group) for group in groups)
        include = tuple(included(_words(entry), with_options) for entry in self.include)
        exclude = tuple(one for entry in self.exclude for one in excluded(_words(entry)))
        return self.model_copy(update={"zip": tuple(groups), "include": include, "exclude": exclude})

    def _check(self) -> None:
        for values in (self.settings, *self.include, *self.exclude):
            for name, value in values.items():
                if name not in (*LEAVES, PRESET):
                    in_sweep = "in a sweep, name the method wanda_variant"
                    raise BadInput(f"{name} is for one run", field=name, value=value, fix=in_sweep)
                if is_axis(name, value) and not value:
                    raise BadInput(
                        f"{name} has an empty list, which gives no runs",
                        field=name,
                        value=value,
                        fix="leave it out",
                    )
        for name in _ONE_RUN_ONLY:
            if any(values.get(name) is not None for values in (self.settings, *self.include)):
                raise BadInput(f"{name} is for one run", field=name, fix="leave it out of a sweep")
        for name in FOLDERS:
            if not isinstance(self.settings.get(name), str | Path | None) or any(name in one for one in self.include):
                raise BadInput(
                    f"{name} is the folder of the whole sweep, in which every run gets a subfolder",
                    field=name,
                    value=self.settings.get(name),
                    fix="name one folder",
                )
        for group in self.zip:
            self._check_group(group)
        if not self.settings.get("save"):
            raise BadInput("the sweep has no folder", field="save", fix=("name one with ", Set("save", "out/NAME")))

    def _check_group(self, group: tuple[str, ...]) -> None:
        lengths = {name: len(self.settings[name]) for name in group if is_axis(name, self.settings.get(name))}
        if len(group) < 2 or len(lengths) == 0:
            wrong = f"zip takes two or more fields that have lists, not {', '.join(group) or 'none'}"
            raise BadInput(wrong, field="sweep.zip", value=group)
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            raise BadInput(f"zipped lists must have the same length: {told}", field="sweep.zip", value=group)

    def with_settings(self, typed: Mapping[str, Any]) -> Sweep:
        """Return the sweep with some fields fixed, including in its included runs."""
        if not typed:
            return self
        typed, method = _words(typed), self.settings.get("method", "wanda")
        with_options = any({"method", "options"} <= set(group) for group in self.zip)
        # Options of another method are dropped with it, as in a recipe.
        if "method" in typed and (with_options or not (isinstance(method, list) or method == typed["method"])):
            typed = {"options": {}, **typed}
        kept = [entry for entry in self.exclude if all(_has(typed[n], v) for n, v in entry.items() if n in typed)]
        groups = [tuple(name for name in group if name not in typed) for group in self.zip]
        changed = self.model_copy(
            update={
                "settings": {**self.settings, **typed},
                "include": tuple({n: v for n, v in entry.items() if n not in typed} for entry in self.include),
                "exclude": tuple(kept),
                "zip": tuple(group for group in groups if len(group) > 1),
            }
        )
        changed._check()
        return changed

    @property
    def folder(self) -> Path:
        """Folder of all output."""
        return expand_home(self.settings["save"])

    def to_yaml(self) -> str:
        """Return the sweep as YAML that `read` accepts."""
        rules = self.model_dump(mode="json", exclude={"settings"}, exclude_defaults=True)
        data = self.settings | ({"sweep": rules} if rules else {})
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their own names, with values as in a file."""
    return {name: _plain(value) for name, value in flatten(settings).items()}


def _plain(value: Any) -> Any:
    """Convert a value for YAML: paths and choices to text, all sequences (including numpy's) to lists."""
    if isinstance(value, Path | Choice):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def is_axis(name: str, value: Any) -> bool:
    """Return whether a field holds a list of values to sweep over."""
    if not isinstance(value, list):
        return False
    return name not in _LIST_FIELDS or any(isinstance(one, list | tuple) for one in value)


def _has(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


_MOST_RUNS = 10_000


def methods_with_options(settings: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Split methods that are listed with options, and expand options that have lists into all combinations.

    Returns the settings, and whether `method` and `options` are now lists to be zipped.
    """
    methods, options = settings.get("method"), settings.get("options")
    if not isinstance(methods, list):
        lists = isinstance(options, Mapping) and any(isinstance(value, list) for value in options.values())
        return (settings | {"options": _combined(options)} if lists and options else settings), False
    if not any(isinstance(one, Mapping | Choice) or (isinstance(one, str) and ":" in one) for one in methods):
        return settings, False
    if options is not None:
        raise BadInput("options are given twice, once with the methods", field="options", fix="leave one out")
    pairs = [(one["name"], own) for one in map(_split, methods) for own in _combined(one["options"])]
    taken = {"method": [name for name, _ in pairs], "options": [own for _, own in pairs]}
    # At the position of the methods, to keep the order of the lists.
    rest = [({name: value} if name != "method" else taken) for name, value in settings.items()]
    return {name: value for part in rest for name, value in part.items()}, True


def included(entry: dict[str, Any], with_options: bool) -> dict[str, Any]:
    """Return the settings of an included entry. with_options: whether methods are listed with their own options."""
    own = {"options": {}, **entry} if with_options and "method" in entry else entry
    return own if isinstance(own.get("method"), list) else methods_with_options(own)[0]


def added_to(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an included entry's runs: its own, and the sweep's; a preset sets its own method."""
    gone = ("method", "options") if entry.get(PRESET) is not None and "method" not in entry else ()
    return {**{name: value for name, value in settings.items() if name not in gone}, **entry}


def excluded(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Split an exclusion whose methods are listed with options into one exclusion per method."""
    taken, paired = methods_with_options(entry)
    if not paired:
        return [taken]
    rest = {name: value for name, value in taken.items() if name not in ("method", "options")}
    pairs = zip(taken["method"], taken["options"], strict=True)
    return [rest | {"method": name} | ({"options": own} if own else {}) for name, own in pairs]


def _split(method: Any) -> dict[str, Any]:
    if not isinstance(method, Mapping):
        choice = Choice.of(method)
        return {"name": choice.name, "options": choice.options}
    try:
        return {"name": "wanda", **split_choice(method)}
    except ValueError as error:
        raise BadInput(f"method: {error}", field="method", value=method) from None


def _combined(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in options.values()]
    require_few(len(one) for one in lists)
    return [dict(zip(options, values, strict=True)) for values in product(*lists)]


def require_few(lengths: Iterable[int]) -> None:
    """Raise BadInput if lists of these lengths combine to too many runs; called before the runs are listed."""
    runs = math.prod(lengths)
    if runs > _MOST_RUNS:
        raise BadInput(
            f"the lists combine to {runs:,} runs, and a sweep has at most {_MOST_RUNS:,}",
            field="sweep",
            fix="shorten them, or combine some with zip",
        )
