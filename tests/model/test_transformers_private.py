"""The internals of transformers on which coprune relies: these tests run first, and fail if a new version changes one.

Each name is looked up separately, since importing `coprune.model.transformers_private` would stop at the first error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import coprune
from support.pico import pico_model
from support.pico_folder import pico_tokenizer

SOURCES = Path(coprune.__file__).parent
HOME = "coprune/model/transformers_private.py"
MODEL = "transformers.modeling_utils:PreTrainedModel"
CORE = "transformers.core_model_loading"
STREAMING, SAVING = "streaming of checkpoints by block", "saving in the checkpoint's names and layout"
TRAINING = "trackers of a fine-tuning"

# Where a name is, how it is called (number of positional arguments, names of the others), and what needs it.
CALLED: list[tuple[str, int, set[str], str]] = [
    ("transformers.conversion_mapping:get_model_conversion_mapping", 1, set(), STREAMING),
    (f"{CORE}:rename_source_key", 5, set(), STREAMING),
    (f"{CORE}:dot_natural_key", 1, set(), STREAMING),
    (f"{CORE}:convert_and_load_state_dict_in_model", 3, set(), STREAMING),
    (f"{CORE}:revert_weight_conversion", 2, set(), SAVING),
    (f"{CORE}:WeightConverter.was_used", 1, set(), STREAMING),
    (f"{CORE}:WeightRenaming.was_used", 1, set(), STREAMING),
    (
        "transformers.modeling_utils:LoadStateDictConfig",
        0,
        {"device_map", "dtype", "dtype_plan", "weight_mapping"},
        STREAMING,
    ),
    ("transformers.modeling_utils:remove_tied_weights_from_state_dict", 2, set(), SAVING),
    (
        "transformers.utils.loading_report:LoadStateDictInfo",
        0,
        {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"},
        STREAMING,
    ),
    ("transformers.integrations.integration_utils:get_available_reporting_integrations", 0, set(), TRAINING),
    (f"{MODEL}._from_config", 1, set(), STREAMING),
    (f"{MODEL}._get_dtype_plan", 2, set(), STREAMING),
    (f"{MODEL}._adjust_missing_and_unexpected_keys", 2, set(), STREAMING),
    (f"{MODEL}.tie_weights", 1, {"missing_keys", "recompute_mapping"}, STREAMING),
    (f"{MODEL}.initialize_weights", 1, set(), STREAMING),
    (f"{MODEL}.get_parameter_or_buffer", 2, set(), STREAMING),
    (f"{MODEL}.set_experts_implementation", 2, set(), "seeing every expert's own inputs"),
    ("transformers.pytorch_utils:Conv1D", 2, set(), "matrices of GPT-2 and its like"),
    ("transformers:Trainer._save", 1, {"output_dir", "state_dict"}, "fine-tuning's states to resume from"),
    ("transformers:Trainer.create_optimizer", 2, set(), "zeros that fine-tuning keeps"),
    ("transformers:Trainer.create_scheduler", 1, {"num_training_steps", "optimizer"}, "learning rates by the clock"),
    (
        "transformers:Trainer.compute_loss",
        3,
        {"return_outputs", "num_items_in_batch"},
        "distillation and the data's own loss",
    ),
]
# Arguments that only some versions require.
OPTIONAL = {
    f"{CORE}:convert_and_load_state_dict_in_model": {"tp_plan"},
    "transformers.utils.loading_report:LoadStateDictInfo": {"skipped_pp_keys"},
}


def look_up(place: str, needed_by: str) -> Any:
    """Return the object at `module:name.name`, or fail with what depends on it."""
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        pytest.fail(f"transformers {transformers.__version__} has no {place}, which {needed_by} needs; mend {HOME}")
    return found


@pytest.mark.parametrize(("place", "positional", "named", "needed_by"), CALLED, ids=[entry[0] for entry in CALLED])
def test_private_functions_exist_and_accept_our_arguments(
    place: str, positional: int, named: set[str], needed_by: str
) -> None:
    called = inspect.signature(look_up(place, needed_by))
    more = {name for name in OPTIONAL.get(place, ()) if name in called.parameters}
    try:
        called.bind(*range(positional), **dict.fromkeys(named | more))
    except TypeError as error:
        pytest.fail(f"transformers {transformers.__version__} calls {place}{called}: {error}; {needed_by} needs it")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("coprune.training.trainer:ZeroKeepingTrainer", "transformers:Trainer"),
    ],
)
def test_overridden_methods_still_exist(ours: str, theirs: str) -> None:
    base = look_up(theirs, ours)
    own = {
        name
        for name, value in vars(look_up(ours, "this test")).items()
        if callable(value) or isinstance(value, property)
    }
    gone = {name for name in own if not name.startswith("__") and not hasattr(base, name)}
    assert not gone, f"{theirs} of transformers {transformers.__version__} knows no {gone}, which {ours} overrides"


def test_the_trainer_uses_the_attributes_that_are_set() -> None:
    source = inspect.getsource(look_up("transformers:Trainer", "fine-tuning"))
    for attribute in ("loss_is_scaled_for_ga", "_created_lr_scheduler"):
        assert f"self.{attribute}" in source, f"fine-tuning sets Trainer.{attribute}, which nobody reads any more"


def test_a_mixtures_tensors_are_renamed_and_fused() -> None:
    from coprune.model.transformers_private import Renaming, conversions_of, splits

    model = pico_model("mixtral")
    conversions = conversions_of(model)
    renaming = Renaming(model, conversions, model.state_dict())
    experts = "model.layers.0.mlp.experts"
    assert renaming.of("model.layers.0.block_sparse_moe.experts.3.w1.weight") == (f"{experts}.gate_up_proj", True)
    assert renaming.of("model.layers.0.block_sparse_moe.experts.3.w2.weight") == (f"{experts}.down_proj", True)
    assert renaming.of("model.norm.weight") == ("model.norm.weight", False)
    assert not any(map(splits, conversions))


def test_weight_conversions_round_trip() -> None:
    from coprune.model import transformers_private as private

    model, copy = pico_model("mixtral"), pico_model("mixtral", seed=1)
    there = private.revert_conversion(model, private.saved_tensors(model))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in there
    conversions = private.conversions_of(copy)
    info = private.convert_into(copy, there, torch.float32, "cpu", conversions)
    assert (info.missing_keys, info.unexpected_keys, info.mismatched_keys) == (set(), set(), set())
    assert private.used_among(conversions)
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name


def test_conversions_to_revert_are_stored_where_saving_looks(tmp_path: Path) -> None:
    from coprune.model import transformers_private as private

    pico_model("mixtral").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert private.conversions_to_revert(loaded)
    private.set_conversions_to_revert(loaded, [])
    kept = set(loaded.state_dict())
    assert set(private.revert_conversion(loaded, private.saved_tensors(loaded))) <= kept
    private.set_conversions_to_revert(loaded, None)
    assert not set(private.revert_conversion(loaded, private.saved_tensors(loaded))) <= kept


def test_missing_and_unexpected_names_match_the_loading_report() -> None:
    from coprune.model.transformers_private import without_known_exceptions

    model = pico_model("llama")
    known = "model.layers.0.self_attn.rotary_emb.inv_freq"  # in old checkpoints
    missing, unexpected = without_known_exceptions(model, ["model.norm.weight"], [known, "model.other"])
    assert (missing, unexpected) == ({"model.norm.weight"}, {"model.other"})


@pytest.mark.parametrize("tied", [True, False])
def test_saved_tensors_match_save_pretrained(tied: bool, tmp_path: Path) -> None:
    from safetensors import safe_open

    from coprune.model.transformers_private import saved_tensors, tied_names

    model = pico_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(saved_tensors(model))
    assert tied_names(model) == ({"lm_head.weight", "model.embed_tokens.weight"} if tied else set())


def test_tied_weights_are_tied_if_one_is_loaded() -> None:
    from coprune.model.transformers_private import tie_read_weights

    model = pico_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to("meta"))
    tie_read_weights(model, {"lm_head.weight"})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_modules_can_be_initialised_again() -> None:
    from coprune.model.transformers_private import initialize_again

    model = pico_model("llama")
    rotary, before = model.model.rotary_emb, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = rotary.inv_freq.clone()
    rotary.inv_freq.zero_()
    initialize_again(model, [rotary])
    assert torch.equal(rotary.inv_freq, table)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_mixtures_declare_the_layout_and_implementation_of_experts() -> None:
    from coprune.model.transformers_private import input_first, run_experts_singly

    for family, first in (("gpt_oss", True), ("mixtral", False)):
        model = pico_model(family)
        experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
        assert input_first(experts) is first, family
        run_experts_singly(model)
        assert model.config._experts_implementation == "eager"


def test_a_configuration_names_the_class_that_it_builds() -> None:
    from coprune.model.transformers_private import builds, name_model

    model = pico_model("llama")
    assert builds(transformers.AutoModelForCausalLM, model.config)
    assert not builds(transformers.AutoModelForImageClassification, model.config)
    name_model(model, "somewhere")
    assert (model.name_or_path, model.config.name_or_path) == ("somewhere", "somewhere")


def test_a_chat_template_is_rendered_as_the_tokenizer_renders_it() -> None:
    from coprune.model.transformers_private import rendered_chat

    tokenizer = pico_tokenizer()
    turns = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    template = "{{ bos_token }}" + turns + "{% if add_generation_prompt %}>{% endif %}"
    messages = [{"role": "user", "content": "Hello"}]
    rendered = rendered_chat(template, messages, tokenizer.special_tokens_map, True)
    assert rendered == tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


# Public: the top of the package, its logging, and the strategies of a Trainer.
DOCUMENTED = {"transformers", "transformers.utils.logging", "transformers.trainer_utils.SaveStrategy"}
PRIVATE = re.compile(
    r"\b_weight_conversions|_is_hf_initialized|_keys_to_ignore|_experts_implementation|\bis_transposed\b"
    r"|_model_mapping|\b_name_or_path|_get_dtype_plan|_adjust_missing|all_tied_weights_keys|_original_\w+_patterns"
)


def imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            yield from (
                "transformers" if node.module == "transformers" else f"{node.module}.{n.name}" for n in node.names
            )
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "transformers")


def test_no_other_module_uses_transformers_internals() -> None:
    for file in SOURCES.rglob("*.py"):
        if file.as_posix().endswith(HOME):
            continue
        place = file.relative_to(SOURCES)
        assert set(imported_names(file)) <= DOCUMENTED, f"{place}: give it a name in {HOME}"
        assert PRIVATE.findall(file.read_text(encoding="utf-8")) == [], f"{place}: give it a name in {HOME}"
