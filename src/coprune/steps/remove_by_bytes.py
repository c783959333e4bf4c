"""Removal of a GGUF file's experts by its bytes alone: when scored by weights, or when transformers cannot read the file.

In the second case llama.cpp runs the text and shows the experts' answers. The cut is always a slice of bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.words import LeaveOut, Setting
from coprune.data.windows import Sampling, Windows, draw_samples
from coprune.evaluation.tasks.text_task import seqlen_within
from coprune.gguf_files.experts import ExpertFile, require_runs, tokenizer_of, watch_experts
from coprune.gguf_files.llama_cpp import require_llama_cpp
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.model.removed import SmallerModel, fewer_lines
from coprune.model.transformers_private import reads_gguf
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.removal.cuts import Plan, fewer
from coprune.removal.expert_calls import Routed
from coprune.removal.expert_choice import (
    Scored,
    Scores,
    by_domain,
    choose,
    experts_left,
    keep_scores,
    known_scores,
)
from coprune.removal.expert_scores import AIMER, ExpertSums, WeightSums, expert_score_named
from coprune.report.run_folder import announce
from coprune.report.schema import CalibrationFacts, ModelFacts
from coprune.run.context import Run
from coprune.run.report_facts import report_without_walk
from coprune.run.result import Result


def file_cut_by_bytes(run: Run) -> GgufFile | None:
    """Return the GGUF file if only experts go and no transformers model is needed or available, else None."""
    recipe = run.recipe
    if not recipe.output.as_gguf or {*recipe.remove.kinds} != {"experts"}:
        return None
    location = locate(recipe.model.name, recipe.model.cache_dir)
    if not isinstance(location, GgufFile):
        return None
    reads_text = bool(_measured(recipe)) or "data" in recipe.calibrate.model_fields_set
    if recipe.remove.weighs_experts and not reads_text:
        return location
    return None if reads_gguf(ExpertFile.architecture_of(location)) else location


def _measured(recipe: Recipe) -> list[str]:
    """Return the given settings that need a model in transformers."""
    asked = recipe.evaluate
    given = {
        "eval_data": asked.data is not None,
        "tasks": asked.runs_tasks,
        "generate": asked.answers.is_asked,
        "calibrate_on": recipe.calibrate.calibrate_on != "all",
    }
    return [field for field, is_given in given.items() if is_given]


def cut_by_bytes(run: Run, location: GgufFile) -> Result:
    """Score a file's experts and write the file with those kept.

    Args:
        run: the run.
        location: the file.

    Raises:
        BadInput: a setting needs a class of transformers, or llama.cpp is not installed.
        UnsupportedModel: the format does not say enough about the experts.
        VerificationError: the written file differs from the planned one.
    """
    recipe = run.recipe
    target = recipe.output.model
    assert target is not None
    file = ExpertFile(location)
    _refuse(run, file)
    left = {mixture.count: experts_left(mixture, recipe.remove) for mixture in file.mixtures.values()}
    domains = _samples(recipe, file)
    with run.taking():
        pass  # all checks have passed by now
    removed = tuple(fewer(Plan(experts=left), file.blocks, recipe.remove.shares["experts"]))
    run.reporter.say(f"Removing {', '.join(fewer_lines(removed))}.")
    began = time.perf_counter()
    keeps, covered = choose(run, file.mixtures, _scores(run, file, domains), left)
    kept = {block: keep.nonzero().flatten().tolist() for block, keep in keeps.items()}
    left_over = file.parameters_of(kept)
    report = report_without_walk(
        run,
        _model(file),
        calibration=_calibration(recipe, domains),
        prune_seconds=time.perf_counter() - began,
        edits=[SmallerModel(parts=removed, before=file.parameters, saved=left_over)],
        left=left_over,
        covered=covered,
    )
    if run.writes:
        announce(recipe, report)
    file.cut(target, kept, run.reporter)
    if not recipe.remove.weighs_experts:
        require_runs(GgufFile(target, target.name))
    return Result(run.finish(report))


def _refuse(run: Run, file: ExpertFile) -> None:
    """Raise BadInput for settings that such a run does not support."""
    recipe, why = run.recipe, f"transformers does not read GGUF files of {file.arch}"
    if run.processes.size > 1:
        raise BadInput("a GGUF file is cut by one process", field="save_model", fix="run it without torchrun")
    for field in _measured(recipe):
        raise BadInput((Setting(field), f" needs a model in transformers, and {why}"), field=field, fix=LeaveOut(field))
    if recipe.remove.weighs_experts:
        run.reporter.say("Experts are scored by their weights: no text is read, and perplexity is not measured.")
        return
    require_llama_cpp(why, "model", run.recipe.model.name)
    run.reporter.say(f"{why[0].upper()}{why[1:]}, so llama.cpp runs the text, and perplexity is not measured.")


def _samples(recipe: Recipe, file: ExpertFile) -> dict[str, Windows]:
    """Return the samples of every domain."""
    asked, found = recipe.calibrate, dict[str, Windows]()
    if recipe.remove.kept_scores is not None or recipe.remove.weighs_experts:
        return found
    with tokenizer_of(file) as tokenizer:
        seqlen = seqlen_within(file.positions, asked.seqlen)
        for name, text in (recipe.remove.texts or {"calibration": asked.data}).items():
            field = "domains" if recipe.remove.texts else "dataset"
            sources = split_sources(text)
            if len(sources) > 1 or not sources[0].is_plain:
                fix = "name one text, or several as domains"
                raise BadInput("llama.cpp only reads plain text here", field=field, value=text, fix=fix)
            with about(field, text):
                sampling = Sampling(asked.samples, seqlen, asked.seed, recipe.model.cache_dir)
                found[name] = draw_samples(text, tokenizer, sampling)
    return found


def _scores(run: Run, file: ExpertFile, domains: dict[str, Windows]) -> Scores:
    """Return the experts' scores."""
    score = expert_score_named(run.recipe.remove.score_of("experts"))
    if isinstance(score, AIMER):
        return {block: {"": own} for block, own in _by_weights(run, file, [*file.mixtures]).items()}
    scored, numbers = _sums(run, file, domains), {block: number for number, block in enumerate(file.mixtures)}
    scores = dict(by_domain(score, scored, numbers))
    # No text reaches layers for speculative decoding.
    silent = [block for block in numbers if not any(bool(sums[block].tokens.any()) for sums in scored.values())]
    for block, own in _by_weights(run, file, silent).items():
        scores[block] = dict.fromkeys(scored, own)
    return scores


def _by_weights(run: Run, file: ExpertFile, blocks: Sequence[str]) -> dict[str, Tensor]:
    found = {block: WeightSums.empty(file.mixtures[block].count) for block in blocks}
    with run.reporter.bar("Weighing experts", len(found)) as advance:
        for block, sums in found.items():
            for expert, weights in file.experts_of(block):
                sums.update(expert, weights)
            advance(1)
    return {block: AIMER().score_weights(sums) for block, sums in found.items()}


def _sums(run: Run, file: ExpertFile, domains: dict[str, Windows]) -> Scored:
    """Return each expert's sums by domain, from an earlier run or from one pass over all domains."""
    digest = hashlib.sha256()
    for router in file.routers():
        digest.update(router)
    model, data = digest.hexdigest()[:16], {name: one.fingerprint for name, one in domains.items()}
    if (known := known_scores(run, model, data, file.mixtures)) is not None:
        run.reporter.say("The experts' scores are known, so no text runs through the model.")
        return known
    scored: Scored = {}
    for name, samples in domains.items():
        sums = {block: ExpertSums.empty(mixture.count) for block, mixture in file.mixtures.items()}

        def see(block: str, index: Tensor, answers: Tensor, sums: dict[str, ExpertSums] = sums) -> None:
            sums[block].update(Routed(index, torch.ones(index.shape), answers))

        watch_experts(file, samples.tokens.tolist(), see, run.reporter)
        scored[name] = sums
    keep_scores(run, model, data, scored)
    return scored


def _model(file: ExpertFile) -> ModelFacts:
    return ModelFacts(
        source=file.file.name,
        model_type=file.arch,
        dtype="as stored",
        device="cpu",
        blocks=file.blocks,
        parameters=file.parameters,
        quantised_source=True,
        digest=source_digest(file.file),
    )


def _calibration(recipe: Recipe, domains: dict[str, Windows]) -> CalibrationFacts | None:
    samples = domains.get("calibration")
    if samples is None:
        return None
    return CalibrationFacts(
        source=samples.source,
        nsamples=len(samples.tokens),
        seqlen=samples.tokens.shape[1],
        seed=recipe.calibrate.seed,
        fingerprint=samples.fingerprint,
    )
