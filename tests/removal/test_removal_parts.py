"""Removed channels, heads and blocks: the small model matches the silenced big one, on disk and in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.removal import rehearsal, removal_plan, smaller_model
from coprune.removal.rehearsal import alike
from coprune.removal.smaller_model import Resized, possible_changes
from coprune.report.run_events import OfMatrix
from coprune.run.phase_events import Phase
from coprune.runner.run_recipe import run_recipe
from coprune.stages import run_stages
from support.killing import killed_when
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing, save_pico, write_words
from support.saved import load_clean, saved_like

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        ("llama", "channels=0.4,heads=0.5,blocks=0.34"),
        ("gpt2", "channels=0.4,blocks=0.34"),  # transposed weights, an MLP of four times the width by default
        pytest.param("qwen2", "heads=0.5", marks=pytest.mark.slow),  # biases; the head width must now be written
        pytest.param(
            "gemma3_text", "channels=0.4,heads=0.5,blocks=0.25", marks=pytest.mark.slow
        ),  # tied; norms afterwards; two kinds of attention
        pytest.param("phi3", "channels=0.4", marks=pytest.mark.slow),  # fused gate and up
        pytest.param("phi3", "heads=0.5", marks=pytest.mark.slow),  # fused query, key and value
        pytest.param("falcon", "channels=0.4,blocks=0.34", marks=pytest.mark.slow),
        pytest.param(
            "mixtral", "channels=0.4,heads=0.5", marks=pytest.mark.slow
        ),  # different channels per expert; saved one by one
        ("gpt_oss", "channels=0.4,heads=0.5"),  # interleaved experts in one tensor, with biases and sinks
        # Three MLP sizes; low-rank queries, keys and values.
        ("deepseek_v3", "channels=0.4,heads=0.5,blocks=0.34"),
        pytest.param("minicpm3", "heads=0.5", marks=pytest.mark.slow),
        pytest.param("afmoe", "heads=0.5", marks=pytest.mark.slow),  # a gate on every head's output
        pytest.param("jamba", "channels=0.4", marks=pytest.mark.slow),
    ],
)
def test_the_small_model_matches_the_silenced_big_one(family: str, remove: str, tmp_path: Path) -> None:
    model = pico_model(family)
    before = model.num_parameters()
    result = coprune.prune(model, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    small = saved_like(model, result.model, tmp_path / "small", rounding=1e-6)
    assert small.num_parameters() < before
    tokens = pico_tokens(2, 16)
    with torch.no_grad():
        made: Any = result.model
        assert made.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert f"{before:,} → {small.num_parameters():,} parameters" in result.report.edits[-1].line()


@pytest.mark.parametrize(
    ("family", "settings", "stays", "place", "left"),
    [
        pytest.param("deepseek_v3", {}, [1, 2], "first_k_dense_replace", 0, marks=pytest.mark.slow),
        ("qwen3_moe", {"mlp_only_layers": [1]}, [1, 2], "mlp_only_layers", [0]),
    ],
)
def test_the_configuration_lists_the_remaining_dense_blocks(
    family: str, settings: dict[str, Any], stays: list[int], place: str, left: Any, tmp_path: Path
) -> None:
    model = pico_model(family, **settings)
    asked: dict[str, Any] = {"remove": "blocks=0.34", "exclude": [f"model.layers.{index}.*" for index in stays]}
    result = coprune.prune(model, save_model=tmp_path / "small", **asked, **SETTINGS)
    small = saved_like(model, result.model, tmp_path / "small", rounding=1e-6)
    assert getattr(small.config, place) == left


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_configuration_right_for_one_attention_implementation_only_is_rejected(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compressed keys and values neither shapes nor sdpa depend on the number of heads."""
    right = {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(rehearsal, "possible_changes", lambda *_: iter([{"num_attention_heads": 2}, right]))
    save_pico(tmp_path / "model", "deepseek_v3")
    write_words(tmp_path / "words.txt")
    data = {"dataset": str(tmp_path / "words.txt"), "nsamples": 4, "seqlen": 16, "stream": stream}
    asked = SETTINGS | {"remove": "heads=0.5", "save_model": tmp_path / "small"} | data
    coprune.prune(tmp_path / "model", **asked)
    assert load_clean(tmp_path / "small").config.num_key_value_heads == 2


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_configurations_refusal_of_heads_suggests_a_share_that_works(family: str) -> None:
    """Six heads do not divide a width of 64."""
    settings: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    with pytest.raises(
        UnsupportedModel, match=r"not a multiple of the number of attention heads \(6\); heads=0.5 works"
    ):
        coprune.prune(pico_model(family, **settings), remove="heads=0.25", **SETTINGS)
    coprune.prune(pico_model(family, **settings), remove="heads=0.5", **SETTINGS)


def test_settings_that_make_unwanted_shapes_are_not_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many settings equal to the cut sizes, not all combinations can be tried."""
    same: dict[str, Any] = {"num_hidden_layers": 4, "head_dim": 16}
    small = pico_model("llama", num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, **same)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    resized = Resized([(4, 2), (2, 1), (96, 64)])
    monkeypatch.setattr(smaller_model, "MOST_CANDIDATES", 8)
    changes = next(possible_changes(pico_model("llama", **same), shapes, resized))
    assert changes == {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    monkeypatch.setattr(smaller_model, "_fitting", lambda model, first, sizes, *more: sizes)
    assert not [*possible_changes(pico_model("llama", **same), shapes, resized)]


def test_an_expert_that_only_sees_zeros_loses_channels_by_norm() -> None:
    """In this family every expert sees all tokens, other experts' tokens as zeros."""
    settings = SETTINGS | {"dataset": pico_tokens(1, 4)}
    result = coprune.prune(pico_model("llama4_text"), remove="channels=0.4", **settings)
    assert any(isinstance(one, OfMatrix) and one.event.kind == "only zeros" for one in result.report.events)


def test_removal_by_magnitude_leaves_other_tensors_unchanged(tmp_path: Path) -> None:
    model = pico_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = coprune.prune(model, remove="channels=0.4", score="magnitude", **SETTINGS).model
    assert small is not None
    for name, tensor in small.state_dict().items():
        if "mlp." not in name:
            assert torch.equal(tensor, before[name])
    for block in range(3):
        up, gate, down = (f"model.layers.{block}.mlp.{part}_proj.weight" for part in ("up", "gate", "down"))
        kept = before[down].square().sum(dim=0).argsort(descending=True, stable=True)[:64].sort().values
        assert torch.equal(small.state_dict()[down], before[down][:, kept])
        assert torch.equal(small.state_dict()[up], before[up][kept])
        assert torch.equal(small.state_dict()[gate], before[gate][kept])


def test_logits_in_float32_that_are_hundredths_apart_refuse_a_cut() -> None:
    logits, noise = torch.randn(2, 1, 50, 300, generator=torch.Generator().manual_seed(0))
    assert not alike(logits + 0.04 * noise, logits)


@pytest.mark.parametrize("remove", ["heads=0.5", "channels=0.4"])
def test_rounding_that_grows_over_many_blocks_refuses_no_cut(remove: str) -> None:
    """In bfloat16 the logits of this model and of the same with fewer zeros are a tenth apart."""
    model = pico_model("llama", num_hidden_layers=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim >= 2 else 1)
    before = model.bfloat16().num_parameters()
    smaller = coprune.prune(model, remove=remove, **SETTINGS).model
    assert smaller.num_parameters() < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_configuration_that_only_fits_the_shapes_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four heads of 16 leave the shapes of four heads of 8."""
    monkeypatch.setattr(rehearsal, "possible_changes", lambda *_: [{"head_dim": 8}])
    with pytest.raises(UnsupportedModel, match="computes other outputs"):
        coprune.prune(pico_model("llama", dtype=dtype), remove="heads=0.5", **SETTINGS)


def test_blocks_of_least_influence_are_removed() -> None:
    model = pico_model("llama")
    influence: dict[int, float] = {}

    def look(index: int, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        influence[index] = 1 - float(torch.cosine_similarity(args[0], output, dim=-1).mean())

    blocks = model.get_submodule("model.layers")
    hooks = [block.register_forward_hook(partial(look, i)) for i, block in enumerate(blocks.children())]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    ups = [model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight").clone() for i in range(3)]
    small = coprune.prune(model, remove="blocks=0.34", score="influence", **SETTINGS).model
    assert small is not None
    left = [small.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2)]
    gone = min(influence, key=influence.__getitem__)
    expected = [up for i, up in enumerate(ups) if i != gone]
    assert all(torch.equal(a, b) for a, b in zip(left, expected, strict=True))


@pytest.mark.parametrize(
    ("score", "remove"),
    [
        ("influence", "blocks=0.34"),
        pytest.param("influence", "blocks=0.67", marks=pytest.mark.slow),
        pytest.param("kl:tokens=64", "blocks=0.34", marks=pytest.mark.slow),
        pytest.param("kl:tokens=64", "blocks=0.67", marks=pytest.mark.slow),
    ],
)
def test_a_block_whose_matrices_are_excluded_is_not_removed(remove: str, score: str) -> None:
    """Each block is tried, since each may be the first to go."""
    for stays in range(3):
        model = pico_model("llama")
        up = model.get_parameter(f"model.layers.{stays}.mlp.up_proj.weight").clone()
        asked: dict[str, Any] = {"remove": remove, "score": score, "exclude": f"model.layers.{stays}.*"}
        small = coprune.prune(model, **asked, **SETTINGS).model
        assert small is not None
        assert any(torch.equal(tensor, up) for tensor in small.state_dict().values())


def test_a_list_of_end_tokens_is_not_taken_for_a_list_per_block() -> None:
    """There are three of both."""
    model = pico_model("llama", eos_token_id=[2, 5, 7], other_tokens=[1, 3, 4])
    made: Any = coprune.prune(model, remove="blocks=0.34", **SETTINGS).model
    assert (made.config.num_hidden_layers, made.config.other_tokens) == (2, [1, 3, 4])
    assert made.config.eos_token_id == made.generation_config.eos_token_id == [2, 5, 7]


@pytest.mark.parametrize("done", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bytes(done: int, tmp_path: Path) -> None:
    save_pico(tmp_path / "llama", num_hidden_layers=4)
    write_words(tmp_path / "words.txt")

    def run(out: str) -> None:
        settings = {"remove": "channels=0.4,heads=0.5,blocks=0.25", "align": 16, "nsamples": 4, "seqlen": 16}
        settings |= {"reconstruct": 4}
        places = {"save": str(tmp_path / out / "run"), "save_model": str(tmp_path / out / "small")}
        data = {"model": str(tmp_path / "llama"), "dataset": str(tmp_path / "words.txt"), "evaluate": False}
        run_recipe(make_recipe(settings | places | data), reporter=Reporter(quiet=True))

    def finished() -> list[Path]:
        return [*(tmp_path / "killed" / ".small.partial").glob("model-*.json")]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # children are forked, where pools of threads do not follow
    run("whole")
    assert killed_when(lambda: run("killed"), lambda: len(finished()) >= done, ("run/output", "writer", "walk"))
    assert finished()
    assert not (tmp_path / "killed" / "small").exists()
    run("killed")
    torch.set_num_threads(threads)
    whole, found = listing(tmp_path / "whole" / "small"), listing(tmp_path / "killed" / "small")
    assert whole.pop("README.md") is not None  # names the folders
    assert found.pop("README.md") is not None
    assert found == whole


@pytest.mark.parametrize(
    ("family", "remove", "message"),
    [
        (
            "olmo2",
            "heads=0.5",
            r"q_proj are read by q_norm over all heads together, .* remove channels or blocks instead",
        ),
        (
            "gpt2",
            "heads=0.5",
            "the configuration of GPT2LMHeadModel has no head width; .* try to remove channels or blocks",
        ),  # all heads together must have the model's width
        ("mamba", "channels=0.4", "no channels .* remove blocks instead"),
        (
            "bloom",
            "channels=0.4",
            "no setting of the configuration of BloomForCausalLM",
        ),  # fixed at four times the width
    ],
)
def test_impossible_cuts_are_refused_and_leave_the_model_unchanged(family: str, remove: str, message: str) -> None:
    model = pico_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=message):
        coprune.prune(model, remove=remove, **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "remove"),
    [("gpt2", "heads=0.5,blocks=0.34"), ("rwkv", "blocks=0.34"), ("llama", "experts=0.5,blocks=0.34")],
)
def test_removal_is_refused_before_anything_slow(
    family: str, remove: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> Any:
        raise AssertionError("this takes hours")

    monkeypatch.setitem(run_stages.STAGES, Phase.MEASURE_DENSE, (slow,))
    monkeypatch.setattr(removal_plan, "blocks_that_go", slow)
    with pytest.raises(UnsupportedModel):
        coprune.prune(pico_model(family), remove=remove, save=tmp_path / "run", **SETTINGS)
    assert not [*(tmp_path / "run").glob("*")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": "chanels=0.3"}, "did you mean 'channels'"),
        ({"remove": "channels=1.5"}, "a number between 0 and 1, not '1.5'"),
        ({"remove": "channels"}, "not ''"),
        ({"remove": ["channels=0.3", "channels=0.2"]}, "given twice"),
        ({"remove": "blocks=0.01"}, "0.01 of 3 blocks is 0"),
        ({"remove": "blocks=0.67", "include": "*.1.*"}, "2 of 3 blocks cannot be removed, since 2 are excluded"),
        ({"remove": "channels=0.4", "align": 97}, "have 96 channels at most, .* multiples of 97; give 32 or less"),
        ({"remove": "channels=0.01"}, "0.01 of 96 channels rounds to none"),
        ({"remove": "heads=0.1,channels=0.4"}, "0.1 of 2 heads rounds to none"),
        ({"remove": "heads=0.5", "score": "best"}, "unknown score 'best'"),
        ({"remove": "heads=0.5", "score": "obs:luck=3"}, "option of score 'obs': 'luck'"),
        ({"remove": "heads=0.5", "permute": True}, "permute reorders channels"),
        ({"remove": "heads=0.5", "refine": "refit"}, "so refine=… has no effect"),
    ],
)
def test_invalid_removals_are_refused_before_anything_starts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        coprune.prune(pico_model("llama"), **SETTINGS | settings)


@pytest.mark.parametrize(
    ("family", "remove", "settings"),
    [
        ("llama", "channels=0.33", {"exclude": "model.layers.1.*"}),
        ("llama", "heads=0.5,channels=0.33", {"include": "*.mlp.*"}),
        ("mixtral", "experts=0.5", {"exclude": "*.1.mlp.experts.*"}),
    ],
)
def test_parts_spared_by_include_and_exclude_are_refused(family: str, remove: str, settings: dict[str, Any]) -> None:
    with pytest.raises(
        BadInput, match=r"removed from all blocks alike, but matrices of model\.layers\.[01] are excluded"
    ):
        coprune.prune(pico_model(family), remove=remove, **SETTINGS, **settings)
