"""The demonstration: a real model, real text, one method, what it did; no network but for the packages."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.preparation import open_model
from coprune.progress import Reporter
from coprune.recipe import Recipe
from coprune.report.summary import summary_lines
from coprune.run import run_recipe

_PROMPT = "The city of Paris is"
_NEW_TOKENS = 40


def run_demo(nsamples: int, reporter: Reporter) -> list[str]:
    """Prune SmolLM2-135M to 50 % with Wanda in memory and return the lines to print."""
    recipe = Recipe(
        model="smollm2-135m", dataset="embedded", nsamples=nsamples, seqlen=512, eval_tokens=32 * 512, stream=False
    )
    loaded = open_model(recipe, stream=False)
    assert loaded.tokenizer is not None
    before = _continue(loaded.model, loaded.tokenizer)
    result = run_recipe(recipe, loaded, reporter, write=False)
    after = _continue(loaded.model, loaded.tokenizer)
    return [
        *summary_lines(result.report),
        "",
        "The model's weights come from a 4-bit file and were dequantised before pruning.",
        f"dense:  {before}",
        f"pruned: {after}",
    ]


@torch.inference_mode()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt with its likeliest continuation, on one line."""
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return " ".join(str(tokenizer.decode(tokens[0], skip_special_tokens=True)).split())
