"""`coprune inspect --plot`: one matrix before pruning, as a picture of its magnitudes, input norms and Wanda scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.files import require_file, write_bytes
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.evaluation.tasks import task_for
from coprune.model.blocks import find_blocks
from coprune.model.loaded_model import open_model
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.recording import Dense
from coprune.model.walk.walk import Walk
from coprune.pruning.distributions import TITLES, Distributions, distributions_of
from coprune.recipe.recipe import Recipe
from coprune.run.calibrating import counted_batches, record_counted
from coprune.stages.checks import check_widths, prepare_solver

_KEPT, _PRUNED = "#4c78a8", "#e4793c"


def plot_matrix(recipe: Recipe, name: str, path: Path, reporter: Reporter) -> None:
    """Plot a matrix of the dense model, and what Wanda would prune of it, as PNG or SVG.

    recipe: model, calibration data, pattern and sparsity; name: of the matrix, or a pattern that matches only it; path:
    ends in .png or .svg. Raises BadInput, also if the extra `report` is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise BadInput(f"a plot is a .png or .svg file, not {path.name}", field="output", value=path)
    require_file(path, "output")
    try:
        import vl_convert
    except ImportError as error:
        raise BadInput("plots need altair and vl-convert", field="plot", fix="pip install 'coprune[report]'") from error
    with reporter.libraries():
        spec = plot_spec(name, matrix_distributions(recipe, name, reporter))
    picture = (
        vl_convert.vegalite_to_svg(spec).encode()
        if path.suffix == ".svg"
        else vl_convert.vegalite_to_png(spec, scale=2)
    )
    write_bytes(path, picture)


def matrix_distributions(recipe: Recipe, name: str, reporter: Reporter) -> Distributions:
    """Walk over the dense model up to a matrix and count its distributions. Raises BadInput unless exactly one matches."""
    solver, target = prepare_solver(recipe.replaced(method="wanda", options={}))
    loaded = open_model(recipe.model, stream=True)
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, (name,), ())
    matching = [matrix.name for matrix in chosen.all()]
    if len(matching) != 1:
        raise BadInput(
            f"{name} matches {len(matching)} matrices ({', '.join(matching[:3])} …)",
            field="plot",
            value=name,
            fix="name one to plot it",
        )
    check_widths(chosen.all(), target)
    task = task_for(recipe, loaded)
    samples = task.inputs.calibration(True, reporter)
    assert samples is not None  # Wanda needs data
    model = prove_replay(FoundModel(loaded.weights, blocks, chosen), task.inputs.probe(samples, {}))
    with reporter.bar(f"Walking to {name}", len(blocks)) as advance:
        recording = record_counted(model, counted_batches(task, recipe, samples))
        for event in Walk(model, recording, solver.statistic, Dense(), advance=advance):
            if isinstance(event, MatricesReady) and event.inputs is not None and event.inputs.statistic is not None:
                weight = event.matrices[0].read()
                keep = solver.solve(weight, event.inputs, target).weight != 0
                return distributions_of(weight, keep, event.inputs.statistic.root_mean_square)
    cause = f"no calibration token reached {name}, so there is nothing to plot"
    raise BadInput(cause, field="plot", value=name, fix=("use more samples with ", Setting("nsamples")))


def plot_spec(name: str, found: Distributions) -> dict[str, Any]:
    """Return the three histograms side by side, as one Vega-Lite specification."""
    panels = []
    for kind, title in TITLES.items():
        histogram = getattr(found, kind)
        if histogram is None:
            continue
        width = (histogram.high - histogram.low) / len(histogram.kept)
        rows = [
            {"what": what, "count": count, "start": histogram.low + i * width, "end": histogram.low + (i + 1) * width}
            for what, counts in (("kept", histogram.kept), ("pruned", histogram.pruned))
            for i, count in enumerate(counts)
        ]
        panels.append(_bins(title, split=kind != "norm") | {"width": 300, "height": 200, "data": {"values": rows}})
    schema = panels[0].get("$schema") if panels else None
    hconcat = [{key: value for key, value in panel.items() if key != "$schema"} for panel in panels]
    return {"$schema": schema, "title": name, "background": "white", "hconcat": hconcat}


def _bins(title: str, split: bool = True) -> dict[str, Any]:
    """Return bars over log₁₀. split: whether the values include pruned ones, which need a legend."""
    import altair as alt

    chart = (
        alt.Chart(alt.NamedData("bins"))
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("start:Q", bin=alt.BinParams(binned=True), title=title, axis=alt.Axis(tickCount=6)),
            x2="end:Q",
            y=alt.Y("count:Q", title=None, stack="zero", axis=alt.Axis(tickCount=4, format="~s")),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["kept", "pruned"], range=[_KEPT, _PRUNED]),
                legend=alt.Legend(orient="top") if split else None,
            ),
            order=alt.Order("what:N", sort="descending"),
        )
    )
    spec: dict[str, Any] = chart.to_dict(validate=True)
    spec.pop("config", None)
    return spec
