"""The results that a recipe's settings decide, its file, and its light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coprune.base.errors import BadInput
from coprune.recipe.flat import layered
from coprune.recipe.parts import Decides, Part, decided_by
from coprune.recipe.presets import PRESETS, preset_settings
from coprune.recipe.recipe import DEFAULTS, Recipe, make_recipe
from coprune.recipe.tree import FIELDS
from coprune.recipe.views import TRAINING

# Settings that may differ between an interrupted run and its resumption.
FREE_TO_RESUME = {
    *("save", "save_model", "cache_dir", "evaluate", "evaluate_dense", "eval_data", "eval_tokens", "eval_images"),
    *(
        "stream",
        "activation_memory",
        "device_activation_memory",
        "check_memory",
        "eval_zero_shot",
        "tasks",
        "num_fewshot",
        "include_path",
    ),
    *("limit", "prompt", "report_to", "push_to_hub", "log_json", "encoding", "generate", "generate_prompts"),
    *("private", "overwrite", "batch_size"),
    *("generate_tokens", "generate_temperature", "gate", "require", "apply_chat_template"),
    *("gen_kwargs", "log_samples", "finetune_save_every", "finetune_eval_seqlen", "trust_tasks"),
}
# Settings that may differ for a sweep to reuse a finished run; whether a model was saved may not.
FREE_WHEN_FINISHED = {
    *(
        "save",
        "cache_dir",
        "check_memory",
        "activation_memory",
        "device_activation_memory",
        "report_to",
        "push_to_hub",
        "log_json",
    ),
    *("log_samples", "private", "overwrite", "finetune_save_every", "trust_tasks"),
}
# Settings that affect neither a run's memory nor much of its time.
FREE_OF_COST = {
    *("finetune_save_every", "finetune_eval_seqlen"),
    "vocabulary_force",
    "trust_tasks",
    *("seed", "save", "pattern", "sparsity", "include_path", "prompt", "report_to", "check_memory", "cache_dir"),
    *(
        "bos",
        "push_to_hub",
        "log_json",
        "encoding",
        "score",
        "align",
        "blend",
        "require",
    ),
    *("apply_chat_template", "log_samples", "private", "overwrite"),
}
FREE_TO_RESUME_TRAINING = {
    *("save", "save_model", "cache_dir", "evaluate", "eval_data", "eval_tokens", "eval_images", "report_to"),
    *("save_every", "generate", "generate_prompts", "generate_tokens", "generate_temperature"),
    *("eval_seqlen", "gate", "require", "overwrite"),
}


def test_every_setting_declares_what_it_decides() -> None:
    for field in FIELDS.values():
        assert isinstance(decided_by(field), Decides)


def test_a_field_must_declare_what_it_decides() -> None:
    class Silent(Part):
        more: int = 0

    with pytest.raises(TypeError, match="does not say what it decides"):
        decided_by(Silent.model_fields["more"])


@pytest.mark.parametrize(
    ("what", "free"),
    [
        (Decides.RESULT, FREE_TO_RESUME),
        (Decides.WHOLE, FREE_WHEN_FINISHED),
        (Decides.COST, FREE_OF_COST),
    ],
)
def test_only_free_settings_do_not_decide_the_result(what: Decides, free: set[str]) -> None:
    assert set(FIELDS) - set(make_recipe({"model": "m"}).deciding(what)) == free


def test_an_empty_train_in_a_file_counts_as_unset() -> None:
    assert make_recipe({"model": "pico", "preset": "fast", "train": None}).train.mode is None


def test_only_free_training_settings_may_change_on_resume() -> None:
    free = {name for name, (word, _) in TRAINING.items() if not decided_by(FIELDS[word]) & Decides.RESULT}
    assert free == FREE_TO_RESUME_TRAINING


def test_cost_depends_on_whether_a_model_is_saved_and_not_on_where() -> None:
    told = [make_recipe({"model": "m", "save_model": where}).deciding(Decides.COST) for where in (None, "a", "b")]
    assert told[1] == told[2] != told[0]


RICH = {
    "model": "m",
    "method": "sparsegpt:block_size=64",
    "sparsity": 0.6,
    "refine": ["refit:rounds=10"],
    "dataset": "c4",
    "save": "out/run",
    "cache_dir": "cache",
    "report_to": ["wandb", "mlflow"],
}


def test_a_recipe_is_written_with_the_users_names_and_round_trips(tmp_path: Path) -> None:
    recipe = make_recipe(RICH)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    written = yaml.safe_load(recipe.to_yaml())
    said = RICH | {"method": {"name": "sparsegpt", "block_size": 64}, "report_to": "wandb,mlflow"}
    assert written | said == written
    assert yaml.safe_load(recipe.to_yaml(usual=False)) == said


def test_deciding_settings_survive_json() -> None:
    """A journal stores them, including multiple choices."""
    recipe = make_recipe(
        {"model": "x", "remove": "channels=0.3,blocks=0.1", "score": ["wanda_sp:refit=true", "influence"]}
    )
    decides = json.loads(json.dumps(recipe.deciding(Decides.RESULT)))
    assert decides["score"] == ["wanda_sp:refit=true", "influence"]
    assert recipe.flat() == make_recipe(recipe.flat()).flat()


def test_an_archived_recipe_neither_pushes_nor_logs() -> None:
    kept = make_recipe({**RICH, "push_to_hub": "me/m", "save_model": "out/m", "log_json": "x.jsonl"}).as_stored()
    assert (kept.output.report_to, kept.output.push_to_hub, kept.output.log_json) == (None, None, None)
    assert kept.output.model is not None


def test_default_data_is_not_recorded_as_chosen(tmp_path: Path) -> None:
    for settings, named in (({"model": "m"}, False), ({"model": "m", "dataset": "wikitext2"}, True)):
        (tmp_path / "recipe.yaml").write_text(make_recipe(settings).to_yaml(), encoding="utf-8")
        read = Recipe.from_yaml(tmp_path / "recipe.yaml").calibrate
        assert ("data" in read.model_fields_set) is named
        assert read.data == "wikitext2"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "said", [{}, {"pattern": "2:4"}, {"sparsity": 0.7}, {"stream": True, "pattern": "2:4"}, {"sparsity": 0.0}]
)
def test_presets_make_recipes(preset: str, said: dict[str, Any]) -> None:
    settings = preset_settings(preset, said)
    assert make_recipe({"model": "m", **settings, **said}).prune.method.name == PRESETS[preset]["method"]


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ({}, {"rotate", "allocation"}),
        ({"pattern": "2:4"}, {"rotate", "permute"}),
        ({"pattern": "unstructured", "sparsity": 0.6}, {"rotate", "allocation"}),
        ({"sparsity_type": "2:4", "stream": True}, set()),
        ({"sparsity": 0.7, "stream": True}, set()),
        ({"sparsity": 0.5, "remove": "channels=0.25"}, {"rotate"}),
        ({"sparsity": 0}, set()),
        ({"pattern": "no pattern"}, {"rotate", "allocation"}),  # the recipe reports the error
    ],
)
def test_a_preset_drops_settings_that_the_run_cannot_use(said: dict[str, Any], changed: set[str]) -> None:
    where_it_can = {"rotate", "permute", "allocation"}
    for preset in set(PRESETS) - {"fast"}:
        assert where_it_can & set(preset_settings(preset, said)) == changed
    assert not where_it_can & set(preset_settings("fast", said))


def test_a_preset_may_be_named_among_the_settings(tmp_path: Path) -> None:
    said = {"model": "m", "pattern": "2:4", "nsamples": 8, "reconstruct": 3}
    expected = make_recipe(layered(preset_settings("balanced", said), said))
    assert make_recipe({"preset": "balanced", **said}) == expected
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"preset": "balanced", **said}))
    assert Recipe.from_yaml(file) == expected
    file.write_text(expected.to_yaml())  # a run stores the settings themselves
    assert Recipe.from_yaml(file) == expected
    assert "preset" not in file.read_text()
    assert make_recipe({"preset": None, **said}) == make_recipe(said)
    assert Recipe.model_validate_json(json.dumps({"preset": "balanced", **said})) == expected
    for wrong in ("balancd", ["balanced", "best"], 3):
        with pytest.raises(BadInput, match="preset"):
            make_recipe({"preset": wrong, **said})


def test_defaults_match_an_empty_recipe() -> None:
    assert make_recipe({"model": "m"}).flat() == DEFAULTS | {"model": "m"}


def test_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys, coprune.recipe.recipe, coprune.recipe.presets, coprune.recipe.flat; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_may_be_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = make_recipe({"model": "pico", "save": "~/run", "save_model": "~/model", "cache_dir": "~/cache"})
    assert (recipe.output.run, recipe.output.model) == (tmp_path / "run", tmp_path / "model")
    assert recipe.model.cache_dir == tmp_path / "cache"
