"""The few lines that a run prints when it is done."""

from __future__ import annotations

from coprune.report.schema import Report


def summary_lines(report: Report) -> list[str]:
    """What was pruned, how sparse it is, what that did to perplexity, and what it took."""
    recipe = report.recipe
    lines = [
        f"model     {report.model.source}, {report.model.parameters:,} parameters, {report.model.dtype}",
        f"method    {recipe.method.name}, {recipe.pattern.name}, {recipe.calibration.propagation} propagation",
        f"sparsity  {report.sparsity.matrices:.4%} of the {len(report.matrices)} pruned matrices, "
        f"{report.sparsity.model:.2%} of all parameters",
    ]
    for entry in report.perplexity:
        dense = "" if entry.dense is None else f"dense {entry.dense:.2f} → "
        lines.append(f"perplexity {dense}pruned {entry.pruned:.2f} on {entry.data} (sequence length {entry.seqlen})")
    for images in report.accuracy:
        before = "" if images.dense_top1 is None else f"dense {images.dense_top1:.2%} → "
        low, high = images.pruned_top1_interval
        lines.append(
            f"accuracy  {before}pruned {images.pruned_top1:.2%} [{low:.2%}, {high:.2%}] top-1, {images.pruned_top5:.2%} "
            f"top-5 on {images.data} ({images.images} images)"
        )
    lines += [f"removed   {line}" for line in report.edits]
    lines += [f"left      {layer}" for layer in report.left_out]
    lines.append(
        f"took      {report.prune_seconds:.1f} s to prune, {report.total_seconds:.1f} s in all, "
        f"peak memory {report.peak_memory_bytes / 2**30:.2f} GiB"
    )
    if report.events:
        lines.append(f"events    {len(report.events)} numerical events, the first: {report.events[0]}")
    if report.saved_model is not None:
        lines.append(f"model in  {report.saved_model} (reloaded and compared)")
    return lines
