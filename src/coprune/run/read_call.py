"""A recipe from a Python call: the model by name or in memory, the method by name or as an object, settings by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import say
from coprune.data.in_memory import given_samples
from coprune.data.keyword_arguments import Named
from coprune.model.loaded_model import Loaded, handed_over_model, refuse_what_loading_decides
from coprune.pruning.methods import Method, all_methods, find_method, is_option, method_named, option_names
from coprune.pruning.methods.entry_points import missing_in
from coprune.recipe.choice import Choice, Scalar
from coprune.recipe.flat import PRESET, is_setting, layered
from coprune.recipe.presets import preset_settings, usual_preset, way_said
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.tree import LEAVES
from coprune.run.context import Given
from coprune.run.preset_training import recipe_that_fits

_DEFAULT_METHOD = "wanda"


def read_call(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None,
    preset: str | None,
    processor: Any,
    settings: Mapping[str, Any],
    prunes: bool = False,
) -> tuple[Recipe, Given]:
    """Turn a call's arguments into a recipe; explicit settings win over the preset.

    prunes: whether a call without pruning settings takes the default preset.

    Raises:
        BadInput: an argument is unknown, given twice, or of the wrong type.
    """
    said = dict(settings)
    loaded = None if isinstance(model, str | Path) else _in_memory(model, processor, said)
    named, given = (method, None) if method is None or isinstance(method, str | Mapping | Choice) else choice_of(method)
    usual = {} if preset is None else preset_settings(preset, train=way_said(said))
    chosen = named if named is not None else usual.get("method", _DEFAULT_METHOD)
    own = None if isinstance(chosen, Choice) and chosen.is_given else options_of(chosen)
    by_call = ({} if named is None else {"method": named}) | sort_options(said, own)
    # If nothing is saved, the caller wants the model in memory.
    usual_stream = None if said.get("save_model") is not None else False
    base = {"stream": usual_stream, "model": str(model) if loaded is None else loaded.source, PRESET: preset}
    asked: Mapping[str, Any] = layered(base, given_samples(said.get("dataset")), by_call)
    if not prunes:
        return make_recipe(asked), Given(loaded, given)
    line = None
    if preset is None:
        asked, line = usual_preset({name: value for name, value in asked.items() if name != PRESET})
    # Training the whole model writes folders, so it needs a call that names one.
    keeps = loaded is None and said.get("save") is not None
    return recipe_that_fits(asked, in_memory=not keeps), Given(loaded, given, None if line is None else say(line))


def options_of(method: Named) -> set[str]:
    """Return the names of a method's own options. Raises BadInput for an unknown method."""
    return {field.name for field in dataclasses.fields(find_method(Choice.of(method).name))}


def sort_options(settings: Mapping[str, Any], own: set[str] | None) -> dict[str, Any]:
    """Move a method's options from plain settings to `options`; options of other methods stay, to be refused later.

    Args:
        settings: by name.
        own: the names of the method's options; None for a method passed as an object.

    Raises:
        BadInput: a name is neither a setting nor an option; the message suggests the nearest.
    """
    for name in settings:
        if not is_setting(name) and (own is None or (name not in own and not is_option(name))):
            raise unknown_name("setting", name, [*LEAVES, *(() if own is None else option_names())], field=name)
    options = {
        name: value
        for name, value in settings.items()
        if not is_setting(name) or (own is not None and name in own and not isinstance(value, Mapping))
    }
    rest = {name: value for name, value in settings.items() if name not in options}
    return layered({"options": options}, rest) if options else rest


def _in_memory(model: Any, processor: Any, settings: Mapping[str, Any]) -> Loaded:
    _refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise BadInput(
            f"a {type(model).__name__} is not a transformers model",
            field="model",
            fix="pass a PreTrainedModel, or the name of a model",
        )
    refuse_what_loading_decides(settings)
    return handed_over_model(model, processor)


def _refuse_adapters(model: Any) -> None:
    """Raise BadInput if a model has PEFT adapters, whose matrices would be pruned as if they were its own."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    # PEFT's wrappers keep the original layer under this name.
    adapted = [name for name, module in modules if hasattr(module, "base_layer") and hasattr(module, "active_adapters")]
    if adapted:
        raise BadInput(
            f"the model has unmerged adapters ({len(adapted)} layers, first {adapted[0]})",
            field="model",
            fix="merge them into it first, with PEFT's merge_and_unload()",
        )


def choice_of(method: Method | type[Method]) -> tuple[Choice, Method]:
    """Return the choice that stands for a method object, and the object: a registered name if there is one, else the class.

    Args:
        method: an instance, or its class, which is instantiated with its defaults.

    Returns:
        A registered name with the options that differ from its defaults, by which a run can be repeated; or the qualified
        class name with its fields, marked as given. And the instance.

    Raises:
        BadInput: the object is not a method.
    """
    made: Any = method() if isinstance(method, type) else method
    if (missing := missing_in(made)) is not None:
        raise BadInput(f"{made!r} is not a method: {missing}", field="method", value=made)
    named = [choice for name, known in all_methods().items() if (choice := _as_named(made, name, known)) is not None]
    return min(named, key=lambda choice: len(choice.options), default=None) or _by_class(made), made


def _as_named(method: Any, name: str, known: Any) -> Choice | None:
    """Return the choice by name for a method object, or None."""
    if type(method) is not type(known):
        return None
    differing = {field: value for field, value in _fields(method).items() if value != getattr(known, field)}
    if not all(_is_scalar(value) for value in differing.values()):
        return None
    return Choice(name=name, options=differing) if method_named(name, differing) == method else None


def _by_class(method: Any) -> Choice:
    kind = type(method)
    name = f"{kind.__module__}.{kind.__qualname__.replace('<locals>.', '')}"
    told: dict[str, Scalar] = {
        field: value if _is_scalar(value) else repr(value) for field, value in _fields(method).items()
    }
    return Choice.given(name, told)


def _fields(method: Any) -> dict[str, Any]:
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
