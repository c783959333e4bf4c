"""Measurements of a run beside perplexity: zero-shot tasks, answers to prompts, and a sample of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, per_cent
from coprune.data.tokenizing import encode
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.answers.run_answers import Look
from coprune.evaluation.batches import inference_logits
from coprune.evaluation.zero_shot import PAPER_TASKS, ZeroShot, ZeroShotFacts, ZeroShotSettings, compare_zero_shot
from coprune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from coprune.model.loaded_model import Loaded


Which = Literal["dense", "pruned"]


class TextSample(BaseModel):
    """A prompt with its likeliest continuation by both models (None where it was not asked for)."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    dense: str | None
    pruned: str


@dataclass
class Extras:
    """The measurements of one run; `prepare` finds the tasks and their data before anything slow starts."""

    recipe: Recipe
    tasks: dict[str, Any] | None
    look: Look = field(default_factory=lambda: Look(None))
    """Answers to prompts."""
    zero_shot: dict[Which, ZeroShot] = field(default_factory=dict)
    texts: dict[Which, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, recipe: Recipe, processes: int = 1, in_files: bool = False) -> Extras:
        """Find what the recipe asks for.

        Args:
            recipe: of the run.
            processes: how many do the run together.
            in_files: whether the recipe names the model, and none was handed over.

        Raises:
            BadInput: as `harness_tasks.find_tasks` and `read_prompts`, or for tasks in several processes.
        """
        look = Look(
            plan_of(recipe.evaluate.answers, recipe.output.model is not None), recipe.model if in_files else None
        )
        if not recipe.evaluate.runs_tasks:
            return cls(recipe, None, look)
        if processes > 1:
            raise BadInput(
                "zero-shot tasks run in one process",
                field="tasks",
                value=recipe.evaluate.tasks.names,
                fix=("leave them out, save the model, and run: ", Command("evaluate", "FOLDER", Set("tasks", ...))),
            )
        from coprune.evaluation.harness_tasks import find_tasks

        return cls(recipe, find_tasks(zero_shot_settings(recipe)), look)

    def measure(self, which: Which, loaded: Loaded, reporter: Reporter) -> None:
        """Generate the dense model's answers, and for a model in memory run the tasks and continue the prompt."""
        asked, weights, tokenizer = self.recipe.evaluate, loaded.weights, loaded.tokenizer
        if tokenizer is None or (which == "dense" and not asked.dense):
            return
        if which == "dense":
            self.look.ask_dense(loaded, reporter, self.recipe.calibrate.batch_size)
        if weights.streams:
            return
        if self.tasks is not None:
            from coprune.evaluation.harness import zero_shot

            settings = zero_shot_settings(self.recipe).logging_as(which)
            title = f"Zero-shot tasks, {which}"
            found = zero_shot(weights.model, tokenizer, settings, self.tasks, reporter, title)
            self.zero_shot[which] = found
            if found.mean is not None:
                reporter.say(
                    f"Mean accuracy of the {which} model over {len(found.tasks)} tasks: {per_cent(found.mean.value)}"
                )
        if asked.perplexity and asked.prompt and loaded.task == "text":
            self.texts[which] = continue_text(weights.model, tokenizer, asked.prompt)

    def zero_shot_facts(self) -> ZeroShotFacts | None:
        """Return both models' results side by side, or None if the tasks were not run."""
        pruned = self.zero_shot.get("pruned")
        return None if pruned is None else compare_zero_shot(self.zero_shot.get("dense"), pruned)

    def sample(self) -> TextSample | None:
        """Return both models' continuations, or None."""
        if "pruned" not in self.texts:
            return None
        prompt = self.recipe.evaluate.prompt
        return TextSample(prompt=prompt, dense=self.texts.get("dense"), pruned=self.texts["pruned"])


def measures_anything(recipe: Recipe) -> bool:
    """Return whether a recipe names texts, tasks or prompts."""
    return bool(recipe.evaluate.data) or recipe.evaluate.runs_tasks or recipe.evaluate.answers.is_asked


def nothing_to_measure() -> BadInput:
    """Return the error where neither texts nor tasks are named."""
    fix = ("name texts, as in ", Set("data", "embedded"), ", or tasks, as in ", Set("tasks", "piqa"))
    return BadInput("there is nothing to measure", field="data", fix=fix)


def zero_shot_settings(recipe: Recipe) -> ZeroShotSettings:
    """Return the tasks of a recipe with their settings."""
    asked = recipe.evaluate.tasks
    names = PAPER_TASKS if asked.names is None else tuple(n.strip() for n in asked.names.split(",") if n.strip())
    return ZeroShotSettings(
        names,
        asked.few_shot,
        asked.task_folder,
        asked.limit,
        recipe.calibrate.batch_size,
        asked.chat_template,
        asked.gen_kwargs,
        asked.log_samples,
        asked.trusted,
    )


NEW_TOKENS = 32


def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = NEW_TOKENS
) -> str:
    """Append the likeliest next tokens to a prompt, one by one; returns the continuation on one line.

    It runs the whole text through the model for every token, which any model that can be measured can do, with or
    without a cache of its own. It ends early at the tokenizer's end mark, and is empty for a prompt without tokens.
    """
    tokens = torch.tensor([encode(tokenizer, prompt)["input_ids"]], dtype=torch.int64)
    start = tokens.shape[1]
    if start == 0:
        return ""
    with inference_logits(model) as logits_of:
        for _ in range(new_tokens):
            following = logits_of(tokens)[:, -1].argmax(dim=-1, keepdim=True).cpu()
            if int(following) == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], dim=1)
    return " ".join(str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True)).split())
