"""The first stages of a run: checks that need no block weights, then the proof of the walk."""

from __future__ import annotations

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, UnsupportedModel, about
from coprune.base.memory import return_free_memory
from coprune.base.precision import SLOW_IN_BFLOAT16, multiplies_bfloat16
from coprune.base.progress import Reporter
from coprune.base.words import Set, per_cent, say
from coprune.data.corpora import EMBEDDED, HUB_CORPORA
from coprune.data.hub_datasets import require_dataset
from coprune.data.windows import Windows
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.bos_choice import score_of
from coprune.evaluation.tasks import Remember, read_anew, task_for
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.locate import locates_gguf
from coprune.model.checkpoint.names import is_below
from coprune.model.edits import require_history
from coprune.model.loaded_model import Loaded, keeps_experts, open_model, say_of_bfloat16, streams
from coprune.model.matrices import LEAST_SPARSITY
from coprune.model.matrix_choice import OF_ANOTHER_PART, choose_matrices
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.prove import prove_replay
from coprune.pruning.allocation import allocation_named
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.removal.mixtures import may_have_experts
from coprune.report.run_events import left_lines
from coprune.run.context import Run
from coprune.stages.checks import (
    check_allocation,
    check_processes,
    check_widths,
    needs_inputs,
    prepare_reconstruction,
    prepare_solver,
)


def open_run(run: Run, remember: Remember = read_anew) -> Run:
    """Check everything that can be checked without the blocks' weights, cheapest first, and read the data.

    Args:
        run: the run; its fields are set to what is found.
        remember: returns tokenised texts, from the store if they were tokenised before.

    Returns:
        The run.

    Raises:
        BadInput, UnsupportedModel: the request cannot be fulfilled.
    """
    recipe, given, reporter = run.recipe, run.given, run.reporter
    if recipe.evaluate.perplexity and recipe.evaluate.data is not None:
        plain_names(recipe.evaluate.data)
    run.solver, run.target = prepare_solver(recipe, given.method)
    if not recipe.remove.parts:
        allocation_named(recipe.prune.allocation)
    check_processes(recipe, run.processes.size)
    loaded = given.loaded
    require_history(expand_home(recipe.model.name))
    if loaded is None:
        if needs_inputs(recipe, run.solver):
            _require_reach(recipe)
        reporter.say(f"Loading {recipe.model.name}")
        loaded = open_model(recipe.model, streams(recipe), keeps_experts(recipe))
    say_of_bfloat16(reporter, loaded, given.loaded is None, ", and saves float32")
    _say_of_trained(recipe, loaded, reporter)
    blocks = find_blocks(loaded.model)
    run.found = FoundModel(
        loaded.weights,
        blocks,
        choose_matrices(loaded.model, blocks, recipe.prune.include, recipe.prune.exclude),
    )
    several = next((name for name, why in run.found.chosen.shared.items() if why != OF_ANOTHER_PART), None)
    if recipe.remove.parts and several is not None:
        raise UnsupportedModel(
            f"{several} is in several blocks, and parts of such blocks cannot be removed",
            field="remove",
            fix="set zeros instead, with a method and a pattern",
        )
    if "experts" in recipe.remove.shares and not may_have_experts(run.found):
        raise UnsupportedModel("the model has no mixture of experts that tokens are routed to")
    # Whether three-dimensional parameters hold experts is only known once the model runs.
    check_widths((matrix for matrix in run.found.chosen.all() if matrix.expert is None), run.target)
    check_allocation(recipe, run.found, run.target)
    run.loaded, run.task = loaded, task_for(recipe, loaded, run.processes, remember)
    needed, inputs = needs_inputs(recipe, run.solver), run.task.inputs
    run.samples = inputs.calibration(needed, reporter) if recipe.reads_calibration else None
    run.domains = _domains(run, remember)
    run.data = run.task.metric.evaluation(reporter)
    return_free_memory()  # tokenising a corpus temporarily takes some hundred bytes per token
    return run


def _require_reach(recipe: Recipe) -> None:
    """Raise BadInput if the text is on the Hub and the Hub cannot be reached, before a model is loaded."""
    reads_text = "data" in recipe.calibrate.model_fields_set or locates_gguf(recipe.model.name)
    for source in split_sources(recipe.calibrate.data) if reads_text and recipe.reads_calibration else ():
        corpus = HUB_CORPORA.get(source.name)
        if corpus is not None and source.name not in EMBEDDED:
            with about("dataset", recipe.calibrate.data):
                require_dataset(corpus.dataset, recipe.model.cache_dir, Set("dataset", "embedded"))


def _say_of_trained(recipe: Recipe, loaded: Loaded, reporter: Reporter) -> None:
    """Report that bfloat16 was requested on a processor that computes it slowly, so that float32 is used."""
    # A later training reports itself.
    if recipe.prune.reconstruct.dtype == "bfloat16" and not multiplies_bfloat16(loaded.device):
        reporter.say(f"{SLOW_IN_BFLOAT16} Blocks are trained in float32 instead.")


def _domains(run: Run, remember: Remember) -> dict[str, Windows]:
    """Return samples of every domain. Raises BadInput if the model does not read text."""
    found = {}
    for name, text in run.recipe.remove.texts.items():
        task = task_for(run.recipe.replaced(dataset=text), run.loaded, run.processes, remember)
        samples = task.inputs.calibration(True, run.reporter)
        if samples is None or task.inputs.text is None:
            raise BadInput("domains are for models that read text", field="domains", value=text)
        found[name] = samples
    return found


def prove_run(run: Run) -> None:
    """Prove that the model can be walked, and report what stays unchanged.

    Raises:
        UnsupportedModel, NumericalError, BadInput: as `prove_replay`; also if the pattern does not fit a matrix.
    """
    run.model = prove_replay(run.found, run.task.inputs.probe(run.looked_at, run.data))
    check_widths(run.model.chosen.all(), run.target)
    for line in left_lines([*run.model.chosen.left_out, *run.loaded.left_out]):
        run.reporter.say(f"Left alone: {line}.")
    _settle_bos(run)
    run.reconstruction = prepare_reconstruction(run.recipe)


def _settle_bos(run: Run) -> None:
    """Begin windows of text with a BOS token as the recipe says, or as suits the dense model best."""
    inputs = run.task.inputs.text
    if inputs is None or not (run.looked_at or run.data):
        return
    choice = inputs.choose_bos(score_of(run.model, run.activations()), run.looked_at, run.data)
    if (line := choice.line()) is not None:
        run.reporter.say(f"The token that begins a text: {line}.")
        if run.recipe.calibrate.bos == "auto" and choice.used == "every":
            usual = ("The papers' way, once at the start of the text, is ", Set("bos", "first"), ".")
            run.reporter.say(say(usual))
    run.domains = {name: inputs.samples_begun(choice, one) for name, one in run.domains.items()}
    if run.samples is not None:
        run.samples = inputs.samples_begun(choice, run.samples)
    run.data, run.bos = inputs.data_begun(choice, run.data), choice


def say_if_sparse(run: Run) -> None:
    """Report that the model is already sparse, judged by its first block."""
    model, block = run.model, run.model.blocks[0]
    matrices = [matrix for matrix in model.chosen.all() if is_below(matrix.name, block.name)]
    model.weights.acquire(block.name)
    zeros = sum(matrix.zeros() for matrix in matrices)
    share = zeros / max(1, sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices))
    model.weights.release(block.name)
    if share >= LEAST_SPARSITY:
        said = f"{run.loaded.source} was pruned before: {per_cent(share)} of the weights of {block.name} are zero"
        run.reporter.say(f"{said}. In the report, dense means the model as it was given.")
