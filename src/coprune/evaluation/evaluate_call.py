"""Evaluation of one model: perplexity, zero-shot tasks and closeness to another model, in memory or by name."""

from __future__ import annotations

from typing import Any, Unpack

from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.data.in_memory import TextData, handed_over
from coprune.data.keyword_arguments import MeasureArguments
from coprune.evaluation.evaluation import Evaluation
from coprune.evaluation.extra_measurements import Extras, measures_anything, nothing_to_measure
from coprune.evaluation.measured_model import Subject, held_against
from coprune.evaluation.model_source import Held, Model
from coprune.model.checkpoint.load import READ_TEXT, WHAT
from coprune.model.loaded_model import refuse_what_loading_decides
from coprune.model.transformers_private import Processor
from coprune.recipe.answers import cannot_require
from coprune.recipe.views import measuring_recipe
from coprune.store.store import Store

_NAMES_DENSE = ("name that model with ", Setting("against"))


def evaluate(
    model: Model,
    data: TextData | None = None,
    *,
    against: Model | None = None,
    processor: Processor | None = None,
    quiet: bool = False,
    **settings: Unpack[MeasureArguments],
) -> Evaluation:
    """Measure a model: perplexity as in the papers (non-overlapping windows), accuracy on images, or tasks.

    Args:
        model: a Hub id, a folder, a GGUF file, `smollm2-135m`, or a model in memory (not changed).
        data: texts, as a list or comma-separated: corpora (`embedded`, `wikitext2`, `c4`, `ptb`), paths, ids of the Hub, each
            optionally with its own settings (`c4@seqlen=1024@tokens=65536`); for a classifier, image sets. Defaults to
            `wikitext2` if no tasks are given either. Also a `datasets.Dataset`, a tensor of token ids, or a mapping of labels to
            names, datasets, tensors and lists of strings.
        against: another model, given like `model`, to compare next-token distributions with on the same texts.
        processor: the tokenizer or image processor of models in memory.
        quiet: no progress bars and lines on standard error.
        settings: `tasks` of lm-eval, or the papers' seven with `eval_zero_shot=True`, with `num_fewshot`, `include_path`
            (`trust_tasks` lets its definitions run code), `limit` (items per task), `apply_chat_template`, `gen_kwargs` and
            `log_samples`; `generate` (`builtin`, or a file of prompts) for answers, with `generate_prompts`,
            `generate_tokens` and `generate_temperature`; `require` for conditions on the results (see `required` of the
            result); `seqlen`, `batch_size` and `eval_tokens` of the texts; `eval_images` per set; `dtype`, `device` and
            `cache_dir` for loading models.

    Returns:
        All measurements, with 95 % intervals.

    Raises:
        BadInput: the request cannot be carried out.
        NumericalError: the model's output is NaN.
    """
    reporter = Reporter(quiet)
    with handed_over({"data": data, **settings}, None, "data") as named, reporter.libraries():
        return _evaluate(model, against, processor, reporter, named)


def _evaluate(
    model: Model, against: Model | None, processor: Any, reporter: Reporter, settings: dict[str, Any]
) -> Evaluation:
    """Do the work of `evaluate`, with named data."""
    held = [Held(one, processor) if isinstance(one, PreTrainedModel) else None for one in (model, against)]
    if held[0] is not None and (held[1] is not None or against is None):
        refuse_what_loading_decides(settings)
    recipe = measuring_recipe(held[0].name if held[0] else str(model), settings)
    if not measures_anything(recipe):
        raise nothing_to_measure()
    if (wrong := cannot_require(recipe.evaluate.answers, None if against is not None else _NAMES_DENSE)) is not None:
        raise wrong
    if against is not None and not recipe.evaluate.data and not recipe.evaluate.answers.is_asked:
        raise BadInput(
            "closeness to another model is measured on text or along its answers",
            field="against",
            value=against,
            fix=("give a text with ", Setting("data"), ", or prompts with ", Setting("generate")),
        )
    store, dense = Store(None), None
    tasks = Extras.prepare(recipe).tasks
    if against is not None:
        # Only store results of a model in files; one in memory may change.
        kept = store if held[1] is not None else Store.of_user()
        dense = Subject(recipe.replaced(model=str(against)), kept, reporter, None, held[1])
    subject = Subject(recipe, store, reporter, tasks, held[0])
    if recipe.evaluate.data and not settings.get("data") and subject.task not in READ_TEXT:
        name = ("give data for it with ", Setting("data"))
        raise BadInput(
            f"{subject.name} {WHAT[subject.task]}, so it cannot be measured on plain text", field="data", fix=name
        )
    if dense is None:
        if subject.task == "embeddings" and recipe.evaluate.data:
            raise BadInput(
                f"{subject.name} embeds texts instead of predicting tokens, so it has no perplexity",
                field="data",
                fix=("compare it with the dense model with ", Setting("against")),
            )
        return subject.measure()
    subject.begin_as(dense)
    closeness = subject.closeness_to(dense)  # first, since it also yields the perplexity
    return held_against(subject.measure(), subject, dense).model_copy(update={"closeness": closeness})
