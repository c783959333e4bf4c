"""The model card of a pruned checkpoint."""

from __future__ import annotations

from coprune.report.schema import Report

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OR ID OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OR ID OF THIS FOLDER")
```"""


def model_card(report: Report) -> str:
    """Markdown with the Hub's metadata header: what this is, how it was made, what was measured, how to load it."""
    base = report.model.source.partition(" ")[0]
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- coprune", "- pruning"]
    header += [f"base_model: {base}"] if base.count("/") == 1 and not base.startswith((".", "/")) else []
    note = (
        "The weights were dequantised from a quantised file before they were pruned; all figures are of those.\n\n"
        if report.model.quantised_source
        else ""
    )
    rows = "\n".join(
        f"| {p.data} | {p.seqlen} | {'not measured' if p.dense is None else f'{p.dense:.2f}'} | {p.pruned:.2f} |"
        for p in report.perplexity
    )
    results = (
        f"| text | sequence length | dense | pruned |\n| --- | --- | --- | --- |\n{rows}" if rows else "Not measured."
    )
    calibration = report.calibration
    data = (
        "No calibration data was used."
        if calibration is None
        else f"Calibrated on {calibration.nsamples} samples of {calibration.seqlen} tokens of {calibration.source} "
        f"(seed {calibration.seed}, fingerprint `{calibration.fingerprint}`)."
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(header) + (
        f"\n---\n\n# {base}, pruned with {report.recipe.method}\n\n"
        f"{report.sparsity.matrices:.2%} of the weights in {len(report.matrices)} matrices are zero "
        f"({report.recipe.pattern}), {report.sparsity.model:.2%} of all parameters. The weights are stored dense, so any "
        f"tool that loads the original loads this.\n\n{note}## Perplexity\n\n{results}\n\n## How it was made\n\n{data}\n\n"
        f"Made with {versions}. The recipe, which `coprune prune --recipe` repeats:\n\n```yaml\n"
        f"{report.recipe.to_yaml()}```\n\n## Load\n\n{_LOAD}\n"
    )
