"""Zero-shot tasks through the EleutherAI harness, lm-eval: its tasks and metrics on a model that is in memory.

The harness is an extra (`coprune[eval]`), imported when it is used. Prompts, scoring and aggregation are upstream's,
so the numbers are those of calling lm-eval directly.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.data.hub import require_dataset
from coprune.errors import BadInput
from coprune.evaluate.batches import BATCH_LOGITS
from coprune.evaluate.zero_shot import Estimate, TaskScores, ZeroShot, ZeroShotSettings
from coprune.progress import Advance, Reporter

LOCAL_TASKS_HINT = (
    "To use files on this machine, write a task definition that names them and give its folder with --include-path; "
    "docs/tasks holds such definitions of the usual tasks."
)
# Dataset builders that read files, where the Hub has no say.
_FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}
# Upstream's seed, for few-shot examples and everything else.
_SEED = 1234
# Enough for metrics without a closed form (F1, say), where upstream's 100,000 take minutes; acc does not use it.
_BOOTSTRAP_RESAMPLES = 1000


def find_tasks(settings: ZeroShotSettings) -> dict[str, Any]:
    """Find the tasks and read their data, as the harness's `TaskManager.load` returns them.

    Raises BadInput if lm-eval is missing, a name is unknown, a number makes no sense, or data are out of reach.
    """
    if settings.num_fewshot < 0 or (settings.limit is not None and settings.limit < 1):
        raise BadInput("the number of few-shot examples must not be negative, and a limit must be at least 1.")
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise BadInput(f"{settings.include_path} is no folder; --include-path takes one with task definitions (YAML).")
    if not settings.tasks:
        raise BadInput("no task is named; for example --tasks boolq,arc_easy.")
    manager = _manager(settings)
    with _isolated():
        for name in settings.tasks:
            _require_known(name, manager)
            _require_data(name, manager)
        try:
            loaded: dict[str, Any] = manager.load(list(settings.tasks))
        except BadInput:
            raise
        except Exception as error:  # a definition is code and data of its own: whatever it raises
            raise BadInput(f"a task cannot be loaded: {_one_line(error)}. {LOCAL_TASKS_HINT}") from error
    return loaded


def tasks_fingerprint(tasks: dict[str, Any], limit: int | None = None) -> str:
    """Name tasks by what is asked: their items (the first `limit`), templates and metrics; 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, task in tasks["tasks"].items():
        settings = {key: value for key, value in task.dump_config().items() if key != "num_fewshot"}
        digest.update(json.dumps([name, settings], sort_keys=True, default=_named).encode())
        for item in itertools.islice(task.eval_docs, limit):
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ZeroShotSettings,
    tasks: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
    title: str = "Zero-shot tasks",
) -> ZeroShot:
    """Run the tasks on a model in memory, which is not changed.

    tasks: what `find_tasks` found for these settings (default: found now); title: what the progress bar is called.
    Without a batch size, a GPU gets lm-eval's automatic choice and a CPU one that keeps the logits small.
    Raises BadInput as `find_tasks`.
    """
    tasks = find_tasks(settings) if tasks is None else tasks
    from lm_eval.evaluator import evaluate

    terminal = sys.stderr
    with _isolated():
        for task in tasks["tasks"].values():
            # As upstream does: a task that says 0 itself means it.
            if task.get_config("num_fewshot") != 0 or settings.num_fewshot == 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
            task.set_fewshot_seed(seed=_SEED)
        harness = _watched_model(
            model, tokenizer, settings.batch_size, reporter or Reporter(quiet=True), title, terminal
        )
        try:
            results = evaluate(
                lm=harness,
                task_dict=tasks,
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAP_RESAMPLES,
                fewshot_as_multiturn=False,
            )
        except ValueError as error:  # too few few-shot examples, unsafe code, multimodal tasks
            raise BadInput(f"the tasks cannot be run: {_one_line(error)}.") from error
    return ZeroShot(
        tasks=tuple(_scores(name, results) for name in tasks["tasks"]),
        groups={name: _estimates(results["results"][name]) for name in tasks.get("groups", {})},
        harness=importlib.metadata.version("lm_eval"),
    )


def _manager(settings: ZeroShotSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput("zero-shot tasks need lm-eval: pip install 'coprune[eval]'.") from error
    with _isolated():
        if settings.include_path is None:
            return _upstream_tasks()
        own = TaskManager(include_path=str(settings.include_path), include_defaults=False)
        if all(name in own.task_index and own.task_index[name].kind.name == "TASK" for name in settings.tasks):
            return own
        return TaskManager(include_path=str(settings.include_path))


@cache
def _upstream_tasks() -> Any:
    """The harness's own thousands of definitions, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _require_known(name: str, manager: Any) -> None:
    if name in manager.all_tasks or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise BadInput(f"lm-eval knows no task {name!r}{hint} It lists its own with: lm-eval ls tasks.")


def _require_data(name: str, manager: Any) -> None:
    """Ask the Hub once for a task's dataset, where the harness itself would ask for half a minute."""
    definition = getattr(manager.task_index.get(name), "cfg", None) or {}
    dataset = definition.get("dataset_path")
    local = definition.get("custom_dataset") is not None or dataset in _FILE_BUILDERS
    if dataset is None or local or Path(dataset).exists():
        return
    try:
        require_dataset(dataset)
    except BadInput as error:
        raise BadInput(
            f"the data of task {name!r} cannot be had: {str(error).partition('. ')[0]}. {LOCAL_TASKS_HINT}"
        ) from error


def _watched_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    reporter: Reporter,
    title: str,
    terminal: Any,
) -> Any:
    """The harness's view of the model, with coprune's progress bar in place of its own."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        advance: Advance = staticmethod(lambda amount: None)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            with redirect_stderr(terminal), reporter.bar(title, len(requests)) as self.advance:
                return super().loglikelihood(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            self.advance(len(inps))
            return logits

    if batch_size is None and model.device.type == "cpu":
        # Automatic choice tries 64 sequences of full length first, which on a CPU takes minutes and much memory.
        batch_size = max(1, min(16, BATCH_LOGITS // (512 * model.config.get_text_config().vocab_size)))
    # What stands before an empty context; a tokenizer without such a mark leaves it to the model's configuration.
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.get_text_config().eos_token_id)
    mark = next((mark[0] if isinstance(mark, list) else mark for mark in marks if mark is not None), None)
    return Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", prefix_token_id=mark)


def _scores(name: str, results: dict[str, Any]) -> TaskScores:
    samples = results["samples"][name]
    filters = {sample["filter"] for sample in samples}
    scores: dict[str, list[float]] = {}
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']}\n".encode())
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                scores.setdefault(_metric_name(metric, sample["filter"]), []).append(float(sample[metric]))
    metrics = _estimates(results["results"][name])
    return TaskScores(
        task=name,
        version=results["versions"].get(name),
        num_fewshot=results["n-shot"].get(name, 0),
        items=len(samples) // max(1, len(filters)),
        fingerprint=digest.hexdigest()[:16],
        metrics=metrics,
        # A metric over all items at once (F1, say) has item values that mean something else, of another length.
        scores={metric: tuple(values) for metric, values in scores.items() if metric in metrics},
    )


def _estimates(result: dict[str, Any]) -> dict[str, Estimate]:
    """The numbers in `{"acc,none": 0.5, "acc_stderr,none": 0.1, …}` by metric."""
    found = {}
    for key, value in result.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{name}")
        found[_metric_name(metric, name)] = Estimate(
            value=float(value), stderr=float(error) if isinstance(error, int | float) else None
        )
    return found


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


@contextmanager
def _isolated() -> Iterator[None]:
    """Silence the harness's notes and bars, and seed the global generators for it; the caller's states come back."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        # Its bars know no switch, so that all of standard error is held back; coprune's own bar finds its way around.
        with redirect_stderr(StringIO()), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(_SEED)  # noqa: NPY002
            torch.manual_seed(_SEED)
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _named(value: Any) -> str:
    # The address of a function in its repr is another in every process.
    return getattr(value, "__qualname__", None) or str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
