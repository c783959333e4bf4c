"""The tree of settings: the parts of a recipe, and the flat name of every setting in them.

`nsamples` is the flat name of `calibrate.samples`. Options of the command line, columns of a sweep's table and messages about
runs go by these names. Nothing heavy is imported here.
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
from coprune.recipe.train import TrainPart


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
    """A setting."""

    path: tuple[str, ...]
    """Names of fields from the tree's root to it."""
    field: FieldInfo
    part: type[Part]

    @property
    def place(self) -> str:
        """The path as people write it."""
        return ".".join(self.path)


def _leaves(part: type[Part], path: tuple[str, ...]) -> Iterator[tuple[str, Leaf]]:
    for name, field in part.model_fields.items():
        inner, place = field.annotation, (*path, name)
        if isinstance(inner, type) and issubclass(inner, Part):
            yield from _leaves(inner, place)
            continue
        word = next((note.name for note in field.metadata if isinstance(note, Word)), f"{part.prefix}{name}")
        if inner is Choice and name == OF_METHOD:  # whose options a command and a call take by themselves
            yield word, Leaf((*place, "name"), field, part)
            yield "options", Leaf((*place, "options"), field, part)
        else:
            yield word, Leaf(place, field, part)


def _parts(kind: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, type[Part]]]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            yield ".".join((*path, name)), field.annotation
            yield from _parts(field.annotation, (*path, name))


OF_METHOD = "method"
PARTS: dict[str, type[Part]] = dict(_parts(Tree, ()))
"""All parts by path, nested ones too."""
LEAVES: dict[str, Leaf] = {
    word: leaf for place, part in PARTS.items() if "." not in place for word, leaf in _leaves(part, (place,))
}
"""All settings by flat name."""
FLAT: dict[str, str] = {word: leaf.place for word, leaf in LEAVES.items()}
"""The place of every setting by its flat name."""
FIELDS: dict[str, FieldInfo] = {word: leaf.field for word, leaf in LEAVES.items()}
"""Fields by flat name; of a method's name and options, that of the method."""
WORDS: dict[str, str] = {place: word for word, place in FLAT.items()}
"""The flat name of every setting by its place."""

HEADS: dict[str, dict[str, str]] = {
    WORDS[f"{place}.{part.head}"]: {
        name: word
        for word, leaf in LEAVES.items()
        if leaf.place.startswith(f"{place}.") and leaf.path[-1] != part.head and word.startswith(part.prefix)
        for name in (leaf.path[-1], word.removeprefix(part.prefix))
    }
    for place, part in PARTS.items()
    if part.head is not None
}
"""Settings that ask for something, and for each those that say how: flat names by the names that they have behind its colon."""
DETAILS = {word for own in HEADS.values() for word in own.values()}
