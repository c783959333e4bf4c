"""State spaces, recurrences and convolutions beside attention: every linear layer is pruned, and everything else named."""

import itertools

import pytest
import torch

from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_walk
from coprune.recipe.pattern import NM, Target, parse_pattern
from support.pico import pico_model, pico_tokens
from support.pico_hybrids import HYBRIDS
from support.sample import sampled
from support.walking import make_walk, masks, prune_with_full_forwards, prune_with_walk, wanda_as_published
from support.whole_forwards import prune_by_whole_forwards

TARGETS = {"50%": Target(parse_pattern("unstructured"), 0.5), "2:4": Target(NM(2, 4), 0.5)}
ALIKE = ("qwen3_5_moe_text", "recurrent_gemma", "lfm2_moe", "granitemoehybrid", "bamba", "mamba2")
BATCHES = pico_tokens(12, 32).split(4)
NO_LAYER = "the weight of no linear layer"
STACK = "three dimensions, and none of its matrices is multiplied"
MIXES = [
    f"{part}.time_mix_{which}"
    for part, whiches in {"attention": ("key", "value", "receptance"), "feed_forward": ("key", "receptance")}.items()
    for which in whiches
]

# Other layers of the blocks: (name within the block, reason, number of layers).
LEFT_ALONE = {
    "mamba": [("mixer.A_log", NO_LAYER, 2), ("mixer.conv1d", "depth-wise", 2)],
    "mamba2": [("mixer.conv1d", "depth-wise", 2)],
    "falcon_h1": [("mamba.conv1d", "depth-wise", 2)],
    "jamba": [
        ("mamba.A_log", NO_LAYER, 2),
        ("mamba.conv1d", "depth-wise", 2),
        ("feed_forward.router", "a router", 1),
    ],
    "bamba": [("mamba.conv1d", "depth-wise", 1)],
    "granitemoehybrid": [("mamba.conv1d", "depth-wise", 1), ("block_sparse_moe.router", "a router", 2)],
    "nemotron_h": [("mixer.conv1d", "depth-wise", 1), ("mixer.gate", "a router", 1)],
    "qwen3_next": [
        ("linear_attn.conv1d", "depth-wise", 1),
        ("mlp.gate", "a router", 2),
        ("mlp.shared_expert_gate", "a router", 2),
    ],
    "qwen3_5_text": [("linear_attn.conv1d", "depth-wise", 1)],
    "qwen3_5_moe_text": [
        ("linear_attn.conv1d", "depth-wise", 1),
        ("mlp.gate", "a router", 2),
        ("mlp.shared_expert_gate", "a router", 2),
    ],
    "lfm2": [("conv.conv", "depth-wise", 1)],
    "lfm2_moe": [("conv.conv", "depth-wise", 2), ("feed_forward.gate", "a router", 2)],
    "rwkv": [(name, "a vector", 2) for name in MIXES],
    "recurrent_gemma": [
        ("temporal_block.rg_lru.input_gate_weight[*]", STACK, 2),
        ("temporal_block.rg_lru.recurrent_gate_weight[*]", STACK, 2),
        ("temporal_block.conv_1d", "depth-wise", 2),
    ],
    "dbrx": [("ffn.router.layer", "a router", 2)],
    "xlnet": [("rel_attn.o", "multiplied along its outputs", 2), ("rel_attn.seg_embed[*]", STACK, 2)],
}
WITHOUT_EXPERTS = [name for name in HYBRIDS if not any("a router" in entry for entry in LEFT_ALONE[name])]


@pytest.mark.parametrize(
    ("family", "target"),
    sampled(
        itertools.product(HYBRIDS, TARGETS),
        # Other families have the same kinds of blocks.
        quick=[(family, [*TARGETS][number % 2]) for number, family in enumerate(HYBRIDS) if family not in ALIKE],
    ),
)
def test_masks_of_classifiers_match_full_forwards(family: str, target: str) -> None:
    model, dense = pico_model(family), pico_model(family).state_dict()
    walk = make_walk(model, BATCHES)
    chosen, block = walk.model.chosen, walk.model.blocks[0].name.replace(".0", ".*")
    assert sorted((layers.kind, layers.why, layers.layers) for layers in chosen.left_out) == sorted(
        (f"{block}.{name}", why, layers) for name, why, layers in LEFT_ALONE[family]
    )
    results = prune_walk(walk, Solver(METHODS["wanda"]), lambda matrix: TARGETS[target])
    alone = {layers.kind for layers in chosen.left_out}
    expected = prune_by_whole_forwards(pico_model(family), BATCHES, TARGETS[target], alone)
    found = {matrix.name: matrix.read() != 0 for matrix in chosen.all()}
    assert {result.name for result in results} == found.keys() == expected.keys()
    different = sum(int((found[name] != mask).sum()) for name, mask in expected.items())
    assert different <= 1e-4 * sum(mask.numel() for mask in expected.values())
    for name, mask in found.items():
        per_row = mask.unflatten(1, (-1, 4)) if target == "2:4" else mask
        assert bool((per_row.sum(dim=-1) * 2 == per_row.shape[-1]).all()), name
    # Everything but the chosen matrices is unchanged.
    changed = {matrix.parameter for matrix in chosen.all()}
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items() if name not in changed)


@pytest.mark.parametrize(
    "family",
    sampled([one for one in WITHOUT_EXPERTS if one not in ("mamba", "xlnet")], quick=["mamba2", "bamba", "rwkv"]),
)
def test_wanda_masks_of_hybrids_match_full_forwards(family: str) -> None:
    model, oracle = pico_model(family), pico_model(family)
    prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TARGETS["2:4"], "sequential")
    prune_with_full_forwards(oracle, BATCHES, wanda_as_published(TARGETS["2:4"]), "sequential")
    found, expected = masks(model), masks(oracle)
    different = sum(int((found[name] != mask).sum()) for name, mask in expected.items())
    assert different <= 1e-3 * sum(mask.numel() for mask in expected.values())
