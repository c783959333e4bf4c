"""Find a model's blocks by structure: the list of modules that holds most of the parameters.

If its elements are stages (lists of blocks, with a change of width and resolution between them), the blocks are the elements of
the stages, in order; a stage's down-sampling counts as a block. No class or family is named, so this works for new models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, permutations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from coprune.base.errors import UnsupportedModel


@dataclass(frozen=True)
class Block:
    """A block: its index, its path in the model (such as `model.layers.3`) and its module."""

    index: int
    name: str
    module: nn.Module
    part: int = 0
    """Number of its list: 0 for an encoder's blocks, 1 for its decoder's."""


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of the largest list of modules (those of its stages, if it is a list of stages), in order.

    Parameters on the meta device count, so this works before any weight is loaded. In an encoder-decoder model, the encoder's
    come first. A language model's vision and audio towers do not count, since text does not run through them.

    Raises UnsupportedModel if there is no such list, or if another one, not a decoder's, has more than half as many parameters.
    """
    found: list[Block] = []
    for part, (path, half) in enumerate(_halves(model)):
        for name, module in _largest_list(half):
            found.append(Block(len(found), f"{path}.{name}" if path else name, module, part))
    return found


def by_list(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group blocks by list: two for an encoder-decoder model, else one."""
    return [[*own] for _, own in groupby(blocks, lambda block: block.part)]


def _halves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return paths and modules of an encoder and its decoder, in order; else the model itself."""
    if isinstance(model, PreTrainedModel) and getattr(model.config, "is_encoder_decoder", False):
        halves = [model.get_encoder(), model.get_decoder()]
        paths = [name for half in halves for name, module in model.named_modules() if module is half]
        first, second = [*paths, "", ""][:2]
        if first and second and not f"{first}.".startswith(f"{second}.") and not f"{second}.".startswith(f"{first}."):
            return list(zip(paths, halves, strict=True))
    return [("", model)]


def _largest_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of the largest list within a module, with their paths in it."""
    towers, every = _towers(model), {name: module for name, module in model.named_modules() if _is_list(module)}
    beside = {name for name in every if any(name.startswith(f"{tower}.") for tower in towers)}
    # A vision model has no other lists.
    lists = {name: module for name, module in every.items() if name not in beside} or every
    if not lists:
        raise UnsupportedModel("the model has no list of blocks (no torch.nn.ModuleList), so there is nothing to walk")
    # Of equally large lists take the outer one: the experts inside an only block are not the list of blocks.
    name = max(lists, key=lambda path: (count_parameters(lists[path]), -path.count(".")))
    others = [path for path in lists if not path.startswith(f"{name}.") and path != name]
    rest = max((count_parameters(lists[path]) for path in others if not name.startswith(f"{path}.")), default=0)
    if rest * 2 > count_parameters(lists[name]):
        raise UnsupportedModel(
            f"the model has more than one long list of blocks beside {name!r}, but coprune walks only one"
        )
    blocks = list(_blocks_of(name, lists[name]))
    if not blocks:
        raise UnsupportedModel("the model has no blocks: its configuration sets their number to 0")
    return blocks


def _towers(model: nn.Module) -> list[str]:
    """Return the paths of submodels with a configuration of their own, other than the text model's."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return []
    own = (type(config), type(config.get_text_config()))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in own
    ]


def _is_list(module: nn.Module) -> bool:
    """Return whether a module may be a list of blocks: a ModuleList, or a Sequential of more than single layers."""
    if isinstance(module, nn.ModuleList):
        return True
    elements = [element for element in module if count_parameters(element)] if isinstance(module, nn.Sequential) else []
    return bool(elements) and all(any(count_parameters(part) for part in e.children()) for e in elements)


def _blocks_of(name: str, elements: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the elements of a list with their paths; for a list of stages, the stages' elements."""
    stages = _are_stages([element for element in elements.children() if count_parameters(element)])
    for path, element in elements.named_children():
        if stages:
            yield from _parts_of_stage(f"{name}.{path}", element)
        else:
            yield f"{name}.{path}", element


def _parts_of_stage(name: str, stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a stage and the modules with parameters before and after them."""
    for path, part in stage.named_children():
        if not _is_list(stage) and _is_list(part):
            yield from ((f"{name}.{path}.{i}", block) for i, block in part.named_children())
        elif count_parameters(part):
            yield f"{name}.{path}", part


def _are_stages(elements: Sequence[nn.Module]) -> bool:
    """Return whether the elements of a list are stages: most of each is itself a list, run in order.

    Nested Sequentials are stages. A ModuleList could also hold a layer's experts, but stages differ in width, while the
    blocks of a model without stages are alike.
    """
    inner = [max([e, *e.children()], key=lambda m: (_is_list(m), count_parameters(m))) for e in elements]
    if not elements or not all(
        _is_list(part) and 2 * count_parameters(part) > count_parameters(element)
        for part, element in zip(inner, elements, strict=True)
    ):
        return False
    if all(isinstance(part, nn.Sequential) for part in inner):
        return True
    shapes = [{p.shape for p in element.parameters()} for element in elements]
    # A block may have one more table than later ones, which share it.
    return len(elements) > 1 and not any(one <= other for one, other in permutations(shapes, 2))


def count_parameters(module: nn.Module) -> int:
    """Count a module's parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())
