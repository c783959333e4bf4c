"""Measurements of a run besides perplexity: zero-shot tasks, answers to prompts, and a sample of text."""

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
    """A prompt with its greedy continuation by both models (None if not requested)."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    dense: str | None
    pruned: str


@dataclass
class Extras:
    """The measurements of one run; `prepare` finds tasks and their data before anything slow starts."""

    recipe: Recipe
    tasks: dict[str, Any] | None
    look: Look = field(default_factory=lambda: Look(None))
    """Answers to prompts."""
    zero_shot: dict[Which, ZeroShot] = field(default_factory=dict)
    texts: dict[Which, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, recipe: Recipe, processes: int = 1, in_files: bool = False) -> Extras:
        """Find the tasks and prompts that the recipe asks for.

        Args:
            recipe: the run's recipe.
            processes: number of processes of the run.
            in_files: whether the recipe names the model; otherwise it was passed in memory.

        Raises:
            BadInput: like `harness_tasks.find_tasks` and `read_prompts`, or for tasks with several processes.
        """
        look = Look(
            plan_of(recipe.evaluate.answers, recipe.output.model is not None), recipe.model if in_files else None
        )
        if not recipe.evaluate.runs_tasks:
            return cls(recipe, None, look)
        if processes > 1:
            raise BadInput(
                "zero-shot tasks only run in a single process",
                field="tasks",
                value=recipe.evaluate.tasks.names,
                fix=("leave them out, save the model, and run: ", Command("evaluate", "FOLDER", Set("tasks", ...))),
            )
        from coprune.evaluation.harness_tasks import find_tasks

        return cls(recipe, find_tasks(zero_shot_settings(recipe)), look)

    def ask_dense(self, loaded: Loaded, reporter: Reporter) -> None:
        """Generate the dense model's answers, or use stored ones."""
        self.look.ask_dense(loaded, reporter, self.recipe.calibrate.batch_size)

    def runs_tasks_of(self, loaded: Loaded) -> bool:
        """Return whether a model can run the tasks: in memory, with a tokenizer."""
        return self.tasks is not None and loaded.tokenizer is not None and not loaded.weights.streams

    def run_tasks(self, which: Which, loaded: Loaded, reporter: Reporter) -> ZeroShot:
        """Run the tasks with a model that can."""
        from coprune.evaluation.harness import zero_shot

        assert self.tasks is not None
        assert loaded.tokenizer is not None
        settings, title = zero_shot_settings(self.recipe).logging_as(which), f"Zero-shot tasks, {which}"
        found = zero_shot(loaded.weights.model, loaded.tokenizer, settings, self.tasks, reporter, title)
        if found.mean is not None:
            accuracy = per_cent(found.mean.value)
            reporter.say(f"Mean accuracy of the {which} model over {len(found.tasks)} tasks: {accuracy}")
        return found

    def continues_prompt_of(self, loaded: Loaded) -> bool:
        """Return whether a model can continue the prompt: a text model in memory, with a tokenizer."""
        asked = self.recipe.evaluate
        able = loaded.task == "text" and loaded.tokenizer is not None and not loaded.weights.streams
        return able and bool(asked.perplexity and asked.prompt)

    def continue_prompt(self, loaded: Loaded) -> str:
        """Return a model's greedy continuation of the prompt."""
        assert loaded.tokenizer is not None
        return continue_text(loaded.weights.model, loaded.tokenizer, self.recipe.evaluate.prompt)

    def measure_pruned(self, loaded: Loaded, reporter: Reporter) -> None:
        """Run the tasks and continue the prompt with the pruned model, as far as it can."""
        if self.runs_tasks_of(loaded):
            self.zero_shot["pruned"] = self.run_tasks("pruned", loaded, reporter)
        if self.continues_prompt_of(loaded):
            self.texts["pruned"] = self.continue_prompt(loaded)

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
    """Return the error for neither texts nor tasks."""
    fix = ("give texts, as in ", Set("data", "embedded"), ", or tasks, as in ", Set("tasks", "piqa"))
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
    """Continue a prompt greedily and return the continuation on one line.

    The whole text runs through the model for every token, which works for any model that can be measured, with or without a
    cache. It stops early at the end token, and is empty for a prompt without tokens.
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
