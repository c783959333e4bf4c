"""Expert scores match full forwards, are stored with a run, and can be blended again without a pass."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.data.conversations import read_conversations
from coprune.data.mixture import packed
from coprune.recipe.recipe import make_recipe
from coprune.removal.expert_calls import Routed
from coprune.removal.expert_scores import ExpertSums
from coprune.run.phase_events import Phase
from coprune.stages import run_stages
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, write_words

IDS = torch.randint(60, (6, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"remove": "experts=0.25", "evaluate": False, "quiet": True}


def by_hand(family: str, tokens: Tensor, counted: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and mean gate · ‖answer‖₂ of every expert, block by block, from full forwards.

    counted: mask of the counted tokens, in their shape; None for all.
    """
    own = torch.ones(tokens.numel(), dtype=torch.bool) if counted is None else counted.flatten()
    model = pico_model(family)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    names = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: calls.append(args))
    found = []
    with torch.no_grad():
        model(tokens, use_cache=False)
    for name, (hidden, index, gates) in zip(names, calls, strict=True):
        experts: Any = model.get_submodule(name)
        total, count = torch.zeros(experts.num_experts), torch.zeros(experts.num_experts)
        for token in own.nonzero().flatten().tolist():
            chosen, weights = index[token], gates[token]
            for expert, gate in zip(chosen.tolist(), weights.tolist(), strict=True):
                up_gate, up = F.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2)
                answer = F.linear(F.silu(up_gate) * up, experts.down_proj[expert])
                total[expert] += gate * answer.norm()
                count[expert] += 1
        found.append((count, total / count))
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_reap_matches_its_formula_on_full_forwards(family: str, tmp_path: Path) -> None:
    coprune.prune(pico_model(family), dataset=IDS, save=tmp_path / "run", **SETTINGS)
    kept = json.loads((tmp_path / "run" / "experts.json").read_text())["sums"]["calibration"]
    for sums, (count, mean) in zip(kept.values(), by_hand(family, IDS), strict=True):
        tokens, weighted = (torch.tensor(sums[part]) for part in ("tokens", "weighted"))
        assert torch.equal(tokens, count)
        torch.testing.assert_close(weighted / tokens, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_can_be_scored_on_generated_tokens_only(family: str, tmp_path: Path) -> None:
    """Also if generated tokens are at different places in every sample, and one domain's samples are shorter."""
    rows = [{"prompt_ids": row[:9], "answer_ids": row[9:]} for row in (IDS + 4).tolist()]
    for name, own in (("long", rows), ("short", rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    data = {"long": f"{tmp_path / 'long.jsonl'}:seqlen=24", "short": f"{tmp_path / 'short.jsonl'}:seqlen=15"}
    asked = SETTINGS | {"processor": pico_tokenizer(), "nsamples": 6, "seqlen": 20, "calibrate_on": "generated"}
    coprune.prune(pico_model(family), domains=data, save=tmp_path / "run", **asked)
    for name, length in (("long", 24), ("short", 15)):
        windows = packed(read_conversations(str(tmp_path / f"{name}.jsonl"), pico_tokenizer()), 6, length, 0, name)
        assert windows.generated is not None
        kept = json.loads((tmp_path / "run" / "experts.json").read_text())["sums"][name]
        expected = by_hand(family, windows.tokens, windows.generated)
        for sums, (count, mean) in zip(kept.values(), expected, strict=True):
            tokens, weighted = (torch.tensor(sums[part]) for part in ("tokens", "weighted"))
            assert torch.equal(tokens, count)
            torch.testing.assert_close(weighted, (mean * count).nan_to_num(), rtol=1e-4, atol=1e-6)
    other = Routed(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(3, 1, 2))
    with pytest.raises(UnsupportedModel, match="a mixture routes 3 rows of 4 tokens"):
        ExpertSums.empty(2).update(other, torch.ones(2, 2) > 0)


def test_domains_are_scored_in_one_pass_and_blended_again_without_one(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_words(tmp_path / f"{name}.txt", seed=seed)
    asked = SETTINGS | {"processor": pico_tokenizer(), "nsamples": 2, "seqlen": 16}
    texts = {name: tmp_path / f"{name}.txt" for name in ("a", "b")}

    def run(out: str, **settings: Any) -> Any:
        return coprune.prune(pico_model("mixtral", num_hidden_layers=1), save=tmp_path / out, **asked, **settings)

    both = run("both", domains=texts)
    kept = both.report.covered
    assert set(kept) == {"a", "b"}
    assert all(0.5 < share < 1 for share in kept.values())
    assert "a 8" in str(dict(both.report.sheet().rows)["kept"]) or "a 7" in dict(both.report.sheet().rows)["kept"]
    again = run("again", domains=str(tmp_path / "both" / "experts.json"))
    assert again.report.covered == kept
    assert again.report.calibration is None
    for name, other in (("a", "b"), ("b", "a")):
        alone = run(f"alone-{name}", domains={name: texts[name]})
        blended = run(f"all-{name}", domains=str(tmp_path / "both" / "experts.json"), blend=f"{name}=1,{other}=0")
        assert blended.report.covered[name] == alone.report.covered[name] >= kept[name]
        assert blended.report.covered[other] <= kept[other] + 1e-12
        for one, two in zip(alone.model.parameters(), blended.model.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(BadInput, match="scores of another model"):
        coprune.prune(pico_model("olmoe"), domains=str(tmp_path / "both" / "experts.json"), **asked)


def test_scores_that_lack_a_mixture_are_refused_before_the_dense_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that also removed a block lacks the scores of its experts."""
    asked = SETTINGS | {"dataset": IDS}
    file, model = tmp_path / "run" / "experts.json", partial(pico_model, "mixtral")
    both = {"remove": "experts=0.25,blocks=0.34", "score": "influence"}
    coprune.prune(model(), save=tmp_path / "run", **asked | both)

    def slow(*_: Any) -> Any:
        raise AssertionError("this takes hours")

    monkeypatch.setitem(run_stages.STAGES, Phase.MEASURE_DENSE, (slow,))
    left = {"remove": "experts=0.25", "domains": str(file)}
    with pytest.raises(BadInput, match=r"experts.json holds no scores of the experts in model.layers.\d"):
        coprune.prune(model(), **asked | left)
    content = json.loads(file.read_text())
    content["sums"]["calibration"] |= {f"model.layers.{i}": {"tokens": [1.0], "weighted": [1.0]} for i in range(3)}
    file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"holds no scores of the experts in model.layers.0"):
        coprune.prune(model(), **asked | left)
    with pytest.raises(BadInput, match="cannot be read"):
        coprune.prune(model(), **asked | {"domains": str(tmp_path / "nothing.json")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": "code"}, "'code' lacks the name of a domain"),
        ({"domains": ["a=x", "a=y"]}, "the domain a is given twice"),
        ({"domains": "a=x,b=y", "blend": "a=1"}, "blend must give a weight for each domain"),
        ({"domains": "a=x,b=y", "blend": "a=0,b=0"}, "all weights of the domains are zero"),
        ({"domains": "a=x", "blend": "mean"}, "'mean' is not a domain's weight"),
        ({"domains": "a=x", "remove": "heads=0.5"}, "domains are only for scoring experts"),
    ],
)
def test_invalid_expert_settings_are_refused_before_anything_starts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_recipe({"model": "x", "remove": "experts=0.25"} | settings)
