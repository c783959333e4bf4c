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
    Raises UnsupportedModel if there is no module list, or if a second one (an encoder beside a decoder) holds more
    than half as much.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UnsupportedModel("the model holds no list of blocks (no torch.nn.ModuleList): nothing to walk.")
    # Of equally large lists the outer one: a list of experts inside the only block is not the list of blocks.
    name = max(lists, key=lambda path: (count_parameters(lists[path]), -path.count(".")))
    others = [path for path in lists if not path.startswith(f"{name}.") and path != name]
    rest = max((count_parameters(lists[path]) for path in others if not name.startswith(f"{path}.")), default=0)
    if rest * 2 > count_parameters(lists[name]):
        raise UnsupportedModel(f"the model has more than one long list of blocks beside {name!r}; coprune walks one.")
    return [Block(i, f"{name}.{i}", module) for i, module in enumerate(lists[name])]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
