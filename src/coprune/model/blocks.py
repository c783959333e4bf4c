"""Find a model's blocks by structure: the module list that holds most of the parameters.

No class name and no family is known here, so a model that appears tomorrow is found as well as LLaMA.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from coprune.errors import UnsupportedModel


@dataclass(frozen=True)
class Block:
    """One block: its position, its path in the model (`model.layers.3`) and its module."""

    index: int
    name: str
    module: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of the largest module list, in order.

    Parameters on the meta device count as well, so this works before any weight is loaded.
    Raises UnsupportedModel if there is no module list, or if it holds less than half of the parameters outside
    the embeddings.
    """
    candidates = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not candidates:
        raise UnsupportedModel(
            "the model holds no list of blocks (no torch.nn.ModuleList), so there is nothing to walk."
        )
    # Of equally large lists the outer one: a list of experts inside the only block is not the list of blocks.
    name, blocks = max(candidates, key=lambda item: (count_parameters(item[1]), -item[0].count(".")))
    embeddings = sum(count_parameters(m) for m in model.modules() if isinstance(m, nn.Embedding))
    rest = count_parameters(model) - embeddings
    if count_parameters(blocks) * 2 < rest:
        raise UnsupportedModel(
            f"the largest list of blocks, {name!r}, holds less than half of the parameters outside the embeddings; "
            "coprune would leave most of this model as it is."
        )
    return [Block(i, f"{name}.{i}", module) for i, module in enumerate(blocks)]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
