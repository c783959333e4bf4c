"""A sweep as data: a recipe in which a field may have a list of values, and how the lists combine.

A field with a list is an axis, and the axes multiply, the first of the file outermost. A field that is a list itself
(include, exclude, refine) becomes an axis when one of its values is a list. `sweep.yaml` reads like `recipe.yaml`, with
everything that no recipe knows under `sweep:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coprune.base.errors import BadInput, unknown_name
from coprune.recipe.recipe import Recipe, read_settings

SWEEP_FILE = "sweep.yaml"
_LIST_FIELDS = tuple(name for name, field in Recipe.model_fields.items() if field.default == ())
# Each run of a sweep would write to the same place.
_ONE_RUN_ONLY = ("log_json", "push_to_hub")


class Sweep(BaseModel):
    """A recipe with lists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Annotated[dict[str, Any], Field(description="Recipe fields, each a value or a list of values.")]
    zip: Annotated[
        tuple[tuple[str, ...], ...],
        Field(description="Groups of fields whose lists go in step instead of multiplying."),
    ] = ()
    include: Annotated[
        tuple[dict[str, Any], ...],
        Field(description="More runs: what an entry does not name is as above, lists and all."),
    ] = ()
    exclude: Annotated[
        tuple[dict[str, Any], ...],
        Field(description="Runs to leave out: those that have all of an entry's values (a list: any of them)."),
    ] = ()
    folders: Annotated[
        str | None, Field(description="Where a run goes within the sweep's folder, such as '{pattern}/{method}'.")
    ] = None

    @field_validator("zip", mode="before")
    @classmethod
    def _one_group_is_enough(cls, value: Any) -> Any:
        one = isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value)
        return (value,) if one else value

    @classmethod
    def make(cls, data: Mapping[str, Any]) -> Self:
        """Build a sweep from what its file says. Raises BadInput for unknown fields or lists that make no sense."""
        rules = data.get("sweep") or {}
        settings = {name: value for name, value in data.items() if name != "sweep"}
        if not isinstance(rules, dict):
            raise BadInput("sweep: must hold zip, include, exclude or folders.")
        for name in rules:
            if name not in cls.model_fields or name == "settings":
                raise unknown_name("key of sweep", name, set(cls.model_fields) - {"settings"})
        try:
            made = cls(settings=settings, **rules)
        except ValidationError as error:
            detail = error.errors()[0]
            raise BadInput(f"sweep.{'.'.join(map(str, detail['loc']))}: {detail['msg']}.") from None
        made._check()
        return made

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a sweep's file; without a folder in it, results go to `out/` and the file's name. Raises BadInput."""
        return cls.make({"save": str(Path("out") / path.stem), **read_settings(path)})

    def _check(self) -> None:
        for values in (self.settings, *self.include, *self.exclude):
            for name, value in values.items():
                if name not in Recipe.model_fields:
                    raise unknown_name("recipe field", name, Recipe.model_fields)
                if is_axis(name, value) and not value:
                    raise BadInput(f"{name} has an empty list, which makes no run at all; leave it out.")
        for name in _ONE_RUN_ONLY:
            if self.settings.get(name) is not None:
                raise BadInput(f"{name} is for one run; leave it out of a sweep.")
        for name in ("save", "save_model"):
            if isinstance(self.settings.get(name), list):
                raise BadInput(
                    f"{name} is the folder of the whole sweep, in which every run gets one; name one folder."
                )
        for group in self.zip:
            self._check_group(group)
        if not self.settings.get("save"):
            raise BadInput("the sweep has no folder; name one with save: out/NAME (--save).")

    def _check_group(self, group: tuple[str, ...]) -> None:
        lengths = {name: len(self.settings[name]) for name in group if is_axis(name, self.settings.get(name))}
        if len(group) < 2 or len(lengths) == 0:
            raise BadInput(f"zip takes two or more fields that have lists, not {', '.join(group) or 'none'}.")
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            raise BadInput(f"zipped lists must be of one length: {told}.")

    def with_settings(self, typed: Mapping[str, Any]) -> Sweep:
        """The sweep with fields fixed to other values, which also replace those of its included runs."""
        if not typed:
            return self
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
        """Where everything goes."""
        return Path(self.settings["save"])

    def to_yaml(self) -> str:
        """The sweep as the file that `read` takes."""
        rules = self.model_dump(mode="json", exclude={"settings"}, exclude_defaults=True)
        data = {name: str(value) if isinstance(value, Path) else value for name, value in self.settings.items()}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
        return yaml.safe_dump(data | ({"sweep": rules} if rules else {}), sort_keys=False, allow_unicode=True)


def is_axis(name: str, value: Any) -> bool:
    """Whether a field's value is a list of values."""
    if not isinstance(value, list):
        return False
    return name not in _LIST_FIELDS or any(isinstance(one, list | tuple) for one in value)


def _has(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted
