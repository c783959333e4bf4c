"""Runs that are called from Python: `coprune.prune`, and what one would take, `coprune.estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.given import handed_over
from coprune.model.checkpoint.load import prepared
from coprune.model.opened import streams
from coprune.pruning.methods import Method
from coprune.recipe.recipe import Recipe
from coprune.run.arguments import PruneArguments
from coprune.run.call import Named, read_call
from coprune.run.estimate.found import Estimate
from coprune.run.given import NOTHING, Given
from coprune.run.result import Result
from coprune.run.session import Surroundings, open_run
from coprune.run.stages import run_recipe
from coprune.run.vocabulary import rest_of


def prune(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None = None,
    *,
    preset: str | None = None,
    processor: Any = None,
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
            calibration={"samples": 32}) and the method's own options, by name. `dataset` may also be a list of strings, a
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
                _ = result.model  # while the model that was given is as the run left it
            return result


def estimate(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None = None,
    *,
    preset: str | None = None,
    processor: Any = None,
    quiet: bool = False,
    **settings: Unpack[PruneArguments],
) -> Estimate:
    """Tell how much memory and time `coprune.prune` would take here with the same arguments, without doing it.

    Args:
        model: as in `coprune.prune`.
        method: as in `coprune.prune`.
        preset: as in `coprune.prune`.
        processor: as in `coprune.prune`.
        quiet: no progress bars and lines on standard error.
        settings: as in `coprune.prune`.

    Returns:
        Peak memory and time, whether that fits, and settings that would.

    Raises:
        BadInput: for what cannot be done as asked.
        UnsupportedModel: the model cannot be walked.
    """
    with handed_over(settings, "dataset", "eval_data") as named:
        recipe, given = read_call(model, method, preset, processor, named, prunes=True)
        with prepared(given.model):
            return estimate_recipe(recipe, Reporter(quiet), given, writes=recipe.output.run is not None)


def estimate_recipe(recipe: Recipe, reporter: Reporter, given: Given = NOTHING, writes: bool = True) -> Estimate:
    """Estimate the memory and time of a run, which is prepared up to where its blocks would be read. Raises as `prune`.

    writes: whether the run would leave a folder.
    """
    if recipe.structure.vocabulary is not None:
        rest = rest_of(recipe)
        if rest is None:
            cause = "a run that only cuts a vocabulary takes little more than copying the model"
            raise BadInput(cause, field="remove", fix="run it")
        reporter.say("The cut of the vocabulary before it is not counted.")
        recipe = rest
    with reporter.libraries():
        found = open_run(recipe, given, Surroundings(reporter, writes=writes)).estimate()
    if recipe.finetune.mode is not None:
        reporter.say("The fine-tuning afterwards is not counted.")
    if found is None:
        raise BadInput("only runs on language models can be estimated so far", field="model")
    return found
