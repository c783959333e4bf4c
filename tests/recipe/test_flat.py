"""Every setting has one name, none may be given twice, and unknown names suggest the nearest."""

from __future__ import annotations

from typing import Any

import pytest

import coprune
from coprune.base.errors import BadInput
from coprune.pruning.methods import METHODS
from coprune.recipe.flat import flatten, layered, nest
from coprune.recipe.parts import ReconstructPart
from coprune.recipe.presets import PRESETS, preset_settings
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.tree import FIELDS
from coprune.recipe.views import measuring_recipe

SETTINGS = {
    "model": "m",
    "prune_method": "sparsegpt",
    "options": {"block_size": 64},
    "sparsity_type": "2:4",
    "exclude": "*.q_proj",
    "refine": ["swaps", "refit:rounds=10"],
    "allocation": "uniform",
    "nsamples": 32,
    "seqlen": 64,
    "propagation": "sequential",
    "reconstruct": 3,
    "eval_data": "a.txt,b.txt",
    "num_fewshot": 2,
    "include_path": "tasks",
    "dtype": "bfloat16",
    "finetune": "lora",
    "save": "out/run",
    "save_model": "out/model",
}
WRITTEN_OTHERWISE = SETTINGS | {
    "prune_method": {"name": "sparsegpt", "block-size": 64},
    "options": {},
    "exclude": ["*.q_proj"],
    "refine": [{"name": "swaps"}, {"name": "refit", "options": {"rounds": 10}}],
    "allocation": {"name": "uniform"},
    "eval_data": ["a.txt", "b.txt"],
}


def test_a_value_may_be_written_in_several_ways() -> None:
    assert make_recipe(WRITTEN_OTHERWISE) == Recipe.model_validate(SETTINGS) == make_recipe(SETTINGS)


def test_a_setting_has_one_name_and_a_description() -> None:
    for other in ("calibrate.samples", "calibrate", "samples"):
        with pytest.raises(BadInput, match=f"unknown recipe field '{other}'"):
            make_recipe({"model": "m", other: {"samples": 3}})
    assert all(field.description for field in FIELDS.values())


def test_no_method_option_has_a_settings_name() -> None:
    options = {name for method in METHODS.values() for name in vars(method)}
    assert options & set(FIELDS) == {"score"}  # a method's option, unless parts are removed


def test_score_is_a_methods_option_if_nothing_is_removed() -> None:
    asked = {"model": "m", "method": "ablate_mag_seq", "score": "wanda"}
    assert make_recipe(asked).prune.method.options == {"score": "wanda"}
    removing = make_recipe({"model": "m", "score": "flap", "remove": "heads=0.5"})
    assert (removing.remove.score_of("units").name, removing.prune.method.options) == ("flap", {})
    with pytest.raises(BadInput, match="is of channels and heads, and none are removed"):
        make_recipe({"model": "m", "remove": "blocks=0.5", "score": "flap"})
    both = make_recipe({"model": "m", "score": ["frequency", "flap:refit=true"], "remove": "heads=0.5,experts=0.5"})
    assert {kind: str(score) for kind, score in both.remove.scores.items()} == {
        "units": "flap:refit=true",
        "experts": "frequency",
    }
    assert both.way == "flap-frequency"
    with pytest.raises(BadInput, match="reap and frequency are scores of the same parts"):
        make_recipe({"model": "m", "score": ["reap", "frequency"], "remove": "experts=0.5"})
    with pytest.raises(BadInput, match="'score'"):
        coprune.prune("m", "wanda", score="magnitude")


def test_settings_round_trip_by_name() -> None:
    recipe = make_recipe(SETTINGS)
    assert make_recipe(recipe.flat()) == recipe
    assert recipe.setting("refine") == ("swaps", "refit:rounds=10")
    assert recipe.replaced(nsamples=3, save=None).setting("nsamples") == 3
    assert recipe.replaced(nsamples=3).calibrate.seqlen == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5, "sparsity_ratio": 0.5}, "sparsity is given twice, as sparsity and as sparsity_ratio"),
        ({"method": "wanda", "prune_method": "wanda"}, "method is given twice"),
        ({"method": "wanda:group=row", "options": {"group": "row"}}, "option group is given twice"),
        ({"method": {"name": "wanda", "group": "row", "options": {"group": "row"}}}, "'group' is given twice"),
        ({"sparsitty": 0.5}, "unknown recipe field 'sparsitty'; did you mean 'sparsity'?"),
        ({"nsamples": "many"}, "^nsamples cannot be 'many'"),
        ({"refine": 3}, "^refine cannot be 3"),
        ({"refine": [{"rounds": 3}]}, "refine.0.name is missing"),
        ({"refine": ["refit:rounds"]}, "^the option 'rounds' of refit has no value; write refit:rounds=VALUE.$"),
        ({"options": {"group": ["row"]}}, r"option 'group' is one value .*, not \['row'\]"),
        ({"method": {"name": "wanda", "options": 3}}, "options are a mapping"),
        ({"pattern": 124}, 'write pattern: "2:4"'),
        ({"method": "sparsegpt", "use_variant": True}, "a variant of wanda, not of sparsegpt"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts the pattern"),
    ],
)
def test_errors_use_the_callers_names(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_recipe({"model": "m", **settings})


def test_an_error_names_its_setting_and_value() -> None:
    with pytest.raises(BadInput) as caught:
        make_recipe({"model": "m", "nsamples": "many"})
    assert (caught.value.field, caught.value.value) == ("nsamples", "many")


def test_all_invalid_settings_are_reported_at_once() -> None:
    with pytest.raises(BadInput, match=r"^nsamples cannot be 0: .*1; seqlen cannot be 1: .* 2\.$"):
        make_recipe({"model": "m", "nsamples": 0, "seqlen": 1})


def test_a_model_has_to_be_named() -> None:
    with pytest.raises(BadInput, match="model is missing"):
        make_recipe({"nsamples": 3})


def test_later_layers_override_settings_and_merge_options() -> None:
    first = {"method": {"name": "sparsegpt", "block_size": 64, "damping": 0.1}, "nsamples": 3}
    later = layered(first, {"options": {"damping": 0.2}, "nsamples": 4})
    assert later == {"method": "sparsegpt", "options": {"block_size": 64, "damping": 0.2}, "nsamples": 4}
    assert flatten(layered(first, {"method": "sparsegpt"}))["options"] == {"block_size": 64, "damping": 0.1}
    assert "options" not in flatten(layered(first, {"method": "wanda"}))
    assert flatten(layered({"options": {"block_size": 64}}, {"method": "sparsegpt"}))["options"] == {"block_size": 64}


def test_settings_take_suboptions_after_a_colon() -> None:
    short = {
        "model": "m",
        "reconstruct": "6:tokens=6144,lr=0.001",
        "finetune": "distill:max_steps=3,only=blocks",
    }
    assert make_recipe(short | {"generate": "p.jsonl:ask:count=2"}) == make_recipe(
        {
            "model": "m",
            "reconstruct": 6,
            "reconstruct_tokens": 6144,
            "reconstruct_lr": 0.001,
            "finetune": "distill",
            "finetune_max_steps": 3,
            "finetune_only": "blocks",
            "generate": "p.jsonl:ask",
            "generate_prompts": 2,
        }
    )
    with pytest.raises(BadInput, match="unknown option of reconstruct 'tokns'; did you mean 'tokens'"):
        make_recipe({"model": "m", "reconstruct": "6:tokns=3"})


def test_reconstruction_steps_replace_a_presets_tokens() -> None:
    preset = {"reconstruct": 6, "reconstruct_tokens": 6144}
    assert layered(preset, {"reconstruct": 3}) == {"reconstruct": 3}
    assert layered(preset, {"reconstruct_tokens": 100}) == {"reconstruct": 6, "reconstruct_tokens": 100}
    assert layered(preset, {"reconstruct": 3, "reconstruct_tokens": 9}) == {"reconstruct": 3, "reconstruct_tokens": 9}
    said = layered(preset | {"reconstruct_lr": 0.01}, {"reconstruct": 3})
    assert said == {"reconstruct": 3, "reconstruct_lr": 0.01}
    assert layered(said, {"reconstruct": 0}) == {"reconstruct": 0}  # without details


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_reconstruction_can_be_switched_off(preset: str) -> None:
    recipe = make_recipe(layered({"model": "m"}, preset_settings(preset), {"reconstruct": 0}))
    assert recipe.prune.reconstruct == ReconstructPart()


def test_wandas_variant_may_be_set_by_the_name_of_its_switch() -> None:
    assert make_recipe({"model": "m", "use_variant": True}).prune.method.name == "wanda_variant"
    assert make_recipe({"model": "m", "use_variant": False}).prune.method.name == "wanda"


def test_nesting_no_settings_gives_none() -> None:
    assert nest({}) == {}


def test_a_scores_name_decides_whether_it_ranks_units_or_blocks() -> None:
    both = make_recipe({"model": "m", "score": ["kl:tokens=9", "flap:refit=true"], "remove": "heads=0.5,blocks=0.5"})
    assert {kind: str(score) for kind, score in both.remove.scores.items()} == {
        "units": "flap:refit=true",
        "blocks": "kl:tokens=9",
    }
    assert both.way == "flap-kl"
    with pytest.raises(BadInput, match="kl and influence are scores of the same parts"):
        make_recipe({"model": "m", "score": ["kl", "influence"], "remove": "blocks=0.5"})


@pytest.mark.parametrize(
    "setting",
    [
        *({"preset": "best"}, {"sparsity": 0.5}, {"remove": "heads=0.5"}, {"use_variant": True}),
        *({"refine": ()}, {"save_model": "out"}, {"gate": True}),
        {"prompt": "Why"},
    ],
)
def test_a_measurement_refuses_settings_that_it_would_ignore(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"is about pruning, and a measurement prunes nothing; leave out "):
        measuring_recipe("m", {"seqlen": 64, **setting})
    assert measuring_recipe("m", {"seqlen": 64, "batch_size": 2}).calibrate.batch_size == 2
    assert measuring_recipe("m", {"require": "loops<1"}).evaluate.data is None
