"""The part of a recipe that asks for a matrix of low rank beside every sparse one. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut, Set, Setting, Words
from coprune.recipe.finetune import FinetunePart
from coprune.recipe.outcome import OutputPart
from coprune.recipe.parts import Decides, Part
from coprune.recipe.structure import StructurePart

_RESULT = Decides.RESULT | Decides.COST
_WHY_NOT: dict[str, Words] = {
    "remove": (Setting("low_rank"), " adds to matrices that keep their shapes, and remove makes them smaller"),
    "finetune": ("fine-tuning would train the sparse part alone, for which the rest was found as it is",),
    "encoding": ("PEFT puts no adapter on packed layers",),
}


class LowRankPart(Part):
    """What is added to pruned matrices."""

    rank: Annotated[
        int,
        _RESULT,
        Field(
            description="Add a matrix of this rank to every pruned linear layer, found together with its zeros. The saved "
            "model is the sparse part, with the rest beside it as an adapter that PEFT and transformers load (needs "
            "coprune[finetune]).",
            ge=0,
        ),
    ] = 0
    rounds: Annotated[
        int,
        _RESULT,
        Field(description="How often a matrix is pruned and approximated in turns for that; the best counts.", ge=1),
    ] = 8


def cannot_add(
    asked: LowRankPart,
    structure: StructurePart,
    finetune: FinetunePart,
    output: OutputPart,
) -> BadInput | None:
    """What is wrong with asking for it beside other parts of a recipe, or with saying how without that; None if nothing is."""
    if not asked.rank and asked.first_said() is not None:
        cause: Words = (
            Setting("low_rank_rounds"),
            " says how low rank is found, and none is without ",
            Setting("low_rank"),
        )
        return BadInput(cause, field="low_rank_rounds", value=asked.rounds, fix=("add ", Set("low_rank", 32)))
    given = {
        "remove": bool(structure.remove),
        "finetune": finetune.mode is not None,
        "encoding": output.encoding == "packed",
    }
    for setting, is_given in given.items():
        if asked.rank and is_given:
            fix: Words = (LeaveOut(setting), ", or ", LeaveOut("low_rank"))
            return BadInput(_WHY_NOT[setting], field=setting, fix=fix)
    return None
