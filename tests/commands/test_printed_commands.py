"""Commands printed by coprune can be typed and give the same recipe."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import coprune
from coprune.base.progress import Reporter
from coprune.commands.app import app
from coprune.commands.recipe_options import recipe_asked
from coprune.pruning.methods import METHODS
from coprune.recipe.command import command_of
from coprune.recipe.flags import CALLED, flags_of
from coprune.recipe.presets import PRESETS, WHOLE
from coprune.recipe.recipe import DEFAULTS, Recipe, make_recipe
from coprune.recipe.structure import SCORES
from coprune.recipe.tree import FIELDS
from coprune.sweeps.expand import expand
from coprune.sweeps.sweep_call import SWEEPS, sweep_of_script

SOURCE = Path(coprune.__file__).parent
TRAINS = {"finetune": "distill"}
ANSWERS = {"generate": "builtin"}
TASKS = {"tasks": "boolq,rte"}
# A non-default value of every setting, with other settings that it requires.
SAID: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("-a model of 'mine'.gguf", {}),
    "dtype": ("bfloat16", {}),
    "device": ("cuda:1", {}),
    "cache_dir": ("~/models and more", {}),
    "stream": (False, {}),
    "check_memory": (False, {}),
    "method": ("sparsegpt", {}),
    "options": ({"block_size": 64, "damping": 1e-05}, {"method": "sparsegpt"}),
    "pattern": ("2:4", {}),
    "sparsity": (0.123456789, {}),
    "permute": (True, {"pattern": "2:4"}),
    "rotate": (True, {}),
    "include": (("*.q_proj", "-odd"), {}),
    "exclude": (("*.[0-9].*",), {}),
    "allocation": ("owl:spread=0.1", {}),
    "refine": (("refit:rounds=3", "swaps"), {}),
    "reconstruct": (6, {}),
    "reconstruct_tokens": (99, {"reconstruct": 6}),
    "reconstruct_lr": (1e-05, {"reconstruct": 6}),
    "reconstruct_dtype": ("bfloat16", {"reconstruct": 6}),
    "remove": (("channels=0.33", "experts=keep:3"), {}),
    "score": (("wanda_sp:refit=true",), {"remove": "channels=0.33"}),
    "domains": (("code=a b.jsonl", "chat=c.jsonl"), {"remove": "experts=0.25"}),
    "blend": ("code=2,chat=1", {"remove": "experts=0.25", "domains": ("code=a.jsonl", "chat=b.jsonl")}),
    "align": (1, {"remove": "channels=0.33"}),
    "vocabulary_text": (("mine.jsonl=2", "en"), {"remove": "vocabulary=0.5"}),
    "vocabulary_force": (True, {"remove": "vocabulary=loss:1%"}),
    "dataset": ("wikitext2", {}),  # even the default text, if it was named
    "nsamples": (7, {}),
    "seqlen": (64, {}),
    "calibrate_on": ("generated", {}),
    "bos": ("never", {}),
    "seed": (-3, {}),
    "batch_size": (3, {}),
    "activation_memory": (0.5, {}),
    "device_activation_memory": (0.0, {}),
    "propagation": ("dense", {}),
    "finetune": ("lora", {}),
    "finetune_minutes": (1.5, TRAINS),
    "finetune_tokens": (12_288, TRAINS),
    "finetune_epochs": (0.25, TRAINS),
    "finetune_max_steps": (3, TRAINS),
    "finetune_batch_size": (2, TRAINS),
    "finetune_accumulate": (2, TRAINS),
    "finetune_lr": (1e-06, TRAINS),
    "finetune_rates": ("relative", TRAINS),
    "finetune_only": (("*.q_proj", "*.k_proj"), TRAINS),
    "finetune_dtype": ("bfloat16", TRAINS),
    "finetune_gradient_checkpointing": (True, TRAINS),
    "finetune_held_out": (0.0, TRAINS),
    "finetune_save_every": (5, TRAINS),
    "finetune_eval_seqlen": (64, TRAINS),
    "finetune_teacher": ("dense", TRAINS),
    "finetune_rank": (4, {"finetune": "lora"}),
    "finetune_alpha": (0.5, {"finetune": "lora"}),
    "finetune_masked": (False, {"finetune": "lora"}),
    "evaluate": (False, {}),
    "evaluate_dense": (False, {}),
    "eval_data": ("a,b@seqlen=64", {}),
    "eval_images": (5, {}),
    "eval_tokens": (500, {}),
    "eval_zero_shot": (True, {}),
    "tasks": ("boolq,rte", {}),
    "num_fewshot": (2, TASKS),
    "include_path": ("tasks of mine", TASKS),
    "trust_tasks": (True, TASKS),
    "limit": (3, TASKS),
    "apply_chat_template": (True, TASKS),
    "gen_kwargs": ("max_gen_toks=64,do_sample=true", TASKS),
    "log_samples": ("items", TASKS),
    "prompt": ("", {}),
    "layer_error": (False, {}),
    "generate": ("builtin", {}),
    "generate_prompts": (3, ANSWERS),
    "generate_tokens": (9, ANSWERS),
    "generate_temperature": (0.5, ANSWERS),
    "require": ("perplexity<=dense*1.1", {}),
    "gate": (False, {}),
    "save": ("~/out/of a run", {}),
    "save_model": ("model", {}),
    "encoding": ("dense", {}),
    "report_to": ("wandb,trackio", {}),
    "push_to_hub": ("me/mine", {"save_model": "model"}),
    "private": (True, {"save_model": "model", "push_to_hub": "me/mine"}),
    "overwrite": (True, {}),
    "log_json": ("log.json", {}),
}


@cache
def parser_of(command: str) -> Any:
    """Return a command's argument parser; None for an unknown command."""
    group: Any = typer.main.get_command(app)
    return group.get_command(typer.Context(group), command)


def typed(line: str) -> Recipe:
    """Return the recipe of a line typed in a shell."""
    name, command, *words = shlex.split(line)
    assert (name, command) == ("coprune", "prune")
    context = parser_of(command).make_context(command, words)
    settings = {name: value for name, value in context.params.items() if name not in ("quiet", "dry_run")}
    return recipe_asked(context, settings, Reporter(quiet=True))


def assert_made_again(recipe: Recipe) -> None:
    """Assert that the printed command reproduces a recipe, and names the text only if the recipe does."""
    line = command_of(recipe)
    again = typed(line)
    assert again == recipe, line
    assert ("data" in again.calibrate.model_fields_set) == ("data" in recipe.calibrate.model_fields_set), line


@pytest.fixture(autouse=True)
def any_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.commands.recipe_options.look_at", lambda recipe: None)


def test_the_table_covers_every_setting() -> None:
    assert SAID.keys() == FIELDS.keys()
    assert [word for word, (value, _) in SAID.items() if word != "dataset" and value == DEFAULTS[word]] == []


@pytest.mark.parametrize("word", SAID)
def test_a_printed_command_reproduces_every_setting(word: str) -> None:
    value, beside = SAID[word]
    recipe = make_recipe({"model": "pico", **beside, word: value})
    assert word in ("model", "dataset") or recipe.setting(word) != DEFAULTS[word]
    assert_made_again(recipe)


@pytest.mark.parametrize("preset", [*PRESETS, None])
@pytest.mark.parametrize(
    "target", [{"pattern": "2:4"}, {"sparsity": 0.6}, {"remove": "channels=0.33", "sparsity": 0.5}]
)
@pytest.mark.parametrize("train", ["blocks", "whole"])
def test_a_printed_command_reproduces_every_preset(preset: str | None, target: dict[str, Any], train: str) -> None:
    said = {"preset": preset, "train": train if preset in WHOLE else None} if preset else {}
    assert_made_again(make_recipe({"model": "pico", **target, **said}))


@pytest.mark.parametrize("method", METHODS)
def test_a_printed_command_reproduces_every_method(method: str) -> None:
    assert_made_again(make_recipe({"model": "pico", "method": method}))


@pytest.mark.parametrize("score", [None, *(name for names in SCORES.values() for name in names)])
@pytest.mark.parametrize("zeros", [{}, {"sparsity": 0.5, "method": "wanda"}])
def test_a_printed_command_reproduces_every_removal(score: str | None, zeros: dict[str, Any]) -> None:
    kinds = ("channels=0.33", "heads=0.25,blocks=0.2", "experts=0.25", "vocabulary=704")
    assert_made_again(make_recipe({"model": "pico", "remove": kinds, "score": score or (), **zeros}))


@pytest.mark.parametrize("script", SWEEPS)
def test_a_printed_command_reproduces_every_row_of_a_script(script: str) -> None:
    for run in expand(sweep_of_script(script)):
        assert_made_again(run.recipe)


def test_an_option_whose_text_has_commas_survives() -> None:
    recipe = make_recipe({"model": "pico", "method": {"name": "sparsegpt", "word": "a, 'b' ", "number": "5"}})
    assert_made_again(recipe)


def commands_in(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each command in a file's messages: its name and its settings."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Command" and node.args:
            name, *parts = node.args
            calls = [part for part in parts if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "Set"]
            words = [part.args[0].value for part in calls if isinstance(part.args[0], ast.Constant)]
            if isinstance(name, ast.Constant):
                yield str(name.value), [str(word) for word in words]


def test_commands_in_messages_are_valid() -> None:
    seen = 0
    for file in SOURCE.rglob("*.py"):
        for name, settings in commands_in(file):
            command = parser_of(CALLED.get(name, name))
            assert command is not None, f"{file} names a command {name}"
            known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
            for setting in settings:
                flags = flags_of(setting, in_training=name == "finetune")[0].split("/")
                assert set(flags) <= known, f"{file}: {name} has no {flags}"
            seen += 1
    assert seen > 30
