"""Zero-shot tasks through the EleutherAI harness, lm-eval: its tasks and metrics on a model in memory.

The harness is an extra (`coprune[eval]`), imported when used. Prompts, scoring and aggregation are upstream's, so the
results equal those of lm-eval.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, CopruneError, NumericalError
from coprune.base.files import write_text
from coprune.base.progress import Advance, Reporter
from coprune.base.words import LeaveOut
from coprune.data.rendering import render
from coprune.evaluation.batches import BATCH_LOGITS
from coprune.evaluation.harness_tasks import SEED, find_tasks, foreign_in, generation_settings, isolated, one_line
from coprune.evaluation.zero_shot import Estimate, TaskScores, ZeroShot, ZeroShotSettings
from coprune.model.checkpoint.load import evaluating

# Enough for metrics without a closed form (such as F1); upstream's 100,000 take minutes.
_BOOTSTRAP_RESAMPLES = 1000


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ZeroShotSettings,
    tasks: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
    title: str = "Zero-shot tasks",
) -> ZeroShot:
    """Run the tasks on a model in memory without changing it.

    tasks: the result of `find_tasks` for these settings (found now by default); title: of the progress bar.
    Without a batch size, a GPU uses lm-eval's automatic choice and a CPU one that keeps the logits small.
    Raises BadInput like `find_tasks`, NumericalError if the model's output is NaN or a metric overflows.
    """
    tasks = find_tasks(settings) if tasks is None else tasks
    if settings.chat_template and not getattr(tokenizer, "chat_template", None):
        missing = "the tokenizer has no chat template"
        raise BadInput(missing, field="apply_chat_template", value=True, fix=LeaveOut("apply_chat_template"))
    from lm_eval.evaluator import evaluate

    terminal = sys.stderr
    with isolated(), foreign_in(settings).sandboxed(), evaluating(model):
        for task in tasks["tasks"].values():
            _configure(task, settings)
        harness = watched_model(
            model, tokenizer, settings.batch_size, reporter or Reporter(quiet=True), title, terminal
        )
        with _explained():
            results = evaluate(
                lm=harness,
                task_dict=tasks,
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAP_RESAMPLES,
                fewshot_as_multiturn=False,
                apply_chat_template=settings.chat_template,
            )
    if settings.log_samples is not None:
        _write_samples(settings.log_samples, results["samples"])
    return ZeroShot(
        tasks=tuple(_scores(name, results) for name in tasks["tasks"]),
        groups={name: _estimates(results["results"][name]) for name in tasks.get("groups", {})},
        harness=importlib.metadata.version("lm_eval"),
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Convert the harness's errors to one-line messages."""
    try:
        yield
    except OverflowError as error:  # perplexities, computed upstream with math.exp
        broken = "a task's metric overflows, which happens when a model is broken"
        raise NumericalError(broken, field="tasks") from error
    except CopruneError:
        raise
    except (ValueError, AssertionError) as error:  # no or too few few-shot examples, unsafe code, multimodal tasks
        raise BadInput(f"the tasks cannot be run: {one_line(error)}", field="tasks") from error


def _configure(task: Any, settings: ZeroShotSettings) -> None:
    """Override a task's definition with the user's settings."""
    # Like upstream: a task's own 0 is not overridden.
    if task.get_config("num_fewshot") != 0 or settings.num_fewshot == 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    task.set_fewshot_seed(seed=SEED)
    if (own := generation_settings(settings)) and task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value=own, update=True)


def _write_samples(folder: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """Write every item with its prompt, the model's answer and its scores, one JSON object per line."""
    for task, items in samples.items():
        lines = [json.dumps(item, ensure_ascii=False, default=str) for item in items]
        write_text(folder / f"{task}.jsonl", "\n".join(lines) + "\n")


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
        # A metric over all items at once (such as F1) has item values of another meaning and length.
        scores={metric: tuple(values) for metric, values in scores.items() if metric in metrics},
    )


def _estimates(result: dict[str, Any]) -> dict[str, Estimate]:
    """Return the estimates in `{"acc,none": 0.5, "acc_stderr,none": 0.1, …}` by metric."""
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


def watched_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    reporter: Reporter,
    title: str,
    terminal: Any,
) -> Any:
    """Wrap a model for the harness, with a progress bar and checks for NaN.

    Args:
        model: in memory.
        tokenizer: its tokenizer.
        batch_size: items per batch; by default a GPU uses the harness's automatic choice and a CPU one that keeps the logits
            small.
        reporter: its bar advances by item.
        title: of the bar.
        terminal: where the bar is shown while the harness is silenced.
    """
    if batch_size is None and in_host_memory(model.device):
        # The automatic choice tries 64 full-length sequences first, which takes minutes and much memory on a CPU.
        batch_size = max(1, min(16, BATCH_LOGITS // (512 * model.config.get_text_config().vocab_size)))
    # The token before an empty context, from the tokenizer or else the model's configuration.
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.get_text_config().eos_token_id)
    mark = next((mark[0] if isinstance(mark, list) else mark for mark in marks if mark is not None), None)
    with _kept_untied(model):
        found = _watched_class()(
            # A copy, since the harness adds a padding token to a tokenizer without one.
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size or "auto",
            prefix_token_id=mark,
        )
    found.watch(reporter, title, terminal)
    return found


@contextmanager
def _kept_untied(model: PreTrainedModel) -> Iterator[None]:
    """Keep the harness from retying weights that have been untied since the model was made."""
    model.__dict__["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


@cache
def _watched_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        advance: Advance = staticmethod(lambda amount: None)

        def watch(self, reporter: Reporter, title: str, terminal: Any) -> None:
            self._reporter, self._title, self._terminal = reporter, title, terminal

        @property
        def eot_token_id(self) -> int | None:
            # The tokenizer may lack one, as above.
            own: int | None = super().eot_token_id
            return self.prefix_token_id if own is None else own

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            for history in (chat_history, [said for said in chat_history if said["role"] != "system"]):
                try:
                    return render(self.tokenizer, history, add_generation_prompt, open_end=not add_generation_prompt)
                except ValueError as error:
                    reason = str(error)  # some templates have no system role
            wrong = f"the tokenizer's chat template fails on an item: {reason}"
            raise BadInput(wrong, field="apply_chat_template", fix=LeaveOut("apply_chat_template"))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            with redirect_stderr(self._terminal), self._reporter.bar(self._title, len(requests)) as self.advance:
                return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            with redirect_stderr(self._terminal), self._reporter.bar(self._title, len(requests)) as self.advance:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            written = super()._model_generate(context, *arguments, **options)
            self.advance(len(context))
            return written

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            # The first token is enough, since NaN before the head affects all tokens.
            if bool(logits[..., 0].isnan().any()):
                raise NumericalError("the model's output is NaN for items of the tasks", field="tasks")
            self.advance(len(inps))
            return logits

    return Watched
