"""The tree of settings: the parts of a recipe and the names of their settings.

Users say `nsamples`, the code reads `calibrate.samples`. Command-line options, Python arguments, recipe files, columns of a
sweep's table and messages use the users' names. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from coprune.recipe.choice import Choice
from coprune.recipe.outcome import EvaluatePart, OutputPart
from coprune.recipe.parts import CalibratePart, ModelPart, Part, PrunePart, Word
from coprune.recipe.structure import RemovePart
from coprune.recipe.train_part import TrainPart


class Tree(BaseModel):
    """All settings of a run, by part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelPart
    prune: PrunePart = PrunePart()
    remove: RemovePart = RemovePart()
    calibrate: CalibratePart = CalibratePart()
    train: TrainPart = TrainPart()
    evaluate: EvaluatePart = EvaluatePart()
    output: OutputPart = OutputPart()


class Leaf(NamedTuple):
    """A setting in the tree."""

    path: tuple[str, ...]
    """Field names from the root to the setting."""
    field: FieldInfo
    part: type[Part]


def _part(field: FieldInfo) -> type[Part] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Part) else None


def _leaves(part: type[Part], path: tuple[str, ...]) -> Iterator[tuple[str, Leaf]]:
    for name, field in part.model_fields.items():
        place = (*path, name)
        if (inner := _part(field)) is not None:
            yield from _leaves(inner, place)
            continue
        word = next((note.name for note in field.metadata if isinstance(note, Word)), f"{part.prefix}{name}")
        if field.annotation is Choice and name == OF_METHOD:  # commands and calls take its options separately
            yield word, Leaf((*place, "name"), field, part)
            yield "options", Leaf((*place, "options"), field, part)
        else:
            yield word, Leaf(place, field, part)


OF_METHOD = "method"
LEAVES: dict[str, Leaf] = {
    word: leaf
    for name, field in Tree.model_fields.items()
    if (part := _part(field)) is not None
    for word, leaf in _leaves(part, (name,))
}
"""All settings by name."""
FIELDS: dict[str, FieldInfo] = {word: leaf.field for word, leaf in LEAVES.items()}
"""Fields by the settings' names; a method's name and options share the method's field."""


def _details(head: Leaf) -> dict[str, str]:
    """Return a part's settings other than its head, by their names with and without the part's prefix."""
    place, part = head.path[:-1], head.part
    return {
        name: word
        for word, leaf in LEAVES.items()
        if leaf.path[: len(place)] == place and leaf is not head and word.startswith(part.prefix)
        for name in (leaf.path[-1], word.removeprefix(part.prefix))
    }


HEADS: dict[str, dict[str, str]] = {
    word: _details(leaf) for word, leaf in LEAVES.items() if leaf.path[-1] == leaf.part.head
}
"""Settings that ask for a step, each with the settings that configure it, by their names after its colon."""
DETAILS = {word for own in HEADS.values() for word in own.values()}
