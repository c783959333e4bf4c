"""What to do where memory runs out."""

from __future__ import annotations

import torch

from coprune.base.devices import in_host_memory
from coprune.base.words import Set, Together, Words
from coprune.model.opened import streams
from coprune.recipe.recipe import Recipe
from coprune.run.journal import may_round_otherwise, weighs_blocks


def less_memory(recipe: Recipe, device: torch.device, in_memory: bool = False) -> Words:
    """What would make a run take less memory: with what it goes on where it stopped, and with what it begins anew.

    device: whose memory that is about; in_memory: whether the model was handed over, and so is there whatever is asked for.
    """
    calibration = recipe.calibration
    batch = [Set("batch_size", 1)] if calibration.batch_size != 1 else []
    activations = "activation_memory" if in_host_memory(device) else "device_activation_memory"
    onward = [Set(activations, 0)] if recipe.setting(activations) != 0 else []
    anew = [Set("nsamples", max(1, calibration.samples // 4))]
    if not (in_memory or streams(recipe)) and streams(recipe.replaced(stream=True)):
        (anew if weighs_blocks(recipe) else onward).append(Set("stream", True))
    if may_round_otherwise(recipe):
        onward = batch + onward
    else:
        anew = batch + anew
    if calibration.propagation == "sequential" and not recipe.structure.remove:
        anew.append(Set("propagation", "block"))
    begun = ("Begun anew, it takes less with ", Together(tuple(anew)))
    if not onward:
        return begun
    # Finished blocks lie in the checkpoint that is being made, if there is one.
    goes_on = recipe.output.model is not None or streams(recipe)
    first = "the same run goes on after its last finished block with " if goes_on else "it takes less with "
    return (first, Together(tuple(onward)), ". ", *begun)
