"""The harness's view of a model in memory, with coprune's progress bar in place of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, NumericalError
from coprune.base.progress import Advance, Reporter
from coprune.base.words import LeaveOut
from coprune.data.rendering import render
from coprune.evaluation.batches import BATCH_LOGITS


def watched_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    reporter: Reporter,
    title: str,
    terminal: Any,
) -> Any:
    """Show a model to the harness.

    Args:
        model: in memory.
        tokenizer: its tokenizer.
        batch_size: items at a time; without it, a GPU gets the harness's automatic choice and a CPU one that keeps the logits
            small.
        reporter: whose bar goes on with every item.
        title: what the bar is called.
        terminal: where it is shown, while the harness is silenced.
    """
    if batch_size is None and in_host_memory(model.device):
        # Automatic choice tries 64 sequences of full length first, which on a CPU takes minutes and much memory.
        batch_size = max(1, min(16, BATCH_LOGITS // (512 * model.config.get_text_config().vocab_size)))
    # What stands before an empty context; a tokenizer without such a mark leaves it to the model's configuration.
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.get_text_config().eos_token_id)
    mark = next((mark[0] if isinstance(mark, list) else mark for mark in marks if mark is not None), None)
    with _parted(model):
        found = _watched_class()(
            # The harness gives a tokenizer without a mark for padding one.
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size or "auto",
            prefix_token_id=mark,
        )
    found.watch(reporter, title, terminal)
    return found


@contextmanager
def _parted(model: PreTrainedModel) -> Iterator[None]:
    """Keep the harness from tying weights again that have been parted since the model was made."""
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
            # As with what stands before a context: a tokenizer may have no mark of its own.
            own: int | None = super().eot_token_id
            return self.prefix_token_id if own is None else own

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            for history in (chat_history, [said for said in chat_history if said["role"] != "system"]):
                try:
                    return render(self.tokenizer, history, add_generation_prompt, open_end=not add_generation_prompt)
                except ValueError as error:
                    reason = str(error)  # some templates know no system
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
            # Of the first token alone, since what is NaN before the head is so for every token.
            if bool(logits[..., 0].isnan().any()):
                raise NumericalError("the model's output is NaN for items of the tasks", field="tasks")
            self.advance(len(inps))
            return logits

    return Watched
