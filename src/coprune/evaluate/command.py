"""`coprune eval`: perplexity of any model that can be loaded."""

from __future__ import annotations

from coprune.errors import BadInput
from coprune.evaluate.perplexity import perplexity
from coprune.preparation import choose_seqlen, open_model, read_evaluation
from coprune.progress import Reporter
from coprune.recipe import Recipe


def evaluate_model(recipe: Recipe, reporter: Reporter) -> list[str]:
    """Measure the perplexity on every text of the recipe's eval_data; one line each. Raises BadInput."""
    if not recipe.eval_data:
        raise BadInput("no text is named; for example --data embedded or --data wikitext2,path/to/text.txt.")
    loaded = open_model(recipe, stream=False)
    seqlen = choose_seqlen(loaded.model, recipe)
    lines = []
    for name, text in read_evaluation(recipe, loaded, seqlen, reporter).items():
        with reporter.bar(f"Perplexity on {name}", len(text.tokens) // seqlen) as advance:
            found = perplexity(loaded.model, text.tokens, seqlen, recipe.batch_size, text.token_bytes, advance)
        low, high = found.interval or (found.value, found.value)
        lines.append(
            f"perplexity {found.value:.4f} [{low:.2f}, {high:.2f}], {found.bits_per_byte:.4f} bits per byte on {name} "
            f"({found.windows} windows, sequence length {seqlen})"
        )
    return lines
