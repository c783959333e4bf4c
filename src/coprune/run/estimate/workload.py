"""From a recipe and an open model to an estimate: measure this machine on the model, and describe the run's work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coprune.base.devices import device_memory
from coprune.base.memory import available_bytes, resident_peak, unread_weights
from coprune.base.processes import Processes
from coprune.data import EvaluationText, Windows
from coprune.data.text import a_longest, lengths_of
from coprune.evaluation.batches import default_batch_size
from coprune.evaluation.tasks.text import samples_per_batch
from coprune.model.checkpoint.lazy import fetches
from coprune.model.low_rank import may_get_factors
from coprune.model.opened import Loaded, streams
from coprune.model.walk.activations import GIB, device_room
from coprune.model.walk.proven import FoundModel
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.recipe.train import has_adapters, has_teacher
from coprune.run.estimate.block import Busyness, measure_block, measure_head
from coprune.run.estimate.estimate import Settings, Training, Workload, estimate
from coprune.run.estimate.found import Estimate
from coprune.run.estimate.solving import Trials, measure_solving
from coprune.training.after_pruning import training_bytes

CALIBRATION_SECONDS = 1.5  # for the solving of all shapes together


@dataclass(frozen=True)
class Planned:
    """What a run is going to do."""

    recipe: Recipe
    solver: Solver
    target: Target
    seqlen: int
    windows: Windows | None
    """Calibration samples; None if none run through the model."""
    texts: Sequence[EvaluationText]
    """Those that perplexity is measured on."""


def estimate_run(planned: Planned, loaded: Loaded, found: FoundModel, processes: Processes) -> Estimate:
    """Estimate peak memory and time of a run that has read its data and nothing of its blocks."""
    (resident, _), unread, device = resident_peak(), unread_weights(), device_memory(loaded.device)
    settings = _settings(planned, loaded, found, processes)
    windows, texts, solver, seqlen = planned.windows, planned.texts, planned.solver, planned.seqlen
    if windows is not None:
        sample = a_longest(windows.tokens)
    elif texts:
        sample = texts[0].tokens[None, :seqlen]
    else:
        sample = loaded.model.dummy_inputs["input_ids"][:1]
    block = measure_block(found, sample.to(loaded.device), trained=settings.reconstruction_steps > 0)
    shapes = Counter(matrix.shape for matrix in found.chosen.all())
    budget = CALIBRATION_SECONDS / max(1, len(shapes))
    trials = Trials(solver, planned.target, planned.recipe.evaluate.layer_error, loaded.device)
    with Busyness(loaded.device) as busyness:
        solving = {shape: measure_solving(shape, trials, budget) for shape in shapes}
        head = measure_head(loaded.model, loaded.device)
    # What share of the matrices of a shape come first in their group, as seen in one block.
    in_block = Counter(shape for group in block.groups for shape in group)
    first = Counter(group[0] for group in block.groups)
    leaders = Counter({s: round(n * first[s] / in_block[s]) if in_block[s] else n for s, n in shapes.items()})
    rest = sum(tensor.nbytes for tensor in loaded.weights.rest_tensors(found.names).values())
    work = Workload(
        resident=resident,
        peak_so_far=resident_peak()[1],
        unread_bytes=unread,
        rest_bytes=rest,
        total_bytes=loaded.weights.total_bytes,
        blocks=len(found.blocks),
        block=block,
        solving=solving,
        matrices=shapes,
        leaders=leaders,
        head=head,
        device=device,
        busy=busyness.factor,
        ahead_bytes=block.weight_bytes if fetches(block.weight_bytes, loaded.device) else 0,
    )
    available = available_bytes()
    if loaded.weights.streams and not settings.streamed:
        work, available = _with_blocks(work, available)
    return estimate(work, settings, available)


def _with_blocks(work: Workload, available: int | None) -> tuple[Workload, int | None]:
    """The same where the run will hold the blocks in memory, and the model was opened without them."""
    blocks = work.total_bytes - work.rest_bytes
    if (there := work.device) is not None:
        left = None if there.available is None else there.available - blocks
        return replace(work, device=replace(there, allocated=there.allocated + blocks, available=left)), available
    work = replace(work, resident=work.resident + blocks, peak_so_far=work.peak_so_far + blocks)
    return work, None if available is None else available - blocks


def _settings(planned: Planned, loaded: Loaded, found: FoundModel, processes: Processes) -> Settings:
    recipe, seqlen, windows, texts = planned.recipe, planned.seqlen, planned.windows, planned.texts
    vocabulary = loaded.model.config.get_text_config().vocab_size
    lengths = [seqlen] if windows is None else lengths_of(windows.tokens).tolist()
    # As the walk and the evaluations choose them; the largest batch is not always of the longest samples.
    batch, batch_length = max(
        ((samples_per_batch(recipe, length, loaded.device), length) for length in {*lengths}),
        key=lambda pair: pair[0] * pair[1],
    )
    evaluation_batch = recipe.calibrate.batch_size or default_batch_size(seqlen, vocabulary)
    memory = recipe.calibrate.activation_memory
    windows_of = [len(text.tokens) // seqlen for text in texts]
    return Settings(
        samples=0 if windows is None else -(-len(windows.tokens) // processes.size),
        seqlen=seqlen,
        batch=batch,
        evaluation_tokens=tuple(-(-count // processes.size) * seqlen for count in windows_of),
        evaluation_batch=min([evaluation_batch, *windows_of]) * seqlen,
        evaluations=1 + recipe.evaluate.dense + (recipe.prune.low_rank.rank > 0),
        propagation=recipe.calibrate.propagation,
        streamed=loaded.weights.streams and streams(recipe),
        dense_beside=recipe.prune.reconstruct.steps > 0,
        reconstruction_steps=_steps(recipe, sum(lengths) / len(lengths) * min(batch, len(lengths))),
        activation_limit=None if memory is None else int(memory * GIB),
        device_room=device_room(loaded.device, recipe.calibrate.device_activation_memory),
        saved=recipe.output.model is not None,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        processes=processes.size,
        mean_length=sum(lengths) / len(lengths),
        batch_length=batch_length,
        training=_training(recipe, loaded),
        added_bytes=4
        * recipe.prune.low_rank.rank
        * sum(sum(m.shape) for m in found.chosen.all() if may_get_factors(m)),
    )


def _training(recipe: Recipe, loaded: Loaded) -> Training | None:
    """The training that the recipe asks for, if it says how long that is."""
    asked = recipe.train
    if asked.mode is None or (asked.tokens is None and asked.minutes is None):
        return None
    sizes = [(name, parameter.numel()) for name, parameter in loaded.model.named_parameters()]
    distils, adapters = has_teacher(asked.mode), has_adapters(asked.mode)
    # Adapters are small beside the weights, which are held as they are.
    own = 4 * sum(size for _, size in sizes) if adapters else training_bytes(sizes, "adamw", asked.scope)
    return Training(
        tokens=asked.tokens or 0,
        seconds=60 * (asked.minutes or 0.0),
        bytes=own + (loaded.weights.total_bytes if distils else 0),
        distils=distils,
    )


def _steps(recipe: Recipe, tokens: float) -> int:
    """Steps of reconstruction, with so many tokens in the mean batch."""
    asked = recipe.prune.reconstruct
    return max(asked.steps, math.ceil(asked.tokens / tokens)) if asked.steps else 0
