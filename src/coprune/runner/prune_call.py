"""The Python calls `coprune.prune`, and `coprune.estimate` for the memory that it would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.in_memory import handed_over
from coprune.data.keyword_arguments import Named, PruneArguments
from coprune.evaluation.tasks import Remember
from coprune.evaluation.tasks.text_task import choose_seqlen
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import prepared
from coprune.model.loaded_model import (
    Loaded,
    open_model,
    open_without_weights,
    streams,
)
from coprune.model.matrix_choice import choose_matrices
from coprune.model.transformers_private import Processor
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.methods import Method
from coprune.recipe.presets import PRESETS
from coprune.recipe.recipe import Recipe
from coprune.run.context import NOTHING, Given, Run
from coprune.run.memory_bound import TextSizes, bound_run
from coprune.run.memory_estimate import Estimate
from coprune.run.read_call import read_call
from coprune.run.result import Result
from coprune.run.reuse import Reuse
from coprune.runner.run_recipe import run_recipe
from coprune.stages.checks import check_widths, needs_inputs, prepare_solver
from coprune.stages.opening import open_run
from coprune.steps.trim import after_trim


def prune(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None = None,
    *,
    preset: str | None = None,
    processor: Processor | None = None,
    quiet: bool = False,
    **settings: Unpack[PruneArguments],
) -> Result:
    """Prune a model and measure the effect.

    Nothing is written unless `save` or `save_model` is given. A model folder is streamed by default if `save_model` is given,
    as on the command line; if nothing is saved, it is loaded into memory, and the result holds the model.

    Args:
        model: a Hub id, folder, GGUF file or `smollm2-135m`; or a transformers model in memory, which is pruned in place.
        method: a name from `coprune methods`, also with options (`sparsegpt:block_size=64`); or a method itself, such as
            `SparseGPT(block_size=64)` or one of your own. Without it, the preset's.
        preset: how long you are willing to wait: `fast`, `balanced` (the default if no pruning setting is given) or `best`;
            other settings override it.
        processor: the tokenizer or image processor of a model in memory.
        quiet: no progress bars and lines on standard error.
        settings: those of a recipe (sparsity, pattern, dataset, nsamples, seqlen, save_model …) and the method's own options,
            by name. `dataset` may also be a list of strings, a `datasets.Dataset` or a tensor of token ids (samples ×
            length); `eval_data` a dataset, a tensor, or a mapping from labels to names, lists of strings, datasets and
            tensors.

    Returns:
        The report, with the model and its processor if they are in memory.

    Raises:
        BadInput: the request cannot be fulfilled.
        NumericalError: the values allow no meaningful result.
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
                _ = result.held  # built now, since `prepared` restores the given model's settings
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
    """Return the recipe of what follows a vocabulary cut. Raises BadInput if nothing follows."""
    if recipe.remove.vocabulary is None:
        return recipe
    if (rest := after_trim(recipe)) is None:
        cause = "a run that only cuts a vocabulary needs little more memory than copying the model"
        raise BadInput(cause, field="remove", fix="run it")
    reporter.say("The vocabulary cut before it is not included.")
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
    remember: Remember = partial(Reuse(texts={}).tokens, recipe.model.name)
    recipe = _after_vocabulary(recipe, reporter)
    with reporter.libraries():
        asked = given if given.loaded is not None else replace(given, loaded=_shape_of(recipe, reporter))
        found = _estimate(recipe, asked, reporter, remember)
        if not presets:
            return found
        if asked.loaded is None:  # load it once for all presets, and only as much as they need
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
        return estimate_shapes(recipe, given.loaded, given.method, reporter)
    found = open_run(Run(recipe, given, reporter), remember).estimate()
    if found is None:
        raise BadInput("only runs on language models can be estimated so far", field="model")
    return found


def estimate_shapes(recipe: Recipe, loaded: Loaded, method: Method | None, reporter: Reporter) -> Estimate:
    """Bound a run's memory from shapes alone; no text is read, since the recipe gives its length. Raises as `prune`."""
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
