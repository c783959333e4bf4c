"""The part of a recipe that says what is removed from a model as a whole."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import one_is_enough
from coprune.recipe.choice import Choice
from coprune.recipe.decides import Decides
from coprune.recipe.parts import Part

Removable = Literal["channels", "heads", "blocks"]


class StructurePart(Part):
    """What is removed: channels of the MLPs, attention heads, whole blocks."""

    remove: Annotated[
        tuple[str, ...],
        BeforeValidator(one_is_enough),
        Decides.RESULT | Decides.COST,
        Field(
            description="Remove a share of the model's channels, heads or blocks, so that it gets smaller: channels=0.33, "
            "heads=0.25, blocks=0.2; repeatable, or with commas between."
        ),
    ] = ()
    score: Annotated[
        Choice,
        Decides.RESULT,
        Field(
            description="Which channels and heads go: obs (what the others can make up for), wanda_sp, flap or magnitude; "
            "options as in wanda_sp:refit=true."
        ),
    ] = Choice(name="obs")
    align: Annotated[
        int, Decides.RESULT, Field(description="Keep channels in multiples of this, where the model has them.", ge=1)
    ] = 64

    @field_validator("remove")
    @classmethod
    def _check(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        shares(asked)
        return asked

    @property
    def shares(self) -> dict[Removable, float]:
        """The share of each that is removed."""
        return shares(self.remove)


def shares(asked: tuple[str, ...]) -> dict[Removable, float]:
    """Read what is to be removed.

    Args:
        asked: as in `("channels=0.33", "heads=0.25,blocks=0.2")`.

    Raises:
        BadInput: something is no share, or said twice.
    """
    found: dict[Removable, float] = {}
    for text in (part.strip() for one in asked for part in one.split(",")):
        name, _, value = text.partition("=")
        kind: Removable | None = next((known for known in get_args(Removable) if known == name.strip()), None)
        if kind is None:
            raise unknown_name("part to remove", name.strip(), get_args(Removable), field="remove")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise BadInput(
                f"the share of {kind} to remove is a number between 0 and 1, not {value!r}", field="remove", value=text
            )
        if kind in found:
            raise BadInput(f"the share of {kind} to remove is said twice", field="remove", value=text)
        found[kind] = share
    return found
