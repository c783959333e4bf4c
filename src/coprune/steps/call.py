"""Runs that are called from Python: `coprune.prune`, and the memory that one would take, `coprune.estimate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.progress import Reporter
from coprune.base.words import say
from coprune.data.in_memory import given_samples, handed_over
from coprune.evaluation.tasks import Remember
from coprune.evaluation.tasks.text_task import choose_seqlen
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import prepared
from coprune.model.checkpoint.weights import InMemory
from coprune.model.loaded_model import (
    Loaded,
    open_model,
    open_without_weights,
    refuse_what_loading_decides,
    require_processor,
    streams,
)
from coprune.model.matrix_choice import choose_matrices
from coprune.model.transformers_private import Processor
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.methods import Method, all_methods, find_method, is_option, method_named, option_names
from coprune.pruning.methods.entry_points import missing_in
from coprune.recipe.choice import Choice, Scalar
from coprune.recipe.flat import PRESET, is_setting, layered
from coprune.recipe.presets import PRESETS, preset_settings, usual_preset, way_said
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.tree import FLAT, PARTS
from coprune.run.arguments import PruneArguments
from coprune.run.context import NOTHING, Given, Run
from coprune.run.memory_bound import TextSizes, bound_run
from coprune.run.memory_estimate import Estimate
from coprune.run.result import Result
from coprune.steps.checks import check_widths, needs_inputs, prepare_solver
from coprune.steps.opening import open_run
from coprune.steps.preset_training import recipe_that_fits
from coprune.steps.stages import run_recipe
from coprune.steps.trim import rest_of


def prune(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None = None,
    *,
    preset: str | None = None,
    processor: Processor | None = None,
    quiet: bool = False,
    **settings: Unpack[PruneArguments],
) -> Result:
    """Prune a model and measure what that did.

    Nothing is written unless `save` or `save_model` is given. A folder that is saved with `save_model` is streamed by
    default, as on the command line; where nothing is saved, it is loaded into memory, and the result holds the model.

    Args:
        model: a Hub id, folder, GGUF file or `smollm2-135m`; or a transformers model in memory, which is pruned in place.
        method: a name from `coprune methods`, also with options (`sparsegpt:block_size=64`); or a method itself, such as
            `SparseGPT(block_size=64)` or one of your own. Without it, the preset's.
        preset: how long you are willing to wait: `fast`, `balanced` (where nothing says how to prune) or `best`; what else is
            said wins.
        processor: the tokenizer or image processor of a model in memory.
        quiet: no progress bars and lines on standard error.
        settings: those of a recipe (sparsity, pattern, dataset, nsamples, seqlen, save_model …, or whole parts, such as
            calibrate={"samples": 32}) and the method's own options, by name. `dataset` may also be a list of strings, a
            `datasets.Dataset` or a tensor of token ids (samples × length); `eval_data` a data set, a tensor, or a mapping
            of labels to names, lists of strings, data sets and tensors.

    Returns:
        The report, with the model and its processor as far as they are in memory.

    Raises:
        BadInput: for what cannot be done as asked.
        NumericalError: the numbers allow no honest result.
        UnsupportedModel: the model cannot be walked.
    """
    with handed_over(settings, "dataset", "eval_data") as named:
        recipe, given = read_call(model, method, preset, processor, named, prunes=True)
        with prepared(given.model):
            reporter = Reporter(quiet)
            if given.line is not None:
                reporter.say(given.line)
            result = run_recipe(recipe, given, reporter, write=recipe.output.run is not None)
            if given.model is not None or not streams(recipe):
                _ = result.held  # while the model that was given is as the run left it
            return result


def estimate(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None = None,
    *,
    preset: str | None = None,
    presets: bool = False,
    processor: Processor | None = None,
    quiet: bool = False,
    **settings: Unpack[PruneArguments],
) -> Estimate:
    """Bound the memory of `coprune.prune` with the same arguments, without running it.

    Args:
        model: as in `coprune.prune`; a folder with only config.json is enough, and of a Hub id no weights are fetched.
        method: as in `coprune.prune`.
        preset: as in `coprune.prune`.
        presets: whether to estimate every preset too.
        processor: as in `coprune.prune`.
        quiet: no progress bars and lines on standard error.
        settings: as in `coprune.prune`.

    Returns:
        An upper bound of the peak memory, whether it fits, and settings that would.

    Raises:
        BadInput: a setting is invalid.
        UnsupportedModel: the model cannot be walked.
    """
    with handed_over(settings, "dataset", "eval_data") as named:
        recipe, given = read_call(model, method, preset, processor, named, prunes=True)
        others = {name: partial(_recipe_of, model, name, processor, named) for name in PRESETS if presets}
        with prepared(given.model):
            return estimate_recipe(recipe, Reporter(quiet), given, others)


def _recipe_of(model: Any, preset: str, processor: Any, settings: Mapping[str, Any]) -> Recipe:
    return read_call(model, None, preset, processor, settings, prunes=True)[0]


def _after_vocabulary(recipe: Recipe, reporter: Reporter) -> Recipe:
    """Return what a run does once it has cut a vocabulary. Raises BadInput where that is nothing."""
    if recipe.remove.vocabulary is None:
        return recipe
    if (rest := rest_of(recipe)) is None:
        cause = "a run that only cuts a vocabulary needs little more memory than copying the model"
        raise BadInput(cause, field="remove", fix="run it")
    reporter.say("The cut of the vocabulary before it is not counted.")
    return rest


def estimate_recipe(
    recipe: Recipe,
    reporter: Reporter,
    given: Given = NOTHING,
    presets: Mapping[str, Callable[[], Recipe]] | None = None,
) -> Estimate:
    """Bound the memory of a run, prepared up to the reading of its blocks. Raises as `prune`.

    presets: make recipes of other runs on the same model, by preset, to compare; impossible ones are left out.
    """
    read: dict[tuple[Hashable, ...], Any] = {}

    def remember(key: tuple[Hashable, ...], reads: Callable[[], Any]) -> Any:
        if key not in read:
            read[key] = reads()
        return read[key]

    recipe = _after_vocabulary(recipe, reporter)
    with reporter.libraries():
        asked = given if given.loaded is not None else replace(given, loaded=_shape_of(recipe, reporter))
        found = _estimate(recipe, asked, reporter, remember)
        if not presets:
            return found
        if asked.loaded is None:  # once for all of them, and no more of it than they need
            asked = Given(open_model(recipe.model, stream=not recipe.calibrate.is_own))
        costs, quiet = dict[str, Estimate](), Reporter(quiet=True)
        with reporter.bar("Estimating presets", len(presets)) as advance:
            for name, other in presets.items():
                with suppress(BadInput):
                    costs[name] = _estimate(_after_vocabulary(other(), quiet), Given(asked.loaded), quiet, remember)
                advance(1)
    return replace(found, presets=costs)


def _estimate(recipe: Recipe, given: Given, reporter: Reporter, remember: Remember) -> Estimate:
    if given.loaded is not None and isinstance(given.loaded.weights, Imagined):
        return _estimate_shapes(recipe, given.loaded, given.method, reporter)
    found = open_run(Run(recipe, given, reporter), remember).estimate()
    if found is None:
        raise BadInput("only runs on language models can be estimated so far", field="model")
    return found


def _estimate_shapes(recipe: Recipe, loaded: Loaded, method: Method | None, reporter: Reporter) -> Estimate:
    """Estimate as `_estimate` from a configuration alone; no text is read, since the recipe gives its length."""
    solver, target = prepare_solver(recipe, method)
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, recipe.prune.include, recipe.prune.exclude)
    check_widths((matrix for matrix in chosen.all() if matrix.expert is None), target)
    seqlen = choose_seqlen(loaded.model, recipe.calibrate.seqlen)
    samples = recipe.calibrate.samples if needs_inputs(recipe, solver) else 0
    evaluated = -(-recipe.evaluate.tokens // seqlen) if recipe.evaluate.tokens else recipe.calibrate.samples
    said = f"{recipe.calibrate.samples} samples of {seqlen} tokens to calibrate, {evaluated} to measure"
    reporter.say(f"No text is read; the estimate assumes {said}.")
    text = TextSizes(seqlen, samples, (seqlen,), seqlen, (evaluated,) if recipe.evaluate.perplexity else ())
    return bound_run(recipe, solver, text, loaded, FoundModel(loaded.weights, blocks, chosen), 1)


def _shape_of(recipe: Recipe, reporter: Reporter) -> Loaded | None:
    """Return the model without weights, if there is a configuration alone."""
    loaded = open_without_weights(recipe.model)
    if loaded is not None:
        reporter.say(f"{loaded.source} is only a configuration; the estimate uses its shapes.")
    return loaded


Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""
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

    prunes: whether a call without settings of pruning takes the default preset.

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
    # Training the whole model writes folders, which a call without one does not want.
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
        BadInput: a name is neither a setting's nor an option's; with the nearest match.
    """
    for name in settings:
        if not is_setting(name) and (own is None or (name not in own and not is_option(name))):
            raise unknown_name("setting", name, [*FLAT, *PARTS, *(() if own is None else option_names())], field=name)
    # A part of the recipe may be called like an option (selection), but is a mapping, which no option is.
    options = {
        name: value
        for name, value in settings.items()
        if not is_setting(name) or (own is not None and name in own and not isinstance(value, Mapping | BaseModel))
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
    require_processor(processor)
    return Loaded(InMemory(model), processor, model.name_or_path or type(model).__name__, False)


def _refuse_adapters(model: Any) -> None:
    """Raise BadInput if there are adapters of PEFT on a model: their matrices would be pruned as if they were its own."""
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
    """Return the choice that stands for a method object: its name where that is known, else its class.

    Args:
        method: an instance, or its class, which is then created with its defaults.

    Returns:
        A registered name with the options that differ from its defaults, by which a run can be repeated; or the qualified name
        of the class with its fields, marked as given. And the instance.

    Raises:
        BadInput: the object is not a method.
    """
    made: Any = method() if isinstance(method, type) else method
    if (missing := missing_in(made)) is not None:
        raise BadInput(f"{made!r} is not a method: {missing}", field="method", value=made)
    named = [choice for name, known in all_methods().items() if (choice := _as_named(made, name, known)) is not None]
    return min(named, key=lambda choice: len(choice.options), default=None) or _by_class(made), made


def _as_named(method: Any, name: str, known: Any) -> Choice | None:
    """Return the named choice that stands for a method, or None."""
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
