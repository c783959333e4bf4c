"""How every pruned block is trained, and what that does not go with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from coprune.base.errors import BadInput
from coprune.base.words import Set, Setting, Words
from coprune.recipe.flat import word_for
from coprune.recipe.parts import CalibrationPart, Decides, Part

_RESULT = Decides.RESULT | Decides.COST


class ReconstructionPart(Part):
    """Training of every pruned block."""

    steps: Annotated[
        int,
        _RESULT,
        Field(description="Train every pruned block for so many steps toward the dense model's outputs.", ge=0),
    ] = 0
    tokens: Annotated[
        int,
        _RESULT,
        Field(
            description="With reconstruct: train every block on at least so many tokens, with more steps where samples are "
            "short, so that half as long ones do not halve the training. [as many as the steps hold]",
            ge=0,
        ),
    ] = 0
    learning_rate: Annotated[float, _RESULT, Field(description="Learning rate of that.", gt=0)] = 2.5e-3
    rates: Annotated[
        Literal["absolute", "relative"],
        _RESULT,
        Field(
            description="relative: reconstruct_lr times the size (root mean square) of each matrix and vector is its rate, so "
            "that one serves models with smaller or larger weights; absolute: reconstruct_lr is the rate of all that is trained.",
        ),
    ] = "relative"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        _RESULT,
        Field(description="What blocks compute in while they are trained."),
    ] = "float32"


def cannot_reconstruct(asked: ReconstructionPart, calibration: CalibrationPart) -> BadInput | None:
    """What a training of the blocks does not go with; None if nothing is wrong."""
    if asked.steps and calibration.propagation == "dense":
        return BadInput(
            "reconstruct trains a block on what the pruned blocks before it give, which propagation dense never computes",
            field="reconstruct",
            value=asked.steps,
            fix=("take ", Set("propagation", "block"), " or ", Set("propagation", "sequential")),
        )
    if not asked.steps and (field := asked.first_said()) is not None:
        word, wanted = word_for(f"reconstruction.{field}"), Setting("reconstruct")
        cause: Words = (Setting(word), " says how blocks are trained, and none is trained without ", wanted)
        return BadInput(cause, field=word, value=getattr(asked, field), fix=("add ", Set("reconstruct", 6)))
    return None
